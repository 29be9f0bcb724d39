"""Likelihoods of real numbers, all densities. Features are locations in ``unit``, the spread of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae import data
from ppl_vae.parts.likelihoods.base import Pixels, median_and_deviation, unbounded
from ppl_vae.runtime.numerics import bounded, location_and_spread, mean_and_variance

MAX_LOG_SCALE = 7.0  # of ``NormalPerPixel``, in units
LOG_DF_LIMIT = math.log(100)  # of ``StudentT``, for df - 1


class RealPixels(Pixels):
    """A density of real numbers with features in units of ``unit``, the spread of the data: abstract.

    The unit is a buffer, 1 until ``fit_marginals`` sets it, which raises ValueError where every pixel is constant.
    Features and learning rates then mean the same in every unit of the pixels.
    """

    support = constraints.real
    support_words = "real numbers"
    measure = "density"
    data_kind = data.REAL
    unit: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def _take_unit(self, spread: Tensor) -> None:
        if not spread > 0:
            raise ValueError("x: expected pixels that vary, got the same image every time: no scale fits")
        self.unit.copy_(spread)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),)."""
        loc, spread = location_and_spread(x)
        self._take_unit(spread)
        return (loc.flatten() / spread).to(self.unit.dtype)


class Normal(RealPixels):
    """p(x | h) = prod_d Normal(x_d; unit h_d, scale), with one learned scale for all pixels, for real x.

    The scale, unit exp(``log_scale``), is trained with the network. It weighs the reconstruction against the KL by
    maximum likelihood. Where the decoder reproduces pixels exactly, it shrinks without end, and the density grows.

    Reference: Rybkin et al. 2021, arXiv 2006.13202 (a shared, learned scale); the unit is ours.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Normal:
        return dist.Normal(self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = scale^2 = mean_nd (x_nd - mean_n x_nd)^2. (N, *E) -> (prod(E),)."""
        with torch.no_grad():
            self.log_scale.zero_()
        return super().fit_marginals(x)


class NormalFixed(RealPixels):
    """p(x | h) = prod_d Normal(x_d; unit h_d, unit scale), the scale a constant, for real x.

    Up to a constant, -log p is squared error over 2 scale^2, so the scale sets the weight of the reconstruction against
    the KL; scale^2 = D / 2 is squared error averaged over D pixels.

    Args:
        event_shape: E, the shape of an image.
        scale: In units of ``unit``, above 0.

    Raises:
        ValueError: The scale is not above 0.
    """

    def __init__(self, event_shape: Sequence[int], *, scale: float = 0.5) -> None:
        super().__init__(event_shape)
        if not scale > 0:
            raise ValueError(f"scale: expected a number above 0, got {scale}")
        self.scale = scale

    def pixel(self, loc: Tensor) -> dist.Normal:
        return dist.Normal(self.unit * loc, self.unit * self.scale)


