"""Likelihoods of numbers between 0 and 1 through their logit: densities, with the Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae import data
from ppl_vae.parts.likelihoods.base import Pixels
from ppl_vae.parts.likelihoods.real import NormalPerPixel
from ppl_vae.parts.likelihoods.unit_interval import open_unit_interval

_QUADRATURE_POINTS = 24  # of each half of the quantiles


class Sigmoid(dist.TorchDistribution):
    """The distribution of x = sigmoid(y), y ~ base: p(x) = p_base(logit x) / (x (1 - x)), 0 < x < 1, of one pixel.

    Args:
        base: a distribution of a real number, symmetric about its median, with ``icdf`` and ``cdf``.
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
        base: A likelihood of real numbers, whose features it takes.

    Raises:
        ValueError: The base has no quantiles, from which the mean of sigmoid(y) is computed, such as ``StudentT``.

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
