"""As many particles as an image asks for: an estimate of log p(x), and no bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ppl_vae.evidence.importance import summarize_log_weights
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, serialize_threads
from ppl_vae.runtime.numerics import tenfold_gain
from ppl_vae.support import check_support


class Adaptive(NamedTuple):
    """Estimates of log p(x), no bounds; every field is (N,).

    ``estimate`` is log (1/S_n) sum_s w_s in nats, float64; ``num_particles`` is S_n, int64. ``rise`` is what ten times
    the particles gained: the estimate minus the mean of the ten that tenths of the same particles give, NaN below ten
    particles. ``bias`` is the delta method's estimate of what the estimate lacks, Var(w) / (2 S E[w]^2). It is a floor:
    of weights without a variance, those of a guide that is too narrow, it sees only the part that was drawn. Both are
    nats, float64.
    """

    estimate: Tensor
    num_particles: Tensor
    bias: Tensor
    rise: Tensor


@serialize_threads()
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
    generator.

    If the estimate lacks a / S^r, ten times the particles gained 10^r - 1 times what is
    still lacking: nine times for weights with a variance (r = 1), and at least as much down to r = 0.3. An image at
    ``most`` particles whose rise is above the tolerance has not converged. Both are of the draws that were made, so an
    image that has met no large weight stops too early: where a guide in 20 dimensions has 0.8 times the posterior's
    marginal scales, the estimates lack 0.07 nats on average, and those of the third that stopped within the tolerance
    0.4. ``defensive`` guards against narrow guides.

    Args:
        vae: any, also ``replace_guide``'s.
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
    num_particles, most = check_count("num_particles", num_particles), check_count("most", most)
    if most < num_particles:
        raise ValueError(f"most: expected at least num_particles, {num_particles}, got {most}")
    check_support(vae.model, x)
    empty = torch.full((len(x),), math.nan, dtype=torch.double, device=x.device)
    found = Adaptive(empty, torch.zeros_like(empty, dtype=torch.long), empty.clone(), empty.clone())
    waiting, sums = torch.arange(len(x), device=x.device), None
    with evaluation_mode(vae), pyro.validation_enabled(False):
        while len(waiting):
            fresh = _sums(vae, x[waiting], num_particles if sums is None else sums.num_particles)
            sums = fresh if sums is None else sums.joined(fresh)
            for field, values in zip(found, sums.summary(), strict=True):
                field[waiting] = values
            done = (found.bias[waiting] <= tolerance) & (found.rise[waiting] <= tolerance)
            done |= torch.full_like(done, 2 * sums.num_particles > most)
            if progress is not None and done.any():
                progress(int(done.sum()))
            waiting, sums = waiting[~done], sums.of_images(~done)
    return found


class _Sums(NamedTuple):
    """What is kept of the log-weights of n images: log-sums (10, n) of each tenth, sizes (10,), of squares (n,)."""

    of_tenths: Tensor
    sizes: Tensor
    of_squares: Tensor

    @property
    def num_particles(self) -> int:
        return int(self.sizes.sum())

    def joined(self, other: _Sums) -> _Sums:
        """Of both sets of particles, equally many: two tenths of one of them are a tenth of both."""
        of_tenths, sizes = (torch.cat(both).unflatten(0, (-1, 2)) for both in zip(self[:2], other[:2], strict=True))
        return _Sums(of_tenths.logsumexp(1), sizes.sum(1), torch.logaddexp(self.of_squares, other.of_squares))

    def of_images(self, index: Tensor) -> _Sums:
        return _Sums(self.of_tenths[:, index], self.sizes, self.of_squares[index])

    def summary(self) -> Adaptive:
        S, log_total = self.num_particles, self.of_tenths.logsumexp(0)
        excess = S * (self.of_squares - 2 * log_total).exp() - 1  # Var(w) / E[w]^2
        return Adaptive(
            estimate=log_total - math.log(S),
            num_particles=torch.full_like(log_total, S, dtype=torch.long),
            bias=excess.clamp(min=0) / (2 * S),
            rise=tenfold_gain(self.of_tenths, self.sizes),
        )


def _sums(vae: Any, x: Tensor, num_particles: int) -> _Sums:
    """Of fresh draws, in passes that fit into memory."""
    pairs = pairs_per_pass(vae, x)
    chunk = min(num_particles, pairs)
    parts = []
    for images in x.split(max(1, pairs // chunk)):
        summary, _, _ = summarize_log_weights(vae.model, vae.guide, images, num_particles, chunk=chunk)
        parts.append((*summary.tenths(), summary.log_sum_squares()))
    of_tenths, sizes, of_squares = zip(*parts, strict=True)
    return _Sums(torch.cat(of_tenths, dim=1), sizes[0], torch.cat(of_squares))
