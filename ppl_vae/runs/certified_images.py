"""The numbers of each image in a certificate, and how a certificate summarizes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate, combine_stderrs
from ppl_vae.evidence.gaps import Gaps
from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.importance import UNRELIABLE_BIAS, Importance
from ppl_vae.evidence.rank_statistics import Ranks
from ppl_vae.evidence.typicality import typicality
from ppl_vae.runs.certificate_results import (
    Bound,
    ChainBound,
    Convergence,
    ConvergenceCurve,
    GuideBound,
    ImportanceBound,
    OtherDataset,
    SimulatedBounds,
    SplitGap,
)
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.results import ImagesMean, Quantiles


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


class ConvergenceBounds(NamedTuple):
    """Bounds with less effort on some of the images.

    Args:
        places: (n,) int64 of these images among the measured ones.
        temperatures, annealed: the numbers T, ascending, and (K, n) the chains' bounds; the last is the full one.
        particles, weighed: the numbers s, ascending, and (K', n) E[L_s] with the guide.
    """

    places: Tensor
    temperatures: list[int]
    annealed: Tensor
    particles: list[int]
    weighed: Tensor


class ScoredImages(NamedTuple):
    """The same bound on log p(x), nats, of the run's own images (N,) and of another data set's (n,), with its name."""

    own: Tensor
    other: Tensor
    dataset: str


@dataclass(frozen=True)
class CertifiedImages:
    """The numbers of each image, (N,) for the split's images unless said otherwise. What was not asked for is None.

    Args:
        index: the images' places in their split, int64, ascending.
        chains: annealed importance sampling.
        plain: importance sampling with the guide.
        smoothed: the Pareto-smoothed estimate from as many particles of the guide.
        improved: importance sampling with a proposal refined for each image.
        convergence: some of the images with less effort.
        simulated: images of the model itself, from below and from above.
        gaps: by split, for other images.
        ranks: of the guide's calibration.
        scored: these images and those of another data set, with the same number of particles.
    """

    index: Tensor
    chains: AISSummary
    plain: Importance
    smoothed: Tensor
    improved: Importance
    convergence: ConvergenceBounds
    simulated: tuple[AISSummary, AISSummary] | None
    gaps: dict[str, Gaps]
    ranks: Ranks | None
    scored: ScoredImages | None

    @property
    def unreliable(self) -> Tensor:
        """(N,) bool: where two kinds of bound differ by more than 0.5 nats, or the chains' jackknife bias is as large.

        The jackknife of a single chain is NaN, and ignored. Source: ours.
        """
        near = (self.chains.bound - self.improved.log_evidence).abs() <= UNRELIABLE_BIAS  # False if both are -infinity
        return ~near | (self.chains.bias > UNRELIABLE_BIAS)


# --- Their summary ---


def summarize_images(found: CertifiedImages, num_particles: int) -> JsonObject:
    """The fields of a ``Certificate`` that summarize the numbers of each image."""
    curves, ais = found.convergence, found.chains.bound[found.convergence.places]
    plain = vars(summarize_importance(found.plain, num_particles))
    return {
        "ais": summarize_chains(found.chains),
        "importance": GuideBound(**plain, smoothed_estimate=Estimate.from_values(found.smoothed)),
        "improved": summarize_importance(found.improved, num_particles),
        "ais_minus_importance": _difference(found.chains, found.plain),
        "ais_minus_improved": _difference(found.chains, found.improved),
        "total_gap": Estimate.from_values(found.chains.bound - found.plain.elbo),
        "unreliable": tuple(found.index[found.unreliable].tolist()),
        "simulated": None if found.simulated is None else summarize_simulated(*found.simulated),
        "convergence": Convergence(
            len(ais),
            _summarize_curve(curves.temperatures, curves.annealed, ais),
            _summarize_curve(curves.particles, curves.weighed, ais),
        ),
        "gaps": {split: _summarize_gaps(gaps) for split, gaps in found.gaps.items()} or None,
        "calibration": None if found.ranks is None else judge(found.ranks),
        "against": None if found.scored is None else _summarize_scores(found.scored, num_particles),
    }


def summarize_chains(found: AISSummary) -> ChainBound:
    """The mean bound of chains."""
    mean = Estimate.from_values(found.bound)
    ess, acceptance = Quantiles.from_values(found.ess), Quantiles.from_values(found.acceptance)
    return ChainBound(
        mean.mean, mean.stderr, combine_stderrs(found.monte_carlo_stderr), float(found.bias.mean()), ess, acceptance
    )


def summarize_importance(found: Importance, num_particles: int) -> ImportanceBound:
    """The mean L_S, and an estimate of log p(x) that is not a bound."""
    mean = Estimate.from_values(found.log_evidence)
    return ImportanceBound(
        mean=mean.mean,
        stderr=mean.stderr,
        monte_carlo_stderr=combine_stderrs(found.monte_carlo_stderr),
        bias=float(found.bias.mean()),
        num_particles=num_particles,
        corrected_estimate=Estimate.from_values(found.jackknife_estimate()),
        rise=float(found.tenfold_gain.mean()),
        elbo=Estimate.from_values(found.elbo),
        ess=Quantiles.from_values(found.ess),
        pareto_k=Quantiles.from_values(found.pareto_k),
        unreliable_images=int(found.unreliable().sum()),
    )


def summarize_simulated(below: AISSummary, above: AISSummary) -> SimulatedBounds:
    """Both bounds. The reverse chains of an image share its exact draw, so they do not show the upper bound's error."""
    gap, upper = above.bound - below.bound, Estimate.from_values(above.bound)
    acceptance = Quantiles.from_values(above.acceptance)
    return SimulatedBounds(
        num_images=len(gap),
        lower=summarize_chains(below),
        upper=ChainBound(upper.mean, upper.stderr, None, None, None, acceptance),
        gap=Estimate.from_values(gap),
        widest_gap=float(gap.max()),
    )


def _difference(chains: AISSummary, other: Importance) -> Bound:
    """The chains' bound minus L_S, paired."""
    mean = Estimate.from_values(chains.bound - other.log_evidence)
    noise = torch.cat([chains.monte_carlo_stderr, other.monte_carlo_stderr])
    return Bound(mean.mean, mean.stderr, float(noise.square().sum().sqrt()) / len(chains.bound))


def _summarize_curve(effort: Sequence[int], bounds: Tensor, ais: Tensor) -> ConvergenceCurve:
    """Bounds (K, N) by effort, and their difference from annealed importance sampling in full (N,)."""
    differences = [Estimate.from_values(bound - ais) for bound in bounds]
    return ConvergenceCurve(
        tuple(effort),
        tuple(float(bound.mean()) for bound in bounds),
        tuple(each.mean for each in differences),
        tuple(each.stderr for each in differences),
    )


def _summarize_gaps(found: Gaps) -> SplitGap:
    names = ("log_evidence", "elbo", "refined_elbo", "total", "approximation", "amortization")
    return SplitGap(len(found.elbo), *(Estimate.from_values(getattr(found, name)) for name in names))


def _summarize_scores(found: ScoredImages, num_particles: int) -> OtherDataset:
    numbers = typicality(found.own, found.other, num_particles=num_particles)
    return OtherDataset(
        found.dataset,
        ImagesMean(numbers.own.mean, numbers.own.stderr, len(found.own)),
        ImagesMean(numbers.other.mean, numbers.other.stderr, len(found.other)),
        num_particles,
        numbers.above_median,
        numbers.above_lowest,
        numbers.density,
        numbers.distance,
        numbers.words,
    )
