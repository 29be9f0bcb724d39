"""The wording of what a run says about given images: their latents and log p(x), and their missing pixels."""

from __future__ import annotations

from ppl_vae.reports.text.evaluation import (
    NOT_A_LOG_LIKELIHOOD,
    describe_images_scale,
    describe_measure,
    format_number,
    plus_minus,
)
from ppl_vae.runs.image_results import Encoding, ImputationSummary

# With fewer effective particles, the draws of an image are nearly all of one or two z. Source: ours.
FEW_PARTICLES = 5


def describe_encoding(found: Encoding) -> list[str]:
    """The log p(x) of images, line by line."""
    if found.log_likelihood is None:
        return _describe_reconstructions(found)
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


def _describe_reconstructions(found: Encoding) -> list[str]:
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
