"""The aggregate posterior q(z) = (1/N) sum_n q(z | x_n): a mixture with one component per image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import floats_per_latent, images_per_pass, items_per_pass
from ppl_vae.runtime.global_state import serialize_threads


def factors(distribution: Distribution) -> Distribution | None:
    """The distributions of the latents, batch shape (..., L), if they are independent by construction; else None."""
    if not isinstance(distribution, Independent) or distribution.reinterpreted_batch_ndims != 1:
        return None
    base: Distribution = distribution.base_dist
    return None if base.event_shape else base


def normal_factors(distribution: Distribution) -> Normal | None:
    """The distributions of the latents if they are independent normals; else None."""
    found = factors(distribution)
    return found if isinstance(found, Normal) else None


class AggregatePosterior:
    """q(z) = (1/N) sum_n q(z | x_n) over N images.

    Products of normals are evaluated by two matrix products in float64, -2 log q(z | x_n) = z^2 @ s_n^-2 -
    2 z @ (m_n s_n^-2) + constant; other posteriors by their ``log_prob``. Memory does not grow with N^2.

    Args:
        groups: q(z | x_n), batch (B,) and event (L,), one distribution per group of images.

    Raises:
        ValueError: no image.
    """

    def __init__(self, groups: Sequence[Distribution]) -> None:
        if not groups:
            raise ValueError("x: expected at least one image, got none")
        self.groups = list(groups)
        self.num_images = sum(int(q.batch_shape[0]) for q in self.groups)
        self.latent_dim = int(self.groups[0].event_shape[0])

    @classmethod
    @serialize_threads()
    @torch.no_grad()
    def encode(cls, vae: LatentModel, x: Tensor) -> AggregatePosterior:
        """The aggregate posterior of images (N, *E) under the VAE's guide, in passes that fit into memory."""
        return cls([vae.posterior(group) for group in x.split(images_per_pass(x))] if len(x) else [])

    @property
    def is_factorized(self) -> bool:
        """Whether each q(z | x_n) is a product over latents by construction."""
        return all(factors(q) is not None for q in self.groups)

    @serialize_threads()
    @torch.no_grad()
    def sample(self) -> Tensor:
        """(N, L) one z ~ q(z | x_n) per image."""
        return torch.cat([q.sample() for q in self.groups])

    @torch.no_grad()
    def log_prob_per_image(self, z: Tensor) -> Tensor:
        """(N,) log q(z_n | x_n), nats, float64. z: (N, L), in the order of the images."""
        parts = zip(self.groups, self._split(z), strict=True)
        return torch.cat([q.log_prob(part).double() for q, part in parts])

    @torch.no_grad()
    def log_prob_per_latent(self, z: Tensor) -> Tensor:
        """(N, L) log q(z_nl | x_n), nats, float64, for a factorized guide. z: (N, L)."""
        parts = zip(map(factors, self.groups), self._split(z), strict=True)
        return torch.cat([q.log_prob(part).double() for q, part in parts if q is not None])

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """(M,) log q(z), nats, float64. z: (M, L)."""
        parts = [self._log_sum(q, z) for q in self.groups]
        return torch.stack(parts).logsumexp(0) - math.log(self.num_images)

    @torch.no_grad()
    def log_prob_by_latent(self, z: Tensor) -> Tensor:
        """(M, L) log q(z_l) of each latent's marginal, nats, float64, for a factorized guide. z: (M, L)."""
        parts = [self._log_sum_by_latent(q, z) for q in map(factors, self.groups) if q is not None]
        return torch.stack(parts).logsumexp(0) - math.log(self.num_images)

    @torch.no_grad()
    def smoothed(self, bandwidth: float) -> AggregatePosterior | None:
        """(1/N) sum_n prod_l Normal(m_nl, s_nl^2 + h^2 Var_n m_nl), with the bandwidth h; None unless normal."""
        found = [normal_factors(q) for q in self.groups]
        normals = [q for q in found if q is not None]
        if len(normals) < len(found):
            return None
        added = bandwidth**2 * torch.cat([q.loc for q in normals]).var(0, correction=0)
        return AggregatePosterior([Independent(Normal(q.loc, (q.scale.square() + added).sqrt()), 1) for q in normals])

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split([int(q.batch_shape[0]) for q in self.groups])

    @staticmethod
    def _log_sum(q: Distribution, z: Tensor) -> Tensor:
        """(M,) log sum_n q(z | x_n) over one group of images."""
        B, normals = int(q.batch_shape[0]), normal_factors(q)
        if normals is None:
            chunk = items_per_pass(B * floats_per_latent(q), z.device.type, bytes_per_float=8)
            return torch.cat([q.log_prob(part[:, None]).double().logsumexp(1) for part in z.split(chunk)])
        loc, precision = normals.loc.double(), normals.scale.double().pow(-2)
        constant = (loc.square() * precision - precision.log() + math.log(2 * math.pi)).sum(-1)

        def log_prob(part: Tensor) -> Tensor:
            return -(part.square() @ precision.T - 2 * part @ (loc * precision).T + constant) / 2

        chunk = items_per_pass(B, z.device.type, bytes_per_float=8)
        return torch.cat([log_prob(part).logsumexp(1) for part in z.double().split(chunk)])

    @staticmethod
    def _log_sum_by_latent(q: Distribution, z: Tensor) -> Tensor:
        """(M, L) log sum_n q(z_l | x_n) over one group of images."""
        chunk = items_per_pass(4 * q.batch_shape.numel(), z.device.type, bytes_per_float=8)
        return torch.cat([q.log_prob(part[:, None]).logsumexp(1).double() for part in z.split(chunk)])
