"""Likelihoods of numbers between 0 and 1: densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ppl_vae import data
from ppl_vae.likelihoods.features import bounded, planes, unbounded
from ppl_vae.likelihoods.marginals import ascend, mean_and_variance, mean_logs
from ppl_vae.likelihoods.pixel import Pixel
from ppl_vae.likelihoods.real import NormalPerPixel
from ppl_vae.likelihoods.stirling import HALF_LOG_TWO_PI, stirling_remainder


class _OpenUnitInterval(constraints.Constraint):
    """0 < x < 1."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "OpenUnitInterval()"


open_unit_interval = _OpenUnitInterval()


# B_2n / (2 n)!, n = 1, 2, ...: h coth(h / 2) / 2 = 1 + sum_n of them h^2n. To |h| = 1/2 seven give 16 digits.
_BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_COTH = tuple(b / math.factorial(2 * n) for n, b in enumerate(_BERNOULLI_NUMBERS, 1))
_LOG_SINHC = tuple(c / (2 * n) for n, c in enumerate(_COTH, 1))  # log [sinh(h / 2) / (h / 2)] is their sum
_SERIES_BELOW = 0.5


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """sum_n coefficients[n] x^n."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


class StableContinuousBernoulli(Pixel):
    """p(x) = e^{h x} h / (e^h - 1), 0 <= x <= 1, for every logit h.

    Pyro's is off by nats in float32 at large logits, and takes a Taylor polynomial where the probability is near 1/2.

    Args:
        logits: h, the batch's shape.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012, as torch has it
    support = constraints.unit_interval
    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-h) - 1 / h, by its series 1/2 + h / 12 - ... where |h| < 1/2."""
        h = self.logits
        small = h.abs() < _SERIES_BELOW
        near, far = torch.where(small, h, 0.0), torch.where(small, 1.0, h)
        return torch.where(small, 0.5 + near * _polynomial(_COTH, near.square()), -1 / torch.expm1(-far) - 1 / far)

    @property
    def mode(self) -> Tensor:
        """1 where h > 0, else 0: the density is monotone (at h = 0 constant, and every x is a mode)."""
        return (self.logits > 0).to(self.logits.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """x = -log(1 - u (1 - e^-|h|)) / |h|, u ~ Uniform[0, 1), which falls from 0 on; 1 - x where h > 0.

        (*sample_shape, *batch_shape).
        """
        u, h = self.uniform(sample_shape), self.logits
        a = h.abs().clamp(min=torch.finfo(h.dtype).tiny)  # at 0 the quotient would be 0 / 0; its limit is u
        x = -torch.log1p(u * torch.expm1(-a)) / a
        return torch.where(h > 0, 1 - x, x).clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), (*sample_shape, *batch_shape), nats.

        -|h| d - log [(1 - e^-|h|) / |h|], d the distance from the mode, which cancels nothing however large h is; where
        |h| < 1/2, h (x - 1/2) - log [sinh(h / 2) / (h / 2)] by its series, because the other's gradient is the
        difference of two numbers of the size of 1 / h there, and none at 0.
        """
        if self._validate_args:
            self._validate_sample(value)
        h = self.logits
        small = h.abs() < _SERIES_BELOW
        near = torch.where(small, h, 0.0)  # each branch on its own side, so that both have gradients
        a = torch.where(small, 1.0, h.abs())
        square = near.square()
        log_sinhc = square * _polynomial(_LOG_SINHC, square)
        steep = -a * torch.where(h > 0, 1 - value, value) - (-torch.expm1(-a) / a).log()
        return torch.where(small, near * (value - 0.5) - log_sinhc, steep)


