"""All options of a run: what decides its data, its model, its training and its evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from ppl_vae.data.registry import BINARIZATIONS, COLORS, DATASETS, DEQUANTIZATIONS, FITS, PROTOCOLS
from ppl_vae.parts.registry import (
    COUPLINGS,
    DENSE_NETWORKS,
    KLS,
    LIKELIHOODS,
    NETWORKS,
    OBJECTIVES,
    POSTERIOR_FLOWS,
    POSTERIORS,
    PRIORS,
    SCALE_MAPS,
    SCHEDULES,
)
from ppl_vae.runs.fields import (
    BELOW_ONE,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    NOT_EMPTY,
    POSITIVE,
    POSITIVE_INTEGER,
    WIDTH,
    CheckedOptions,
    check_value,
    option,
)
from ppl_vae.runs.files import JsonObject

COMPILES = ("auto", "on", "off")
PRECISIONS = ("float32", "tf32", "bf16")
PLACES = ("data_dir", "start_from")  # options that are paths on the machine of a training

# The plain VAE, which the study, the tables and the benchmark train: N(0, I), the sampled ELBO, torch's own
# initialization, a rate that falls from the first step, and no averaged weights.
PLAIN: JsonObject = {
    "prior": "standard-normal",
    "objective": "elbo",
    "initialization": "shrinking",
    "learning_rate": 3e-3,
    "decay_start": 0.0,
    "average_decay": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Options(CheckedOptions):
    """All options of a run, as in ``config.json``."""

    dataset: str = option(
        "mnist",
        f"{', '.join(DATASETS)}; or the path of an .npz or .npy file or of a folder of images",
        NOT_EMPTY,
        group="data",
    )
    data_dir: str | None = option(
        None,
        "folder of the named data sets (default: the environment variable PPL_VAE_DATA_DIR, else data)",
        group="data",
    )
    protocol: str = option(
        "vampprior",
        "vampprior: validation images, test drawn once; iwae: all 60,000 images train, test drawn anew",
        PROTOCOLS,
        group="data",
        rare=True,
    )
    image_size: tuple[int, ...] | None = option(
        None, "height and width to which a folder's images are brought; one number for both", WIDTH, group="data"
    )
    fit: str = option("crop", "how: crop the middle, or stretch", FITS, group="data", rare=True)
    color: str | None = option(
        None, "of a folder's images (default: gray where all of them are)", COLORS, group="data", rare=True
    )
    binarization: str | None = option(
        None,
        "how gray pixels become zeros and ones (default: dynamic under a likelihood of zeros and ones)",
        BINARIZATIONS,
        group="data",
    )
    dequantization: str | None = option(
        None,
        "8-bit levels under a density: uniform, (level + u) / 256, or none, level / 255 (default: uniform)",
        DEQUANTIZATIONS,
        group="data",
        rare=True,
    )

    likelihood: str = option("bernoulli", "p(x | z)", LIKELIHOODS, group="model")
    likelihood_scale: float = option(
        0.5,
        "scale of normal-fixed, as a fraction of the spread of the training pixels",
        POSITIVE,
        group="model",
        rare=True,
    )
    likelihood_components: int = option(
        5, "logistics per pixel of discretized-logistic-mixture", WIDTH, group="model", rare=True
    )
    transform: str = option(
        "none",
        "logit: put a density of real numbers on the logit of pixels in (0, 1)",
        ("none", "logit"),
        group="model",
        rare=True,
    )
    network: str = option("gated", "encoder and decoder", NETWORKS, group="model")
    hidden: tuple[int, ...] | None = option(
        None,
        "widths of the encoder's dense layers, reversed in the decoder (default: 300 300; 256 with convolutions)",
        WIDTH,
        group="model",
    )
    channels: tuple[int, ...] = option(
        (16, 32), "channels of each stage of a convolutional network", WIDTH, group="model"
    )
    latent_dim: int = option(40, "dimensions of z", WIDTH, group="model")
    prior: str | None = option(
        None,
        "p(z) (default: flow; standard-normal with an analytic KL, a delta posterior or one latent)",
        PRIORS,
        group="model",
    )
    prior_components: int = option(500, "components of mixture and vamp", WIDTH, group="model", rare=True)
    prior_flow: str = option("affine", "couplings of the flow prior", COUPLINGS, group="model", rare=True)
    prior_layers: int = option(10, "number of couplings of the flow prior", WIDTH, group="model", rare=True)
    prior_hidden: tuple[int, ...] = option(
        (256,), "widths of the hidden layers of each coupling", WIDTH, group="model", rare=True
    )
    posterior: str = option("diagonal", "the guide q(z | x)", POSTERIORS, group="model")
    posterior_flow: str = option("iaf", "layers of the flow posterior", POSTERIOR_FLOWS, group="model", rare=True)
    posterior_layers: int = option(2, "number of layers of the flow posterior", WIDTH, group="model", rare=True)
    posterior_hidden: tuple[int, ...] = option(
        (256,), "widths of the hidden layers of each layer of the flow posterior", WIDTH, group="model", rare=True
    )
    scale_map: str = option(
        "bounded", "from the encoder's output h to the guide's scale", SCALE_MAPS, group="model", rare=True
    )
    upper_latents: tuple[int, ...] | None = option(
        None, "dimensions of further latent layers above z, from the bottom to the top", WIDTH, group="model", rare=True
    )
    upper_hidden: tuple[int, ...] = option(
        (100, 100), "widths of the hidden layers to and from each further layer", WIDTH, group="model", rare=True
    )
    inference: str = option(
        "top-down",
        "guide of several layers: top-down (a ladder) or bottom-up",
        ("top-down", "bottom-up"),
        group="model",
        rare=True,
    )
    decoder_input: str = option(
        "bottom",
        "what the decoder sees of several layers: the bottom one, or all",
        ("bottom", "all"),
        group="model",
        rare=True,
    )

    objective: str | None = option(
        None,
        "what is maximized (default: stl; elbo with --kl analytic and with a flow or delta posterior)",
        OBJECTIVES,
        group="objective",
    )
    beta: float = option(
        1.0,
        "weight of the KL in training (beta-VAE); reports are always at 1",
        NON_NEGATIVE,
        group="objective",
    )
    warmup_epochs: int | None = option(
        None,
        "epochs in which that weight rises from 0 (default: 0.3 of the epochs, at most 15)",
        NON_NEGATIVE_INTEGER,
        group="objective",
    )
    kl: str = option(
        "sampled", "sampled (Trace_ELBO), or in closed form (TraceMeanField_ELBO)", KLS, group="objective", rare=True
    )
    free_bits: float = option(
        0.1, "nats of KL that cost nothing, for each latent, of free-bits", NON_NEGATIVE, group="objective", rare=True
    )
    num_particles: int = option(1, "samples of z per image and training step", POSITIVE_INTEGER, group="objective")

    epochs: int = option(50, "passes through the training images", POSITIVE_INTEGER, group="optimization")
    batch_size: int = option(100, "images per step", POSITIVE_INTEGER, group="optimization")
    learning_rate: float = option(2e-3, "Adam's learning rate at the start", POSITIVE, group="optimization")
    schedule: str = option("cosine", "how the learning rate falls", SCHEDULES, group="optimization", rare=True)
    decay_start: float = option(
        0.5, "fraction of the steps before the cosine begins", BELOW_ONE, group="optimization", rare=True
    )
    initialization: str = option(
        "wide",
        "dense hidden layers: shrinking (torch's own), or wide (three times its variance)",
        ("shrinking", "wide"),
        group="optimization",
        rare=True,
    )
    start_from: str | None = option(
        None, "run folder whose weights training starts from", group="optimization", rare=True
    )
    clip_norm: float = option(100.0, "largest norm of the whole gradient", POSITIVE, group="optimization", rare=True)
    skip_norm: float | None = option(
        None,
        "leave out steps whose gradient has a larger norm",
        POSITIVE,
        group="optimization",
        rare=True,
    )
    average_decay: float = option(
        0.999,
        "decay of the averaged weights, which are validated, kept and evaluated; 0: none",
        BELOW_ONE,
        group="optimization",
        rare=True,
    )
    keep: str | None = option(
        None,
        "weights that are kept: best by validation, or last (default: best; last where beta is not 1)",
        ("best", "last"),
        group="optimization",
        rare=True,
    )

    images: int = option(
        5000, "test images of the evaluation at the end, a fixed random subset", POSITIVE_INTEGER, group="evaluation"
    )
    evaluation_particles: int = option(
        200, "importance samples per image of that evaluation", POSITIVE_INTEGER, group="evaluation"
    )
    dequantization_draws: int = option(
        16,
        "without effect: masses of levels are exact under every likelihood of the list",
        POSITIVE_INTEGER,
        group="evaluation",
        rare=True,
    )

    seed: int = option(0, "of the weights, the noise and the order of images", NON_NEGATIVE_INTEGER, group="run")
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", NOT_EMPTY, group="run")
    compile: str = option("auto", "the training step as one compiled graph", COMPILES, group="run")
    precision: str = option(
        "float32",
        "of matrix products in training; tf32 needs an NVIDIA GPU",
        PRECISIONS,
        group="run",
        rare=True,
    )
    stream: str = option(
        "auto",
        "bring each batch to the device on demand (auto: for data larger than half of its free memory)",
        ("auto", "on", "off"),
        group="run",
        rare=True,
    )
    checkpoint_seconds: float = option(
        60.0, "longest time between two checkpoints", NON_NEGATIVE, group="run", rare=True
    )
    tensorboard: str = option(
        "off", "also write the numbers as TensorBoard events", ("off", "on"), group="run", rare=True
    )


# What a model and its data are, apart from how it is trained: a run that starts from another takes these from it.
MODEL_OPTIONS = tuple(spec.name for spec in fields(Options) if spec.metadata["group"] in ("data", "model"))


def default_hidden(network: str) -> tuple[int, ...]:
    """The default widths: two layers of 300 (Tomczak and Welling 2018), or one of 256 next to convolutions."""
    return (300, 300) if network in DENSE_NETWORKS else (256,)


def default_prior(options: Options) -> str:
    """The default prior: a flow, or N(0, I) if the KL is in closed form or absent, or there is a single latent."""
    has_closed_form = options.kl == "analytic" or options.objective == "free-bits"
    top = (options.upper_latents or (options.latent_dim,))[-1]
    return "standard-normal" if has_closed_form or options.posterior == "delta" or top == 1 else "flow"


def default_objective(options: Options) -> str:
    """The default objective: the ELBO without the guide's score, unless the KL is closed-form, absent or expensive.

    Without the score a flow guide is inverted at every step: an autoregressive one took 6.6 times as long.
    """
    return "elbo" if options.kl == "analytic" or options.posterior in ("delta", "flow") else "stl"


# A graph compiles in about 10 s, and each run of it saves some milliseconds.
_RUNS_THAT_PAY = 5000


def compiling_pays(runs: int) -> bool:
    """Whether ``--compile auto`` compiles a graph that will run that often."""
    return runs >= _RUNS_THAT_PAY


def model_options(config: object) -> JsonObject:
    """The options of a run's model and data in its ``config.json``, which a run that starts from it takes over.

    Raises:
        ValueError: no options in it, or some that ``from_json`` refuses.
    """
    if not isinstance(config, dict) or not {"options", "model"} & config.keys():
        raise ValueError("expected an object with options")
    other = read_options(config)
    return {name: getattr(other, name) for name in MODEL_OPTIONS}


def to_json(options: Options) -> JsonObject:
    """The options as in ``config.json``."""
    return json.loads(json.dumps(asdict(options)))


def from_json(values: object) -> Options:
    """The options that ``to_json`` wrote.

    Raises:
        ValueError: a field that is missing, unknown, or out of its range.
    """
    return Options(**_check_names(values, {spec.name for spec in fields(Options)}))


def _check_names(values: object, known: set[str]) -> JsonObject:
    """The values with tuples for lists. Raises ValueError unless they are an object of exactly these names."""
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of options, got {type(values).__name__}")
    if set(values) != known:
        odd = ", ".join(sorted(set(values) ^ known))
        raise ValueError(f"expected exactly the options of this version; missing or unknown: {odd}")
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for spec in fields(Options):
        if spec.name in found:
            check_value(spec, found[spec.name])  # a file is held to what this program writes
    return found


# --- An export: the model without its training ---

EXPORT_FORMAT = "ppl_vae model 1"  # the "format" of its config.json
_EXPORTED = {*MODEL_OPTIONS, "dequantization_draws"} - {"data_dir"}


def model_to_json(options: Options) -> JsonObject:
    """The options of the model alone, for an export's ``config.json``. The data has its name and no path."""
    name = options.dataset
    if name not in DATASETS:
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        name = f"own {name}" if name in DATASETS else name or "data"  # no path may become the name of another data set
    values = to_json(options) | {"dataset": name}
    return {name: value for name, value in values.items() if name in _EXPORTED}


def model_from_json(values: object) -> Options:
    """The options that ``model_to_json`` wrote, with defaults for those of training.

    Raises:
        ValueError: an option that is missing, unknown, or out of its range.
    """
    options = Options(**_check_names(values, _EXPORTED))
    return replace(options, objective=default_objective(options), warmup_epochs=0)


def is_export(config: Mapping[str, object]) -> bool:
    """Whether a ``config.json`` belongs to an export."""
    return "format" in config


def read_options(config: Mapping[str, object]) -> Options:
    """The options of a run's ``config.json``, or of an export's.

    Raises:
        KeyError: it has none.
        ValueError: an unknown format, or options out of their range.
    """
    if not is_export(config):
        return from_json(config["options"])
    if config["format"] != EXPORT_FORMAT:
        raise ValueError(f"format: expected {EXPORT_FORMAT!r}, got {config['format']!r}; another version wrote it")
    return model_from_json(config["model"])
