"""Section (d) of study.json: a VAE beside the plain autoencoder, what blurs the one and what blurs both already."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae import diagnostics, runs
from ppl_vae.evidence.estimate import Estimate, ratio_of_means
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.evidence.paired import paired_difference
from ppl_vae.runs.load import load
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study import plan
from ppl_vae.study.context import PICTURES, Study
from ppl_vae.study.material import NUM_COMPONENTS, StudyData
from ppl_vae.study.pairs import as_json, per_image
from ppl_vae.study.pictures import ORIGINALS
from ppl_vae.study.quality import frechet_excess_ratio, frechet_ratio, sample_quality
from ppl_vae.vae import VAE

NUM_NEIGHBORS = 20
_MOST_NEIGHBORS_OF = 20_000  # training images among which they are
_NEIGHBORED = 500  # test images
_DRAWS = 8  # of q(z | x) an image, for the parts of its squared error


def autoencoder_section(study: Study) -> dict[str, Any]:
    """VAE against autoencoder, by data set: reconstructions, samples, and the parts of the squared error."""
    return {word: _of_dataset(study, material) for word, material in study.materials.items()}


def _of_dataset(study: Study, material: StudyData) -> dict[str, Any] | None:
    word = material.word
    vae, autoencoder = (study.ended(name) for name in (plan.sweep_name(word, 1.0), plan.autoencoder_name(word)))
    if vae is None or autoencoder is None:
        return None
    latents = _by_latents(study, word) if word == study.first else []
    both = _Both(*(load(study.run(name)) for name in (vae["name"], autoencoder["name"])))
    return {
        "vae": _one(vae),
        "autoencoder": _one(autoencoder),
        "sharper": _sharper(both, material).to_json(),
        "reconstruction_difference": _reconstruction_difference(study, word),
        "samples_worse": {
            **_frechet_ratios(both, material),
            "classifier": _minus(autoencoder["samples"]["classifier"], vae["samples"]["classifier"]),
        },
        "floor": _floor(material),
        "num_samples": material.num_images,
        "num_components": min(NUM_COMPONENTS, material.num_pixels),
        "latents": latents,
        "binarized": _binarized(material),
        "decomposition": _decomposition(both, material),
        "same_code": _same_code(study, material, latents),
        "pictures": {
            "originals": f"{PICTURES}/{word}/{ORIGINALS}",
            "vae": vae["pictures"],
            "autoencoder": autoencoder["pictures"],
        },
    }


class _Both(NamedTuple):
    """The two that are compared."""

    vae: VAE
    autoencoder: VAE


def _one(record: dict[str, Any]) -> dict[str, Any]:
    blur = record["diagnosis"]["pictures"]["blur"]
    return {
        "run": record["name"],
        "reconstruction": record["evaluation"]["reconstruction"],
        "squared_error": blur["error"],
        "sharpness": blur["at_mean"],
        "variation": record["variation"],
        "samples": record["samples"],
        "fitted_samples": record["fitted_samples"],
        "blur": blur,
    }


# --- Reconstructions ---


def _sharper(both: _Both, material: StudyData) -> Estimate:
    """High-frequency power of the autoencoder's reconstructions over that of the VAE's, of the same images."""
    vae, autoencoder = (_reconstructed(each, material.x) for each in both)
    return diagnostics.sharpness(autoencoder, vae)


def _reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """(N, *E) E[x | z] at the mean of q(z | x)."""
    return decode_mean(vae, encode(vae, x).mean)


def _reconstruction_difference(study: Study, word: str) -> dict[str, Any] | None:
    """log p(x | z), z ~ q(z | x): the autoencoder's minus the VAE's, nats an image. Neither is a log-likelihood."""
    path = study.run(plan.autoencoder_name(word)) / runs.per_image("test")
    vae = per_image(study.run(plan.sweep_name(word, 1.0)))
    tensors = runs.load_tensors(path)[0] if path.exists() else {}
    if vae is None or not torch.equal(tensors.get("index", torch.empty(0)), vae.index):
        return None
    return as_json(paired_difference(vae.result.reconstruction, tensors["reconstruction"]))


# --- Samples ---


def _frechet_ratios(both: _Both, material: StudyData) -> dict[str, Any]:
    """How many times as far from real images the autoencoder's samples are, less the floor in both, and as it stands.

    Their samples are of the same prior draws and are held against the same images, which are left out together.
    """
    count = min(len(material.other_gray), len(material.gray))
    images = [decode_mean(vae, material.prior_draws(vae.prior())) for vae in both] + [
        material.other_gray,
        material.gray,
    ]
    vae, autoencoder, other, real = (material.components.of(each[:count]) for each in images)
    excess = frechet_excess_ratio(autoencoder, vae, other, real)
    return {
        "frechet": None if excess is None else excess.to_json(),
        "frechet_uncorrected": frechet_ratio(autoencoder, vae, real).to_json(),
    }


def _minus(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """a - b with the error of independent values; of values that share images that is, if anything, too large."""
    return Estimate(a["mean"] - b["mean"], (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5).to_json()


def _floor(material: StudyData) -> dict[str, Any]:
    """What validation images would be measured as, in the samples' place."""
    return sample_quality(material.other_gray, material.gray, material.components)


# --- The squared error ---


