"""Published models as options of training runs, and the results of training them again.

The numbers are log-likelihoods of test images in nats per image: importance-weighted bounds with 5,000 samples, unless
the source says otherwise. All recipes but ``static_flow`` and ``caltech_conv`` use the protocol of Tomczak and Welling
2018, arXiv 1705.07120: images binarized anew at every access, 50,000 / 10,000 / 10,000 of them, and one draw of the
test set. For MNIST it is their draw, even if the source of a number has another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.options import Options
from ppl_vae.runs.results import read_rows


@dataclass(frozen=True)
class Published:
    """A number that is in print."""

    log_likelihood: float  # nats per image
    stderr: float | None  # the error that is printed with it
    source: str  # the model in a few words, and where it is published


@dataclass(frozen=True)
class Budget:
    """The epochs of a reproduction: the share of the recipe's, and the epochs of each stage, there and here."""

    share: float
    epochs: tuple[int, ...]
    recipe_epochs: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationProtocol:
    """The images and particles of a reproduction's log p(x)."""

    dataset: str
    protocol: str
    binarization: str
    split: str
    num_images: int
    num_particles: int


@dataclass(frozen=True)
class ValidationCurve:
    """How the validation curve of each training stage ended. Nats per image.

    The gains are those of the last tenth of each stage's epochs over the best epoch before, by the validation ELBO, or
    by the bound L_S where that chooses the weights. None for a stage of one epoch.
    """

    last_tenth_gains: tuple[float | None, ...]