def _natural_parameter(mean: Tensor) -> Tensor:
    """The h at which 1 / (1 - e^-h) - 1 / h is that mean, by bisection. float64, means from 0.001 to 0.999."""
    low, high = torch.full_like(mean, -1100.0), torch.full_like(mean, 1100.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_below = StableContinuousBernoulli(middle).mean < mean
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


class ContinuousBernoulli(nn.Module):
    """p(x | h) = prod_d e^{h_d x_d} h_d / (e^{h_d} - 1), for x in [0, 1]^E.

    What a Bernoulli's formula becomes on gray pixels once it is divided by its integral: a density, with one feature a
    pixel that says both where the pixel is and how sure. It is monotone: its peaks are black and white alone.

    Args:
        event_shape: E, the shape of an image.

    Reference: Loaiza-Ganem and Cunningham 2019, arXiv 1907.06845.
    """

    support = constraints.unit_interval
    support_words = "numbers from 0 to 1"
    measure = "density"
    asks_for = data.UNIT_INTERVAL
    numbers_a_pixel = 10

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., prod(E)) logits -> batch shape (...), event shape E."""
        logits = h.reshape(*h.shape[:-1], *self.event_shape)
        return StableContinuousBernoulli(logits).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The h_d whose mean is the pixel's, which is brought to between 0.001 and 0.999. x: (N, *E) -> (prod(E),).

        At 0 and 1 h would be infinite, and at 1e-5 too large for a gradient step to matter.
        """
        mean, _ = mean_and_variance(x)
        return _natural_parameter(mean.clamp(0.001, 0.999)).to(x.dtype)


_MEAN_LOGIT_LIMIT = 10.0
_LOG_CONCENTRATION_CENTER, _LOG_CONCENTRATION_LIMIT = 3.0, 6.0


class StableBeta(Pixel):
    """p(x) = x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta), 0 < x < 1, alpha = mu kappa, beta = (1 - mu) kappa.

    Args:
        mean_logit: logit(mu), the batch's shape.
        log_concentration: log(kappa).
    """

    arg_constraints = {"mean_logit": constraints.real, "log_concentration": constraints.real}  # noqa: RUF012, as torch
    support = open_unit_interval
    mean_logit: Tensor
    log_concentration: Tensor

    def _exponents(self) -> tuple[Tensor, Tensor]:
        """alpha and beta."""
        kappa = self.log_concentration.exp()
        return kappa * self.mean_logit.sigmoid(), kappa * (-self.mean_logit).sigmoid()

    @property
    def mean(self) -> Tensor:
        """mu."""
        return self.mean_logit.sigmoid()

    @property
    def mode(self) -> Tensor:
        """(alpha - 1) / (kappa - 2) where both exponents exceed 1; else the end of the smaller exponent.

        There the density has a pole, or its largest value. The number is the one next to the end that data can have.
        """
        alpha, beta = self._exponents()
        has_peak = (alpha > 1) & (beta > 1)
        peak = (alpha - 1) / torch.where(has_peak, alpha + beta - 2, 1.0)
        return data.inside_unit_interval(torch.where(has_peak, peak, (alpha > beta).to(alpha.dtype)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape), strictly inside."""
        return data.inside_unit_interval(dist.Beta(*self._exponents()).sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), (*sample_shape, *batch_shape), nats.

        alpha log(x / mu) + beta log((1 - x) / (1 - mu)) - log x - log(1 - x) + (1/2) log[kappa mu (1 - mu) / 2 pi]
        - s(alpha) - s(beta) + s(kappa), s what Stirling's formula leaves of log Gamma: the library's sum of log Gamma
        functions loses 0.02 nats in float32 at kappa = 20,000.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.log_density(value.log(), torch.log1p(-value))

    def log_density(self, log_x: Tensor, log_rest: Tensor) -> Tensor:
        """log p by log x and log(1 - x); linear in both, so that their means over x give the mean of log p."""
        alpha, beta = self._exponents()
        log_mean, log_other = logsigmoid(self.mean_logit), logsigmoid(-self.mean_logit)
        normalizer = (self.log_concentration + log_mean + log_other) / 2 - HALF_LOG_TWO_PI
        remainders = stirling_remainder(alpha + beta) - stirling_remainder(alpha) - stirling_remainder(beta)
        fit = alpha * (log_x - log_mean) + beta * (log_rest - log_other)
        return fit + (normalizer + remainders) - (log_x + log_rest)


class Beta(nn.Module):
    """p(x | h) = prod_d Beta(x_d; mu_d kappa_d, (1 - mu_d) kappa_d), for x in (0, 1)^E.

    h = (a, b): the mean is mu = sigmoid(10 tanh(a / 10)), between 5e-5 and 1 - 5e-5, a hundredth of a level from the
    ends; the concentration is log kappa = 3 + 6 tanh(b / 6), kappa between 0.05, where all mass is at the two ends, and
    8,100, where the spread in the middle is 1.4 levels, and beyond which float32 knows log p no better than to 0.001.
    Without bounds the exponents vanish or overflow after one bad step, and with them the gradients.

    Args:
        event_shape: E, the shape of an image.

    Source: the parameters are those of beta regression (Ferrari and Cribari-Neto 2004, J. Appl. Stat. 31(7), 799-815);
    the bounds are ours.
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    asks_for = data.UNIT_INTERVAL
    numbers_a_pixel = 24

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = 2 * math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., 2 prod(E)), all means and then all concentrations -> batch shape (...), event shape E."""
        return _beta(*planes(h, 2, self.event_shape)).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The most likely h of each pixel, by its means of log x and log(1 - x). x: (N, *E) -> (2 prod(E),).

        From its mean m and spread on, kappa = m (1 - m) / spread^2 - 1.
        """
        x = data.inside_unit_interval(x)
        mean, variance = mean_and_variance(x)
        log_x, log_rest = mean_logs(x)
        kappa = mean * (1 - mean) / variance - 1  # infinite for a constant pixel, which ``unbounded`` brings down
        b = unbounded(kappa.clamp(min=0).log() - _LOG_CONCENTRATION_CENTER, _LOG_CONCENTRATION_LIMIT)
        start = torch.stack([unbounded(mean.logit(), _MEAN_LOGIT_LIMIT), b])
        return ascend(lambda h: _beta(*h).log_density(log_x, log_rest), start).flatten().to(x.dtype)


