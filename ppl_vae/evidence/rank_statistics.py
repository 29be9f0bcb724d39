"""Statistics of ranks: whether they are uniform, and which normals would explain them if they are not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.runtime.errors import check_count

MAX_BINS = 20  # of a histogram. Source: ours
_MIN_EXPECTED = 10  # ranks per bin, so that the tail of the chi-square distribution holds
STDERRS = 3.0  # by which a scale or a location must be off to be called so. Source: ours


@dataclass(frozen=True)
class Ranks:
    """The rank of the z* that made an image among M draws of q(z | x): uniform on 0, ..., M for the exact posterior.

    Args:
        latents: (N, L) int64, of each latent.
        log_joint: (N,) int64, of log p(x, z*) among the log p(x, z_m).
        num_draws: M.
    """

    latents: Tensor
    log_joint: Tensor
    num_draws: int

    @property
    def all(self) -> Tensor:
        """(N, L + 1) the ranks of the latents, and in the last column that of log p(x, z)."""
        return torch.cat([self.latents, self.log_joint[:, None]], dim=1)


# --- Uniformity ---


def bin_edges(num_simulations: int, num_draws: int) -> Tensor:
    """(K + 1,) int64 from 0 to M + 1: bin k holds the ranks from edge k up to, not including, edge k + 1.

    Bins are as equal as possible. K is 20, or fewer so that each bin expects at least ten ranks and holds one.
    """
    K = max(min(2, num_draws + 1), min(MAX_BINS, num_draws + 1, num_simulations // _MIN_EXPECTED))
    return torch.arange(K + 1) * (num_draws + 1) // K


def count_ranks(ranks: Tensor, edges: Tensor) -> Tensor:
    """(..., K) the number of ranks in each bin, int64. ranks: (N, ...)."""
    return torch.stack([(ranks < edge).sum(0) for edge in edges.tolist()], dim=-1).diff()


def rank_p_values(found: Ranks) -> Tensor:
    """P(chi^2_{K-1} >= sum_k (n_k - N pi_k)^2 / (N pi_k)) for uniform ranks, of each quantity.

    pi_k is the share of the M + 1 ranks that bin k holds.

    Returns:
        (L + 1,) float64: of each latent, and last of log p(x, z). They depend on each other.

    Reference: Pearson 1900; for ranks Talts et al. 2018, arXiv 1804.06788, section 5.
    """
    N = len(found.latents)
    at = bin_edges(N, found.num_draws)
    expected = N * at.diff().double() / (found.num_draws + 1)
    statistic = ((count_ranks(found.all, at) - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (len(expected) - 1) / 2), statistic / 2)


def adjust_p_values(p: Tensor) -> Tensor:
    """Holm's correction, max_{j <= i} min(1, (n - j + 1) p_(j)) for the i-th smallest of n p-values.

    The smallest corrected one is the p-value of "all ranks are uniform". p: (n,) -> (n,), in the same order.

    Reference: Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    ordered, order = p.sort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype, device=p.device)
    return torch.empty_like(p).scatter_(0, order, (factors * ordered).clamp(max=1).cummax(0).values)


