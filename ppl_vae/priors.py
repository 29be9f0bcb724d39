"""Priors p(z): called without arguments, they return a distribution over one latent vector."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """p(z) = prod_l Normal(z_l; 0, 1).

    Args:
        latent_dim: L.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.Independent:
        """-> batch shape (), event shape (L,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)
