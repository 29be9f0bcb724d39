"""The numbers of a certificate as evaluation.json holds them, from those of each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae.commands.certificate_stages import AISSummary
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.gaps import Gaps
from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.importance import UNRELIABLE_BIAS, Importance
from ppl_vae.evidence.rank_statistics import Ranks
from ppl_vae.evidence.typicality import typicality
from ppl_vae.runs.results import Quantiles


class Converging(NamedTuple):
    """Bounds by less effort on some of the images.

    Args:
        places: (n,) int64 of these images among the measured ones.
        temperatures, chains: the numbers T, ascending, and (K, n) the chains' bound with each; the last is in full.
        particles, weighed: the numbers s, ascending, and (K', n) E[L_s] with the guide.
    """

    places: Tensor
    temperatures: list[int]
    chains: Tensor
    particles: list[int]
    weighed: Tensor


class Scored(NamedTuple):
    """The same bound on log p(x), of two sets of images, nats.

    Args:
        own: (N,).
        other: (n,) of another data set.
    """

    own: Tensor
    other: Tensor


@dataclass(frozen=True)
class Measured:
    """The numbers of each image, (N,) of the split's unless said otherwise; what was left out is None, or empty.

    Args:
        index: the images' places in their split, int64, ascending.
        chains: annealed importance sampling.
        plain: importance sampling with the guide.
        smoothed: the Pareto-smoothed estimate by as many particles of the guide.
        improved: importance sampling with a proposal of each image's own.
        converging: some of them with less effort.
        simulated: of images of the model's own, from below and from above.
        gaps: by split, of others of its images.
        ranks: of the guide's calibration.
        scored: these images and those of another data set, by as many particles.
    """

    index: Tensor
    chains: AISSummary
    plain: Importance
    smoothed: Tensor
    improved: Importance
    converging: Converging
    simulated: tuple[AISSummary, AISSummary] | None
    gaps: dict[str, Gaps]
    ranks: Ranks | None
    scored: Scored | None

    @property
    def unreliable(self) -> Tensor:
        """(N,) bool."""
        return unreliable(self.chains, self.improved)


def numbers_of(found: Measured, num_particles: int) -> dict[str, Any]:
    """The entry's numbers, but for what was asked."""
    curves, ais = found.converging, found.chains.bound[found.converging.places]
    return {
        "ais": summarize_chains(found.chains),
        "importance": summarize_importance(found.plain, num_particles) | {"smoothed_estimate": _mean(found.smoothed)},
        "improved": summarize_importance(found.improved, num_particles),
        "ais_minus_importance": difference(found.chains, found.plain),
        "ais_minus_improved": difference(found.chains, found.improved),
        "total_gap": _mean(found.chains.bound - found.plain.elbo),
        "unreliable": found.index[found.unreliable].tolist(),
        "simulated": None if found.simulated is None else summarize_simulated(*found.simulated),
        "convergence": {
            "num_images": len(ais),
            "temperatures": summarize_curve(curves.temperatures, curves.chains, ais),
            "particles": summarize_curve(curves.particles, curves.weighed, ais),
        },
        "gaps": {split: summarize_gaps(each) for split, each in found.gaps.items()} or None,
        "calibration": None if found.ranks is None else judge(found.ranks).to_json(),
        "against": None if found.scored is None else typicality(*found.scored, num_particles=num_particles).to_json(),
    }


def unreliable(chains: AISSummary, improved: Importance) -> Tensor:
    """(N,) bool: where two bounds by different means are more than 0.5 nats apart, or the chains' own jackknife is.

    The jackknife of a single chain is NaN, and says nothing. Source: ours.
    """
    near = (chains.bound - improved.log_evidence).abs() <= UNRELIABLE_BIAS  # not so where both are -infinity
    return ~near | (chains.bias > UNRELIABLE_BIAS)


def summarize_chains(found: AISSummary) -> dict[str, Any]:
    """A bound of chains: mean, standard error over images, Monte Carlo error of the mean, what is still lacking."""
    return {
        **_mean(found.bound),
        "monte_carlo_stderr": _of_mean(found.monte_carlo_stderr),
        "bias": float(found.bias.mean()),
        "ess": vars(Quantiles.from_values(found.ess)),
        "acceptance": vars(Quantiles.from_values(found.acceptance)),
    }


def summarize_importance(found: Importance, num_particles: int) -> dict[str, Any]:
    """The same of L_S, with the jackknife-corrected estimate beside it, which is no bound."""
    return {
        **_mean(found.log_evidence),
        "num_particles": num_particles,
        "monte_carlo_stderr": _of_mean(found.monte_carlo_stderr),
        "bias": float(found.bias.mean()),
        "corrected_estimate": _mean(found.jackknife_estimate()),
        "rise": float(found.tenfold_gain.mean()),
        "elbo": _mean(found.elbo),
        "ess": vars(Quantiles.from_values(found.ess)),
        "pareto_k": vars(Quantiles.from_values(found.pareto_k)),
        "unreliable_images": int(found.unreliable().sum()),
    }


def difference(chains: AISSummary, other: Importance) -> dict[str, float]:
    """The chains' bound minus L_S, paired: its mean, standard error over images, and Monte Carlo error."""
    noise = torch.cat([chains.monte_carlo_stderr, other.monte_carlo_stderr])
    error = float(noise.square().sum().sqrt()) / len(chains.bound)
    return {**_mean(chains.bound - other.log_evidence), "monte_carlo_stderr": error}


def summarize_simulated(below: AISSummary, above: AISSummary) -> dict[str, Any]:
    """Both bounds of the model's own images, and the gap between them.

    The reverse chains of an image share its one exact draw, so how they differ says nothing of the upper bound's error.
    """
    unknown = {"monte_carlo_stderr": None, "bias": None, "ess": None}
    return {
        "num_images": len(below.bound),
        "lower": summarize_chains(below),
        "upper": summarize_chains(above) | unknown,
        "gap": _mean(above.bound - below.bound),
        "widest_gap": float((above.bound - below.bound).max()),
    }


def summarize_curve(effort: Sequence[int], bounds: Tensor, ais: Tensor) -> dict[str, list[float]]:
    """What bounds (K, N) of each effort lack of that of AIS in full (N,): the mean over images and its paired error."""
    lacking = [Estimate.from_values(bound - ais, 1) for bound in bounds]
    return {
        "effort": list(effort),
        "mean": [float(bound.mean()) for bound in bounds],
        "minus_ais": [each.mean for each in lacking],
        "minus_ais_stderr": [each.stderr for each in lacking],
    }


def summarize_gaps(found: Gaps) -> dict[str, Any]:
    """log p(x) - ELBO of one split, and its parts."""
    parts = {"log_evidence": found.log_evidence, "elbo": found.elbo, "refined_elbo": found.refined_elbo}
    parts |= {"total": found.total, "approximation": found.approximation, "amortization": found.amortization}
    return {"num_images": len(found.elbo)} | {name: _mean(values) for name, values in parts.items()}


def _mean(values: Tensor) -> dict[str, float]:
    return Estimate.from_values(values, 1).to_json()


def _of_mean(stderrs: Tensor) -> float:
    """Of the mean of independent numbers, from the standard error of each."""
    return float(stderrs.square().sum().sqrt()) / max(1, len(stderrs)) if len(stderrs) else math.nan
