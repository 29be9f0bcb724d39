"""The summary of a certificate in evaluation.json, and files that hold those of several runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.guide_calibration import GuideCalibration
from ppl_vae.runs.environment import describe_environment
from ppl_vae.runs.files import JsonObject, write_json
from ppl_vae.runs.results import ImagesMean, Provenance, Quantiles, read_rows, to_json

CERTIFICATE = "certificate-"  # begins the key of each certificate in evaluation.json; its split follows


@dataclass(frozen=True)
class Bound:
    """The mean of a bound over images, nats per image.

    Args:
        mean: of the bound.
        stderr: over images.
        monte_carlo_stderr: the part of the mean's error that other draws would change; None if it is not known.
    """

    mean: float
    stderr: float
    monte_carlo_stderr: float | None

    @property
    def estimate(self) -> Estimate:
        """The mean and its standard error over images."""
        return Estimate(self.mean, self.stderr)


@dataclass(frozen=True)
class ChainBound(Bound):
    """The bound of chains; ``bias`` is what the jackknife sees still lacking, nats per image."""

    bias: float | None
    ess: Quantiles | None
    acceptance: Quantiles


@dataclass(frozen=True)
class ImportanceBound(Bound):
    """L_S. ``corrected_estimate``, by the jackknife, is not a bound."""

    bias: float
    num_particles: int
    corrected_estimate: Estimate
    rise: float
    elbo: Estimate
    ess: Quantiles
    pareto_k: Quantiles
    unreliable_images: int


@dataclass(frozen=True)
class GuideBound(ImportanceBound):
    """L_S with the guide. ``smoothed_estimate``, by Pareto smoothing of as many other draws, is not a bound."""

    smoothed_estimate: Estimate


@dataclass(frozen=True)
class SimulatedBounds:
    """Both bounds on log p(x) of images that the model made, and the gap between them, nats per image."""

    num_images: int
    lower: ChainBound
    upper: ChainBound
    gap: Estimate
    widest_gap: float


@dataclass(frozen=True)
class ConvergenceCurve:
    """Mean bounds by effort, and what they lack of annealed importance sampling in full, with paired errors."""

    effort: tuple[int, ...]
    mean: tuple[float, ...]
    minus_ais: tuple[float, ...]
    minus_ais_stderr: tuple[float, ...]


@dataclass(frozen=True)
class Convergence:
    """How bounds rise with the number of temperatures, and of particles, on some of the images."""

    num_images: int
    temperatures: ConvergenceCurve
    particles: ConvergenceCurve


@dataclass(frozen=True)
class SplitGap:
    """log p(x) - ELBO (``total``) of one split, and its parts, nats per image."""

    num_images: int
    log_evidence: Estimate
    elbo: Estimate
    refined_elbo: Estimate
    total: Estimate
    approximation: Estimate
    amortization: Estimate


@dataclass(frozen=True)
class OtherDataset:
    """``typicality.Typicality``: log p(x) of another data set, compared with the run's own."""

    dataset: str
    own: ImagesMean
    other: ImagesMean
    num_particles: int
    share_above_own_median: Estimate
    share_above_own_5_percent_quantile: Estimate
    auroc_of_density: Estimate
    auroc_of_distance: Estimate
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Certificate(Provenance):
    """log p(x) of a split from both sides: an entry of evaluation.json. What was not asked for is None.

    Args:
        split, num_images: the images.
        temperatures, leapfrogs, chains, start: how chains were annealed.
        num_particles: S.
        seed: of every draw.
        step: of the weights.
        ais: annealed importance sampling.
        importance, improved: importance sampling, with the guide and with a proposal refined for each image.
        ais_minus_importance, ais_minus_improved: paired differences.
        total_gap: log p(x) - ELBO, by annealed importance sampling.
        unreliable: the places of unreliable images in their split.
        simulated: both bounds on images of the model itself.
        convergence: bounds by effort.
        gaps: by split, the parts of log p(x) - ELBO.
        calibration: of the guide.
        against: another data set.
        stage_seconds, seconds: how long each stage and all of them took.
    """

    split: str
    num_images: int
    temperatures: int
    leapfrogs: int
    chains: int
    start: str
    num_particles: int
    seed: int
    step: int
    ais: ChainBound
    importance: GuideBound
    improved: ImportanceBound
    ais_minus_importance: Bound
    ais_minus_improved: Bound
    total_gap: Estimate | None = None
    unreliable: tuple[int, ...]
    simulated: SimulatedBounds | None
    convergence: Convergence
    gaps: dict[str, SplitGap] | None
    calibration: GuideCalibration | None
    against: OtherDataset | None
    stage_seconds: dict[str, float]
    seconds: float


# --- Certificates of several runs in one file ---


@dataclass(frozen=True, kw_only=True)
class StoredCertificate(Certificate):
    """A certificate in a file of several, with the run's name and what it was made with."""

    run: str
    environment: JsonObject


def read_certificates(path: Path) -> list[StoredCertificate]:
    """The certificates in a file of several; none if there is no file. Raises ValueError for a damaged one."""
    return read_rows(path, "certificates", StoredCertificate)


def add_certificate(path: Path, run: str, found: Certificate, device: str) -> list[StoredCertificate]:
    """Add a certificate to a file of several, or replace that of the same run and split, and return all of them."""
    environment = {key: value for key, value in describe_environment(device).items() if key != "argv"}
    row = StoredCertificate(**vars(found), run=run, environment=environment)
    kept = [old for old in read_certificates(path) if (old.run, old.split) != (run, found.split)]
    rows = sorted([*kept, row], key=lambda each: (each.run, each.split))
    write_json(path, {"certificates": [to_json(each) for each in rows]})
    return rows
