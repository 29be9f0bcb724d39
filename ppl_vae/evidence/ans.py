"""A stack of bits that integers and latents are coded onto (ANS).

Every codec has ``push`` and ``pop``, each the other's exact inverse. ``pop`` draws values from bits and shortens the
stack by -log2 P(values), and ``push`` lengthens it by as much. Latents are the integers i of cells
[i, i + 1) / 2^16, and a cell stands for its center.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_] | EllipsisType

CELLS = 2.0**16  # per unit of a latent
_LARGEST_BITS = 23  # of one uniform integer; constriction's probabilities have 24 bits
_CELLS_PER_SCALE = 32  # coarse cells of a normal, which are 1/36 to 1/32 of its scale wide
# How many coarse cells a normal has on each side. Each has a mass of at least 2^-24, which is a coarse cell's own 4.9
# scales from the mean. Draws that fell farther out would be too frequent, and their weights p / q far too large: a
# distribution to draw from ends at 5 to 5.6 scales. One that must reach every latent has an escape from 7 to 8 on.
_RADIUS, _FAR_RADIUS = 180, 256


class OutOfBits(Exception):
    """More bits were drawn from the stack than it had."""


class Stack:
    """Bits, last in, first out.

    Args:
        words: Its content, 32 bits each, the last of which is not 0.

    Raises:
        ValueError: ``constriction`` is not installed.

    Reference: Duda 2009, arXiv 0902.0271; Bamler 2022, arXiv 2201.01741 (constriction).
    """

    def __init__(self, words: NDArray[np.uint32]) -> None:
        try:
            from constriction import stream
        except ImportError:
            raise ValueError("compression needs constriction: pip install 'ppl_vae[compression]'") from None
        self._normal: Any = stream.model.QuantizedGaussian
        self._families: dict[str, Any] = {
            "bits": stream.model.Bernoulli(perfect=False),
            "choice": stream.model.Categorical(perfect=False),
            "uniform": stream.model.Uniform(),
        }
        self._coder: Any = stream.stack.AnsCoder(np.array(words, dtype=np.uint32))

    @classmethod
    def make_random(cls, num_words: int, seed: int) -> Stack:
        """A stack of pseudo-random bits, the same for the same arguments."""
        words = np.random.Generator(np.random.PCG64(seed)).integers(2**32, size=num_words, dtype=np.uint32)
        words[-1] |= 2**31
        return cls(words)

    @property
    def words(self) -> NDArray[np.uint32]:
        """Its content; 32 bits each."""
        found: NDArray[np.uint32] = self._coder.get_compressed()
        return found

    @property
    def num_words(self) -> int:
        """The length of its content."""
        return int(self._coder.num_words())

    def scramble(self, num_latents: int, *seed: int) -> None:
        """Flip pseudo-random bits at the top, 23 for each latent that comes next; the same call flips them back.

        What was pushed last is at the top. Where it does not follow the distribution that it was pushed by, its bits
        are not random, and latents that are popped from them would not follow theirs: under N(0, 1) prior and guide,
        the noise of an image's latent would be the latent of the image before it.
        """
        sizes = np.full(num_latents, 1 << _LARGEST_BITS)
        mask = np.random.Generator(np.random.PCG64(seed)).integers(1 << _LARGEST_BITS, size=num_latents)
        self._push_small(self._pop_small(sizes) ^ mask, sizes)

    def push(self, family: Any, values: Ints, *parameters: NDArray[Any]) -> None:
        """Push integers (n,) of a family: "bits" of P(1), (n,), or a "choice" of shares, (n, K), up to a factor."""
        if len(values):
            model = self._families.get(family, family)
            self._coder.encode_reverse(values.astype(np.int32), model, *map(np.ascontiguousarray, parameters))

    def pop(self, family: Any, *parameters: NDArray[Any]) -> Ints:
        """The inverse of ``push``."""
        if not len(parameters[0]):
            return np.zeros(0, dtype=np.int64)
        model = self._families.get(family, family)
        found: Ints = self._coder.decode(model, *map(np.ascontiguousarray, parameters)).astype(np.int64)
        if self._coder.num_words() < 3:  # a popped stack only becomes shorter, so it was not empty before either
            raise OutOfBits
        return found

    def push_uniform(self, values: Ints, sizes: Ints) -> None:
        """Push integers of [0, size), each size below 2^31, in any shape; a size of 1 takes no bits.

        A size is split into 128 to 255 equal parts of 2^k and a rest, since constriction's own uniform distribution
        rounds probabilities to 2^-24, which at a size of 2^20 costs 0.04 bits.
        """
        bits, whole, rest = _split_sizes(sizes)
        is_rest = values >= whole << bits
        self._push_small(values[is_rest] - (whole << bits)[is_rest], rest[is_rest])
        self._push_small(values[~is_rest] & ((1 << bits) - 1)[~is_rest], (1 << bits)[~is_rest])
        self._push_small((values >> bits)[~is_rest], whole[~is_rest])
        has_rest = rest > 0
        self.push("bits", is_rest[has_rest].astype(np.int64), (rest / sizes)[has_rest])

    def pop_uniform(self, sizes: Ints) -> Ints:
        """The inverse of ``push_uniform``, in the shape of the sizes."""
        bits, whole, rest = _split_sizes(sizes)
        values, is_rest = np.zeros(sizes.shape, dtype=np.int64), rest > 0
        is_rest[is_rest] = self.pop("bits", (rest / sizes)[is_rest])
        values[~is_rest] = self._pop_small(whole[~is_rest]) << bits[~is_rest]
        values[~is_rest] |= self._pop_small((1 << bits)[~is_rest])
        values[is_rest] = (whole << bits)[is_rest] + self._pop_small(rest[is_rest])
        return values

    def _push_small(self, values: Ints, sizes: Ints) -> None:
        several = sizes > 1  # constriction has no uniform distribution over one value
        self.push("uniform", values[several], sizes[several].astype(np.int32))

    def _pop_small(self, sizes: Ints) -> Ints:
        values = np.zeros(len(sizes), dtype=np.int64)
        values[sizes > 1] = self.pop("uniform", sizes[sizes > 1].astype(np.int32))
        return values

    def push_normal(self, values: Ints, loc: Floats, scale: Floats, *, is_far: bool) -> None:
        """Push cells by their mass under a normal, up to a constant within coarse cells.

        Args:
            values: (n,)
            loc, scale: (n,), in the unit of latents.
            is_far: Whether every cell can be pushed; otherwise only what was popped with the same arguments.
        """
        radius = _FAR_RADIUS if is_far else _RADIUS
        bits, parts, start, mean, spread = _find_coarse_cells(loc, scale)
        steps = values // (parts << bits) - start
        low = values - ((steps + start) * parts << bits)
        if is_far:
            beyond = np.abs(steps[np.abs(steps) >= radius]) - radius
            if (beyond >= 1 << _LARGEST_BITS).any():
                raise ValueError(
                    "latents: expected z within 10^5 scales of p(z), got one whose ELBO is below -10^9 nats"
                )
            self._push_small(beyond, np.full_like(beyond, 1 << _LARGEST_BITS))
        self.push(self._normal(-radius, radius), steps.clip(-radius, radius), mean, spread)
        self._push_small(low >> bits, parts)
        self._push_small(low & ((1 << bits) - 1), 1 << bits)

    def pop_normal(self, loc: Floats, scale: Floats, *, is_far: bool) -> Ints:
        """The inverse of ``push_normal``."""
        radius = _FAR_RADIUS if is_far else _RADIUS
        bits, parts, start, mean, spread = _find_coarse_cells(loc, scale)
        low = self._pop_small(1 << bits)
        low |= self._pop_small(parts) << bits
        steps = self.pop(self._normal(-radius, radius), mean, spread)
        if is_far:
            beyond = np.flatnonzero(np.abs(steps) >= radius)
            steps[beyond] += np.sign(steps[beyond]) * self._pop_small(np.full(len(beyond), 1 << _LARGEST_BITS))
        return ((steps + start) * parts << bits) + low


def _split_sizes(sizes: Ints) -> tuple[Ints, Ints, Ints]:
    """k, n and r of size = n 2^k + r, with n below 256 and r below 2^k."""
    bits = (np.frexp(sizes.astype(np.float64))[1].astype(np.int64) - 8).clip(0)
    whole = sizes >> bits
    return bits, whole, sizes - (whole << bits)


def _find_coarse_cells(loc: Floats, scale: Floats) -> tuple[Ints, Ints, Ints, Floats, Floats]:
    """A normal's coarse cells of n 2^k cells, n below 16: k, n, the one at ``loc``, and mean and scale in coarse cells.

    The mean is seen from the coarse cell at ``loc``.
    """
    width = (scale * (CELLS / _CELLS_PER_SCALE)).clip(1, 2.0**_LARGEST_BITS)
    bits = (np.frexp(width)[1].astype(np.int64) - 4).clip(0)
    parts = np.floor(np.ldexp(width, -bits)).astype(np.int64)
    size = parts << bits
    place, spread = loc * CELLS / size, scale * CELLS / size
    start = np.floor(place)
    return bits, parts, start.astype(np.int64), place - start - 0.5, spread  # its cells are [i - 1/2, i + 1/2)


def cell_centers(values: Ints) -> Tensor:
    """The centers of cells, in any shape (...), float32."""
    return torch.from_numpy((values + 0.5) / CELLS).float()


class Codec(Protocol):
    """A distribution over rows of cells, (..., L), as a code; those of a mask (...) are coded together.

    Rows are all of (R, L) unless a mask is given.
    """

    def push(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        """Push rows of values."""

    def pop(self, stack: Stack, values: Ints, rows: Mask = ...) -> None:
        """Fill in rows of values; the others are known."""


def double_array(tensor: Tensor) -> Floats:
    """The same numbers in double precision, in any shape (...)."""
    array: Floats = tensor.detach().double().numpy()
    return array
