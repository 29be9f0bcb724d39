"""Results of comparisons of runs, of tables of likelihoods and networks, and of given images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ppl_vae.evidence.estimate import Estimate, ImagesMean
from ppl_vae.runs.results import ImportanceSummary, Provenance, Quantiles, RunCalibration


@dataclass(frozen=True, kw_only=True)
class ComparedRun(ImportanceSummary):
    """One of the runs of a ``Comparison``, by its own numbers. Nats per image."""

    name: str
    folder: str
    step: int
    training_seed: int
    binarization: str
    likelihood: str
    bits_per_dim: Estimate | None
    log_likelihood: Estimate
    last_gain: float | None = None  # what the last tenth of its epochs gained on validation images, where known


@dataclass(frozen=True, kw_only=True)
class ComparedPair:
    """The paired difference L_S(x; run) - L_S(x; baseline) of two runs on the same images. Nats per image.

    See ``estimate.PairedDifference`` and ``estimate.BoundDifference``.
    """

    name: str
    baseline: str
    difference: Estimate
    interval: tuple[float, float]  # the two-sided t interval of the mean, Bonferroni-corrected
    confidence: float  # of that interval
    unpaired_stderr: float  # that the difference would have on different images
    monte_carlo_stderr: float
    rise: float  # the larger of what ten times the particles gained for either run
    bound: str  # "better", "worse" or "not distinguishable"
    ranks_log_likelihood: bool  # whether log p(x) ranks as the bounds do
    verdict: str  # the comparison in one sentence


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs on the same images of one split: comparison.json. The first run is the baseline of all others."""

    time: str
    dataset: str
    split: str
    protocol: str
    binarization: str  # the words of all runs, joined by "or"
    scale: str
    num_images: int
    num_particles: int
    seed: int
    stored_evaluations: bool  # whether the numbers are those of the runs' own evaluations
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
    """A row of the table of likelihoods, which all are on one scale."""

    likelihood: str
    kind: str  # "mass", "density", or "exact" for the exact masses of a density of dequantized levels
    scale: str
    bits_per_dim: Estimate | None  # for 8-bit levels
    reconstruction: Estimate
    floor_bits_per_dim: float | None  # of independent pixels
    calibration: RunCalibration
    rank: int = 1
    difference_nats: PairedRow | None = None  # below 0 where the row is worse than the best, which has None
    difference_bits_per_dim: PairedRow | None = None  # above 0 where the row is worse
    verdict: str = "best"  # or "worse", or "not distinguishable"
    ranks_log_likelihood: bool | None = None  # whether log p(x) ranks as the bounds do


@dataclass(frozen=True)
class ImageScore:
    """An image by its name, and its log p(x); or of an autoencoder its log p(x | z(x)). Nats."""

    name: str
    log_likelihood: float | None = None
    reconstruction: float | None = None


@dataclass(frozen=True, kw_only=True)
class GivenImages(Provenance):
    """The fields that all results about given images share."""

    images: str  # the split, or the path of the images
    num_images: int
    seed: int
    step: int  # of the weights
    notes: tuple[str, ...]  # sentences about how the images were read


@dataclass(frozen=True, kw_only=True)
class Encoding(ImportanceSummary, GivenImages):
    """The latents and log p(x) of a user's images: encoded.json. Nats per image.

    An autoencoder has the reconstruction alone, and None for every other estimate.
    """

    num_particles: int | None = None
    log_likelihood: Estimate | None = None  # the importance-weighted bound L_S
    reconstruction: Estimate | None = None  # log p(x | z(x)) of an autoencoder
    lowest: tuple[ImageScore, ...]  # the images with the lowest score


@dataclass(frozen=True)
class ImputedImage:
    """An image with missing pixels. Nats; the log-likelihood of hidden pixels is NaN where one is not known."""

    name: str
    missing_pixels: int
    log_likelihood_observed: float
    ess: float
    log_likelihood_hidden: float


@dataclass(frozen=True, kw_only=True)
class ImputationSummary(GivenImages):
    """Images with missing pixels: imputations.json. Nats per image."""

    num_particles: int
    missing_pixels: int
    num_pixels: int
    complete_images: int  # without a missing pixel
    empty_images: int  # without an observed pixel
    log_likelihood_observed: Estimate  # log p(x_observed), the bound L_S
    log_likelihood_hidden: ImagesMean | None  # log p(x_hidden | x_observed), where it is known
    ess: Quantiles
    few_particles: int  # images with missing pixels and too few effective particles
    mask: str | None
    hide: str | None
    num_draws: int  # of the missing pixels of each image
    per_image: tuple[ImputedImage, ...]


@dataclass(frozen=True, kw_only=True)
class Compression(Provenance):
    """Images as a file of bits. Nats per image unless the name says otherwise."""

    run: str
    split: str
    num_images: int
    num_dims: int  # pixels of an image, or columns
    num_particles: int  # K of importance-weighted bits-back
    seed: int
    step: int
    num_bytes: int  # of the file
    initial_bytes: int  # of bits that were there before the first image, and come back
    bits_per_dim: float  # of all bytes without the initial ones
    bound: Estimate  # the ELBO, or L_K, with draws of its own
    coded_bound: Estimate  # the same at the latents that were coded
    coded_nats: float  # of the bits alone, without the header
    other_formats: dict[str, int]  # bytes
    seconds: float  # of compressing

    @property
    def excess(self) -> float:
        """By how much the file is longer than the bound predicts, as a share."""
        return self.bits_per_dim * self.num_dims * math.log(2) / -self.bound.mean - 1

    @property
    def coding_cost(self) -> float:
        """By how much the bits are more than the coded latents' log-weights, as a share: cells, rounding, precision."""
        return self.coded_nats / -self.coded_bound.mean - 1