def cumulative_band(num_simulations: int, num_draws: int, *, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """A band that holds the whole distribution function of N uniform ranks with the given probability.

        n_k ~ Binomial(N, t_k),   t_k = edge_k / (M + 1),   lower_k <= n_k <= upper_k for all k at once

    The bounds are quantiles of each binomial, at one level for all k, found by 20,000 simulations with a fixed seed.

    Args:
        num_simulations, num_draws: N and M.
        coverage: The probability, for all k together.

    Returns:
        t, lower and upper, each (K - 1,): the bins' inner edges, and bounds on the share of ranks below them.

    Reference: Säilynoja et al. 2022, arXiv 2103.10522, section 2 (by simulation).
    """
    N = num_simulations
    t = bin_edges(N, num_draws)[1:-1].double() / (num_draws + 1)
    n = torch.arange(N + 1, dtype=torch.double)[:, None]
    log_choose = torch.lgamma(torch.tensor(N + 1.0, dtype=torch.double)) - torch.lgamma(n + 1) - torch.lgamma(N - n + 1)
    mass = (log_choose + n * t.log() + (N - n) * (-t).log1p()).exp()
    at_most, at_least = mass.cumsum(0).clamp(max=1), mass.flip(0).cumsum(0).flip(0).clamp(max=1)
    tail = torch.minimum(at_most, at_least)
    level = tail.gather(0, _simulated_counts(N, t)).min(1).values.sort().values[int((1 - coverage) * _BAND_DRAWS)]
    inside = tail >= level
    lower = inside.int().argmax(0)
    upper = N - inside.flip(0).int().argmax(0)
    return t, lower.double() / N, upper.double() / N


_BAND_DRAWS = 20_000


def _simulated_counts(N: int, t: Tensor) -> Tensor:
    """(20,000, K - 1) int64: how many of N uniform numbers are below each t."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(_BAND_DRAWS, len(t), dtype=torch.double)
    before, last = torch.zeros(_BAND_DRAWS, dtype=torch.double), 0.0
    for k, edge in enumerate(t.tolist()):
        share = torch.full_like(before, (edge - last) / (1 - last))
        before = before + torch.binomial(N - before, share, generator=generator)
        counts[:, k], last = before, edge
    return counts.long()


# --- Normals that would explain the ranks ---


@dataclass(frozen=True)
class NormalShape:
    """The normals q = N(m + d s, (c s)^2), the guide, and p = N(m, s^2), the posterior, that would explain the ranks.

    Args:
        scale: (n,) c, the guide's scale over the posterior's: below 1 for a U-shaped histogram of ranks, above for a
            hump.
        scale_stderr: (n,).
        shift: (n,) d, how far the guide lies above the posterior, in the posterior's scales: a sloped histogram.
        shift_stderr: (n,).
        mean_scale: The mean of the n scales.
        mean_scale_stderr: Over simulations, which includes the correlations between the n scales.
    """

    scale: Tensor
    scale_stderr: Tensor
    shift: Tensor
    shift_stderr: Tensor
    mean_scale: float
    mean_scale_stderr: float

    @property
    def narrow(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.scale + STDERRS * self.scale_stderr < 1

    @property
    def wide(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.scale - STDERRS * self.scale_stderr > 1

    @property
    def shifted(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.shift.abs() > STDERRS * self.shift_stderr


def estimate_shape(ranks: Tensor, num_draws: int) -> NormalShape:
    """c and d with E[u] = Phi(a) and E[u^2] = Phi_2(a, a; r), r = 1 / (1 + c^2), a = -d sqrt(r).

    u = Q(z* | x), the guide's distribution function, is Phi((z* - m - d s) / (c s)), and a rank is Binomial(M, u). The
    means of R / M and R (R - 1) / (M (M - 1)) therefore estimate those of u and u^2. Phi_2 is the distribution function
    of two standard normals of correlation r. Standard errors are the delta method's.

    A guide of the right scale that is misplaced upward in some images and downward in others also looks too narrow. The
    result is NaN for a quantity whose ranks are all the same, and the means are over the others.

    Args:
        ranks: (N, n) from 0 to M.
        num_draws: M, at least 2; a smaller one raises ValueError.

    Reference: ours; of Phi_2, Plackett 1954, Biometrika 41(3-4), 351-360.
    """
    num_draws = check_count("num_draws", num_draws, least=2)
    N, M = len(ranks), num_draws
    R = ranks.double()
    least = 1 / (2 * N * M)  # if all ranks are at one end, count half of one draw at the other
    mean = (R / M).mean(0).clamp(least, 1 - least)
    square = (R * (R - 1) / (M * (M - 1))).mean(0)
    a = torch.special.ndtri(mean)
    r = _correlation(a, mean, square)
    slope = torch.exp(-a.square() / (1 + r)) / (2 * math.pi * (1 - r.square()).sqrt())  # of Phi_2 in r
    a_each = (R / M - mean) * math.sqrt(2 * math.pi) * torch.exp(a.square() / 2)
    share = torch.special.ndtr(a * ((1 - r) / (1 + r)).sqrt())
    r_each = (R * (R - 1) / (M * (M - 1)) - square - 2 * share * (R / M - mean)) / slope
    scale, shift = ((1 - r) / r).sqrt(), -a / r.sqrt()
    scale_each = -r_each / (2 * r.square() * scale)
    shift_each = -a_each / r.sqrt() + a / (2 * r**1.5) * r_each
    known = (R[0] != R).any(0)
    return NormalShape(
        scale=scale.where(known, math.nan),
        scale_stderr=_mean_stderr(scale_each).where(known, math.nan),
        shift=shift.where(known, math.nan),
        shift_stderr=_mean_stderr(shift_each).where(known, math.nan),
        mean_scale=float(scale[known].mean()),
        mean_scale_stderr=float(_mean_stderr(scale_each[:, known].mean(1))),
    )


def _mean_stderr(values: Tensor) -> Tensor:
    """The standard error of the mean over the first of (N, ...); NaN for one value."""
    N = len(values)
    return values.std(0) / math.sqrt(N) if N > 1 else torch.full_like(values[0], math.nan)


_NODES = (torch.arange(64, dtype=torch.double) + 0.5) / 64
_LARGEST_ANGLE = math.pi / 2 - 1e-3  # a scale of 0.0005


def _correlation(a: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """The r in (0, 1) with Phi_2(a, a; r) = square, by bisection, or the nearest there is. All (n,).

    Phi_2(a, a; r) = Phi(a)^2 + int_0^{asin r} exp(-a^2 / (1 + sin t)) dt / (2 pi), which rises with r.
    """
    low, high = torch.full_like(a, 1e-3), torch.full_like(a, _LARGEST_ANGLE)
    for _ in range(50):
        angle = (low + high) / 2
        heights = torch.exp(-a[:, None].square() / (1 + (angle[:, None] * _NODES).sin())).mean(-1)
        too_low = mean.square() + angle * heights / (2 * math.pi) < square
        low, high = torch.where(too_low, angle, low), torch.where(too_low, high, angle)
    return ((low + high) / 2).sin()
