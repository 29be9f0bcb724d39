"""The wording of an evaluation: log p(x) of a split, with its errors and its scale."""

from __future__ import annotations

import math

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.runs.results import Evaluation, Provenance

BINARY_SCALE = "mass of binary pixels"  # as ``describe_scale`` words it

# Below this Pareto k-hat the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5

NOT_A_LOG_LIKELIHOOD = "not a log-likelihood; the guide is deterministic, an autoencoder has no density"


def format_number(value: float | None, digits: int) -> str:
    """A rounded number, or "unknown" for None and NaN."""
    return "unknown" if value is None or math.isnan(value) else f"{value + 0.0:.{digits}f}"


def plus_minus(estimate: Estimate | None, digits: int = 2) -> str:
    """A mean ± its standard error. The error of a single image is unknown."""
    if estimate is None:
        return "unknown"
    return f"{format_number(estimate.mean, digits)} ± {format_number(estimate.stderr, digits)}"


def describe_images_scale(provenance: Provenance, seed: int) -> str:
    """The binarization and the scale of a result: what a reader must know before comparing it with others."""
    words = [f"binarization {provenance.binarization}"]
    if provenance.protocol == "iwae":
        words.append(f"iwae protocol, drawn by seed {seed}")
    return ", ".join([*words, *filter(None, [describe_measure(provenance)])])


def describe_measure(provenance: Provenance) -> str:
    """Whether the numbers are masses or densities; nothing for binary pixels, whose binarization says it."""
    scale = provenance.scale
    if provenance.pixels == "dequantized" and scale.startswith("mass"):
        return f"{scale}, exact, under a density"
    if provenance.measure == "density":
        return f"a {scale}: never comparable with a mass"
    return "" if scale == BINARY_SCALE else scale


def describe_evaluation(found: Evaluation) -> list[str]:
    """An evaluation, line by line."""
    if found.log_likelihood is None:
        return _describe_reconstructions(found)
    assert found.num_particles is not None
    assert found.pareto_k is not None
    assert found.ess is not None
    S, n = found.num_particles, found.num_images
    references = [f"independent pixels (marginals of the training images) {plus_minus(found.floor)}"]
    if found.binarization_entropy is not None:
        references.append(f"no model expects above {-found.binarization_entropy:.2f}, the binarization's own entropy")
    lines = [
        f"log-likelihood {plus_minus(found.log_likelihood)} nats an image: the importance-weighted bound L_{S}, "
        "in expectation below log p(x)"
    ]
    if found.bits_per_dim is not None:
        lines.append(f"  at most {plus_minus(found.bits_per_dim, 4)} bits per dimension, by that bound")
    lines += [
        f"  {found.split} split, {n:,} images, {describe_images_scale(found, found.seed)}; "
        "± is the standard error over images",
        f"  for scale: {'; '.join(references)}",
        f"  ELBO (beta = 1) {plus_minus(found.elbo)} = reconstruction {plus_minus(found.reconstruction)} - "
        f"KL {plus_minus(found.kl)}",
    ]
    if S == 1:
        return [*lines, "  one importance sample says nothing of its own error: take more"]
    k = found.pareto_k.median
    fitted = "not estimated" if k is None else f"median {k:.2f}"
    lines.append(
        f"  effective particles: median {format_number(found.ess.median, 1)} of {S:,}; Pareto k-hat: {fitted} "
        "(above 0.7 is normal for a healthy VAE)"
    )
    if k is None:
        seen = "see, as a floor since k-hat is not known at so few samples,"
    else:
        seen = "see" if k < _K_WITH_VARIANCE else "see, as a floor since k-hat is not below 0.5,"
    lines.append(
        f"  delta method and jackknife {seen} a Monte Carlo error of {format_number(found.monte_carlo_stderr, 3)} "
        f"and {format_number(found.bias, 3)} nats still lacking"
    )
    if S >= 10:
        gain = format_number(found.rise, 3)
        lines.append(f"  ten times the particles, S = {S // 10:,} to {S:,}, gained {gain} nats")
    return [
        *lines,
        f"  unreliable images (jackknife above {UNRELIABLE_BIAS} nats): {found.unreliable_images:,} of {n:,}",
    ]


def _describe_reconstructions(found: Evaluation) -> list[str]:
    return [
        f"reconstruction log p(x | z(x)) {plus_minus(found.reconstruction)} nats an image: {NOT_A_LOG_LIKELIHOOD}",
        f"  {found.split} split, {found.num_images:,} images, {describe_images_scale(found, found.seed)}; "
        "± is the standard error over images",
        "  it has no floor and no entropy: those are for log-likelihoods, which pay for what z says of x",
    ]