def _beta(a: Tensor, b: Tensor) -> StableBeta:
    """The distribution of the two features of ``Beta``."""
    log_concentration = _LOG_CONCENTRATION_CENTER + bounded(b, _LOG_CONCENTRATION_LIMIT)
    return StableBeta(bounded(a, _MEAN_LOGIT_LIMIT), log_concentration)


_QUADRATURE_POINTS = 24  # of each half of the quantiles
_MODE_POINTS = 96
_MODE_REFINEMENTS = 30


class Sigmoid(dist.TorchDistribution):
    """The distribution of x = sigmoid(y), y ~ base: p(x) = p_base(logit x) / (x (1 - x)), 0 < x < 1, of one pixel.

    Args:
        base: a distribution of a real number, symmetric about its median, with ``icdf`` and ``cdf``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, the name and type that torch asks for
    support = open_unit_interval

    def __init__(self, base: Any) -> None:
        self.base = base
        super().__init__(base.batch_shape, validate_args=base._validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Sigmoid:
        """The same distribution for a larger batch shape."""
        return Sigmoid(self.base.expand(torch.Size(batch_shape)))

    @property
    def median(self) -> Tensor:
        """sigmoid of the base's median."""
        return self._quantile(0.5).sigmoid()

    def _quantile(self, u: float) -> Tensor:
        return self.base.icdf(self.base.mean.new_tensor(u))

    @property
    def mean(self) -> Tensor:
        """E[sigmoid(y)] by Gauss-Legendre quadrature, 24 points for each half, right to 1e-4.

        Over the base's quantiles, int_0^1 sigmoid(F^-1(u)) du, where the base is narrower than the sigmoid, whose own
        width is that of the logistic distribution. Where it is wider, sigmoid(F^-1(u)) is nearly a step, and the same
        number is taken over the logistic distribution's quantiles, int_0^1 [1 - F(logit v)] dv.
        """
        nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_POINTS)
        is_wide = self._quantile(0.75) - self._quantile(0.25) > 2 * math.log(3)  # the logistic's own
        total = torch.zeros_like(is_wide, dtype=self.base.mean.dtype)
        for node, weight in zip(nodes, weights, strict=True):
            for u in ((1 + node) / 4, (3 + node) / 4):
                y = math.log(u / (1 - u))
                of_wide = 1 - self.base.cdf(torch.full_like(total, y))
                total = total + weight / 4 * torch.where(is_wide, of_wide, self._quantile(u).sigmoid())
        return total

    @property
    def mode(self) -> Tensor:
        """The x of the largest density, to a thousandth of the way from the median to the end, or better.

        With a symmetric base the density is largest between the median and the end that is nearer to it. It is searched
        there on a grid that is fine near the median, then by ternary search around the best point. Where the density
        has a pole at the end, it is the number next to the end that data can have.
        """
        start = self._quantile(0.5)
        ends = data.inside_unit_interval(torch.stack([torch.zeros_like(start), torch.ones_like(start)])).logit()
        start = torch.minimum(torch.maximum(start, ends[0]), ends[1])
        span = torch.where(start > 0, ends[1], ends[0]) - start

        def log_p(share: Tensor) -> Tensor:
            y = start + share * span
            return self.base.log_prob(y) - logsigmoid(y) - logsigmoid(-y)

        grid = torch.cat([torch.zeros(1), torch.logspace(-6, 0, _MODE_POINTS - 1)]).to(start)
        best, highest = torch.zeros_like(start, dtype=torch.long), log_p(torch.zeros_like(start))
        for i, share in enumerate(grid[1:], 1):
            here = log_p(share.expand(start.shape))
            best, highest = torch.where(here > highest, i, best), torch.maximum(here, highest)
        low, high = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=_MODE_POINTS - 1)]
        for _ in range(_MODE_REFINEMENTS):
            third = (high - low) / 3
            is_right = log_p(low + third) < log_p(high - third)
            low, high = torch.where(is_right, low + third, low), torch.where(is_right, high, high - third)
        share = (low + high) / 2
        share = torch.where(log_p(share) > highest, share, grid[best])
        return data.inside_unit_interval((start + share * span).sigmoid())

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape), strictly inside."""
        return data.inside_unit_interval(self.base.sample(torch.Size(sample_shape)).sigmoid())

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_base(logit x) - log x - log(1 - x), (*sample_shape, *batch_shape), nats."""
        if self._validate_args:
            self._validate_sample(value)
        log_x, log_one_minus_x = value.log(), torch.log1p(-value)
        return self.base.log_prob(log_x - log_one_minus_x) - (log_x + log_one_minus_x)


