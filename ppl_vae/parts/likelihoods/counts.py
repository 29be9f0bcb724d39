"""Likelihoods of zeros and ones, and of counts 0, 1, 2, ...: masses."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import data
from ppl_vae.parts.likelihoods.base import Pixel, Pixels, unbounded
from ppl_vae.runtime.numerics import HALF_LOG_TWO_PI, bounded, mean_and_variance, stirling_remainder, sum_over_images

_LOG_MEAN_LIMIT = 15.0
_LARGEST_MEAN = 3e6  # for a fit; features reach exp(15) = 3.27 million, where they have almost no gradient
LOG_TOTAL_LIMIT = 9.0
_COUNTS_WORDS = "whole numbers from 0 on"


class Bernoulli(Pixels):
    """p(x | h) = prod_d sigmoid(h_d)^{x_d} (1 - sigmoid(h_d))^{1 - x_d}, for x in {0, 1}^E.

    Features are logits: probabilities would saturate in float32. Gray pixels are refused: the Bernoulli formula at a
    fraction is not a density, since its integral is below one.
    """

    support = constraints.boolean
    support_words = "0 or 1"
    measure = "mass"
    data_kind = data.BINARY

    def pixel(self, logits: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=logits)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = logit((1 + sum_n x_nd) / (2 + N)), each pixel's rate, Laplace-smoothed. x: (N, *E) -> (prod(E),)."""
        rate = (1 + sum_over_images(x.flatten(1))) / (2 + len(x))
        return rate.logit().float()


def _log_mean_features(mean: Tensor) -> Tensor:
    """The features of these means, clamped to at least 1e-6. Raises ValueError for a mean above 3 million."""
    largest = float(mean.max())
    if not largest <= _LARGEST_MEAN:
        raise ValueError(
            f"x: expected counts with a mean of at most {_LARGEST_MEAN:,.0f} in every pixel or column, got "
            f"{largest:,.0f}; larger counts can be modelled as real numbers (floats under a normal likelihood)"
        )
    return _LOG_MEAN_LIMIT * (mean.clamp(min=1e-6).log() / _LOG_MEAN_LIMIT).atanh()


def _log_mass_at_mean(x: Tensor) -> Tensor:
    """log Poisson(x; rate x) = x log x - x - log x! = -(1/2) log(2 pi x) - s(x), with s = ``stirling_remainder``.

    It is 0 at x = 0 and -9.2 nats at x = 16,777,216, so it is exact in float32.
    """
    positive = x.clamp(min=1)
    return torch.where(x > 0, -(HALF_LOG_TWO_PI + positive.log() / 2 + stirling_remainder(positive)), 0.0)


class StablePoisson(dist.Poisson):
    """Pyro's Poisson, with a log-mass that is exact in float32.

    Pyro subtracts x log(rate), the rate and log x!: 13 million at a count of a million, where float32 resolves 1.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log Poisson(x; x) - [rate - x - x log(rate / x)], whose bracket can be large and is computed in float64."""
        if self._validate_args:
            self._validate_sample(value)
        x, rate = value.double(), self.rate.double()
        misfit = rate - x - x * (rate / x.clamp(min=1)).log()
        return _log_mass_at_mean(value) - misfit.to(self.rate.dtype)


class Poisson(Pixels):
    """P(x | h) = prod_d Poisson(x_d; exp(15 tanh(h_d / 15))), for counts x in {0, 1, ...}^E.

    The variance equals the mean. Rates lie between 3e-7 and 3.27 million: exp alone overflows after one bad step.
    """

    support = constraints.nonnegative_integer
    support_words = _COUNTS_WORDS
    measure = "mass"
    data_kind = data.COUNTS
    floats_per_pixel = 8

    def pixel(self, feature: Tensor) -> StablePoisson:
        return StablePoisson(bounded(feature, _LOG_MEAN_LIMIT).exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """rate_d = (1/2 + sum_n x_nd) / (1 + N), each pixel's mean, smoothed. x: (N, *E) -> (prod(E),).

        A mean above 3 million raises ValueError.
        """
        mean = (0.5 + sum_over_images(x.flatten(1))) / (1 + len(x))
        return _log_mean_features(mean).to(x.dtype)


class StableNegativeBinomial(Pixel):
    """P(x) = C(x + r - 1, x) (r / (r + m))^r (m / (r + m))^x: a Poisson whose rate is Gamma with mean m and shape r."""

    arg_constraints = {"log_mean": constraints.real, "log_total": constraints.real}  # noqa: RUF012, as torch has it
    support = constraints.nonnegative_integer
    log_mean: Tensor
    log_total: Tensor

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        library = dist.NegativeBinomial(self.log_total.exp(), logits=self.log_mean - self.log_total)
        return library.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(x), nats, with x the value:

        (r + x) log[(r + x) / (r + m)] + x log(m / x) + log Poisson(x; x) - (1/2) log[(r + x) / r] + s(r + x) - s(r), s
        the remainder of Stirling's formula. The first two terms can be large and cancel: they are computed in float64.
        """
        if self._validate_args:
            self._validate_sample(value)
        m, r = self.log_mean.exp(), self.log_total.exp()
        x, mean, total = value.double(), m.double(), r.double()
        fit = (total + x) * ((total + x) / (total + mean)).log() + x * (mean / x.clamp(min=1)).log()
        remainders = stirling_remainder(r + value) - stirling_remainder(r) - torch.log1p(value / r) / 2
        return fit.to(r.dtype) + (_log_mass_at_mean(value) + remainders)


class NegativeBinomial(Pixels):
    """P(x | h) = prod_d NegativeBinomial(x_d; mean m_d, total count r_d), for counts x in {0, 1, ...}^E.

    The variance is m + m^2 / r, above a Poisson's. h = (a, b), log m = 15 tanh(a / 15), as in ``Poisson``, and
    log r = 9 tanh(b / 9). r lies between 0.0001, where almost all counts are zero, and 8,100, where all but the largest
    counts have a Poisson distribution and r has almost no gradient.
    """

    support = constraints.nonnegative_integer
    support_words = _COUNTS_WORDS
    measure = "mass"
    data_kind = data.COUNTS
    features_per_pixel = 2
    floats_per_pixel = 24

    def pixel(self, a: Tensor, b: Tensor) -> StableNegativeBinomial:
        return StableNegativeBinomial(bounded(a, _LOG_MEAN_LIMIT), bounded(b, LOG_TOTAL_LIMIT))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean m, smoothed as in ``Poisson``, and r = m^2 / (variance - m). x: (N, *E) -> (2 prod(E),).

        A pixel with a variance of at most its mean gets r = 6,800. A mean above 3 million raises ValueError.
        """
        mean, variance = mean_and_variance(x.flatten(1))
        smoothed = (0.5 + len(x) * mean) / (1 + len(x))
        total = smoothed.square() / (variance - smoothed).clamp(min=0)
        return torch.cat([_log_mean_features(smoothed), unbounded(total.log(), LOG_TOTAL_LIMIT)]).to(x.dtype)
