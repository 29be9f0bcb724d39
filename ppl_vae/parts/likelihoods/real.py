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


class _InUnits(Pixels):
    """A density of real numbers whose features are in ``unit``, the spread of the data: abstract.

    The unit is a buffer, 1 until ``fit_marginals`` has seen the data, so that features and learning rates mean the same
    in whatever unit the pixels are.
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
        """Raises ValueError where the data has no spread, and so no unit."""
        if not spread > 0:
            raise ValueError("x: expected pixels that vary, got the same image every time: no scale fits")
        self.unit.copy_(spread)

    def _mean_in_units(self, x: Tensor) -> Tensor:
        """mean_n x_nd / unit, with unit^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),)."""
        loc, spread = location_and_spread(x)
        self._take_unit(spread)
        return (loc.flatten() / spread).to(self.unit.dtype)


class Normal(_InUnits):
    """p(x | h) = prod_d Normal(x_d; unit h_d, scale), with one learned scale for all pixels, for real x.

    The scale is unit exp(``log_scale``), a parameter that is trained with the network by the same objective. Unlike
    squared error, whose scale is fixed by whoever averages it, it weighs the reconstruction against the KL as the data
    asks. ``unit`` is a constant, the spread of the data once ``fit_marginals`` has seen it, so that features and
    learning rates mean the same in whatever unit the pixels are. This is a density: in another unit it is another
    number, and it never compares with a mass. It has no upper bound: where the decoder can reproduce pixels exactly,
    the scale shrinks without end.

    Args:
        event_shape: E, the shape of an image.

    Reference: Rybkin et al. 2021, arXiv 2006.13202 (a shared, learned scale); the unit is ours.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Normal:
        """Of a mean in units."""
        return dist.Normal(self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = scale^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),).

        Raises:
            ValueError: every pixel is constant, so that no scale is small enough.
        """
        with torch.no_grad():
            self.log_scale.zero_()
        return self._mean_in_units(x)


class NormalFixed(_InUnits):
    """p(x | h) = prod_d Normal(x_d; unit h_d, unit scale), the scale a constant, for real x.

    Up to a constant its log is squared error over 2 scale^2, so the scale is the weight of the reconstruction against
    the KL: with scale^2 = D / 2 it is squared error averaged over D pixels. It is chosen, not learned, and the density
    that it gives is the lower the worse it was chosen.

    Args:
        event_shape: E, the shape of an image.
        scale: in units of ``unit``, the spread of the data once ``fit_marginals`` has seen it; above 0.

    Raises:
        ValueError: a scale that is not above 0.
    """

    def __init__(self, event_shape: Sequence[int], *, scale: float = 0.5) -> None:
        super().__init__(event_shape)
        if not scale > 0:
            raise ValueError(f"scale: expected a number above 0, got {scale}")
        self.scale = scale

    def pixel(self, loc: Tensor) -> dist.Normal:
        """Of a mean in units."""
        return dist.Normal(self.unit * loc, self.unit * self.scale)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),).

        Raises:
            ValueError: every pixel is constant, so that the data has no unit.
        """
        return self._mean_in_units(x)


