"""Posteriors q(z | h): features to a distribution over latents. One class a distribution."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

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


class DiagonalNormal(nn.Module):
    """q(z | h) = prod_l Normal(z_l; loc_l, scale_l), with h = (loc, feature) and log scale = 7 tanh(feature / 7).

    Args:
        latent_dim: L.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.num_features = 2 * latent_dim

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., 2 L) -> batch shape (...), event shape (L,)."""
        loc, feature = h.chunk(2, dim=-1)
        return dist.Normal(loc, bounded_log_scale(feature).exp()).to_event(1)
