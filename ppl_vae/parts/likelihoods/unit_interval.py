"""Likelihoods of numbers between 0 and 1: densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid

from ppl_vae import data
from ppl_vae.parts.likelihoods.base import Pixel, Pixels, ascend, mean_logs, unbounded
from ppl_vae.parts.likelihoods.real import NormalPerPixel
from ppl_vae.runtime.numerics import HALF_LOG_TWO_PI, bounded, mean_and_variance, polynomial, stirling_remainder


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


class StableContinuousBernoulli(Pixel):
    """p(x) = e^{h x} h / (e^h - 1), 0 <= x <= 1, h the logits. Pyro's is off by nats in float32 at large logits."""

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012, as torch has it
    support = constraints.unit_interval
    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-h) - 1 / h, by its series 1/2 + h / 12 - ... where |h| < 1/2."""
        h = self.logits
        small = h.abs() < _SERIES_BELOW
        near, far = torch.where(small, h, 0.0), torch.where(small, 1.0, h)
        return torch.where(small, 0.5 + near * polynomial(_COTH, near.square()), -1 / torch.expm1(-far) - 1 / far)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """x = -log(1 - u (1 - e^-|h|)) / |h|, u ~ Uniform[0, 1), or 1 - x where h > 0."""
        u, h = self.uniform(sample_shape), self.logits
        a = h.abs().clamp(min=torch.finfo(h.dtype).tiny)  # at 0 the quotient would be 0 / 0; its limit is u
        x = -torch.log1p(u * torch.expm1(-a)) / a
        return torch.where(h > 0, 1 - x, x).clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """-|h| d - log [(1 - e^-|h|) / |h|], nats, with d the distance from the mode.

        For |h| < 1/2 it is h (x - 1/2) - log [sinh(h / 2) / (h / 2)], by its series: there, the gradient of the first
        form is the difference of two numbers of the size of 1 / h.
        """
        if self._validate_args:
            self._validate_sample(value)
        h = self.logits
        small = h.abs() < _SERIES_BELOW
        near = torch.where(small, h, 0.0)  # each branch on its own side, so that both have gradients
        a = torch.where(small, 1.0, h.abs())
        square = near.square()
        log_sinhc = square * polynomial(_LOG_SINHC, square)
        steep = -a * torch.where(h > 0, 1 - value, value) - (-torch.expm1(-a) / a).log()
        return torch.where(small, near * (value - 0.5) - log_sinhc, steep)


class ContinuousBernoulli(Pixels):
    """p(x | h) = prod_d e^{h_d x_d} h_d / (e^{h_d} - 1), for x in [0, 1]^E.

    This is the Bernoulli formula on gray pixels, divided by its integral. One feature per pixel sets both the mean and
    the spread. The density is monotone: its only peaks are black and white.

    Reference: Loaiza-Ganem and Cunningham 2019, arXiv 1907.06845.
    """

    support = constraints.unit_interval
    support_words = "numbers from 0 to 1"
    measure = "density"
    data_kind = data.UNIT_INTERVAL
    floats_per_pixel = 10

    def pixel(self, logits: Tensor) -> StableContinuousBernoulli:
        return StableContinuousBernoulli(logits)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The h_d with the pixel's mean, by bisection in float64. x: (N, *E) -> (prod(E),).

        The mean is clamped to [0.001, 0.999], since h is infinite at 0 and 1.
        """
        mean = mean_and_variance(x.flatten(1))[0].clamp(0.001, 0.999)
        low, high = torch.full_like(mean, -1100.0), torch.full_like(mean, 1100.0)
        for _ in range(60):
            middle = (low + high) / 2
            is_below = StableContinuousBernoulli(middle).mean < mean
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return ((low + high) / 2).to(x.dtype)


_MEAN_LOGIT_LIMIT = 10.0
_LOG_CONCENTRATION_CENTER, _LOG_CONCENTRATION_LIMIT = 3.0, 6.0


