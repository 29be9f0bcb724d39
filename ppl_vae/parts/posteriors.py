"""Posteriors q(z | h): features to a distribution over latents.

Each has ``event_shape``, ``num_features`` (what the network's last layer must give) and ``forward(h)``, which returns a
distribution with batch shape ``h.shape[:-1]`` and event shape (L,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints, register_kl
from torch.nn.functional import softplus

from ppl_vae.parts.flows import SPLINE_BINS, Autoregressive, affine, spline
from ppl_vae.runtime.errors import Widths, check_count
from ppl_vae.runtime.numerics import bounded

# |log scale| never exceeds this: scales lie between 0.0009 and 1,097.
MAX_LOG_SCALE = 7.0


def bounded_log_scale(h: Tensor) -> Tensor:
    """log sigma = 7 tanh(h / 7): the map from a feature to a latent's log-scale, in the shape of h (ours).

    It has slope one at h = 0, where sigma = 1, and a gradient up to |h| = 60 in float32. An unbounded exp(h) overflows
    the KL after one bad step (at h = 50, sigma^2 = 10^43); softplus is slow to learn small scales.
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
    """q(z | h) = delta(z - h): the deterministic guide of a plain autoencoder (Hinton and Salakhutdinov 2006).

    A model with it has reconstructions, and neither an ELBO nor a log-likelihood. With beta 0 the loss is
    -log p(x | z(x)).
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

    The gradient of log q(z), (...) nats, in the parameters is the total one, through z (..., L) too; for the partial
    one, evaluate the density at ``z.detach()``.
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


class FlowPosterior(nn.Module):
    """q(z | h) of z = loc + scale f(u; c), u ~ N(0, I), with h = (loc, feature, c) and log scale = g(feature).

    log q(z | h) = log N(u; 0, I) - log |det df/du| - sum_l log scale_l. f acts on the noise, so that its resolution
    does not depend on the location and width of the posterior. The density of the distribution's own draw is cached; at
    any other z the layers are inverted.

    Args:
        latent_dim: L.
        layers: Of f, each (u (..., L), c (..., C)) -> the value and its log |det|, with an ``inverse`` likewise.
        context_dim: C, the features of an image that the layers see.
        log_scale: g, elementwise; by default 7 tanh(feature / 7).

    Reference: Rezende and Mohamed 2015, arXiv 1505.05770; Kingma et al. 2016, arXiv 1606.04934, section 3, where the
    layers follow loc + scale u.
    """

    def __init__(
        self,
        latent_dim: int,
        layers: Iterable[nn.Module],
        *,
        context_dim: int,
        log_scale: Callable[[Tensor], Tensor] = bounded_log_scale,
    ) -> None:
        super().__init__()
        self.log_scale = log_scale
        self.event_shape = (latent_dim,)
        self.context_dim = context_dim
        self.num_features = 2 * latent_dim + context_dim
        self.layers = nn.ModuleList(layers)

    def forward(self, h: Tensor) -> ConditionedFlow:
        """h: (..., 2 L + C) -> batch shape (...), event shape (L,)."""
        (L,) = self.event_shape
        loc, feature, context = h.split([L, L, self.context_dim], dim=-1)
        base = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return ConditionedFlow(base, self.layers, context=context, loc=loc, log_scale=self.log_scale(feature))


class ConditionedFlow(dist.TorchDistribution):
    """The distribution of z = loc + scale f(u; c), u ~ base. It has no mean in closed form.

    Args:
        base: Of the noise u, batch shape (...), event shape (L,).
        layers: Of f.
        context, loc, log_scale: c, (..., C), (..., L) and (..., L). Leading dimensions broadcast with the batch shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's name and form)
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, base: Distribution, layers: Iterable[nn.Module], *, context: Tensor, loc: Tensor, log_scale: Tensor
    ) -> None:
        self.base, self.layers = base, tuple(layers)
        self.context, self.loc, self.log_scale = context, loc, log_scale
        self._own: CachedLogProb | None = None
        super().__init__(base.batch_shape, base.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> ConditionedFlow:
        """With another batch shape. The context does not expand, so that it is multiplied once per image."""
        base = self.base.expand(torch.Size(batch_shape))
        flow = ConditionedFlow(base, self.layers, context=self.context, loc=self.loc, log_scale=self.log_scale)
        flow._validate_args = self._validate_args
        return flow

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        y = self.base.rsample(torch.Size(sample_shape))
        log_q = self.base.log_prob(y) - self.log_scale.sum(-1)
        for layer in self.layers:
            y, log_volume = layer(y, self.context)
            log_q = log_q - log_volume
        z = self.loc + self.log_scale.exp() * y
        self._own = CachedLogProb(z, log_q)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        known = self._own.log_density(value) if self._own else None
        if known is not None:
            return known
        u = (value - self.loc) * (-self.log_scale).exp()
        log_volume = -self.log_scale.sum(-1)
        for layer in reversed(self.layers):
            u, of_layer = layer.inverse(u, self.context)  # type: ignore[operator]
            log_volume = log_volume + of_layer
        return self.base.log_prob(u) + log_volume


def inverse_autoregressive_flow(
    latent_dim: int,
    *,
    context_dim: int,
    num_layers: int,
    hidden: Widths,
    log_scale: Callable[[Tensor], Tensor] = bounded_log_scale,
) -> FlowPosterior:
    """A flow of affine layers that map each latent given all before it, in alternating order.

    A draw and its density take one pass per layer; the density at any other z takes L sequential passes. It starts as
    the diagonal normal. Arguments as ``FlowPosterior``, with the number of layers and the widths of their networks.

    Reference: Kingma et al. 2016, arXiv 1606.04934, section 4.
    """
    orders = [range(latent_dim)[:: -1 if index % 2 else 1] for index in range(num_layers)]
    layer = partial(Autoregressive, univariate=affine, num_features=2, context_dim=context_dim, hidden=hidden)
    return FlowPosterior(latent_dim, map(layer, orders), context_dim=context_dim, log_scale=log_scale)


def spline_flow(
    latent_dim: int,
    *,
    context_dim: int,
    num_layers: int,
    hidden: Widths,
    log_scale: Callable[[Tensor], Tensor] = bounded_log_scale,
) -> FlowPosterior:
    """A flow of spline couplings: one half of the latents given the context, the other given the first half too.

    A draw and its density take one pass per layer; the density at any other z takes two. Layers come in pairs that swap
    the halves; a latent's half in the k-th pair is the k-th bit of its index. It starts as the diagonal normal, and
    keeps a normal's tails: beyond 5 scales each layer is the identity. Arguments as ``inverse_autoregressive_flow``.

    Reference: Durkan et al. 2019, arXiv 1906.04032, section 3; which half is which is ours.
    """
    latent_dim = check_count("latent_dim", latent_dim)
    bits = [index // 2 % max(1, (latent_dim - 1).bit_length()) for index in range(num_layers)]
    halves = [[(latent >> bit & 1) ^ (i % 2) for latent in range(latent_dim)] for i, bit in enumerate(bits)]
    F = 3 * SPLINE_BINS - 1
    layer = partial(Autoregressive, univariate=spline, num_features=F, context_dim=context_dim, hidden=hidden)
    return FlowPosterior(latent_dim, map(layer, halves), context_dim=context_dim, log_scale=log_scale)


def flow_posterior(
    latent_dim: int,
    *,
    flow: Callable[..., FlowPosterior],
    num_layers: int,
    hidden: Sequence[int],
    log_scale: Callable[[Tensor], Tensor] = bounded_log_scale,
) -> FlowPosterior:
    """The given ``flow`` with layers that depend on ``hidden[0]`` features of the image."""
    return flow(latent_dim, context_dim=hidden[0], num_layers=num_layers, hidden=hidden, log_scale=log_scale)
