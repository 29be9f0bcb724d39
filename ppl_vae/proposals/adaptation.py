"""As many particles as an image asks for: an estimate of log p(x), and no bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ppl_vae.evidence import importance, in_evaluation_mode


class Adaptive(NamedTuple):
    """Estimates of log p(x), no bounds; every field is (N,).

    ``estimate`` is log (1/S_n) sum_s w_s in nats, float64; ``num_particles`` S_n, int64. ``bias`` is the delta method's
    estimate of what it lacks, Var(w) / (2 S E[w]^2), and ``rise`` what the last doubling changed, estimate minus the
    mean of its two halves; NaN where there was none. Both are nats, float64.
    """

    estimate: Tensor
    num_particles: Tensor
    bias: Tensor
    rise: Tensor


@torch.no_grad()
def adaptive(
    vae: Any,
    x: Tensor,
    *,
    num_particles: int = 1000,
    most: int = 64_000,
    tolerance: float = 0.02,
    progress: Callable[[int], None] | None = None,
) -> Adaptive:
    """log (1/S_n) sum_{s <= S_n} w_s, S_n doubled until an image's bias and rise are within the tolerance.

    It is an estimate and no bound: how many particles there are depends on what they were, so that images whose weights
    happen to agree stop early, whether too low or too high. All particles count. Draws come from torch's global
    generator; values are not validated.

    Args:
        vae: any, also ``with_guide``'s.
        x: images (N, *E).
        num_particles: S at first.
        most: where doubling ends, whatever the tolerance says.
        tolerance: nats.
        progress: called with the number of images that are done, N in all.

    Returns:
        ``Adaptive``.

    Raises:
        ValueError: ``most`` below ``num_particles``, or as ``importance``.

    Source: ours.
    """
    if most < num_particles:
        raise ValueError(f"most: expected at least num_particles, {num_particles}, got {most}")
    bias = torch.full((len(x),), math.nan, dtype=torch.double, device=x.device)
    rise, log_mean, log_mean_square = bias.clone(), bias.clone(), bias.clone()
    counts, waiting, old = torch.zeros_like(bias, dtype=torch.long), torch.arange(len(x), device=x.device), 0
    with in_evaluation_mode(vae), pyro.validation_enabled(False):
        while len(waiting):
            fresh = old or num_particles
            result = importance(vae.model, vae.guide, x[waiting], num_particles=fresh)
            before, log_square = log_mean[waiting], 2 * result.log_evidence + (fresh / result.ess).log()
            log_mean[waiting] = _joined(before, old, result.log_evidence, fresh)
            log_mean_square[waiting] = _joined(log_mean_square[waiting], old, log_square, fresh)
            old += fresh
            counts[waiting] = old
            bias[waiting] = ((log_mean_square - 2 * log_mean)[waiting].exp() - 1).clamp(min=0) / (2 * old)
            if old > fresh:
                rise[waiting] = log_mean[waiting] - (before + result.log_evidence) / 2
            done = (bias[waiting] <= tolerance) & ~(rise[waiting] > tolerance) | (2 * old > most)
            if progress is not None and done.any():
                progress(int(done.sum()))
            waiting = waiting[~done]
    return Adaptive(log_mean, counts, bias, rise)


def _joined(a: Tensor, count_a: int, b: Tensor, count_b: int) -> Tensor:
    """The logarithm of the mean over both sets, from those over each."""
    if count_a == 0:
        return b
    total = count_a + count_b
    return torch.logaddexp(a + math.log(count_a / total), b + math.log(count_b / total))