class NormalOptimal(_InUnits):
    """p(x | h) = prod_d Normal(x_d; unit h_d, scale), the scale in closed form of the training data.

    For given means the best scale is known, scale^2 = mean (x - loc)^2. ``refit`` follows it by a running mean (of
    about ten batches; ``fit`` gives it every tenth, so it lags by a hundred steps), and no gradient trains it:
    ``log_scale`` is a buffer, which stands still in evaluation. That matters. A scale computed from the x that is
    scored makes p(x | h) depend on x by its scale as well: max_scale Normal(x; loc, scale) does not integrate to one
    over x (over one pixel it is 1 / (|x - loc| sqrt(2 pi e)), whose integral is infinite), and what it gives is no
    log-likelihood.

    Args:
        event_shape: E, the shape of an image.

    Reference: Rybkin et al. 2021, arXiv 2006.13202, section 3 (the closed form; there of the batch that is scored).
    The running mean is ours.
    """

    log_scale: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.register_buffer("log_scale", torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Normal:
        """Of a mean in units."""
        return dist.Normal(self.unit * loc, self.unit * self.log_scale.exp())

    @torch.no_grad()
    def refit(self, h: Tensor, x: Tensor, *, rate: float = 0.1) -> None:
        """scale^2 <- (1 - rate) scale^2 + rate mean (x - loc)^2, over the batch and its pixels, in place.

        It stays as it is where that is no number, as with a weight that is not finite.

        Args:
            h: (..., prod(E)) features of training images.
            x: (..., *E) those images.
            rate: above 0, at most 1.

        Raises:
            ValueError: a rate out of its range.
        """
        if not 0 < rate <= 1:
            raise ValueError(f"rate: expected a number above 0 and at most 1, got {rate}")
        residual = x / self.unit - h.reshape(*h.shape[:-1], *self.event_shape)
        square = (1 - rate) * (2 * self.log_scale).exp() + rate * residual.square().mean()
        # Where the decoder reproduces every pixel the best scale is zero, and its logarithm no number.
        log_scale = square.clamp(min=torch.finfo(square.dtype).tiny).log() / 2
        self.log_scale.copy_(torch.where(log_scale.isfinite(), log_scale, self.log_scale))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = scale^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),).

        Raises:
            ValueError: every pixel is constant, so that no scale is small enough.
        """
        self.log_scale.zero_()
        return self._mean_in_units(x)


class NormalPerPixel(_InUnits):
    """p(x | h) = prod_d Normal(x_d; unit loc_d, unit scale_d), h = (loc, feature), log scale = 7 tanh(feature / 7).

    The decoder says of every pixel of every image how far it may be off. Scales lie between 0.0009 and 1,097 units:
    without a bound below, one pixel that is reproduced exactly has an infinite density and takes the whole objective
    with it; without one above, exp overflows after one bad step.

    Args:
        event_shape: E, the shape of an image.

    Reference: Kingma and Welling 2014, arXiv 1312.6114, appendix C.2; the bounds are ours.
    """

    features_per_pixel = 2
    floats_per_pixel = 9

    def pixel(self, loc: Tensor, feature: Tensor) -> dist.Normal:
        """Of a mean in units, and of what gives the scale."""
        return dist.Normal(self.unit * loc, self.unit * bounded(feature, MAX_LOG_SCALE).exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """Each pixel's mean and spread, in units. x: (N, *E) -> (2 prod(E),).

        unit^2 = mean_nd (x_nd - mean_n x_nd)^2, the spread of all pixels. A constant pixel gets a scale of 0.001 units.

        Raises:
            ValueError: every pixel is constant, so that the data has no unit.
        """
        mean, variance = mean_and_variance(x.flatten(1))
        spread = variance.mean().sqrt()
        self._take_unit(spread)
        log_scale = (variance / spread.square()).log() / 2  # -inf for a constant pixel, which ``unbounded`` brings up
        return torch.cat([mean / spread, unbounded(log_scale, MAX_LOG_SCALE)]).to(self.unit.dtype)


class Laplace(_InUnits):
    """p(x | h) = prod_d Laplace(x_d; unit h_d, scale), with one learned scale for all pixels, for real x.

    Up to the scale its log is absolute error: what is far off counts less than under a Normal, and the location is a
    median. The scale is unit exp(``log_scale``), a parameter, as in ``Normal``.

    Args:
        event_shape: E, the shape of an image.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def pixel(self, loc: Tensor) -> dist.Laplace:
        """Of a median in units."""
        return dist.Laplace(self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = median_n x_nd / unit, with unit = scale = mean_nd |x_nd - median_n x_nd|. x: (N, *E) -> (prod(E),).

        Raises:
            ValueError: every pixel is constant, so that no scale is small enough.
        """
        loc, deviation = median_and_deviation(x)
        spread = deviation.mean()
        self._take_unit(spread)
        with torch.no_grad():
            self.log_scale.zero_()
        return (loc / spread).to(self.log_scale.dtype)


class StudentT(_InUnits):
    """p(x | h) = prod_d StudentT(x_d; df, unit h_d, scale), scale and df shared by all pixels and learned, for real x.

    Its tails fall like |x|^-(df + 1): an outlier pulls at the location the less, the further it is off, and df learns
    how many there are. df = 1 + exp(f), f = log(100) tanh(``feature`` / log(100)), lies between 1.01, so that there is
    a mean, and 101, beyond which it is a Normal to three digits and df has no gradient worth having. The scale is unit
    exp(``log_scale``), as in ``Normal``.

    Args:
        event_shape: E, the shape of an image.
    """

    floats_per_pixel = 10

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.feature = nn.Parameter(torch.zeros(()))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, ()."""
        return 1 + bounded(self.feature, math.log(100)).exp()

    def pixel(self, loc: Tensor) -> dist.StudentT:
        """Of a location in units."""
        return dist.StudentT(self.df, self.unit * loc, self.unit * self.log_scale.exp())

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, df = 5, and the scale at which the variance is unit^2. x: (N, *E) -> (prod(E),).

        unit^2 = mean_nd (x_nd - mean_n x_nd)^2 = scale^2 df / (df - 2).

        Raises:
            ValueError: every pixel is constant, so that no scale is small enough.
        """
        with torch.no_grad():
            self.log_scale.fill_(math.log(3 / 5) / 2)
            self.feature.copy_(unbounded(self.feature.new_tensor(math.log(4)), math.log(100)))
        return self._mean_in_units(x)
