"""Statistics of log-weights (log-mean-exp, effective sample size, Pareto k-hat) and of images; special functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

# With fewer exceedances the Pareto fit is meaningless (Vehtari et al. 2024, arXiv 1507.02646, section 6).
_SMALLEST_TAIL = 5

# If all weights differ by less than this fraction of the largest, there is no tail: the fit would divide by zero.
_ROUNDING = 1e-12

_TENTHS = 10


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log (1/S) sum_s exp(log w_s) over the dimension ``dim`` of log-weights of any shape, nats, without overflow."""
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])


def bound_by_particles(log_w: Tensor, sizes: Sequence[int]) -> Tensor:
    """E[L_s], L_s = log (1/s) sum_{t <= s} w_t, estimated by the mean of L_s over the S // s disjoint blocks of s.

    The estimate is unbiased for every s; s = 1 is the ELBO. E[L_s] never falls with s (Burda et al. 2016, arXiv
    1509.00519, theorem 1), but noisy estimates can. A size that is not from 1 to S raises ValueError.

    log_w: (S, B), independent particles -> (len(sizes), B) nats, float64.
    """
    S = len(log_w)
    for s in sizes:
        if not 1 <= s <= S:
            raise ValueError(f"sizes: expected numbers from 1 to {S}, got {s}")
    blocks = (log_w[: S // s * s].double().unflatten(0, (-1, s)) for s in sizes)
    return torch.stack([log_mean_exp(block, dim=1).mean(0) for block in blocks])


def tail_length(num_particles: int) -> int:
    """M = min(S / 5, 3 sqrt(S)), the number of weights that the Pareto fit uses (Vehtari et al. 2024, 1507.02646)."""
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def _fit_pareto_shape(exceedances: Tensor) -> float:
    """The shape k of a generalized Pareto distribution; NaN or infinity if there is no fit."""
    if not exceedances[0] > _ROUNDING:
        return math.nan
    if exceedances[3 * len(exceedances) // 4] < torch.finfo(torch.double).tiny:  # the fit divides by a lower quartile
        return math.inf
    return fit_generalized_pareto(exceedances)[0]


def pareto_k(largest_log_w: Tensor) -> Tensor:
    """k-hat, the shape of a generalized Pareto distribution fitted to the largest weights.

    The weights have 1 / k moments: above 0.5 their variance is infinite, and above 0.7 an estimate from a practical
    number of particles is considered unreliable (Vehtari et al. 2024, arXiv 1507.02646).

    From the largest log-weights (M + 1, B) in descending order, whose last is the threshold, to (B,). It is NaN
    for fewer than 5 exceedances or if all are equal, and infinity if they exceed float64's range.
    """
    if len(largest_log_w) <= _SMALLEST_TAIL:
        return largest_log_w.new_full(largest_log_w.shape[1:], math.nan, dtype=torch.double)
    exceedances = (largest_log_w - largest_log_w[0]).double().exp()
    exceedances = (exceedances[:-1] - exceedances[-1]).T
    fitted = [_fit_pareto_shape(image) for image in exceedances.cpu()]
    return torch.tensor(fitted, dtype=torch.double, device=largest_log_w.device)


class LogWeightSummary:
    """Statistics of a stream of log-weights for each image, in memory that grows with sqrt(S) instead of S.

    With normalized weights v_s = w_s / sum_t w_t:

    - ``log_mean_exp``: L_S = log (1/S) sum_s w_s
    - ``effective_sample_size``: 1 / sum_s v_s^2
    - ``monte_carlo_stderr``: sqrt(sum_s v_s^2 - 1/S), the delta method's standard error of L_S over repeated draws
    - ``bias``: the jackknife's estimate of log p(x) - E[L_S], never negative: (S - 1) (L_S - (1/S) sum_s L_{-s}), with
      L_{-s} the bound without particle s. It assumes that the bias falls like 1/S, which is too fast for k above 0.5.
    - ``tenfold_gain``: L_S - (1/10) sum_g L_{S/10}, with the g-th tenth of the particles: what ten times as many
      particles gained
    - ``pareto_k``: see the function of this name

    The M largest log-weights are kept, the others summed. That is exact except for the bias, whose error is below
    1/(3 M^2) nats.

    Args:
        num_particles: S, the number of particles of the whole stream.
        num_images: B.
    """

    def __init__(self, num_particles: int, num_images: int, *, device: torch.device | str = "cpu") -> None:
        self.num_particles = num_particles
        nothing = torch.full((num_images,), -math.inf, dtype=torch.double, device=device)
        self._log_sum, self._log_sum_squares = nothing, nothing
        self._largest = nothing.new_empty((0, num_images))
        self._log_sums_of_tenths = [nothing] * _TENTHS
        self._seen = 0

    def update(self, log_w: Tensor) -> None:
        """Add (s, B) further log-weights, nats."""
        self._update_tenths(log_w.double())
        pool = torch.cat([self._largest, log_w.double()])
        kept = min(tail_length(self.num_particles) + 1, len(pool))
        pool = pool.sort(dim=0, descending=True).values
        self._largest, rest = pool[:kept], pool[kept:]
        if len(rest):
            self._log_sum = torch.logaddexp(self._log_sum, rest.logsumexp(0))
            self._log_sum_squares = torch.logaddexp(self._log_sum_squares, (2 * rest).logsumexp(0))

    def _update_tenths(self, log_w: Tensor) -> None:
        ends = [self.num_particles * (g + 1) // _TENTHS for g in range(_TENTHS)]
        while len(log_w):
            g = next(g for g, end in enumerate(ends) if self._seen < end)
            part, log_w = log_w[: ends[g] - self._seen], log_w[ends[g] - self._seen :]
            self._log_sums_of_tenths[g] = torch.logaddexp(self._log_sums_of_tenths[g], part.logsumexp(0))
            self._seen += len(part)

    def tenfold_gain(self) -> Tensor:
        """(B,) nats, at least 0 for tenths of equal sizes; NaN for fewer than 10 particles."""
        sizes = (torch.arange(_TENTHS + 1) * self.num_particles // _TENTHS).diff().to(self._log_sum)
        if not sizes.all():
            return torch.full_like(self._log_sum, math.nan)
        log_sums = torch.stack(self._log_sums_of_tenths)
        return log_sums.logsumexp(0) - sizes.sum().log() - (log_sums - sizes.log()[:, None]).mean(0)

    def _log_total(self) -> Tensor:
        return torch.logaddexp(self._largest.logsumexp(0), self._log_sum)

    def log_mean_exp(self) -> Tensor:
        """(B,) nats."""
        return self._log_total() - math.log(self.num_particles)

    def log_sum_squares(self) -> Tensor:
        """(B,) log sum_s w_s^2, nats."""
        return torch.logaddexp((2 * self._largest).logsumexp(0), self._log_sum_squares)

    def effective_sample_size(self) -> Tensor:
        """(B,) from 1 to S."""
        return (2 * self._log_total() - self.log_sum_squares()).exp()

    def monte_carlo_stderr(self) -> Tensor:
        """(B,) nats; NaN for one particle."""
        if self.num_particles == 1:
            return torch.full_like(self._log_sum, math.nan)
        return (1 / self.effective_sample_size() - 1 / self.num_particles).clamp(min=0).sqrt()

    def bias(self) -> Tensor:
        """(B,) nats, not below 0; NaN for one particle."""
        S = self.num_particles
        if S == 1:
            return torch.full_like(self._log_sum, math.nan)
        total = self._log_total()
        rest = (self._log_sum - total).exp() + (self._log_sum_squares - 2 * total).exp() / 2
        # log(1 - v): for the largest weight from what the others sum to, because 1 - v cancels where v is nearly 1.
        without_largest = torch.logaddexp(self._largest[1:].logsumexp(0), self._log_sum) - total
        without_others = torch.log1p(-(self._largest[1:] - total).exp()).sum(0)
        mean_log_without = (without_largest + without_others - rest) / S
        return (-(S - 1) * (mean_log_without + math.log(S / (S - 1)))).clamp(min=0)

    def pareto_k(self) -> Tensor:
        """(B,) k-hat; NaN for fewer than 21 particles, or where the largest weights are all equal."""
        return pareto_k(self._largest)


_LARGE = 2**28  # bytes; a larger array may be in a file, and is read once, row by row
_COLUMNS = 64  # per block: their sums stay in the processor's cache


def _split_columns(x: Tensor) -> Sequence[Tensor]:
    """Split x (..., D) into blocks of 64 columns, the last one of 64 to 127, which have the same sums bit for bit."""
    return x.tensor_split(list(range(_COLUMNS, x.shape[-1] - _COLUMNS + 1, _COLUMNS)), dim=-1)


def sum_over_images(x: Tensor, *, chunk: int = 1000) -> Tensor:
    """sum_n x_n. x: (N, *E) -> (*E), float64, ``chunk`` images at once if x is very large."""
    rows = chunk if x.numel() * x.element_size() > _LARGE else max(1, len(x))
    total = torch.zeros(math.prod(x.shape[1:]), dtype=torch.double, device=x.device)
    for part in x.reshape(-1, len(total)).split(rows):
        for columns, own_total in zip(_split_columns(part), _split_columns(total), strict=True):
            own_total += columns.sum(0, dtype=torch.double)
    return total.reshape(x.shape[1:])


def mean_and_variance(x: Tensor, *, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """mean_n x_n and mean_n (x_n - mean_n x_n)^2. x: (N, *E) -> (*E) and (*E), float64, ``chunk`` images at once."""
    mean = sum_over_images(x, chunk=chunk) / len(x)
    squares = torch.zeros(mean.numel(), dtype=torch.double, device=x.device)
    blocks = list(zip(_split_columns(mean.flatten()), _split_columns(squares), strict=True))
    for part in x.reshape(len(x), mean.numel()).split(chunk):
        for columns, (own_mean, own_squares) in zip(_split_columns(part), blocks, strict=True):
            own_squares += (columns.double() - own_mean).square().sum(0)
    return mean, squares.reshape(mean.shape) / len(x)


def location_and_spread(x: Tensor, *, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """The mean image, mean_n x_n, (*E), and one scale, sqrt(mean_nd (x_nd - mean_n x_nd)^2), (). x: (N, *E)."""
    mean, variance = mean_and_variance(x, chunk=chunk)
    return mean, variance.mean().sqrt()


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """sum_n coefficients[n] x^n, by Horner's rule, in the shape of x."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def bounded(h: Tensor, limit: float) -> Tensor:
    """limit tanh(h / limit): smooth, of slope one at h = 0, between -limit and limit, in the shape of h."""
    return limit * (h / limit).tanh()


HALF_LOG_TWO_PI = math.log(2 * math.pi) / 2

_SERIES_FROM = 8.0
# B_2n / (2 n (2 n - 1)), n = 1, 2, ...; from z = 8 on the first that is left out is below 1e-16.
_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)


def stirling_remainder(z: Tensor) -> Tensor:
    """s(z) = log Gamma(z) - (z - 1/2) log z + z - (1/2) log 2 pi, for z > 0.

    log Gamma(1,000) is 5,905, which single precision resolves to 0.0005; s(1,000) is 1 / 12,000. Where log-gamma
    functions are subtracted, as in a Beta's density, their large parts cancel on paper and s is left. It is computed by
    its series for z >= 8, and below from log Gamma(z + 8) = log Gamma(z) + sum_k log(z + k), k = 0, ..., 7, as

        s(z) = s(z + 8) - (z + 1/2) log [z / (z + 8)] - log prod_{k = 1}^{7} [(z + k) / (z + 8)] - 8.

    Reference: Abramowitz and Stegun 1964, 6.1.40 (the series) and 6.1.15 (the recurrence).
    """
    small = z < _SERIES_FROM
    inverse = 1 / torch.where(small, z + _SERIES_FROM, z)
    square = inverse.square()
    near = torch.where(small, z, _SERIES_FROM)  # both branches have gradients everywhere
    unit = 1 / (near + 8)
    middle, step = ((near + 4) * unit).square(), unit.square()  # (z + 1) (z + 7) = (z + 4)^2 - 9, and so on
    product = (near + 4) * unit * (middle - step) * (middle - 4 * step) * (middle - 9 * step)
    shift = (near + 0.5) * (near * unit).log() + product.log() + 8
    return inverse * polynomial(_SERIES, square) - torch.where(small, shift, 0.0)
