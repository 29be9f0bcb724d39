"""Likelihoods of numbers between 0 and 1: densities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ppl_vae import data
from ppl_vae.parts.likelihoods.base import Pixel, Pixels, ascend, mean_logs, unbounded
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
    """p(x) = e^{h x} h / (e^h - 1), 0 <= x <= 1. Pyro's is off by nats in float32 at large logits.

    Args:
        logits: h, (*batch_shape).
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


def _natural_parameter(mean: Tensor) -> Tensor:
    """The h with 1 / (1 - e^-h) - 1 / h = mean, by bisection, for means from 0.001 to 0.999; float64."""
    low, high = torch.full_like(mean, -1100.0), torch.full_like(mean, 1100.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_below = StableContinuousBernoulli(middle).mean < mean
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


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
        """The h_d with the pixel's mean, clamped to [0.001, 0.999]: h is infinite at 0 and 1. (N, *E) -> (prod(E),)."""
        mean, _ = mean_and_variance(x.flatten(1))
        return _natural_parameter(mean.clamp(0.001, 0.999)).to(x.dtype)


_MEAN_LOGIT_LIMIT = 10.0
_LOG_CONCENTRATION_CENTER, _LOG_CONCENTRATION_LIMIT = 3.0, 6.0


class StableBeta(Pixel):
    """p(x) = x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta), 0 < x < 1, alpha = mu kappa, beta = (1 - mu) kappa.

    Args:
        mean_logit: logit(mu), (*batch_shape).
        log_concentration: log(kappa), (*batch_shape).
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
        """mu."""
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
