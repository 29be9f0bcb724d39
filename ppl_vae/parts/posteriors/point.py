"""The posterior without a density: one point an image."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn


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
