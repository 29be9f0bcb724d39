"""A certificate: the numbers of each image, their summary in evaluation.json, and files of several certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate, combine_stderrs
from ppl_vae.evidence.guide_calibration import GuideCalibration, Ranks
from ppl_vae.evidence.importance import UNRELIABLE_BIAS, Importance
from ppl_vae.evidence.refinement import Gaps
from ppl_vae.evidence.typicality import Typicality
from ppl_vae.runs.files import JsonObject, write_json
from ppl_vae.runs.outputs import describe_environment
from ppl_vae.runs.results import ImportanceSummary, Provenance, Quantiles, read_rows, summarize_importance, to_json

CERTIFICATE = "certificate-"  # begins the key of each certificate in evaluation.json; its split follows


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The mean of a bound over images, nats per image."""

    mean: float
    stderr: float  # over images
    monte_carlo_stderr: float | None  # what other draws would change; None if it is not known

    @property
    def estimate(self) -> Estimate:
        """The mean and its standard error over images."""
        return Estimate(self.mean, self.stderr)


@dataclass(frozen=True, kw_only=True)
class ChainBound(Bound):
    """The bound of chains; ``bias`` is what the jackknife sees still lacking, nats per image."""

    bias: float | None = None
    ess: Quantiles | None = None
    acceptance: Quantiles


@dataclass(frozen=True, kw_only=True)
class ImportanceBound(ImportanceSummary, Bound):
    """L_S. ``corrected_estimate``, by the jackknife, is not a bound."""

    num_particles: int
    corrected_estimate: Estimate


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


@dataclass(frozen=True, kw_only=True)
class Certificate(Provenance):
    """log p(x) of a split from both sides: an entry of evaluation.json. What was not asked for is None.

    Args:
        temperatures, leapfrogs, chains, start: how chains were annealed.
        num_particles: S.
        step: of the weights.
        importance, improved: importance sampling, with the guide and with a proposal refined for each image.
        ais_minus_importance, ais_minus_improved: paired differences.
        total_gap: log p(x) - ELBO, by annealed importance sampling.
        unreliable: the places of unreliable images in their split.
        gaps: by split, the parts of log p(x) - ELBO.
        against: another data set.
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
    importance: ImportanceBound
    improved: ImportanceBound
    ais_minus_importance: Bound
    ais_minus_improved: Bound
    total_gap: Estimate | None = None
    unreliable: tuple[int, ...]
    simulated: SimulatedBounds | None
    convergence: Convergence
    gaps: dict[str, SplitGap] | None
    calibration: GuideCalibration | None
    against: Typicality | None
    stage_seconds: dict[str, float]
    seconds: float


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


class AISSummary(NamedTuple):
    """What C chains say of each image; every field is (N,), float64.

    ``bound`` is the bound on log p(x) in nats, from below or from above; ``monte_carlo_stderr`` is its error by the
    delta method and ``bias`` the jackknife's estimate of its distance from log p(x), both NaN for one chain; ``ess`` is
    from 1 to C; ``acceptance`` is the mean over chains and temperatures, NaN if nothing moved.
    """

    bound: Tensor
    monte_carlo_stderr: Tensor
    bias: Tensor
    ess: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class CertifiedImages:
    """The numbers of each image that figures show, (N,). What was not asked for is None."""

    index: Tensor  # the images' places in their split, int64, ascending
    chains: AISSummary
    plain: Importance  # with the guide
    improved: Importance  # with a proposal refined for each image
    ranks: Ranks | None  # of the guide's calibration
    scored: tuple[Tensor, Tensor] | None  # L_S of these images (N,) and of another data set's (n,), with one guide

    @property
    def unreliable(self) -> Tensor:
        """(N,) bool: where two kinds of bound differ by more than 0.5 nats, or the chains' jackknife bias is as large.

        The jackknife of a single chain is NaN, and ignored. Source: ours.
        """
        near = (self.chains.bound - self.improved.log_evidence).abs() <= UNRELIABLE_BIAS  # False if both are -infinity
        return ~near | (self.chains.bias > UNRELIABLE_BIAS)


def summarize_chains(found: AISSummary) -> ChainBound:
    """The mean bound of chains."""
    return ChainBound(
        **Estimate.mean_of(found.bound).to_json(),
        monte_carlo_stderr=combine_stderrs(found.monte_carlo_stderr),
        bias=float(found.bias.mean()),
        ess=Quantiles.compute(found.ess),
        acceptance=Quantiles.compute(found.acceptance),
    )


def summarize_bound(found: Importance, num_particles: int) -> ImportanceBound:
    """The mean L_S, and an estimate of log p(x) that is not a bound."""
    return ImportanceBound(
        **vars(summarize_importance(found, num_particles)) | Estimate.mean_of(found.log_evidence).to_json(),
        num_particles=num_particles,
        corrected_estimate=Estimate.mean_of(found.jackknife_estimate()),
    )


def summarize_simulated(below: AISSummary, above: AISSummary) -> SimulatedBounds:
    """Both bounds. The reverse chains of an image share its exact draw, so they do not show the upper bound's error."""
    gap, upper = above.bound - below.bound, Estimate.mean_of(above.bound)
    acceptance = Quantiles.compute(above.acceptance)
    return SimulatedBounds(
        num_images=len(gap),
        lower=summarize_chains(below),
        upper=ChainBound(mean=upper.mean, stderr=upper.stderr, monte_carlo_stderr=None, acceptance=acceptance),
        gap=Estimate.mean_of(gap),
        widest_gap=float(gap.max()),
    )


def subtract_importance(chains: AISSummary, other: Importance) -> Bound:
    """The chains' bound minus L_S, paired."""
    noise = torch.cat([chains.monte_carlo_stderr, other.monte_carlo_stderr])
    stderr = float(noise.square().sum().sqrt()) / len(chains.bound)
    return Bound(**Estimate.mean_of(chains.bound - other.log_evidence).to_json(), monte_carlo_stderr=stderr)


def summarize_curve(effort: Sequence[int], bounds: Tensor, ais: Tensor) -> ConvergenceCurve:
    """Bounds (K, N) by effort, and their difference from annealed importance sampling in full (N,)."""
    differences = [Estimate.mean_of(bound - ais) for bound in bounds]
    return ConvergenceCurve(
        tuple(effort),
        tuple(float(bound.mean()) for bound in bounds),
        tuple(each.mean for each in differences),
        tuple(each.stderr for each in differences),
    )


def summarize_gaps(found: Gaps) -> SplitGap:
    """The means of the parts of log p(x) - ELBO."""
    names = ("log_evidence", "elbo", "refined_elbo", "total", "approximation", "amortization")
    return SplitGap(len(found.elbo), *(Estimate.mean_of(getattr(found, name)) for name in names))
