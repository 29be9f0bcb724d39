"""Section (d) of study.json: a VAE beside the plain autoencoder, what blurs the one and what blurs both already."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppl_vae import build, data, diagnostics, runs
from ppl_vae.diagnostics import Value, ratio_of_means
from ppl_vae.experiment.paired import paired_difference
from ppl_vae.exploration import encode
from ppl_vae.study import plan
from ppl_vae.study.context import PICTURES, Study
from ppl_vae.study.material import NUM_COMPONENTS, Material
from ppl_vae.study.measuring import decoded
from ppl_vae.study.pairs import as_json, per_image
from ppl_vae.study.pictures import ORIGINALS
from ppl_vae.study.quality import sample_quality
from ppl_vae.vae import VAE

NUM_NEIGHBORS = 20
_MOST_NEIGHBORS_OF = 20_000  # training images among which they are
_NEIGHBORED = 500  # test images


def autoencoder_section(study: Study) -> dict[str, Any]:
    """VAE against autoencoder, by data set: reconstructions, samples, and the parts of the blur."""
    return {word: _of_dataset(study, material) for word, material in study.materials.items()}


def _of_dataset(study: Study, material: Material) -> dict[str, Any] | None:
    word = material.word
    vae, autoencoder = (study.ended(name) for name in (plan.sweep_name(word, 1.0), plan.autoencoder_name(word)))
    if vae is None or autoencoder is None:
        return None
    latents = _by_latents(study, word) if word == study.first else []
    return {
        "vae": _one(vae),
        "autoencoder": _one(autoencoder),
        "sharper": _sharper(study, material).to_json(),
        "reconstruction_difference": _reconstruction_difference(study, word),
        "samples_worse": _samples_worse(vae["samples"], autoencoder["samples"]),
        "floor": _floor(study, material),
        "num_samples": material.num_images,
        "num_components": min(NUM_COMPONENTS, material.num_pixels),
        "latents": latents,
        "decomposition": _decomposition(vae, autoencoder),
        "same_code": _same_code(study, material, latents),
        "pictures": {
            "originals": f"{PICTURES}/{word}/{ORIGINALS}",
            "vae": vae["pictures"],
            "autoencoder": autoencoder["pictures"],
        },
    }


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


def _sharper(study: Study, material: Material) -> Value:
    """Power in fine detail of the autoencoder's reconstructions over that of the VAE's, of the same images."""
    names = plan.autoencoder_name(material.word), plan.sweep_name(material.word, 1.0)
    autoencoder, vae = (_reconstructed(build.load(study.run(name)), material.x) for name in names)
    return diagnostics.sharpness(autoencoder, vae)


def _reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """(N, *E) E[x | z] at the mean of q(z | x)."""
    return decoded(vae, encode(vae, x).mean)


def _reconstruction_difference(study: Study, word: str) -> dict[str, Any] | None:
    """log p(x | z), z ~ q(z | x): the autoencoder's minus the VAE's, nats an image. Neither is a log-likelihood."""
    path = study.run(plan.autoencoder_name(word)) / runs.per_image("test")
    vae = per_image(study.run(plan.sweep_name(word, 1.0)))
    tensors = runs.load_tensors(path)[0] if path.exists() else {}
    if vae is None or not torch.equal(tensors.get("index", torch.empty(0)), vae[0]):
        return None
    return as_json(paired_difference(vae[1].reconstruction, tensors["reconstruction"]))


# --- Samples ---


def _samples_worse(vae: dict[str, Any], autoencoder: dict[str, Any]) -> dict[str, Any]:
    """How many times as far, and how much better told apart; the samples are drawn apart, so that errors add up."""
    a, b = autoencoder["frechet"], vae["frechet"]
    factor = a["mean"] / b["mean"]
    error = factor * math.hypot(a["stderr"] / a["mean"], b["stderr"] / b["mean"])
    return {
        "frechet": {"mean": factor, "stderr": error},
        "classifier": _minus(autoencoder["classifier"], vae["classifier"]),
    }


def _minus(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {"mean": a["mean"] - b["mean"], "stderr": math.hypot(a["stderr"], b["stderr"])}


def _floor(study: Study, material: Material) -> dict[str, Any]:
    """What validation images would be measured as, in the samples' place."""
    return sample_quality(material.other_gray, material.gray, material.components)


# --- Blur ---


def _decomposition(vae: dict[str, Any], autoencoder: dict[str, Any]) -> dict[str, Any]:
    """E|x - E[x | z]|^2 = Var_q E[x | z] + |x - E_q E[x | z]|^2, the second the autoencoder's and what is lost beside.

    The errors of differences are added as if images were different ones, which makes them too large.
    """
    blur, other = (record["diagnosis"]["pictures"]["blur"] for record in (vae, autoencoder))
    return {
        **{name: blur[name] for name in ("error", "posterior_noise", "bias")},
        "autoencoder_error": other["error"],
        "lost": _minus(blur["bias"], other["error"]),
    }


def _by_latents(study: Study, word: str) -> list[dict[str, Any]]:
    """Each number of latents, with and without a density."""
    names = [plan.sweep_name(word, 1.0), *(plan.latents_name(word, L) for L in study.size.latent_dims)]
    names += [plan.autoencoder_name(word), f"{plan.autoencoder_name(word)}-2"]
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


def _same_code(study: Study, material: Material, latents: list[dict[str, Any]]) -> dict[str, Any]:
    """The best reconstruction from a code is the mean of the images that share it: fewer latents, more of them."""
    of_autoencoders = [row for row in latents if row["posterior"] == "delta"]
    two = f"{plan.autoencoder_name(material.word)}-2"
    return {
        "latent_dims": [row["latent_dim"] for row in of_autoencoders],
        "sharpness": [row["sharpness"] for row in of_autoencoders],
        "neighbors": None if study.ended(two) is None else _neighbors(build.load(study.run(two)), material),
    }


@torch.no_grad()
def _neighbors(vae: VAE, material: Material) -> dict[str, Any]:
    """A reconstruction beside the mean m of the 20 training images whose codes are nearest to the image's own.

    Were the decoder exact and codes dense, E[x | z] would be E[x | z(x) = z], which m estimates.
    """
    x, gray = material.x[:_NEIGHBORED], material.gray[:_NEIGHBORED]
    train = material.train_as_seen(_MOST_NEIGHBORS_OF)
    train_gray = data.probabilities(material.splits, "train")[
        data.subset(len(material.splits.train), _MOST_NEIGHBORS_OF)
    ]
    codes = encode(vae, x).mean
    nearest = torch.cdist(codes, encode(vae, train).mean).topk(min(NUM_NEIGHBORS, len(train)), largest=False).indices
    means = torch.stack([train_gray[index].mean(0) for index in nearest])
    reconstructed = decoded(vae, codes)
    to_mean, to_image = ((reconstructed - each).square().flatten(1).mean(1) for each in (means, gray))
    return {
        "count": nearest.shape[1],
        "num_images": len(x),
        "sharpness_of_reconstruction": diagnostics.sharpness(reconstructed, gray).to_json(),
        "sharpness_of_mean": diagnostics.sharpness(means, gray).to_json(),
        "to_mean": Value.of(to_mean).to_json(),
        "to_image": Value.of(to_image).to_json(),
        "ratio": ratio_of_means(to_mean, to_image).to_json(),
    }
