"""Estimate log p(x) with as many particles as each image needs. An estimate, not a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ppl_vae.evidence.importance import summarize_log_weights
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, serialize_threads
from ppl_vae.runtime.numerics import tenfold_gain
from ppl_vae.support import check_support


@dataclass(frozen=True)
class AdaptiveEstimate:
    """Estimates of log p(x), not bounds; every field is (N,).

    Args:
        estimate: log (1/S_n) sum_s w_s, nats, float64.
        num_particles: S_n, int64.
        bias: The delta method's estimate of what the estimate lacks, Var(w) / (2 S E[w]^2), nats, float64. It is a
            lower bound: under a guide that is too narrow, the largest weights are not among those that were drawn.
        tenfold_gain: What ten times the particles gained: the estimate minus the mean of the ten estimates from tenths
            of the same particles, nats, float64. NaN below ten particles.
    """

    estimate: Tensor
    num_particles: Tensor
    bias: Tensor
    tenfold_gain: Tensor


@serialize_threads()
@torch.no_grad()
def estimate_adaptively(
    vae: LatentModel, x: Tensor, *, num_particles: int = 1000, most: int = 64_000, tolerance: float = 0.02
) -> AdaptiveEstimate:
    """log (1/S_n) sum_{s <= S_n} w_s, with S_n doubled until bias and tenfold gain are within the tolerance.

    It is no bound: the number of particles depends on their weights, so that images whose weights happen to agree stop
    early. Draws come from torch's global generator.

    If the estimate lacks a / S^r, the tenfold gain is 10^r - 1 times what is still lacking: nine times for weights with
    a variance (r = 1), and at least as much down to r = 0.3. An image that reaches ``most`` particles with a gain above
    the tolerance has not converged. An image without a large weight among its draws stops too early, which costs tenths
    of a nat under a narrow guide; ``defend_proposal`` guards against such guides.

    Args:
        vae: A VAE, also one from ``replace_guide``.
        x: Images (N, *E).
        num_particles: S at first.
        most: The largest S_n.
        tolerance: In nats.

    Raises:
        ValueError: ``most`` is below ``num_particles``, or as ``importance``.

    Source: ours.
    """
    num_particles, most = check_count("num_particles", num_particles), check_count("most", most)
    if most < num_particles:
        raise ValueError(f"most: expected at least num_particles, {num_particles}, got {most}")
    check_support(vae.model, x)
    found = torch.full((3, len(x)), math.nan, dtype=torch.double, device=x.device)
    counts = torch.zeros(len(x), dtype=torch.long, device=x.device)
    waiting, sums = torch.arange(len(x), device=x.device), None
    with evaluation_mode(vae), pyro.validation_enabled(False):
        while len(waiting):
            fresh = _draw_sums(vae, x[waiting], num_particles if sums is None else sums.num_particles)
            sums = fresh if sums is None else sums.join(fresh)
            found[:, waiting] = sums.summarize()
            counts[waiting] = sums.num_particles
            done = (found[1:, waiting] <= tolerance).all(0)
            done |= torch.full_like(done, 2 * sums.num_particles > most)
            waiting, sums = waiting[~done], sums.select(~done)
    estimate, bias, gain = found
    return AdaptiveEstimate(estimate, counts, bias, gain)


@dataclass(frozen=True)
class _Sums:
    """Sums over the particles of n images.

    Args:
        log_tenths: (10, n) log sum of the weights in each tenth of the particles.
        sizes: (10,) the numbers of particles in the tenths.
        log_squares: (n,) log sum of squared weights.
    """

    log_tenths: Tensor
    sizes: Tensor
    log_squares: Tensor

    @property
    def num_particles(self) -> int:
        return int(self.sizes.sum())

    def join(self, other: _Sums) -> _Sums:
        """The sums over both sets of equally many particles: two tenths of one set are a tenth of both."""
        log_tenths = torch.cat([self.log_tenths, other.log_tenths]).unflatten(0, (-1, 2)).logsumexp(1)
        sizes = torch.cat([self.sizes, other.sizes]).unflatten(0, (-1, 2)).sum(1)
        return _Sums(log_tenths, sizes, torch.logaddexp(self.log_squares, other.log_squares))

    def select(self, index: Tensor) -> _Sums:
        return _Sums(self.log_tenths[:, index], self.sizes, self.log_squares[index])

    def summarize(self) -> Tensor:
        """(3, n): estimate, bias and tenfold gain."""
        S, log_total = self.num_particles, self.log_tenths.logsumexp(0)
        relative_variance = (S * (self.log_squares - 2 * log_total).exp() - 1).clamp(min=0)  # Var(w) / E[w]^2
        gain = tenfold_gain(self.log_tenths, self.sizes)
        return torch.stack([log_total - math.log(S), relative_variance / (2 * S), gain])


def _draw_sums(vae: LatentModel, x: Tensor, num_particles: int) -> _Sums:
    """Sums over fresh particles, in passes that fit into memory."""
    pairs = pairs_per_pass(vae, x)
    chunk = min(num_particles, pairs)
    parts = []
    for images in x.split(max(1, pairs // chunk)):
        summary, _, _ = summarize_log_weights(vae.model, vae.guide, images, num_particles, chunk=chunk)
        parts.append((*summary.tenths(), summary.log_sum_squares()))
    log_tenths, sizes, log_squares = zip(*parts, strict=True)
    return _Sums(torch.cat(log_tenths, dim=1), sizes[0], torch.cat(log_squares))
