"""The entry of evaluation.json in words."""

from __future__ import annotations

import math
from typing import Any

from ppl_vae.evidence.importance import UNRELIABLE_BIAS

BINARY_SCALE = "mass of binary pixels"  # as ``build.scale`` says it

# Below this Pareto k the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5

NOT_A_LOG_LIKELIHOOD = "not a log-likelihood; the guide is deterministic, an autoencoder has no density"


def has_no_density(entry: dict[str, Any]) -> bool:
    """The entry is an autoencoder's."""
    return "log_likelihood" in entry and entry["log_likelihood"] is None


def scale_in_words(entry: dict[str, Any]) -> str:
    """On what scale an entry's nats are: what a reader must know before comparing them with others."""
    words = [f"binarization {entry['binarization']}"]
    if entry["protocol"] == "iwae":
        words.append(f"iwae protocol, drawn by seed {entry['seed']}")
    words.append(kind_in_words(entry))
    return ", ".join(filter(None, words))


def kind_in_words(entry: dict[str, Any]) -> str:
    """Mass, bound or density, and of what; nothing for binary pixels, whose binarization says it."""
    scale = entry.get("scale", "density" if entry["measure"] == "density" else BINARY_SCALE)  # of before there was one
    if entry.get("dequantization_draws") is not None:
        return f"bound on the {scale} (uniform dequantization, M = {entry['dequantization_draws']} draws a pixel)"
    if entry.get("pixels") == "dequantized" and entry.get("scale", "").startswith("mass"):
        return f"{scale}, exact, under a density"
    if entry["measure"] == "density":
        return f"a {scale}: never comparable with a mass"
    return "" if scale == BINARY_SCALE else scale


def describe_evaluation(entry: dict[str, Any]) -> list[str]:
    """The numbers of one evaluation, in words."""
    if has_no_density(entry):
        return _describe_reconstructions(entry)
    S, n = entry["num_particles"], entry["num_images"]
    scale = [f"independent pixels (marginals of the training images) {plus_minus(entry['floor'])}"]
    if entry["binarization_entropy"] is not None:
        scale.append(f"no model expects above {-entry['binarization_entropy']:.2f}, the binarization's own entropy")
    ll, elbo, rec, kl = (entry[key] for key in ("log_likelihood", "elbo", "reconstruction", "kl"))
    lines = [
        f"log-likelihood {plus_minus(ll)} nats an image: the importance-weighted bound L_{S}, "
        "in expectation below log p(x)",
        *_bits_in_words(entry),
        f"  {entry['split']} split, {n:,} images, {scale_in_words(entry)}; ± is the standard error over images",
        f"  for scale: {'; '.join(scale)}",
        f"  ELBO (beta = 1) {plus_minus(elbo)} = reconstruction {plus_minus(rec)} - KL {plus_minus(kl)}",
    ]
    if S == 1:
        return [*lines, "  one importance sample says nothing of its own error: take more"]
    k = entry["pareto_k"]["median"]
    fitted = "not estimated" if k is None else f"median {k:.2f}"
    lines.append(
        f"  effective particles: median {number(entry['ess']['median'], 1)} of {S:,}; Pareto k-hat: {fitted} "
        "(above 0.7 is normal for a healthy VAE)"
    )
    why = "is not known at so few samples" if k is None else "is not below 0.5"
    seen = "see" if k is not None and k < _K_WITH_VARIANCE else f"see, as a floor since k-hat {why},"
    lines.append(
        f"  delta method and jackknife {seen} a Monte Carlo error of {number(entry['monte_carlo_stderr'], 3)} "
        f"and {number(entry['bias'], 3)} nats still lacking"
    )
    if S >= 10:
        lines.append(f"  ten times the particles, S = {S // 10:,} to {S:,}, gained {number(entry['rise'], 3)} nats")
    return [
        *lines,
        f"  unreliable images (jackknife above {UNRELIABLE_BIAS} nats): {entry['unreliable_images']:,} of {n:,}",
    ]


def _describe_reconstructions(entry: dict[str, Any]) -> list[str]:
    return [
        f"reconstruction log p(x | z(x)) {plus_minus(entry['reconstruction'])} nats an image: {NOT_A_LOG_LIKELIHOOD}",
        f"  {entry['split']} split, {entry['num_images']:,} images, {scale_in_words(entry)}; "
        "± is the standard error over images",
        "  no floor and no entropy beside it: they are for log-likelihoods, which pay for what z says of x",
    ]


def _bits_in_words(entry: dict[str, Any]) -> list[str]:
    if entry["bits_per_dim"] is None:
        return []
    bits = entry["bits_per_dim"]
    return [f"  at most {number(bits['mean'], 4)} ± {number(bits['stderr'], 4)} bits per dimension, by that bound"]


def number(value: float | None, digits: int) -> str:
    """Rounded; "unknown" for what is not known."""
    return "unknown" if value is None or math.isnan(value) else f"{value + 0.0:.{digits}f}"


def plus_minus(estimate: dict[str, float]) -> str:
    """A mean ± its standard error, nats."""
    return f"{number(estimate['mean'], 2)} ± {number(estimate['stderr'], 2)}"  # unknown for one image