class Logit(nn.Module):
    """p(x | h) = prod_d p_base(logit(x_d) | h) / (x_d (1 - x_d)), for x in (0, 1)^E.

    A likelihood of real numbers, bent: x is sigmoid(y), y ~ base(h), and 1 / (x (1 - x)) is the derivative of the
    logit, by which densities of x and of y differ. Features mean what they mean to the base.

    Args:
        base: a likelihood of real numbers whose distribution has quantiles.

    Raises:
        ValueError: a base without quantiles, such as ``StudentT``: the mean of sigmoid(y) is computed from them.

    Reference: Aitchison and Shen 1980, Biometrika 67(2), 261-272 (the logit-normal distribution).
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    asks_for = data.UNIT_INTERVAL

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        family: Any = base
        some = next(iter(base.state_dict().values()), torch.zeros(()))
        with torch.no_grad(), pyro.validation_enabled(False):  # it may be on the meta device, without numbers
            of_pixel = family(torch.zeros(family.num_features).to(some)).base_dist
        if type(of_pixel).icdf is torch.distributions.Distribution.icdf:
            raise ValueError(f"base: expected a likelihood whose distribution has quantiles, got {type(base).__name__}")
        self.base = family
        self.event_shape: tuple[int, ...] = family.event_shape
        self.num_features: int = family.num_features
        self.numbers_a_pixel: int = family.numbers_a_pixel + 4

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., num_features) of the base -> batch shape (...), event shape E."""
        p_y = self.base(h)
        return Sigmoid(p_y.base_dist).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The base's, of logit(x). x: (N, *E) -> (num_features,).

        Raises:
            ValueError: as the base.
        """
        return self.base.fit_marginals(data.inside_unit_interval(x).logit())

    @property
    def refit(self) -> Callable[[Tensor, Tensor], None]:
        """(h, x) -> None: the base's, of logit(x), where it has one, as ``NormalOptimal``; else there is none here."""
        refit = self.base.refit
        return lambda h, x: refit(h, data.inside_unit_interval(x).logit())


class LogitNormal(nn.Module):
    """p(x | h) = prod_d Normal(logit(x_d); loc_d, scale_d) / (x_d (1 - x_d)), for x in (0, 1)^E.

    ``Logit`` over ``NormalPerPixel``: both a location and a scale for every pixel, as a ``Beta`` has them.

    Args:
        event_shape: E, the shape of an image.
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    asks_for = data.UNIT_INTERVAL
    numbers_a_pixel = 13

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.logit = Logit(NormalPerPixel(event_shape))
        self.event_shape = self.logit.event_shape
        self.num_features = self.logit.num_features

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., 2 prod(E)), all locations and then all scales -> batch shape (...), event shape E."""
        return self.logit(h)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean and spread of logit(x). x: (N, *E) -> (2 prod(E),).

        Raises:
            ValueError: every pixel is constant.
        """
        return self.logit.fit_marginals(x)
