"""Flow posteriors: a normal followed by autoregressive layers, whose parameters depend on the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import linear

from ppl_vae.parts.flows import Univariate, affine, spline
from ppl_vae.parts.posteriors.normal import CachedLogProb, bounded_log_scale
from ppl_vae.runtime.errors import Widths, check_count, check_widths


class MaskedLinear(nn.Linear):
    """y = (W * mask) u + b.

    Args:
        mask: (outputs, inputs), whether an output sees an input.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return linear(input, self.weight * self.mask, self.bias)


class MaskedNetwork(nn.Module):
    """h_l = net_l({u_m: order_m < order_l}, c): one network with features for every latent, its weights masked.

    A hidden unit of degree d depends on the latents of order below d, and those of order d and above depend on it.
    Degrees are spread evenly. The context is added in the first layer, so that it is multiplied once per image and not
    once per particle. h starts at 0.

    Args:
        order: L integers from 0.
        num_features: F, of each latent.
        context_dim: C.
        hidden: The widths of the hidden layers. Raises ValueError for none.

    Reference: Germain et al. 2015 (MADE), arXiv 1502.03509, equations 8 to 11; the even degrees and the context as in
    Papamakarios et al. 2017, arXiv 1705.07057, section 3.4.
    """

    def __init__(self, order: Sequence[int], *, num_features: int, context_dim: int, hidden: Widths) -> None:
        super().__init__()
        hidden = check_widths("hidden", hidden)
        if not hidden:
            raise ValueError("hidden: expected at least one width, got none")
        passes, of_latents = max(order) + 1, torch.tensor(order)
        degrees = [torch.arange(width) * passes // width for width in hidden]
        masks = [degrees[0][:, None] > of_latents]
        masks += [after[:, None] >= before for before, after in pairwise(degrees)]
        masks += [of_latents.repeat_interleave(num_features)[:, None] >= degrees[-1]]
        self.num_features = num_features
        self.context = nn.Linear(context_dim, hidden[0], bias=False)
        self.first = MaskedLinear(masks[0])
        self.further = nn.Sequential(*(nn.Sequential(nn.ReLU(), MaskedLinear(mask)) for mask in masks[1:-1]))
        self.output = MaskedLinear(masks[-1])
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.zero_()

    def forward(self, u: Tensor, context: Tensor) -> Tensor:
        """u: (..., L), context: (..., C) -> (..., L, F)."""
        h = self.further(self.first(u) + self.context(context))
        return self.output(h.relu()).to(u.dtype).unflatten(-1, (-1, self.num_features))


class Autoregressive(nn.Module):
    """y_l = t(u_l; h_l), h_l = net_l({u_m: order_m < order_l}, c): triangular, so that log |det dy/du| is a sum.

    u to y takes one pass of the network; y to u takes one pass per distinct number in the order: L for a full order, 2
    for a coupling, where one half is mapped given the other. It starts as y = u.

    Args:
        order: L integers from 0; each latent is mapped given those of lower order.
        univariate: t, of ``num_features`` features, monotone in its argument.
        num_features, context_dim, hidden: As in ``MaskedNetwork``.

    Reference: Kingma et al. 2016, arXiv 1606.04934; as one layer with its couplings in Papamakarios et al. 2021,
    arXiv 1912.02762, section 3.1.
    """

    order: Tensor

    def __init__(
        self, order: Sequence[int], *, univariate: Univariate, num_features: int, context_dim: int, hidden: Widths
    ) -> None:
        super().__init__()
        self.univariate = univariate
        self.passes = max(order) + 1
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.net = MaskedNetwork(order, num_features=num_features, context_dim=context_dim, hidden=hidden)

    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L), context: (..., C) -> y (..., L) and log |det dy/du|, (...)."""
        y, log_slope = self.univariate(u, self.net(u, context), False)
        return y, log_slope.sum(-1)

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L), context: (..., C) -> u (..., L) and log |det du/dy|, (...)."""
        u = torch.zeros_like(y)
        for index in range(self.passes - 1):
            found, _ = self.univariate(y, self.net(u, context), True)
            u = torch.where(self.order == index, found, u)  # only latents of this order are known now
        u, log_slope = self.univariate(y, self.net(u, context), True)
        return u, log_slope.sum(-1)


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
        base: of the noise u, batch shape (...), event shape (L,).
        layers: of f.
        context: c, (..., C). Its leading dimensions, and those of the next two, broadcast with the batch shape.
        loc: (..., L).
        log_scale: (..., L).
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
    num_bins: int = 8,
    log_scale: Callable[[Tensor], Tensor] = bounded_log_scale,
) -> FlowPosterior:
    """A flow of spline couplings: one half of the latents given the context, the other given the first half too.

    A draw and its density take one pass per layer; the density at any other z takes two. Layers come in pairs that swap
    the halves; a latent's half in the k-th pair is the k-th bit of its index. It starts as the diagonal normal, and
    keeps a normal's tails: beyond 5 scales each layer is the identity. Arguments as ``inverse_autoregressive_flow``,
    with the number of bins of each spline.

    Reference: Durkan et al. 2019, arXiv 1906.04032, section 3; which half is which is ours.
    """
    latent_dim = check_count("latent_dim", latent_dim)
    bits = [index // 2 % max(1, (latent_dim - 1).bit_length()) for index in range(num_layers)]
    halves = [[(latent >> bit & 1) ^ (i % 2) for latent in range(latent_dim)] for i, bit in enumerate(bits)]
    F = 3 * num_bins - 1
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
