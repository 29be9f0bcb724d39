"""Normal posteriors: with independent latents, and with a full covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl

from ppl_vae.parts.posteriors.own_draw import CachedLogProb
from ppl_vae.parts.posteriors.scales import bounded_log_scale


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


class FullNormal(nn.Module):
    """q(z | h) = Normal(z; loc, T T'), T = diag(scale) (I + U / sqrt(L)), with h = (loc, feature, U).

    log scale = g(feature), and U is strictly lower triangular. Its entries are counted in scales of their own row, the
    latent's scale given those before it, so that a latent can become narrow without all its correlations being learned
    anew; and in 1 / sqrt(L), so that features of order one give marginal scales of order one whatever L. They have no
    bound, so that no correlation is out of reach. h = 0 is N(0, I).

    The density of an own draw is taken from its noise, and stays exact in float32 where T is close to singular; at any
    other z a triangular system is solved.

    Args:
        latent_dim: L.
        log_scale: g, from features to the logarithms of T's diagonal, elementwise; by default 7 tanh(feature / 7).

    Reference: Kingma and Welling 2019, arXiv 1906.02691, section 2.5.1; the scaling of U is ours.
    """

    below: Tensor

    def __init__(self, latent_dim: int, *, log_scale: Callable[[Tensor], Tensor] = bounded_log_scale) -> None:
        super().__init__()
        self.log_scale = log_scale
        self.event_shape = (latent_dim,)
        self.num_features = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        row, column = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.register_buffer("below", row * latent_dim + column, persistent=False)

    def forward(self, h: Tensor) -> CachedLogProbNormal:
        """h: (..., 2 L + L (L - 1) / 2), U row by row -> batch shape (...), event shape (L,)."""
        (L,) = self.event_shape
        loc, feature, U = h.split([L, L, self.num_features - 2 * L], dim=-1)
        U = h.new_zeros(*h.shape[:-1], L * L).index_copy(-1, self.below, U / math.sqrt(L)).unflatten(-1, (L, L))
        one = torch.eye(L, dtype=h.dtype, device=h.device)
        return CachedLogProbNormal(loc, scale_tril=self.log_scale(feature).exp()[..., None] * (one + U))


class CachedLogProbNormal(dist.MultivariateNormal):
    """Normal(z; loc, T T'), of whose own draw z = loc + T u the density is Normal(u; 0, I) / det T, without solving."""

    _own: CachedLogProb | None = None

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + batch shape + (L,)."""
        T = self._unbroadcasted_scale_tril
        noise = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        u = noise.rsample(sample_shape)
        z = self.loc + (T * u[..., None, :]).sum(-1)  # no product of matrices, which autocast would round
        self._own = CachedLogProb(z, noise.log_prob(u) - T.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """value: (..., L) -> (...) nats."""
        known = self._own.log_density(value) if self._own else None
        return super().log_prob(value) if known is None else known


@register_kl(MultivariateNormal, Independent)
def _kl_full_diagonal(q: MultivariateNormal, p: Independent) -> Tensor:
    """KL(Normal(m, T T') || prod_l Normal(mu_l, s_l^2)), (...) nats; torch has no formula for this pair.

        sum_l (log s_l - log T_ll) + (sum_lk (T_lk / s_l)^2 + sum_l ((m_l - mu_l) / s_l)^2 - L) / 2

    Raises:
        NotImplementedError: a second distribution that is no product of L normals.
    """
    factors = p.base_dist
    if not isinstance(factors, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    T, s = q._unbroadcasted_scale_tril, factors.scale
    log_ratio = s.log() - T.diagonal(dim1=-2, dim2=-1).log()
    spread = (T / s[..., None]).square().sum(-1)
    return (log_ratio + (spread + ((q.loc - factors.loc) / s).square() - 1) / 2).sum(-1)