def _binarized(material: StudyData) -> dict[str, Any] | None:
    """|gray - x|^2 / D, x the binary image that networks see, and its power beside gray's: p (1 - p) a pixel is noise.

    What returned its input unchanged would have this error. None where nothing is binarized.
    """
    if torch.equal(material.x, material.gray):
        return None
    return {
        "error": Estimate.from_values(_squared_error(material.x, material.gray)).to_json(),
        "sharpness": diagnostics.sharpness(material.x, material.gray).to_json(),
    }


def _squared_error(images: Tensor, other: Tensor) -> Tensor:
    """(N,) |x - y|^2 / D, float64."""
    return (images.double() - other.double()).square().flatten(1).mean(1)


def _decomposition(both: _Both, material: StudyData) -> dict[str, Any]:
    """E_q|x - y|^2 = Var_q y + |x - E_q y|^2, y = E[x | z]: the second as the autoencoder's error, and what is beside.

    The autoencoder has as many latents and neither noise nor a KL, but it has what binary inputs, its network and its
    training do to it. All errors are of the same images, pair by pair.
    """
    error, noise = _error_and_noise(both.vae, material)
    autoencoder = _squared_error(_reconstructed(both.autoencoder, material.x), material.gray)
    lost = error - noise - autoencoder
    shares = {"posterior_noise": noise, "autoencoder_error": autoencoder, "lost": lost}
    parts = {"error": error, "bias": error - noise} | shares
    return {name: Estimate.from_values(part).to_json() for name, part in parts.items()} | {
        "shares": {name: ratio_of_means(part, error).to_json() for name, part in shares.items()}
    }


@torch.no_grad()
def _error_and_noise(vae: VAE, material: StudyData) -> tuple[Tensor, Tensor]:
    """(N,) each: mean_j |x - y_j|^2 / D and sum_j |y_j - Y|^2 / ((J - 1) D), of J draws with mean Y; float64."""
    error, square = torch.zeros(len(material.x), dtype=torch.double), torch.zeros(len(material.x), dtype=torch.double)
    total = torch.zeros_like(material.gray, dtype=torch.double)
    with seeded(0, material.x.device):
        for _ in range(_DRAWS):
            z = sample_posterior(vae, material.x)
            y = decode_mean(vae, z).double()
            error += _squared_error(y, material.gray) / _DRAWS
            square += y.square().flatten(1).mean(1)
            total += y
    noise = (square - _DRAWS * (total / _DRAWS).square().flatten(1).mean(1)) / (_DRAWS - 1)
    return error, noise


def _by_latents(study: Study, word: str) -> list[dict[str, Any]]:
    """Each number of latents, with and without a density."""
    names = [plan.sweep_name(word, 1.0), *(plan.latents_name(word, L) for L in study.size.latent_dims)]
    names += [plan.autoencoder_name(word), plan.autoencoder_name(word, 2)]
    ended = [record for name in names if (record := study.ended(name)) is not None]
    return sorted((_with_latents(record) for record in ended), key=lambda row: (row["latent_dim"], row["posterior"]))


def _with_latents(record: dict[str, Any]) -> dict[str, Any]:
    blur, options = record["diagnosis"]["pictures"]["blur"], record["options"]
    return {
        "posterior": options["posterior"],
        "latent_dim": options["latent_dim"],
        "run": record["name"],
        "sharpness": blur["at_mean"],
        **{name: blur[name] for name in ("error", "posterior_noise", "bias")},
        "variation": record["variation"],
    }


# --- Why an autoencoder blurs ---


def _same_code(study: Study, material: StudyData, latents: list[dict[str, Any]]) -> dict[str, Any]:
    """The best reconstruction from a code is the mean of the images that share it: fewer latents, more of them."""
    of_autoencoders = [row for row in latents if row["posterior"] == "delta"]
    two = plan.autoencoder_name(material.word, 2)
    return {
        "latent_dims": [row["latent_dim"] for row in of_autoencoders],
        "sharpness": [row["sharpness"] for row in of_autoencoders],
        "neighbors": None if study.ended(two) is None else _neighbors(load(study.run(two)), material),
    }


@torch.no_grad()
def _neighbors(vae: VAE, material: StudyData) -> dict[str, Any]:
    """A reconstruction beside the mean m of the 20 training images whose codes are nearest to the image's own.

    Were the decoder exact and codes dense, E[x | z] would be E[x | z(x) = z], which m estimates.
    """
    x, gray = material.x[:_NEIGHBORED], material.gray[:_NEIGHBORED]
    train = material.train_as_seen(_MOST_NEIGHBORS_OF)
    train_gray = material.train_gray(_MOST_NEIGHBORS_OF)
    codes = encode(vae, x).mean
    nearest = torch.cdist(codes, encode(vae, train).mean).topk(min(NUM_NEIGHBORS, len(train)), largest=False).indices
    means = torch.stack([train_gray[index].mean(0) for index in nearest])
    reconstructed = decode_mean(vae, codes)
    to_mean, to_image = ((reconstructed - each).square().flatten(1).mean(1) for each in (means, gray))
    return {
        "count": nearest.shape[1],
        "num_images": len(x),
        "sharpness_of_reconstruction": diagnostics.sharpness(reconstructed, gray).to_json(),
        "sharpness_of_mean": diagnostics.sharpness(means, gray).to_json(),
        "to_mean": Estimate.from_values(to_mean).to_json(),
        "to_image": Estimate.from_values(to_image).to_json(),
        "ratio": ratio_of_means(to_mean, to_image).to_json(),
    }