class NormalOptimal(RealPixels):
    """p(x | h) = prod_d Normal(x_d; unit h_d, scale), the scale in closed form of the training data.

    For given means the best scale is scale^2 = mean (x - loc)^2. ``refit`` tracks it by a running mean of about ten
    batches; ``fit`` passes every tenth. ``log_scale`` is a buffer without gradients, and constant in evaluation. A
    scale from the scored x itself would give no likelihood: max_scale Normal(x; loc, scale) has an infinite integral.

    Reference: Rybkin et al. 2021, arXiv 2006.13202, section 3 (the closed form; there of the batch that is scored).
    The running mean is ours.
    """

    log_scale: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("log_scale", torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Normal:
        return dist.Normal(self.unit * loc, self.unit * self.log_scale.exp())

    @torch.no_grad()
    def refit(self, h: Tensor, x: Tensor, *, rate: float = 0.1) -> None:
        """scale^2 <- (1 - rate) scale^2 + rate mean (x - loc)^2, over the batch and its pixels, where that is finite.

        Args:
            h: (..., prod(E)) features of training images.
            x: (..., *E) those images.
            rate: From 0 to 1.
        """
        squares = (x / self.unit - h.reshape(*h.shape[:-1], *self.event_shape)).square()
        mean = squares.nanmean() if squares.isnan().any() else squares.mean()  # a missing pixel is NaN
        square = (1 - rate) * (2 * self.log_scale).exp() + rate * mean
        # Where the decoder reproduces every pixel exactly the best scale is zero, and its logarithm is -infinity.
        log_scale = square.clamp(min=torch.finfo(square.dtype).tiny).log() / 2
        self.log_scale.copy_(torch.where(log_scale.isfinite(), log_scale, self.log_scale))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """As ``Normal``: the scale is the unit. x: (N, *E) -> (prod(E),)."""
        self.log_scale.zero_()
        return super().fit_marginals(x)


class NormalPerPixel(RealPixels):
    """p(x | h) = prod_d Normal(x_d; unit loc_d, unit scale_d), h = (loc, feature), log scale = 7 tanh(feature / 7).

    Every pixel of every image has its own scale, between 0.0009 and 1,097 units. Without bounds, one pixel that is
    reproduced exactly would have an infinite density, and exp would overflow after one bad step.

    Reference: Kingma and Welling 2014, arXiv 1312.6114, appendix C.2; the bounds are ours.
    """

    features_per_pixel = 2
    floats_per_pixel = 9

    def pixel(self, loc: Tensor, feature: Tensor) -> dist.Normal:
        return dist.Normal(self.unit * loc, self.unit * bounded(feature, MAX_LOG_SCALE).exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean and spread, in units. x: (N, *E) -> (2 prod(E),).

        unit^2 = mean_nd (x_nd - mean_n x_nd)^2, the spread of all pixels. A constant pixel gets a scale of 0.001 units.
        """
        mean, variance = mean_and_variance(x.flatten(1))
        spread = variance.mean().sqrt()
        self._take_unit(spread)
        log_scale = (variance / spread.square()).log() / 2  # -inf for a constant pixel, which ``unbounded`` brings up
        return torch.cat([mean / spread, unbounded(log_scale, MAX_LOG_SCALE)]).to(self.unit.dtype)


class Laplace(RealPixels):
    """p(x | h) = prod_d Laplace(x_d; unit h_d, scale), with one learned scale for all pixels, for real x.

    Up to the scale, -log p is absolute error: outliers count less than under a normal, and the location is a median.
    The scale is that of ``Normal``.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Laplace:
        return dist.Laplace(self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = median_n x_nd / unit, with unit = scale = mean_nd |x_nd - median_n x_nd|. x: (N, *E) -> (prod(E),)."""
        loc, deviation = median_and_deviation(x)
        spread = deviation.mean()
        self._take_unit(spread)
        with torch.no_grad():
            self.log_scale.zero_()
        return (loc / spread).to(self.log_scale.dtype)


class StudentT(RealPixels):
    """p(x | h) = prod_d StudentT(x_d; df, unit h_d, scale), scale and df shared by all pixels and learned, for real x.

    Its tails fall like |x|^-(df + 1), so that distant outliers hardly move the location. df = 1 + exp(f), with
    f = log(100) tanh(``feature`` / log(100)), lies between 1.01, where the mean exists, and 101, where the distribution
    is nearly normal. The scale is that of ``Normal``.
    """

    floats_per_pixel = 10

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.feature = nn.Parameter(torch.zeros(()))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, of shape ()."""
        return 1 + bounded(self.feature, LOG_DF_LIMIT).exp()

    def pixel(self, loc: Tensor) -> dist.StudentT:
        return dist.StudentT(self.df, self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, df = 5, and the scale at which the variance is unit^2. x: (N, *E) -> (prod(E),).

        unit^2 = mean_nd (x_nd - mean_n x_nd)^2 = scale^2 df / (df - 2).
        """
        with torch.no_grad():
            self.log_scale.fill_(math.log(3 / 5) / 2)
            self.feature.copy_(unbounded(self.feature.new_tensor(math.log(4)), LOG_DF_LIMIT))
        return super().fit_marginals(x)
