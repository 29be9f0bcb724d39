"""Likelihoods of counts 0, 1, 2, ...: masses."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import data
from ppl_vae.likelihoods.family import Pixels
from ppl_vae.likelihoods.features import unbounded
from ppl_vae.likelihoods.pixel import Pixel
from ppl_vae.likelihoods.stirling import stirling_remainder
from ppl_vae.numerics import bounded, mean_and_variance, sum_over_images

_LOG_MEAN_LIMIT = 15.0
_LOG_TOTAL_LIMIT = 9.0
_COUNTS_WORDS = "whole numbers from 0 on"


def _log_mean(mean: Tensor) -> Tensor:
    """The feature that gives this mean, brought above 1e-6 first."""
    return unbounded(mean.clamp(min=1e-6).log(), _LOG_MEAN_LIMIT)


class Poisson(Pixels):
    """P(x | h) = prod_d Poisson(x_d; exp(15 tanh(h_d / 15))), for counts x in {0, 1, ...}^E.

    One feature says both how many and how sure: the variance is the mean. The bound keeps rates between 3e-7 and 3
    million: exp alone overflows at 89, after one bad step.

    Args:
        event_shape: E, the shape of an image.
    """

    support = constraints.nonnegative_integer
    support_words = _COUNTS_WORDS
    measure = "mass"
    asks_for = data.COUNTS
    numbers_a_pixel = 8

    def pixel(self, feature: Tensor) -> dist.Poisson:
        """Of what gives the log-rate."""
        return dist.Poisson(bounded(feature, _LOG_MEAN_LIMIT).exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """rate_d = (1/2 + sum_n x_nd) / (1 + N), each pixel's mean, smoothed. x: (N, *E) -> (prod(E),)."""
        mean = (0.5 + sum_over_images(x.flatten(1))) / (1 + len(x))
        return _log_mean(mean).to(x.dtype)


class StableNegativeBinomial(Pixel):
    """P(x) = C(x + r - 1, x) (r / (r + m))^r (m / (r + m))^x: a Poisson whose rate is Gamma with mean m and shape r.

    Args:
        log_mean: log m, the batch's shape.
        log_total: log r.
    """

    arg_constraints = {"log_mean": constraints.real, "log_total": constraints.real}  # noqa: RUF012, as torch has it
    support = constraints.nonnegative_integer
    log_mean: Tensor
    log_total: Tensor

    @property
    def mean(self) -> Tensor:
        """m."""
        return self.log_mean.exp()

    @property
    def mode(self) -> Tensor:
        """The largest whole number that is not above (r - 1) m / r, or 0."""
        return (self.log_mean.exp() * (1 - (-self.log_total).exp())).floor().clamp(min=0)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """(*sample_shape, *batch_shape)."""
        library = dist.NegativeBinomial(self.log_total.exp(), logits=self.log_mean - self.log_total)
        return library.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(value), (*sample_shape, *batch_shape), nats.

        (r + x) log[(r + x) / (r + m)] - (1/2) log[(r + x) / r] + s(r + x) - s(r) + x log m - x - log x!, s what
        Stirling's formula leaves of log Gamma: the library's log Gamma(r + x) - log Gamma(r) loses 0.008 nats in
        float32 at r = 8,000.
        """
        if self._validate_args:
            self._validate_sample(value)
        x, m, r = value, self.log_mean.exp(), self.log_total.exp()
        # log of the quotient, from the side on which nothing is subtracted from 1
        over, under = torch.where(x > m, x - m, 0.0), torch.where(x > m, 0.0, m - x)
        log_quotient = torch.log1p(over / (r + m)) - torch.log1p(under / (r + x))
        remainders = stirling_remainder(r + x) - stirling_remainder(r) - torch.log1p(x / r) / 2
        return (r + x) * log_quotient + remainders + x * self.log_mean - (x + (x + 1).lgamma())


class NegativeBinomial(Pixels):
    """P(x | h) = prod_d NegativeBinomial(x_d; mean m_d, total count r_d), for counts x in {0, 1, ...}^E.

    The variance is m + m^2 / r: counts that spread more than a Poisson's. h = (a, b), log m = 15 tanh(a / 15), as in
    ``Poisson``, and log r = 9 tanh(b / 9), r between 0.0001, where nearly all is zero, and 8,100, where it is a Poisson
    for all but the largest counts and r has no gradient worth having.

    Args:
        event_shape: E, the shape of an image.
    """

    support = constraints.nonnegative_integer
    support_words = _COUNTS_WORDS
    measure = "mass"
    asks_for = data.COUNTS
    features_a_pixel = 2
    numbers_a_pixel = 24

    def pixel(self, a: Tensor, b: Tensor) -> StableNegativeBinomial:
        """Of what gives the mean, and the total count."""
        return StableNegativeBinomial(bounded(a, _LOG_MEAN_LIMIT), bounded(b, _LOG_TOTAL_LIMIT))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean m, smoothed as in ``Poisson``, and r = m^2 / (variance - m). x: (N, *E) -> (2 prod(E),).

        A pixel that spreads no more than a Poisson gets an r of 6,800.
        """
        mean, variance = mean_and_variance(x.flatten(1))
        smoothed = (0.5 + len(x) * mean) / (1 + len(x))
        total = smoothed.square() / (variance - smoothed).clamp(min=0)
        return torch.cat([_log_mean(smoothed), unbounded(total.log(), _LOG_TOTAL_LIMIT)]).to(x.dtype)
