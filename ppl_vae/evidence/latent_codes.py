"""Priors and guides as codes of latents: normals, mixtures, flows and layers of them.

A code of cells is exact where ``push`` and ``pop`` compute the same numbers. It is short where its masses are close to
the density times the volume of a cell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from ppl_vae.evidence.ans import CELLS, Codec, Floats, Ints, Mask, Stack, cell_centers, double_array
from ppl_vae.hierarchy import LayeredDistribution
from ppl_vae.parts.flows import MAX_INPUT, Coupling, ElementwiseAffine, Permutation
from ppl_vae.parts.priors import Pushforward
from ppl_vae.runtime.numerics import bounded

_FINE_BITS = 16  # a flow maps a cell to a whole number of parts of cells, 2^16 in each
_SEARCH_STEPS = 120


def make_latent_codec(distribution: Distribution, *, is_far: bool = False) -> Codec:
    """A distribution over latents (R, L), or over one vector for all rows, as a code.

    Args:
        distribution: Of the parts of ``priors`` and ``posteriors``, apart from posteriors with a flow.
        is_far: Whether every latent can be pushed; otherwise only what was popped from the same distribution.

    Raises:
        ValueError: It is another distribution.
    """
    if isinstance(distribution, LayeredDistribution):
        return _Layered(distribution, is_far)
    if isinstance(distribution, Pushforward):
        return _Flow(distribution)
    if isinstance(distribution, dist.MixtureSameFamily):
        return _Mixture(distribution)
    if isinstance(distribution, MultivariateNormal):
        return _Full(double_array(distribution.loc), double_array(distribution.scale_tril), is_far)
    if isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        base = distribution.base_dist
        return _Diagonal(double_array(base.loc), double_array(base.scale), is_far)
    raise ValueError(
        "compression: expected normals (--posterior diagonal or full), and as priors also their mixtures and flows, "
        f"got {type(distribution).__name__}"
    )


@dataclass(frozen=True)
class _Diagonal:
    """prod_l Normal(z_l; loc_l, scale_l); the shapes of loc and scale broadcast to (..., L)."""

    loc: Floats
    scale: Floats
    is_far: bool

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        loc, scale = (np.broadcast_to(part, values.shape)[rows].ravel() for part in (self.loc, self.scale))
        stack.push_normal(values[rows].ravel(), loc, scale, is_far=self.is_far)

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        loc, scale = (np.broadcast_to(part, values.shape)[rows] for part in (self.loc, self.scale))
        values[rows] = stack.pop_normal(loc.ravel(), scale.ravel(), is_far=self.is_far).reshape(loc.shape)


@dataclass(frozen=True)
class _Full:
    """Normal(z; loc, T T'), one latent given those before it: Normal(z_l; loc_l + sum_{m < l} T_lm u_m, T_ll).

    u_m = (z_m - mean_m) / T_mm is the noise that z_m, the center of its cell, was made from. The shapes of loc and T
    broadcast to (..., L) and (..., L, L).
    """

    loc: Floats
    tril: Floats
    is_far: bool

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        loc, tril = self._find_rows(values.shape, rows)
        z, u, means = (values[rows] + 0.5) / CELLS, np.zeros_like(loc), []
        for i in range(z.shape[1]):
            means.append(loc[:, i] + (tril[:, i, :i] * u[:, :i]).sum(1))
            u[:, i] = (z[:, i] - means[i]) / tril[:, i, i]
        for i in reversed(range(z.shape[1])):
            stack.push_normal(values[rows][:, i], means[i], tril[:, i, i], is_far=self.is_far)

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        loc, tril = self._find_rows(values.shape, rows)
        u, found = np.zeros_like(loc), np.zeros(loc.shape, dtype=np.int64)
        for i in range(loc.shape[1]):
            mean, scale = loc[:, i] + (tril[:, i, :i] * u[:, :i]).sum(1), tril[:, i, i]
            found[:, i] = stack.pop_normal(mean, scale, is_far=self.is_far)
            u[:, i] = ((found[:, i] + 0.5) / CELLS - mean) / scale
        values[rows] = found

    def _find_rows(self, shape: tuple[int, ...], rows: Mask) -> tuple[Floats, Floats]:
        tril = np.broadcast_to(self.tril, (*shape, shape[-1]))
        return np.broadcast_to(self.loc, shape)[rows], tril[rows]


@dataclass(frozen=True)
class _Mixture:
    """sum_k pi_k p_k(z), by bits-back over the component: its net length is exactly -log2 of the sum.

    ``push`` pops k from pi_k p_k(z) / sum_j pi_j p_j(z), then pushes z by p_k and k by pi.
    """

    mixture: dist.MixtureSameFamily

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        z = values[rows]
        k = stack.pop("choice", self._find_responsibilities(z))
        self._make_component(k).push(stack, z)
        stack.push("choice", k, np.tile(double_array(self.mixture.mixture_distribution.probs), (len(z), 1)))

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        z = values[rows]
        k = stack.pop("choice", np.tile(double_array(self.mixture.mixture_distribution.probs), (len(z), 1)))
        self._make_component(k).pop(stack, z)
        stack.push("choice", k, self._find_responsibilities(z))
        values[rows] = z

    def _find_responsibilities(self, values: Ints) -> Floats:
        log_p = self.mixture.component_distribution.log_prob(cell_centers(values)[:, None])  # (R, K)
        return double_array((self.mixture.mixture_distribution.logits + log_p).softmax(-1))

    def _make_component(self, k: Ints) -> Codec:
        codec = make_latent_codec(self.mixture.component_distribution, is_far=True)
        if isinstance(codec, _Full):
            return _Full(codec.loc[k], codec.tril[k], True)
        if isinstance(codec, _Diagonal):
            return _Diagonal(codec.loc[k], codec.scale[k], True)
        raise ValueError("compression: expected a mixture of normals")


class _Layered:
    """p(z_a) p(z_b | z_a) ...: layer by layer, each given the one before it."""

    def __init__(self, distribution: LayeredDistribution, is_far: bool) -> None:
        self._distribution, self._is_far = distribution, is_far
        self._first = make_latent_codec(distribution.first, is_far=is_far)  # once: a flow's holds a copy of it

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        for codec, layer in reversed([*self._iterate_layers(values)]):
            codec.push(stack, layer, rows)

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        for codec, layer in self._iterate_layers(values):
            codec.pop(stack, layer, rows)

    def _iterate_layers(self, values: Ints) -> Iterator[tuple[Codec, Ints]]:
        """Each layer's code, given the layer before it, and its columns of values, a view."""
        p = self._distribution
        layers = np.split(values, np.cumsum(p.latent_dims[:-1]), axis=-1)[:: 1 if p.upward else -1]
        yield self._first, layers[0]
        for link, before, layer in zip(p.links, layers, layers[1:], strict=False):
            yield make_latent_codec(link(cell_centers(before)), is_far=self._is_far), layer


# --- Flows ---


class _Flow:
    """p(z) of z = f(u), u ~ base, with f a stack of couplings: z is brought to u layer by layer, in integers.

    A layer's inverse g is monotone in each coordinate, given coordinates that stay as they are. It maps the ends of the
    cell i of z_l to whole numbers of parts of cells, 2^16 in each:

        e(i) = floor((2^16 - 1) 2^16 g(i / 2^16)) + i,    e(i) < e(i + 1)

    ``push`` draws r from bits, uniform on [0, e(i + 1) - e(i)). The part e(i) + r belongs to the cell of u_l, and its
    place in that cell is pushed. The net length is log2 (e(i + 1) - e(i)) - 16 bits less than u_l takes, the logarithm
    of the slope of g. All parts of all cells are reached exactly once, so the masses sum to one, and ``pop`` finds the
    only i whose cell holds a part. The "+ i" keeps e increasing where g is flat.

    Reference: local bits-back coding, Ho et al. 2019, arXiv 1905.08500, has noise in place of r; exact maps of integers
    with remainders on the stack, Zhang et al. 2021, arXiv 2111.00965 (iFlow).
    """

    def __init__(self, distribution: Pushforward) -> None:
        self._base = make_latent_codec(distribution.base, is_far=True)
        self._layers = list(copy.deepcopy(distribution.flow).double().layers)

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        z = np.array(values[rows])
        for layer in reversed(self._layers):
            if isinstance(layer, Permutation):
                z = z[:, layer.back.numpy()]
            else:
                moved = _find_moved(layer, z.shape[1])
                z[:, moved] = _push_slope(stack, z[:, moved], _make_map(layer, z))
        self._base.push(stack, z)

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        z = np.array(values[rows])
        self._base.pop(stack, z)
        for layer in self._layers:
            if isinstance(layer, Permutation):
                z = z[:, layer.order.numpy()]
            else:
                moved = _find_moved(layer, z.shape[1])
                z[:, moved] = _pop_slope(stack, z[:, moved], _make_map(layer, z))
        values[rows] = z


# (coordinates (R, m), whether to invert) -> the map of a layer, elementwise and increasing
Map = Callable[[Floats, bool], Floats]


def _find_moved(layer: torch.nn.Module, dim: int) -> slice:
    return slice(layer.kept if isinstance(layer, Coupling) else 0, dim)


def _make_map(layer: torch.nn.Module, z: Ints) -> Map:
    """The map of a layer's moved coordinates, given those of z (R, L) that it keeps."""
    if isinstance(layer, ElementwiseAffine):
        loc, scale = double_array(layer.loc), np.exp(double_array(layer.log_scale))
        return lambda y, inverse: (y - loc) / scale if inverse else loc + scale * y
    assert isinstance(layer, Coupling), f"no code for {type(layer).__name__}"
    kept = torch.from_numpy((z[:, : layer.kept] + 0.5) / CELLS)
    h = layer.net(bounded(kept, MAX_INPUT)).unflatten(-1, (layer.num_features, -1)).transpose(-1, -2)
    return lambda y, inverse: double_array(layer.univariate(torch.from_numpy(y), h, inverse)[0])


def _find_start(cells: Ints, map: Map) -> Ints:
    """e(i) of cells i: the first part of cells that belongs to each."""
    parts = np.floor((2.0**_FINE_BITS - 1) * CELLS * map(cells / CELLS, True))
    return parts.astype(np.int64) + cells


def _push_slope(stack: Stack, cells: Ints, map: Map) -> Ints:
    """The cells of u that cells of z are mapped to; see ``_Flow``."""
    start = _find_start(cells, map)
    part = start + stack.pop_uniform(_check_sizes(_find_start(cells + 1, map) - start))
    stack.push_uniform(part & ((1 << _FINE_BITS) - 1), np.full(part.shape, 1 << _FINE_BITS))
    return part >> _FINE_BITS


def _pop_slope(stack: Stack, cells: Ints, map: Map) -> Ints:
    """The inverse of ``_push_slope``."""
    part = (cells << _FINE_BITS) | stack.pop_uniform(np.full(cells.shape, 1 << _FINE_BITS))
    found = np.floor(CELLS * map(part / CELLS / 2.0**_FINE_BITS, False)).astype(np.int64)
    low, high = np.full(found.shape, -(1 << 40)), np.full(found.shape, 1 << 40)
    for step in range(_SEARCH_STEPS):
        start = _find_start(found, map)
        size = _find_start(found + 1, map) - start
        is_below = part >= start
        if (is_below & (part < start + size)).all():
            stack.push_uniform(part - start, _check_sizes(size))
            return found
        low, high = np.where(is_below, np.maximum(low, found), low), np.where(is_below, high, np.minimum(high, found))
        guess = found + (part - start) // np.maximum(size, 1)  # Newton's step, within the bracket, or its middle
        is_good = (low <= guess) & (guess < high) & (step < _SEARCH_STEPS // 3)
        found = np.where(is_good, guess, (low + high) // 2)
    raise ValueError("flow: expected an increasing map in each coordinate, got another: no cell is found again")


def _check_sizes(sizes: Ints) -> Ints:
    if (sizes < 1).any() or (sizes >= 1 << 30).any():
        raise ValueError(
            f"flow: expected slopes from 0 to 2^14, got a cell mapped to {int(sizes.min())} to {int(sizes.max())} of "
            f"{1 << _FINE_BITS} parts"
        )
    return sizes
