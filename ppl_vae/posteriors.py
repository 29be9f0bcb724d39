"""Posteriors q(z | h): features to a distribution over latents. One class a distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae.numerics import bounded

# |log scale| never exceeds this: scales lie between 0.0009 and 1,097.
MAX_LOG_SCALE = 7.0


def bounded_log_scale(h: Tensor) -> Tensor:
    """log sigma = 7 tanh(h / 7): the map from a feature to a latent's log-scale.

    It has slope one at h = 0, where it gives sigma = 1, the prior's scale; it is smooth, with a gradient for every
    feature up to |h| = 60 in float32; and it is bounded. An unbounded exp(h) overflows the KL after one bad step (at
    h = 50, sigma^2 = 10^43), and lets a scale vanish, where log q(z | x) is infinite; softplus cannot overflow, but its
    slope makes small scales slow to learn and needs an epsilon at the bottom. A posterior narrower than 0.0009 prior
    scales cannot be expressed.

    Source: ours.
    """
    return bounded(h, MAX_LOG_SCALE)


def exponential_log_scale(h: Tensor) -> Tensor:
    """log sigma = h, sigma = exp(h): the map of most published code. It has no bound either way.

    Reference: Kingma and Welling 2014, arXiv 1312.6114, appendix C.2 (there h = log sigma^2).
    """
    return h


_SOFTPLUS_OFFSET = math.log(math.e - 1)  # softplus of it is 1, so that h = 0 gives the prior's scale
_LEAST_SOFTPLUS = (
    1.1e-19  # whose square is a normal float32: a KL takes it, and that of softplus(-55) is 0, a KL of inf
)


def softplus_log_scale(h: Tensor) -> Tensor:
    """log sigma = log softplus(h + log(e - 1)): linear where exp overflows, exp where scales are small.

    Slope in log sigma at h = 0: 1 - 1/e. Below h = -44 sigma stays at 1.1e-19, with no gradient.

    Source: common practice; the offset is ours, so that h = 0 gives sigma = 1 as the other maps do.
    """
    return softplus(h + _SOFTPLUS_OFFSET).clamp(min=_LEAST_SOFTPLUS).log()


class DiagonalNormal(nn.Module):
    """q(z | h) = prod_l Normal(z_l; loc_l, scale_l), with h = (loc, feature) and log scale = g(feature).

    Args:
        latent_dim: L.
        log_scale: g, from features to log-scales, elementwise; by default 7 tanh(feature / 7).
    """

    def __init__(self, latent_dim: int, *, log_scale: Callable[[Tensor], Tensor] = bounded_log_scale) -> None:
        super().__init__()
        self.log_scale = log_scale
        self.event_shape = (latent_dim,)
        self.num_features = 2 * latent_dim

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., 2 L) -> batch shape (...), event shape (L,)."""
        loc, feature = h.chunk(2, dim=-1)
        return dist.Normal(loc, self.log_scale(feature).exp()).to_event(1)


class Delta(nn.Module):
    """q(z | h) = delta(z - h): the deterministic guide of a plain autoencoder.

    It has no density: a model with it has reconstructions, and neither an ELBO nor a log-likelihood. Trained with the
    latent sites' weight 0, the loss is -log p(x | z(x)).

    Args:
        latent_dim: L.

    Reference: Hinton and Salakhutdinov 2006.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.num_features = latent_dim

    def forward(self, h: Tensor) -> dist.Delta:
        """h: (..., L) -> batch shape (...), event shape (L,)."""
        return dist.Delta(h, event_dim=1)
