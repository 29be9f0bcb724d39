"""Mixtures of discretized logistic distributions over 8-bit levels: masses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae import data
from ppl_vae.data import NUM_LEVELS
from ppl_vae.parts.likelihoods.base import level_counts, planes
from ppl_vae.parts.likelihoods.levels import (
    CENTER,
    LEVELS,
    LEVELS_WORDS,
    PIXELS_AT_ONCE,
    LevelLogistic,
    discretized_logistic_draw,
    discretized_logistic_log_mass,
    discretized_logistic_mean,
    logistic_log_scale,
    match_moments,
)
from ppl_vae.runtime.errors import check_count

_EM_STEPS = 20
_SMALLEST_WEIGHT = 1e-4  # of a component, so that it stays one that can be trained
_APART = 0.25  # of a level: K components are spread by that much, so that those of a constant pixel differ


class ColorLogisticMixture(dist.TorchDistribution):
    """prod over positions of sum_k pi_k P_k(R) P_k(G | R) P_k(B | R, G), images (3, H, W) of levels.

    P_k are discretized logistic distributions, in units of t = level / 127.5 - 1, with locations loc_R,
    loc_G + c_0 t_R and loc_B + c_1 t_R + c_2 t_G. The three colors of a position share one component.

    Args:
        logits: (..., K, H, W), of pi.
        locs, log_scales, coefficients: (..., 3, K, H, W).
        observed: (..., H, W) bool, the positions whose densities count; None: all.
    """

    arg_constraints = dict.fromkeys(("logits", "locs", "log_scales", "coefficients"), constraints.real)
    support = constraints.independent(LEVELS, 3)

    def __init__(
        self, logits: Tensor, locs: Tensor, log_scales: Tensor, coefficients: Tensor, observed: Tensor | None = None
    ) -> None:
        self.observed = observed
        self.logits, self.locs, self.log_scales, self.coefficients = logits, locs, log_scales, coefficients
        super().__init__(logits.shape[:-3], torch.Size((3, *logits.shape[-2:])))

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> ColorLogisticMixture:
        batch = torch.Size(batch_shape)
        new = ColorLogisticMixture(
            self.logits.expand(batch + self.logits.shape[-3:]),
            *(p.expand(batch + p.shape[-4:]) for p in (self.locs, self.log_scales, self.coefficients)),
        )
        new.observed, new._validate_args = self.observed, self._validate_args
        return new

    def mask_missing(self, x: Tensor) -> ColorLogisticMixture:
        """The same without the densities of positions that are NaN in x, (B, 3, H, W).

        Raises ValueError for a position with some of its colors: they depend on each other given z.
        """
        missing = x.isnan()
        if (missing.any(1) & ~missing.all(1)).any():
            raise ValueError(
                "missing pixels: expected all three colors of a pixel to be missing or none, since they depend on each "
                "other given z, got some of the three"
            )
        return ColorLogisticMixture(self.logits, self.locs, self.log_scales, self.coefficients, ~missing.all(1))

    def _map_channels(self, channel: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """channel(c, loc, log_scale) of each color, whose location depends on those before it: (..., 3, K, H, W)."""
        loc, log_scale, c = self.locs.unbind(-4), self.log_scales.unbind(-4), self.coefficients.unbind(-4)
        red = channel(0, loc[0], log_scale[0])
        t_red = red / CENTER - 1
        green = channel(1, loc[1] + c[0] * t_red, log_scale[1])
        t_green = green / CENTER - 1
        blue = channel(2, loc[2] + c[1] * t_red + c[2] * t_green, log_scale[2])
        return torch.stack([red, green, blue], dim=-4)

    @property
    def mean(self) -> Tensor:
        """sum_k pi_k E_k[x]: (..., 3, H, W) levels.

        It is exact for red, and where coefficients are 0. The means of green and blue are taken at the mean of their
        location, E_k[loc_G + c_0 t_R], which is off where level 0 or 255 is within the spread of the location.
        """
        means = self._map_channels(lambda c, loc, log_scale: discretized_logistic_mean(loc, log_scale))
        return (self.logits.softmax(-3).unsqueeze(-4) * means).sum(-3)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        component = dist.Categorical(logits=self.logits.movedim(-3, -1)).sample(torch.Size(sample_shape))
        of_sample = self.expand(torch.Size(sample_shape) + self.batch_shape)
        index = component[..., None, None, :, :].expand(*of_sample.locs.shape[:-3], 1, *component.shape[-2:])
        parameters = (of_sample.locs, of_sample.log_scales, of_sample.coefficients)
        locs, log_scales, coefficients = (p.gather(-3, index) for p in parameters)
        single = ColorLogisticMixture(torch.zeros_like(locs[..., 0, :, :, :]), locs, log_scales, coefficients)
        u = torch.rand_like(locs)

        def draw(c: int, loc: Tensor, log_scale: Tensor) -> Tensor:
            return discretized_logistic_draw(u[..., c, :, :, :], loc, log_scale)

        return single._map_channels(draw).squeeze(-3)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x = value.unsqueeze(-3)  # (..., 3, 1, H, W)
        locs = []

        def look_up(c: int, loc: Tensor, log_scale: Tensor) -> Tensor:
            locs.append(loc)
            return x[..., c, :, :, :]

        self._map_channels(look_up)
        given = torch.stack(torch.broadcast_tensors(*locs), dim=-4)
        log_p = discretized_logistic_log_mass(x, given, self.log_scales).sum(-4)
        log_p = (log_p + self.logits.log_softmax(-3)).logsumexp(-3)
        return (log_p if self.observed is None else log_p.where(self.observed, 0.0)).sum((-2, -1))


class DiscretizedLogisticMixture(nn.Module):
    """P(x | h) = prod_d sum_k pi_dk P(x_d; loc_dk, scale_dk), each P a discretized logistic, for levels x.

    A gray image or a table has K logits, locations and scales (see ``DiscretizedLogistic``) per value. A color image
    (3, H, W) has one mixture per position, a ``ColorLogisticMixture``, whose coefficients are tanh of features: 10 K
    features per position.

    Args:
        event_shape: E.
        components: K, at least 1.

    Raises:
        ValueError: K is below 1.

    Reference: Salimans et al. 2017, arXiv 1701.05517, sections 2.1 and 2.2.
    """

    support = LEVELS
    support_words = LEVELS_WORDS
    measure = "mass"
    data_kind = data.LEVELS

    def __init__(self, event_shape: Sequence[int], *, components: int = 5) -> None:
        super().__init__()
        components = check_count("components", components)
        self.event_shape = tuple(event_shape)
        self.components = components
        self.floats_per_pixel = 16 * components
        self.is_color = len(self.event_shape) == 3 and self.event_shape[0] == 3
        D = math.prod(self.event_shape)
        self.num_features = 10 * components * D // 3 if self.is_color else 3 * components * D

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """h: (..., num_features) -> batch shape (...), event shape E.

        Planes of h are logits, locations, scales and (in color) coefficients, each for every component. The locations
        of a color image are K for red, K for green and K for blue; scales and coefficients likewise.
        """
        K = self.components
        if self.is_color:
            h = h.unflatten(-1, (10, K, *self.event_shape[1:]))
            locs, features, coefficients = h[..., 1:, :, :, :].split(3, dim=-4)
            return ColorLogisticMixture(h[..., 0, :, :, :], locs, logistic_log_scale(features), coefficients.tanh())
        logits, loc, feature = planes(h, 3, (K, *self.event_shape))
        logits, loc, feature = (p.movedim(-len(self.event_shape) - 1, -1) for p in (logits, loc, feature))
        component = LevelLogistic(loc, logistic_log_scale(feature))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), component).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """A mixture for every pixel by expectation-maximization, coefficients 0. x: (N, *E) -> (num_features,).

        Component k starts with the k-th of K equal shares of the pixel's sorted levels. A maximization step matches the
        mean and variance of each component. In the end components are moved apart by a fraction of a level, so that no
        two are alike. In color a position has the mean of the three channels' weights.
        """
        share = level_counts(x) / len(x)
        parts = [_fit_mixture(part.float(), self.components) for part in share.split(PIXELS_AT_ONCE)]
        features = torch.cat(parts, dim=-1)  # (3, K, D)
        if not self.is_color:
            return features.flatten().to(x.dtype)
        by_color = features.unflatten(-1, (3, -1)).movedim(-2, 1)  # (3, 3, K, H W)
        weights, nothing = by_color[0].mean(0, keepdim=True), torch.zeros_like(by_color[0])
        return torch.cat([weights, by_color[1], by_color[2], nothing]).flatten().to(x.dtype)


def _fit_mixture(share: Tensor, K: int) -> Tensor:
    """Features of a mixture of K for D pixels, (3, K, D). share: (D, 256), the share of images at each level."""
    levels = torch.arange(NUM_LEVELS, dtype=share.dtype, device=share.device)
    below = torch.arange(K, dtype=share.dtype, device=share.device)[:, None, None] / K
    cdf = share.cumsum(-1)
    of_component = (torch.minimum(cdf, below + 1 / K) - torch.maximum(cdf - share, below)).clamp(min=0)  # (K, D, 256)
    for _ in range(_EM_STEPS):
        logits = of_component.sum(-1).clamp(min=_SMALLEST_WEIGHT).log()
        loc, feature = match_moments(of_component)
        log_p = discretized_logistic_log_mass(levels, loc[..., None], logistic_log_scale(feature)[..., None])
        of_component = share * (logits[..., None] + log_p).softmax(0)
    apart = _APART * (below[..., 0] - (K - 1) / (2 * K)) / CENTER
    return torch.stack([logits - logits.mean(0), loc + apart, feature])
