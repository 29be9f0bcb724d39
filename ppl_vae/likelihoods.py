"""Likelihoods p(x | h): features to a distribution over pixels. One class a distribution.

Each has ``event_shape``, ``num_features`` (what the network's last layer must give), ``support`` (the values a pixel
can take) and ``support_words`` (the same for a person), ``measure`` ("mass" or "density": they are on different scales,
and never compared), ``forward(h)``, which returns a distribution with batch shape ``h.shape[:-1]`` and the event shape,
and ``fit_marginals(x)``, which sets the likelihood's own parameters, if it has any, and returns the h of the pixels'
marginals: training starts from there. ``to_event`` makes pixels independent and *summed*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.numerics import location_and_spread


class Bernoulli(nn.Module):
    """p(x | h) = prod_d sigmoid(h_d)^{x_d} (1 - sigmoid(h_d))^{1 - x_d}, for x in {0, 1}^E.

    Features are logits: probabilities would saturate in float32 and lose both value and gradient. Gray pixels are not
    on the support: a Bernoulli of a fraction is no density (its integral is below one), and they are refused.

    Args:
        event_shape: E, the shape of an image, such as (1, 28, 28).
    """

    support = constraints.boolean
    support_words = "0 or 1"
    measure = "mass"

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., prod(E)) logits -> batch shape (...), event shape E."""
        logits = h.reshape(*h.shape[:-1], *self.event_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = logit((1 + sum_n x_nd) / (2 + N)), each pixel's rate, Laplace-smoothed. x: (N, *E) -> (prod(E),)."""
        rate = (1 + x.flatten(1).sum(0, dtype=torch.double)) / (2 + len(x))
        return rate.logit().float()


class Normal(nn.Module):
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

    support = constraints.real
    support_words = "real numbers"
    measure = "density"
    unit: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = math.prod(self.event_shape)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., prod(E)) means in units of ``unit`` -> batch shape (...), event shape E."""
        loc = self.unit * h.reshape(*h.shape[:-1], *self.event_shape)
        return dist.Normal(loc, self.unit * self.log_scale.exp()).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = mean_n x_nd / unit, with unit^2 = scale^2 = mean_nd (x_nd - mean_n x_nd)^2. x: (N, *E) -> (prod(E),).

        Raises:
            ValueError: every pixel is constant, so that no scale is small enough.
        """
        loc, spread = location_and_spread(x)
        if not spread > 0:
            raise ValueError("x: expected pixels that vary, got the same image every time: no scale fits")
        with torch.no_grad():
            self.unit.copy_(spread)
            self.log_scale.zero_()
        return (loc.flatten() / spread).to(self.log_scale.dtype)
