"""What a run says about given images: their latents and log p(x), and their missing pixels."""

from __future__ import annotations

from dataclasses import dataclass

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.results import ImagesMean, Provenance, Quantiles


@dataclass(frozen=True)
class ImageScore:
    """An image by its name, and its log p(x); or of an autoencoder its log p(x | z(x)). Nats."""

    name: str
    log_likelihood: float | None = None
    reconstruction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Encoding(Provenance):
    """The latents and log p(x) of a person's images: encoded.json. Nats per image.

    An autoencoder has the reconstruction alone, and None for every other estimate.

    Args:
        images: The split, or the path of the images.
        num_particles: S. None for an autoencoder.
        log_likelihood: The importance-weighted bound L_S.
        reconstruction: log p(x | z(x)) of an autoencoder.
        ess: Effective sample size of the particles.
        unreliable_images: The number of images whose jackknife bias is large.
        lowest: The images with the lowest score.
        notes: Sentences about how the images were read.
    """

    images: str
    num_images: int
    num_particles: int | None
    log_likelihood: Estimate | None = None
    elbo: Estimate | None = None
    reconstruction: Estimate | None = None
    ess: Quantiles | None = None
    unreliable_images: int | None = None
    lowest: tuple[ImageScore, ...]
    seed: int
    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ImputedImage:
    """An image with missing pixels. Nats; the log-likelihood of hidden pixels is NaN where one is not known."""

    name: str
    missing_pixels: int
    log_likelihood_observed: float
    ess: float
    log_likelihood_hidden: float


@dataclass(frozen=True, kw_only=True)
class ImputationSummary(Provenance):
    """Images with missing pixels: imputations.json. Nats per image.

    Args:
        images: The split, or the path of the images.
        missing_pixels, num_pixels: Of all images.
        complete_images: Images without a missing pixel.
        empty_images: Images without an observed pixel.
        log_likelihood_observed: log p(x_observed), the bound L_S.
        log_likelihood_hidden: log p(x_hidden | x_observed), where pixels of complete images were hidden.
        ess: Effective sample size of the particles.
        few_particles: Images with missing pixels and too few effective particles.
        num_draws: Draws of the missing pixels of each image.
        notes: Sentences about how the images were read.
    """

    images: str
    num_images: int
    num_particles: int
    missing_pixels: int
    num_pixels: int
    complete_images: int
    empty_images: int
    log_likelihood_observed: Estimate
    log_likelihood_hidden: ImagesMean | None
    ess: Quantiles
    few_particles: int
    mask: str | None
    hide: str | None
    num_draws: int
    seed: int
    step: int
    notes: tuple[str, ...]
    per_image: tuple[ImputedImage, ...]
