"""Normal and deterministic posteriors, the maps to their scales, and draws that remember their density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl
from torch.nn.functional import softplus

from ppl_vae.runtime.numerics import bounded

# |log scale| never exceeds this: scales lie between 0.0009 and 1,097.
MAX_LOG_SCALE = 7.0


def bounded_log_scale(h: Tensor) -> Tensor:
    """log sigma = 7 tanh(h / 7): the map from a feature to a latent's log-scale, in the shape of h.

    It has slope one at h = 0, where sigma = 1, and a gradient up to |h| = 60 in float32. An unbounded exp(h) overflows
    the KL after one bad step (at h = 50, sigma^2 = 10^43); softplus is slow to learn small scales.

    Source: ours.
    """
    return bounded(h, MAX_LOG_SCALE)


def exponential_log_scale(h: Tensor) -> Tensor:
    """log sigma = h, sigma = exp(h): the map of most published code, in the shape of h. It has no bound either way.

    Reference: Kingma and Welling 2014, arXiv 1312.6114, appendix C.2 (there h = log sigma^2).
    """
    return h


_SOFTPLUS_OFFSET = math.log(math.e - 1)  # softplus of it is 1, so that h = 0 gives the prior's scale
# Its square is a normal float32. A KL takes the square, and that of softplus(-55) is 0, which makes the KL infinite.
_LEAST_SOFTPLUS = 1.1e-19


def softplus_log_scale(h: Tensor) -> Tensor:
    """log sigma = log softplus(h + log(e - 1)): linear where exp overflows, exp where scales are small.

    In the shape of h. Slope in log sigma at h = 0: 1 - 1/e. Below h = -44 sigma stays at 1.1e-19, with no gradient.

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


class FullNormal(nn.Module):
    """q(z | h) = Normal(z; loc, T T'), T = diag(scale) (I + U / sqrt(L)), with h = (loc, feature, U).

    log scale = g(feature), and U is strictly lower triangular and unbounded. Its entries are relative to the scale of
    their row, so that a latent can become narrow without relearning its correlations, and to 1 / sqrt(L), so that
    features of order one give marginal scales of order one. h = 0 is N(0, I).

    The density of the distribution's own draw comes from its noise, and stays exact in float32 where T is nearly
    singular.

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
    """Normal(z; loc, T T'); the density of its own draw z = loc + T u is Normal(u; 0, I) / det T, without solving."""

    _own: CachedLogProb | None = None

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        T = self._unbroadcasted_scale_tril
        noise = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        u = noise.rsample(sample_shape)
        z = self.loc + (T * u[..., None, :]).sum(-1)  # not a matrix product, which autocast would round
        self._own = CachedLogProb(z, noise.log_prob(u) - T.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        return z

    def log_prob(self, value: Tensor) -> Tensor:
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


class Delta(nn.Module):
    """q(z | h) = delta(z - h): the deterministic guide of a plain autoencoder.

    A model with it has reconstructions, and neither an ELBO nor a log-likelihood. With beta 0 the loss is
    -log p(x | z(x)).

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


class CachedLogProb:
    """A draw z of a distribution, with log q(z) from the noise that z was made from.

    The gradient of log q(z) in the parameters is the total one, through z too; for the partial one, evaluate the
    density at ``z.detach()``.

    Args:
        z: (..., L).
        log_q: (...) nats.
    """

    def __init__(self, z: Tensor, log_q: Tensor) -> None:
        self._z = z
        self._log_q = log_q
        self._had_gradients = torch.is_grad_enabled()
        self._marks = _marks(z)

    def log_density(self, z: Tensor) -> Tensor | None:
        """log q(z), (...) nats, if z is this draw, unchanged; else None.

        None also where gradients are enabled now but were not when z was drawn.
        """
        knows = z is self._z and self._marks == _marks(z)
        return self._log_q if knows and (self._had_gradients or not torch.is_grad_enabled()) else None


def _marks(z: Tensor) -> tuple[bool, int | None]:
    """Marks that change when z is written to, or becomes an input of a gradient."""
    return z.requires_grad, None if z.is_inference() else z._version
