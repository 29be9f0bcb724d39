"""Normalizing flows: invertible maps with the logarithm of their volume, and the distribution that a map makes.

A layer maps u to y (``forward``, to draw) and back (``inverse``, for a density), each in one pass and with
log |det dy/du| or log |det du/dy|, for any leading dimensions. Pyro's transforms cannot be compiled: they cache tensors
between calls, and its splines branch on values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softmax, softplus

from ppl_vae.parts.networks import MLP
from ppl_vae.runtime.errors import Widths, check_widths
from ppl_vae.runtime.numerics import bounded

MAX_LOG_SCALE = 2.0  # of one affine layer: a factor between 0.14 and 7.4
MAX_INPUT = 10.0  # of a coupling's network, in the unit of the base's scale
SPLINE_BOUND = 5.0
SPLINE_BINS = 8
_LEAST_SHARE = 1e-3  # of a spline's interval that a bin takes, and the least slope at a knot


class ElementwiseAffine(nn.Module):
    """y = loc + exp(log_scale) u, elementwise: an activation norm that starts as the identity.

    Args:
        dim: L.

    Reference: Kingma and Dhariwal 2018, arXiv 1807.03039, section 3.1 (there it starts from a batch's statistics).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L) -> y (..., L) and log |det dy/du|, ()."""
        return self.loc + self.log_scale.exp() * u, self.log_scale.sum()

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L) -> u (..., L) and log |det du/dy|, ()."""
        return (y - self.loc) * (-self.log_scale).exp(), -self.log_scale.sum()


class Permutation(nn.Module):
    """y_l = u_{pi(l)}, l = 1..L: a fixed order, drawn once from torch's global generator."""

    order: Tensor
    back: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        order = torch.randperm(dim)
        self.register_buffer("order", order)
        # The meta device has no order to invert, and sorting there would import torch's compiler.
        self.register_buffer("back", order if order.is_meta else order.argsort())

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L) -> y (..., L) and 0."""
        return u[..., self.order], u.new_zeros(())

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L) -> u (..., L) and 0."""
        return y[..., self.back], y.new_zeros(())