class StableBeta(Pixel):
    """p(x) = x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta), 0 < x < 1, alpha = mu kappa, beta = (1 - mu) kappa.

    Its parameters are logit(mu) and log(kappa).
    """

    arg_constraints = {"mean_logit": constraints.real, "log_concentration": constraints.real}  # noqa: RUF012, as torch
    support = open_unit_interval
    mean_logit: Tensor
    log_concentration: Tensor

    def exponents(self) -> tuple[Tensor, Tensor]:
        """alpha and beta."""
        kappa = self.log_concentration.exp()
        return kappa * self.mean_logit.sigmoid(), kappa * (-self.mean_logit).sigmoid()

    @property
    def mean(self) -> Tensor:
        return self.mean_logit.sigmoid()

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return data.clamp_to_unit_interval(dist.Beta(*self.exponents()).sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x), nats, with x the value, and s the remainder of Stirling's formula:

        alpha log(x / mu) + beta log((1 - x) / (1 - mu)) - log x - log(1 - x) + (1/2) log[kappa mu (1 - mu) / 2 pi]
        - s(alpha) - s(beta) + s(kappa). A sum of log Gamma functions would lose 0.02 nats in float32 at kappa = 20,000.
        """
        if self._validate_args:
            self._validate_sample(value)
        return self.log_density(value.log(), torch.log1p(-value))

    def log_density(self, log_x: Tensor, log_rest: Tensor) -> Tensor:
        """log p by log x and log(1 - x); linear in both, so that their means over x give the mean of log p."""
        alpha, beta = self.exponents()
        log_mean, log_other = logsigmoid(self.mean_logit), logsigmoid(-self.mean_logit)
        normalizer = (self.log_concentration + log_mean + log_other) / 2 - HALF_LOG_TWO_PI
        remainders = stirling_remainder(alpha + beta) - stirling_remainder(alpha) - stirling_remainder(beta)
        fit = alpha * (log_x - log_mean) + beta * (log_rest - log_other)
        return fit + (normalizer + remainders) - (log_x + log_rest)


class Beta(Pixels):
    """p(x | h) = prod_d Beta(x_d; mu_d kappa_d, (1 - mu_d) kappa_d), for x in (0, 1)^E.

    h = (a, b). The mean mu = sigmoid(10 tanh(a / 10)) lies between 5e-5 and 1 - 5e-5. The concentration has
    log kappa = 3 + 6 tanh(b / 6) and lies between 0.05, where all mass is at the two ends, and 8,100, where the spread
    in the middle is 1.4 levels. Without bounds the exponents vanish or overflow after one bad step.

    Source: the parameters are those of beta regression (Ferrari and Cribari-Neto 2004, J. Appl. Stat. 31(7), 799-815);
    the bounds are ours.
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    data_kind = data.UNIT_INTERVAL
    features_per_pixel = 2
    floats_per_pixel = 24

    def pixel(self, a: Tensor, b: Tensor) -> StableBeta:
        log_concentration = _LOG_CONCENTRATION_CENTER + bounded(b, _LOG_CONCENTRATION_LIMIT)
        return StableBeta(bounded(a, _MEAN_LOGIT_LIMIT), log_concentration)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The most likely h of each pixel, from kappa = m (1 - m) / spread^2 - 1 on. x: (N, *E) -> (2 prod(E),)."""
        x = data.map_images(data.clamp_to_unit_interval, x, dtype=x.dtype)
        mean, variance = mean_and_variance(x.flatten(1))
        log_x, log_rest = mean_logs(x)
        kappa = mean * (1 - mean) / variance - 1  # infinite for a constant pixel, which ``unbounded`` brings down
        b = unbounded(kappa.clamp(min=0).log() - _LOG_CONCENTRATION_CENTER, _LOG_CONCENTRATION_LIMIT)
        start = torch.stack([unbounded(mean.logit(), _MEAN_LOGIT_LIMIT), b])
        return ascend(lambda h: self.pixel(*h).log_density(log_x, log_rest), start).flatten().to(x.dtype)


_QUADRATURE_POINTS = 24  # of each half of the quantiles


class Sigmoid(dist.TorchDistribution):
    """The distribution of x = sigmoid(y), y ~ base: p(x) = p_base(logit x) / (x (1 - x)), 0 < x < 1, of one pixel.

    The base is a distribution of a real number, symmetric about its median, with ``icdf`` and ``cdf``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = open_unit_interval

    def __init__(self, base: dist.TorchDistribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, validate_args=base._validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Sigmoid:
        return Sigmoid(self.base.expand(torch.Size(batch_shape)))

    def _quantile(self, u: float) -> Tensor:
        return self.base.icdf(self.base.mean.new_tensor(u))

    @property
    def mean(self) -> Tensor:
        """E[sigmoid(y)] by quadrature, within 2e-5 for a normal or Laplace base.

        It is int_0^1 sigmoid(F^-1(u)) du, or, where the base is wider than the logistic distribution and
        sigmoid(F^-1(u)) is nearly a step, the equal int_0^1 [1 - F(logit u)] du. Each half has 24 Gauss-Legendre points
        in v, where u = v^3 / 2 is the distance from the end: the integrand varies most there.
        """
        nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_POINTS)
        is_wide = self._quantile(0.75) - self._quantile(0.25) > 2 * math.log(3)  # the logistic's own
        total = torch.zeros_like(is_wide, dtype=self.base.mean.dtype)
        for node, weight in zip(nodes, weights, strict=True):
            v = (1 + node) / 2
            u, du = v**3 / 2, 3 / 4 * v**2 * weight
            y = math.log(u / (1 - u))
            for quantile, logit in ((u, y), (1 - u, -y)):
                of_wide = 1 - self.base.cdf(torch.full_like(total, logit))
                total = total + du * torch.where(is_wide, of_wide, self._quantile(quantile).sigmoid())
        return total

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return data.clamp_to_unit_interval(self.base.sample(torch.Size(sample_shape)).sigmoid())

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_base(logit x) - log x - log(1 - x), nats.

        The logit is in float64: in float32 a logit of 14 is off by 1e-6, which can be 0.02 nats at a scale of 0.001.
        """
        if self._validate_args:
            self._validate_sample(value)
        x = value.double()
        log_x, log_one_minus_x = x.log(), (1 - x).log()  # log1p in float64 takes several times as long
        log_p = self.base.log_prob(log_x - log_one_minus_x) - (log_x + log_one_minus_x)
        return log_p.to(self.base.mean.dtype)


def has_quantiles(family: Pixels) -> bool:
    """Whether the distribution of a pixel has quantiles (``icdf``): a Student's t has none in closed form."""
    some = next(iter(family.state_dict().values()), torch.zeros(()))
    with torch.no_grad(), pyro.validation_enabled(False):  # it may be on the meta device, without numbers
        of_pixel = family(torch.zeros(family.num_features).to(some)).base_dist
    return type(of_pixel).icdf is not torch.distributions.Distribution.icdf


