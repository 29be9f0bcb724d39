"""The wording of log p(x): of a split, and of given images with their latents or their missing pixels."""

from __future__ import annotations

import math

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.runs.command_results import Encoding, ImputationSummary
from ppl_vae.runs.results import Evaluation, Provenance

BINARY_SCALE = "mass of binary pixels"  # as ``describe_scale`` words it

# Below this Pareto k-hat the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5
# From 1 on they have no mean either: the bound may be too low by any amount.
_K_WITHOUT_MEAN = 1.0

# With fewer effective particles, the draws of an image are nearly all of one or two z. Source: ours.
FEW_PARTICLES = 5

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
    trust = "above 0.7 is normal for a healthy VAE"
    if k is not None and k >= _K_WITHOUT_MEAN:
        trust = "from 1 on the bound cannot be trusted: take more particles, or a certificate"
    lines.append(
        f"  effective particles: median {format_number(found.ess.median, 1)} of {S:,}; Pareto k-hat: {fitted} ({trust})"
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


# --- Given images ---


def describe_encoding(found: Encoding) -> list[str]:
    """The log p(x) of images, line by line."""
    if found.log_likelihood is None:
        return _describe_image_reconstructions(found)
    S, n = found.num_particles, found.num_images
    if n == 1:
        mean = f"{found.log_likelihood.mean:.2f}"
        return [f"log-likelihood {mean} nats of one image: the bound L_{S}, in expectation below log p(x)"]
    lowest = ", ".join(f"{image.name} {image.log_likelihood:.2f}" for image in found.lowest)
    assert found.ess is not None
    return [
        f"log-likelihood {plus_minus(found.log_likelihood)} nats an image: the bound L_{S}, in expectation below "
        "log p(x)",
        _describe_images(found),
        f"  effective particles: median {format_number(found.ess.median, 1)} of {S:,}",
        f"  lowest log p(x), perhaps unlike the training images: {lowest}",
        "  That alone does not find outliers: smooth and simple images of another kind can score higher than the "
        "training data's own (Nalisnick et al. 2019, arXiv 1810.09136).",
    ]


def _describe_image_reconstructions(found: Encoding) -> list[str]:
    assert found.reconstruction is not None
    if found.num_images == 1:
        mean = f"{found.reconstruction.mean:.2f}"
        return [f"reconstruction log p(x | z(x)) {mean} nats of one image: {NOT_A_LOG_LIKELIHOOD}"]
    lowest = ", ".join(f"{image.name} {image.reconstruction:.2f}" for image in found.lowest)
    return [
        f"reconstruction log p(x | z(x)) {plus_minus(found.reconstruction)} nats an image: {NOT_A_LOG_LIKELIHOOD}",
        _describe_images(found),
        f"  lowest log p(x | z(x)), the worst reconstructed: {lowest}",
    ]


def _describe_images(found: Encoding) -> str:
    return (
        f"  {found.num_images:,} images ({found.images}), seed {found.seed}, "
        f"{describe_images_scale(found, found.seed)}; ± is the standard error over images"
    )


def describe_imputation(found: ImputationSummary) -> list[str]:
    """What is missing in images, and the log p of what is not, line by line."""
    n, S, missing, pixels = found.num_images, found.num_particles, found.missing_pixels, found.num_pixels
    if missing:
        lines = [f"{missing:,} of {pixels:,} pixels are missing ({missing / pixels:.0%}), in {n:,} images."]
        if found.complete_images:
            lines.append(f"  Without a missing pixel: {found.complete_images:,}, imputed as they are.")
    else:
        lines = [f"No pixel is missing in {n:,} images: nothing is imputed, and log p is that of the whole images."]
    if found.empty_images:
        lines.append(
            f"  Without an observed pixel: {found.empty_images:,}, imputed by draws of the model, with log p of 0."
        )
    measure = describe_measure(found)
    lines.append(
        f"log p(x_observed) {plus_minus(found.log_likelihood_observed)} nats an image: the bound L_{S}, in "
        f"expectation below it{measure and f'; {measure}'}"
    )
    hidden = found.log_likelihood_hidden
    if hidden is not None:
        lines.append(
            f"log p(x_hidden | x_observed) {plus_minus(hidden.estimate)} nats an image: log p(x) "
            "- log p(x_observed), two such bounds, so no bound; where the second is looser, it flatters"
        )
    median = format_number(found.ess.median, 1)
    lines.append(f"  ± is the standard error over images; effective particles: median {median}")
    if found.few_particles:
        lines.append(
            f"  Unreliable: {found.few_particles:,} of {n - found.complete_images:,} images with missing pixels have "
            f"fewer than {FEW_PARTICLES} effective particles of {S:,}. Their draws are nearly alike and show less than "
            "what is possible, and log p(x_observed) may lie above its bound; more --num-particles help."
        )
    return lines