# (argument, features, inverse) -> the value and the logarithm of its slope
Univariate = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def affine(u: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """y = exp(2 tanh(h_1 / 2)) u + h_2. u: (...), h: (..., 2) -> y and log dy/du, or u and log du/dy; h = 0 is y = u.

    The scale is bounded, so that no training step can make one layer explode.

    Reference: Dinh et al. 2017 (RealNVP), arXiv 1605.08803, equation 7; Kingma et al. 2016, arXiv 1606.04934, equation
    10; the bound on the log-scale is common practice.
    """
    log_scale, shift = bounded(h[..., 0], MAX_LOG_SCALE), h[..., 1]
    if inverse:
        return (u - shift) * (-log_scale).exp(), -log_scale
    return log_scale.exp() * u + shift, log_scale


class Coupling(nn.Module):
    """y = (a, t(b; h)) for u = (a, b), t monotone in each b_l, h_l = net_l(10 tanh(a / 10)): the identity at first.

    The network's input is bounded. Otherwise shifts grow from coupling to coupling: among 50 million draws of a trained
    guide a few had a log-density of -10^17 nats, which ruins the ELBO.

    Args:
        dim: L; a is the first half, rounded up. Raises ValueError for L below 2.
        univariate: t, of ``num_features`` features for each b_l.
        num_features: F.
        hidden: The widths of the network's hidden layers.

    Reference: Dinh et al. 2017, arXiv 1605.08803, section 3.2; the bound on the network's input is ours.
    """

    def __init__(self, dim: int, *, univariate: Univariate, num_features: int, hidden: Widths) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(
                f"latents of a coupling flow: expected at least 2, one half mapped by the other, got {dim}"
            )
        self.kept = (dim + 1) // 2
        self.univariate = univariate
        self.num_features = num_features
        self.net = MLP(self.kept, num_features * (dim - self.kept), hidden=hidden)
        nn.init.zeros_(self.net.output.weight)
        nn.init.zeros_(self.net.output.bias)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L) -> y (..., L) and log |det dy/du|, (...)."""
        return self._map(u, False)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L) -> u (..., L) and log |det du/dy|, (...)."""
        return self._map(y, True)

    def _map(self, u: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        a, b = u[..., : self.kept], u[..., self.kept :]
        h = self.net(bounded(a, MAX_INPUT)).to(a.dtype).unflatten(-1, (self.num_features, -1)).transpose(-1, -2)
        found, log_slope = self.univariate(b, h, inverse)
        return torch.cat([a, found], dim=-1), log_slope.sum(-1)


def affine_coupling(dim: int, *, hidden: Widths) -> Coupling:
    """b is scaled and shifted. Arguments and errors as ``Coupling``."""
    return Coupling(dim, univariate=affine, num_features=2, hidden=hidden)


def spline_coupling(dim: int, *, hidden: Widths) -> Coupling:
    """b goes through splines with eight bins. Arguments and errors as ``Coupling``.

    The spline is evaluated directly for the density; drawing solves a quadratic equation.
    """

    def inverted(u: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline(u, h, not inverse)

    return Coupling(dim, univariate=inverted, num_features=3 * SPLINE_BINS - 1, hidden=hidden)


def spline(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """A monotone map of [-5, 5] onto itself, a ratio of quadratics between knots, and the identity outside.

    K bins of widths softmax(h[:K]) and heights softmax(h[K:2K]); slopes at the inner knots softplus(h[2K:] + log(e-1)),
    and 1 at the two ends. h = 0 is the identity.

    Args:
        x: (...), the argument of the map, or of its inverse.
        h: (..., 3 K - 1) features.
        inverse: Which of them.

    Returns:
        The value (...), and the logarithm of its derivative with respect to x, (...).

    Reference: Gregory and Delbourgo 1982; Durkan et al. 2019, arXiv 1906.04032, equations 4 to 8 and appendix A.1.
    """
    bound = SPLINE_BOUND
    K = (h.shape[-1] + 1) // 3
    (widths, left), (heights, bottom) = _bins(h[..., :K]), _bins(h[..., K : 2 * K])
    inner = _LEAST_SHARE + (1 - _LEAST_SHARE) * softplus(h[..., 2 * K :] + math.log(math.e - 1))
    ends = torch.ones_like(h[..., :1])
    slopes = torch.cat([ends, inner, ends], dim=-1)
    inside = x.clamp(-bound, bound)
    starts = bottom if inverse else left
    below_end = torch.cat([inside[..., None] < starts[..., 1:], torch.ones_like(ends).bool()], dim=-1)
    is_bin = (inside[..., None] >= starts) & below_end

    def select_bin(values: Tensor) -> Tensor:
        return torch.where(is_bin, values, torch.zeros_like(values)).sum(-1)

    w, hgt = select_bin(widths), select_bin(heights)
    x_0, y_0 = select_bin(left), select_bin(bottom)
    d_0, d_1, s = select_bin(slopes[..., :-1]), select_bin(slopes[..., 1:]), hgt / w
    if inverse:
        t, rest = _place_in_bin(((inside - y_0) / hgt).clamp(0, 1), s, d_0, d_1)
    else:
        t = ((inside - x_0) / w).clamp(0, 1)
        rest = 1 - t
    denominator = s * (t * t + rest * rest) + (d_0 + d_1) * t * rest
    value = t * w + x_0 if inverse else y_0 + hgt * (s * t * t + d_0 * t * rest) / denominator
    slope = s * s * (d_1 * t * t + 2 * s * t * rest + d_0 * rest * rest) / (denominator * denominator)
    log_slope = -slope.log() if inverse else slope.log()
    is_outside = x.abs() >= bound
    return torch.where(is_outside, x, value), torch.where(is_outside, torch.zeros_like(x), log_slope)


def _place_in_bin(r: Tensor, s: Tensor, d_0: Tensor, d_1: Tensor) -> tuple[Tensor, Tensor]:
    """t and 1 - t of r = (s t^2 + d_0 t (1 - t)) / (s (t^2 + (1 - t)^2) + (d_0 + d_1) t (1 - t)).

    The root of a quadratic equation, without a difference of nearly equal numbers, which could be 0 in float32.

    Source: Durkan et al. 2019, arXiv 1906.04032, equations 6 to 8; this form is ours.
    """
    e = d_0 * (1 - r) - d_1 * r
    is_rising = e >= 0
    g = (e * e + 4 * s * s * r * (1 - r)).sqrt() + torch.where(is_rising, e, -e)
    low, high = torch.where(is_rising, 2 * s * r, g), torch.where(is_rising, g, 2 * s * (1 - r))
    return low / (low + high), high / (low + high)


def _bins(h: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of K bins of [-5, 5], and where each begins. h: (..., K) -> (..., K) twice."""
    shares = _LEAST_SHARE + (1 - _LEAST_SHARE * h.shape[-1]) * softmax(h, dim=-1)
    lengths = 2 * SPLINE_BOUND * shares
    return lengths, lengths.cumsum(-1) - lengths - SPLINE_BOUND


class Flow(nn.Module):
    """y = f_n(... f_1(u)): layers one after the other; the volumes' logarithms add up."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L) -> y (..., L) and log |det dy/du|, (...)."""
        total = u.new_zeros(u.shape[:-1])
        for layer in self.layers:
            u, log_volume = layer(u)
            total = total + log_volume
        return u, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L) -> u (..., L) and log |det du/dy|, (...)."""
        total = y.new_zeros(y.shape[:-1])
        for layer in reversed(self.layers):
            y, log_volume = layer.inverse(y)  # type: ignore[operator]
            total = total + log_volume
        return y, total


class MaskedLinear(nn.Linear):
    """y = (W * mask) u + b, mask (outputs, inputs): whether an output sees an input."""

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