class Logit(nn.Module):
    """p(x | h) = prod_d p_base(logit(x_d) | h) / (x_d (1 - x_d)), for x = sigmoid(y) in (0, 1)^E and y ~ base(h).

    Args:
        base: A likelihood of real numbers, whose features it takes. One without quantiles, from which the mean of
            sigmoid(y) is computed, raises ValueError, such as ``StudentT``.

    Reference: Aitchison and Shen 1980, Biometrika 67(2), 261-272 (the logit-normal distribution).
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    data_kind = data.UNIT_INTERVAL

    def __init__(self, base: Pixels) -> None:
        super().__init__()
        if not has_quantiles(base):
            raise ValueError(f"base: expected a likelihood whose distribution has quantiles, got {type(base).__name__}")
        self.base = base
        self.event_shape = base.event_shape
        self.num_features = base.num_features
        self.floats_per_pixel = base.floats_per_pixel + 4

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., num_features) of the base -> batch shape (...), event shape E."""
        p_y = self.base(h)
        return Sigmoid(p_y.base_dist).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """``fit_marginals`` of the base at logit(x), with its errors. x: (N, *E) -> (num_features,)."""
        logits = data.map_images(lambda part: data.clamp_to_unit_interval(part).logit(), x, dtype=x.dtype)
        return self.base.fit_marginals(logits)

    @property
    def refit(self) -> Callable[[Tensor, Tensor], None]:
        """(h, x) -> None: the base's ``refit`` with logit(x), for a base that has one, such as ``NormalOptimal``."""
        refit = self.base.refit
        return lambda h, x: refit(h, data.clamp_to_unit_interval(x).logit())  # type: ignore[operator]


class LogitNormal(nn.Module):
    """p(x | h) = prod_d Normal(logit(x_d); loc_d, scale_d) / (x_d (1 - x_d)), for x in (0, 1)^E.

    ``Logit`` of ``NormalPerPixel``: a location and a scale for every pixel, as in ``Beta``.
    """

    support = open_unit_interval
    support_words = "numbers between 0 and 1, neither of them"
    measure = "density"
    data_kind = data.UNIT_INTERVAL
    floats_per_pixel = 13

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.logit = Logit(NormalPerPixel(event_shape))
        self.event_shape = self.logit.event_shape
        self.num_features = self.logit.num_features

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., 2 prod(E)), all locations and then all scales -> batch shape (...), event shape E."""
        return self.logit(h)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean and spread of logit(x). x: (N, *E) -> (2 prod(E),)."""
        return self.logit.fit_marginals(x)
