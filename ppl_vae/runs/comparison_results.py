"""The results of comparisons: runs on the same images, and the tables of likelihoods and of networks."""

from __future__ import annotations

from dataclasses import dataclass

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.results import RunCalibration


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
        ranks_log_likelihood: Whether log p(x) ranks as the bounds do (``paired.BoundDifference``).
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