@dataclass(frozen=True)
class StageSeconds:
    """The time of each training stage, and of the evaluation."""

    training: tuple[float, ...]
    evaluation: float


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A published model that was trained again: a row of the file of reproductions. Nats per image."""

    recipe: str
    model: str
    published: tuple[Published, ...]  # the numbers in print that it is compared with
    seed: int
    budget: Budget
    precision: str
    options: tuple[JsonObject, ...]  # of each stage, without places on a machine
    ours: Estimate  # log p(x), the importance-weighted bound L_S
    elbo: Estimate
    kl: Estimate
    rise: float
    protocol: EvaluationProtocol
    weights: int
    validation: ValidationCurve
    seconds: StageSeconds
    command: str  # the command line that makes the row again
    commits: tuple[str, ...]  # of the code that took part
    environment: JsonObject  # of the last stage


def read_reproductions(path: Path) -> list[Reproduction]:
    """The rows of a file of reproductions; none if there is no file. Raises ValueError for a damaged one."""
    return read_rows(path, "rows", Reproduction)


class Recipe(NamedTuple):
    """A model and how it is trained."""

    model: str
    stages: tuple[Options, ...]  # each but the first starts from the weights of the one before
    published: tuple[Published, ...]  # numbers of the same model, or of the best of its kind
    particles: int = 5000  # S of the evaluation of every test image


_BURDA = "Burda et al. 2016, arXiv 1509.00519"
_NOROUZI = "Norouzi et al. 2020, arXiv 2004.04795"
_TOMCZAK = "Tomczak and Welling 2018, arXiv 1705.07120"
_SONDERBY = "Sønderby et al. 2016, arXiv 1602.02282"
_ROLFE = "Rolfe 2017, arXiv 1609.02200"
_XU = "Xu et al. 2019, arXiv 1905.13452"

_VAMPPRIOR = Published(-82.43, 0.06, f"VAE, VampPrior: {_NOROUZI}, dynamic MNIST")
_EXEMPLAR = Published(-82.09, 0.18, f"VAE, Exemplar prior: {_NOROUZI}, dynamic MNIST")
_REALNVP = Published(-78.61, None, f"convolutional VAE, RealNVP prior, S = 1,000: {_XU}, dynamic MNIST")
_CONV_EXEMPLAR = Published(-79.58, 0.07, f"convolutional HVAE, Exemplar prior: {_NOROUZI}, dynamic MNIST")
_REALNVP_STATIC = Published(-80.09, None, f"convolutional VAE, RealNVP prior, S = 1,000: {_XU}, static MNIST")

# What the recipes have in common: a gradient without the guide's score, hidden layers that start wide, a rate that is
# flat for half of the steps, an average of the weights, and no step with a gradient that is astronomical.
_COMMON = Options(
    prior="standard-normal",
    objective="stl",
    initialization="wide",
    batch_size=100,
    learning_rate=2e-3,
    schedule="cosine",
    decay_start=0.5,
    warmup_epochs=20,
    average_decay=0.9998,
    skip_norm=1000.0,
)
# Tomczak and Welling: a rate of 5e-4 throughout, 2,000 epochs at most and no more than 50 without a better validation
# ELBO, a warm-up of 100, each tensor's gradient divided by its norm, He's start, and no average of the weights.
_GATED = replace(_COMMON, network="gated", hidden=(300, 300), latent_dim=40, epochs=300)
# At 2e-3 the guide of N(0, I) failed for single images after 270 epochs, and after 160 where steps with a large
# gradient were left out, because such images are then never learned.
_FASHION = replace(_GATED, dataset="fashion-mnist", skip_norm=None, learning_rate=1e-3, decay_start=0.25)

_CONV = replace(
    _COMMON,
    network="gated-conv",
    channels=(32, 64),
    hidden=(256,),
    latent_dim=40,
    prior="flow",
    prior_layers=20,
    epochs=120,
)


def _finished_by_dreg(first: Options, *, epochs: int = 30) -> tuple[Options, Options]:
    """A training, and some epochs more on the bound of eight particles."""
    finish = replace(
        first, objective="dreg", num_particles=8, epochs=epochs, learning_rate=2e-4, decay_start=0.0, warmup_epochs=0
    )
    return first, finish


# Burda et al.: 60,000 images in batches of 20 for 3,280 epochs, from 1e-3 in eight stages, the last weights, Adam's
# epsilon 1e-4, one k throughout, and another draw of the test set.
_BURDA_FIRST = replace(
    _COMMON, network="tanh", hidden=(200, 200), latent_dim=50, initialization="shrinking", epochs=1000
)
_BURDA_SECOND = replace(
    _BURDA_FIRST, objective="dreg", num_particles=16, epochs=300, learning_rate=1e-3, decay_start=0.0, warmup_epochs=0
)
_LADDER = _finished_by_dreg(
    replace(_GATED, upper_latents=(40,), upper_hidden=(300, 300), decoder_input="all", prior="flow")
)

RECIPES = {
    # Burda et al., Table 1, one stochastic layer, k = 1.
    "iwae_vae_1": Recipe(
        "one layer of 50 latents, two tanh layers of 200 each way, k = 1",
        (_BURDA_FIRST,),
        (Published(-86.76, None, f"VAE, k = 1: {_BURDA}, Table 1"),),
    ),
    # The same table, k = 5 and 50, held against L_16; the gradient is that of Tucker et al. 2019, arXiv 1810.04152.
    "iwae_1": Recipe(
        "one layer of 50 latents, two tanh layers of 200 each way, k = 16",
        (_BURDA_FIRST, _BURDA_SECOND),
        (
            Published(-85.54, None, f"IWAE, k = 5: {_BURDA}, Table 1"),
            Published(-84.78, None, f"IWAE, k = 50: {_BURDA}, Table 1"),
        ),
    ),
    # Norouzi et al., density estimation on dynamic MNIST: VAE, Gaussian prior.
    "vae_gaussian": Recipe(
        "one layer of 40 latents, N(0, I), two gated layers of 300 each way",
        (_GATED,),
        (Published(-84.45, 0.12, f"VAE, Gaussian prior: {_NOROUZI}, dynamic MNIST"),),
    ),
    # Ours, held against the priors of Norouzi et al. and a prior of the same kind behind convolutions. The gradient of
    # the first stage is that of Roeder et al. 2017, arXiv 1703.09194, of the second that of Tucker et al. 2019.
    "vae_flow": Recipe(
        "one layer of 40 latents, a flow prior of ten affine couplings, two gated layers of 300 each way",
        _finished_by_dreg(replace(_GATED, prior="flow")),
        (_VAMPPRIOR, _EXEMPLAR, _REALNVP),
    ),
    # Ours, held against a convolutional VAE with a prior of the same kind, and one with two layers of latents.
    "conv_flow": Recipe(
        "one layer of 40 latents, a flow prior of twenty affine couplings, gated convolutions of 32 and 64 channels",
        _finished_by_dreg(_CONV, epochs=10),
        (_REALNVP, _CONV_EXEMPLAR),
    ),
    # Ours: the widest of one latent layer here.
    "vae_flow_wide": Recipe(
        "one layer of 40 latents, a flow prior of ten affine couplings, two gated layers of 500 each way",
        _finished_by_dreg(replace(_GATED, hidden=(500, 500), prior="flow")),
        (_VAMPPRIOR, _EXEMPLAR, _REALNVP),
    ),
    # The guide of Sønderby et al., which weighs by precisions; the HVAE's does not. They have five layers of 64, 32,
    # 16, 8 and 4 latents, batch normalization, batches of 256 at 1e-3, a warm-up of 200, and another draw of the test
    # set. It ends with the importance-weighted bound's plain gradient: the doubly reparametrized one leaves out the
    # score of the prior's layer in the guide alone, which is large where that layer is narrow.
    "ladder": Recipe(
        "two layers of 40 latents, top-down, a flow prior on top, gated layers of 300",
        (_LADDER[0], replace(_LADDER[1], objective="iwae")),
        (
            Published(-81.22, 0.05, f"HVAE, Exemplar prior: {_NOROUZI}, dynamic MNIST"),
            Published(-81.20, None, f"ladder VAE, five layers, fine-tuned: {_SONDERBY}"),
        ),
    ),
    # Ours, held against Tomczak and Welling, Table 1, and a prior of the same kind behind convolutions.
    "static_flow": Recipe(
        "one layer of 40 latents, a flow prior of ten affine couplings, two gated layers of 300 each way, static MNIST",
        _finished_by_dreg(replace(_GATED, dataset="static-mnist", epochs=100, prior="flow")),
        (Published(-85.57, None, f"VAE, VampPrior: {_TOMCZAK}, Table 1"), _REALNVP_STATIC),
    ),
    # Ours, with dropout in the decoder, held against a dense model with a Boltzmann machine as its prior.
    "caltech_conv": Recipe(
        "one layer of 40 latents, a flow prior of ten couplings, gated convolutions, dropout, Caltech silhouettes",
        _finished_by_dreg(
            replace(
                _CONV, dataset="caltech-silhouettes", prior_layers=10, dropout=0.3, skip_norm=None, warmup_epochs=10
            ),
            epochs=10,
        ),
        (Published(-97.6, None, f"discrete VAE, RBM prior, S = 10,000: {_ROLFE}, Caltech silhouettes"),),
    ),
    # Norouzi et al., density estimation on Fashion-MNIST. They take a random 10,000 of the training images for
    # validation, here it is the last 10,000; both binarize the test images once, by other draws.
    "fashion_gaussian": Recipe(
        "one layer of 40 latents, N(0, I), two gated layers of 300 each way, Fashion-MNIST",
        (replace(_FASHION, epochs=400),),
        (Published(-228.70, 0.15, f"VAE, Gaussian prior: {_NOROUZI}, Fashion-MNIST"),),
    ),
    "fashion_flow": Recipe(
        "one layer of 40 latents, a flow prior of ten couplings, two gated layers of 300 each way, Fashion-MNIST",
        _finished_by_dreg(replace(_FASHION, prior="flow", epochs=240), epochs=5),
        (
            Published(-227.35, 0.05, f"VAE, VampPrior: {_NOROUZI}, Fashion-MNIST"),
            Published(-226.75, 0.07, f"VAE, Exemplar prior: {_NOROUZI}, Fashion-MNIST"),
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"NAME: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
