"""Results of comparisons of runs, of tables of likelihoods and networks, and of given images."""

from __future__ import annotations

from dataclasses import dataclass

from ppl_vae.evidence.estimate import Estimate, ImagesMean
from ppl_vae.runs.results import Provenance, Quantiles, RunCalibration


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One of the runs of a ``Comparison``, by its own numbers. Nats per image."""

    name: str
    folder: str
    step: int
    training_seed: int
    binarization: str
    likelihood: str
    bits_per_dim: Estimate | None
    log_likelihood: Estimate
    elbo: Estimate
    monte_carlo_stderr: float
    rise: float


@dataclass(frozen=True, kw_only=True)
class ComparedPair:
    """The paired difference L_S(x; run) - L_S(x; baseline) of two runs on the same images. Nats per image.

    Args:
        difference: The mean over the images, and its standard error.
        interval: The two-sided t interval of the mean, Bonferroni-corrected.
        confidence: The confidence of that interval.
        unpaired_stderr: The standard error that the difference would have on different images.
        monte_carlo_stderr: The particles' part of the standard error, by the delta method.
        rise: The larger of what ten times the particles gained for either run.
        bound: "better", "worse" or "not distinguishable".
        ranks_log_likelihood: Whether log p(x) ranks as the bounds do (``estimate.BoundDifference``).
        verdict: The comparison in one sentence.
    """

    name: str
    baseline: str
    difference: Estimate
    interval: tuple[float, float]
    confidence: float
    unpaired_stderr: float
    monte_carlo_stderr: float
    rise: float
    bound: str
    ranks_log_likelihood: bool
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs on the same images of one split: comparison.json.

    Args:
        binarization: The words of all runs, joined by "or".
        scale: What the nats measure, one for all runs.
        stored_evaluations: Whether the numbers are those of the runs' own evaluations.
        runs: The first is the baseline.
        comparisons: Each further run against the baseline.
    """

    time: str
    dataset: str
    split: str
    protocol: str
    binarization: str
    scale: str
    num_images: int
    num_particles: int
    seed: int
    stored_evaluations: bool
    runs: tuple[ComparedRun, ...]
    comparisons: tuple[ComparedPair, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainedRow:
    """A trained run as a row of a table: its training, and its evaluation on test images. Nats per image."""

    split: str
    binarization: str
    num_images: int
    num_particles: int
    weights: int
    epochs: int
    best_epoch: int
    seconds: float
    log_likelihood: Estimate
    elbo: Estimate
    kl: Estimate
    rise: float
    floor: Estimate


@dataclass(frozen=True, kw_only=True)
class NetworkRow(TrainedRow):
    """A row of the table of networks."""

    network: str
    seconds_an_epoch: float


@dataclass(frozen=True)
class PairedRow:
    """How far a row is behind the best row of its table, paired on the same images."""

    mean: float
    stderr: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LikelihoodRow(TrainedRow):
    """A row of the table of likelihoods.

    Args:
        likelihood: A word of ``--likelihood``.
        kind: "mass", "density", or "exact" for the exact masses of a density of dequantized levels.
        scale: What the nats measure, one for all rows.
        bits_per_dim: For 8-bit levels.
        floor_bits_per_dim: That of independent pixels.
        rank: From 1, the row with the best bound.
        difference_nats: Below 0 where the row is worse than the best. None for the best row.
        difference_bits_per_dim: Above 0 where the row is worse than the best.
        verdict: "best", "worse" or "not distinguishable".
        ranks_log_likelihood: Whether log p(x) ranks as the bounds do.
    """

    likelihood: str
    kind: str
    scale: str
    bits_per_dim: Estimate | None
    reconstruction: Estimate
    floor_bits_per_dim: float | None
    calibration: RunCalibration
    rank: int = 1
    difference_nats: PairedRow | None = None
    difference_bits_per_dim: PairedRow | None = None
    verdict: str = "best"
    ranks_log_likelihood: bool | None = None


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
