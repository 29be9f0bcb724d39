"""A stack of bits that integers and latents are coded onto (ANS).

Every codec has ``push`` and ``pop``, each the other's exact inverse. ``pop`` draws values from bits and shortens the
stack by -log2 P(values), and ``push`` lengthens it by as much. Latents are the integers i of cells
[i, i + 1) / 2^16, and a cell stands for its center.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

CELLS = 2.0**16  # per unit of a latent
_LARGEST_BITS = 23  # of one uniform integer; constriction's probabilities have 24 bits
# Half the number of coarse cells of a normal, which are 1/32 to 1/16 of its scale wide. Every coarse cell has a mass of
# at least 2^-24, so draws fall far from the mean too often, and such latents are expensive: a distribution to draw
# from gets 6 to 12 scales on each side. One that must reach every latent gets 32 to 64, and an escape.
_RADIUS, _FAR_RADIUS = 192, 1024


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
        self._models: Any = stream.model
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
        """Flip pseudo-random bits at the top, 24 for each latent that comes next; the same call flips them back.

        What was pushed last is at the top. Where it does not follow the distribution that it was pushed by, its bits
        are not random, and latents that are popped from them would not follow theirs: under N(0, 1) prior and guide,
        the noise of an image's latent would be the latent of the image before it.
        """
        size = 1 << 12
        mask = np.random.Generator(np.random.PCG64(seed)).integers(size, size=2 * num_latents)
        sizes = np.full(len(mask), size)
        self._push_small(self._pop_small(sizes) ^ mask, sizes)

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
        self.push_bits(is_rest[has_rest].astype(np.int64), (rest / sizes)[has_rest])

    def pop_uniform(self, sizes: Ints) -> Ints:
        """The inverse of ``push_uniform``, in the shape of the sizes."""
        bits, whole, rest = _split_sizes(sizes)
        values, is_rest = np.zeros(sizes.shape, dtype=np.int64), rest > 0
        is_rest[is_rest] = self.pop_bits((rest / sizes)[is_rest])
        values[~is_rest] = self._pop_small(whole[~is_rest]) << bits[~is_rest]
        values[~is_rest] |= self._pop_small((1 << bits)[~is_rest])
        values[is_rest] = (whole << bits)[is_rest] + self._pop_small(rest[is_rest])
        return values

    def _push_small(self, values: Ints, sizes: Ints) -> None:
        several = sizes > 1  # constriction has no uniform distribution over one value
        self._push(values[several], self._models.Uniform(), sizes[several].astype(np.int32))

    def _pop_small(self, sizes: Ints) -> Ints:
        values = np.zeros(len(sizes), dtype=np.int64)
        values[sizes > 1] = self._pop(self._models.Uniform(), sizes[sizes > 1].astype(np.int32))
        return values

    def push_choice(self, values: Ints, shares: Floats) -> None:
        """Push integers of [0, K) by their probabilities, up to a factor. values: (n,), shares: (n, K)."""
        self._push(values, self._models.Categorical(perfect=False), shares)

    def pop_choice(self, shares: Floats) -> Ints:
        """The inverse of ``push_choice``."""
        return self._pop(self._models.Categorical(perfect=False), shares)

    def push_bits(self, bits: Ints, share: Floats) -> None:
        """Push bits with P(1) = share. Both: (n,)."""
        self._push(bits, self._models.Bernoulli(perfect=False), share)

    def pop_bits(self, share: Floats) -> Ints:
        """The inverse of ``push_bits``."""
        return self._pop(self._models.Bernoulli(perfect=False), share)

    def push_normal(self, values: Ints, loc: Floats, scale: Floats, *, is_far: bool) -> None:
        """Push cells by their mass under a normal, up to a constant within coarse cells.

        Args:
            values: (n,)
            loc, scale: (n,), in the unit of latents.
            is_far: Whether every cell can be pushed; otherwise only what was popped with the same arguments.
        """
        radius = _FAR_RADIUS if is_far else _RADIUS
        bits, start, mean, spread = _find_coarse_cells(loc, scale)
        steps = (values >> bits) - start
        if is_far:
            beyond = np.abs(steps[np.abs(steps) >= radius]) - radius
            if (beyond >= 1 << _LARGEST_BITS).any():
                raise ValueError(
                    "latents: expected z within 10^5 scales of p(z), got one whose ELBO is below -10^9 nats"
                )
            self.push_uniform(beyond, np.full_like(beyond, 1 << _LARGEST_BITS))
        model = self._models.QuantizedGaussian(-radius, radius)
        self._push(steps.clip(-radius, radius), model, mean, spread)
        self.push_uniform(values & ((1 << bits) - 1), 1 << bits)

    def pop_normal(self, loc: Floats, scale: Floats, *, is_far: bool) -> Ints:
        """The inverse of ``push_normal``."""
        radius = _FAR_RADIUS if is_far else _RADIUS
        bits, start, mean, spread = _find_coarse_cells(loc, scale)
        low = self.pop_uniform(1 << bits)
        steps = self._pop(self._models.QuantizedGaussian(-radius, radius), mean, spread)
        if is_far:
            beyond = np.flatnonzero(np.abs(steps) >= radius)
            steps[beyond] += np.sign(steps[beyond]) * self.pop_uniform(np.full(len(beyond), 1 << _LARGEST_BITS))
        return ((steps + start) << bits) | low

    def _push(self, values: Ints, model: Any, *parameters: NDArray[Any]) -> None:
        if len(values):
            self._coder.encode_reverse(values.astype(np.int32), model, *map(np.ascontiguousarray, parameters))

    def _pop(self, model: Any, *parameters: NDArray[Any]) -> Ints:
        if not len(parameters[0]):
            return np.zeros(0, dtype=np.int64)
        found: Ints = self._coder.decode(model, *map(np.ascontiguousarray, parameters)).astype(np.int64)
        if self._coder.num_words() < 3:  # a popped stack only becomes shorter, so it was not empty before either
            raise OutOfBits
        return found


def _split_sizes(sizes: Ints) -> tuple[Ints, Ints, Ints]:
    """k, n and r of size = n 2^k + r, with n below 256 and r below 2^k."""
    bits = (np.frexp(sizes.astype(np.float64))[1].astype(np.int64) - 8).clip(0)
    whole = sizes >> bits
    return bits, whole, sizes - (whole << bits)


def _find_coarse_cells(loc: Floats, scale: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """A normal's coarse cells of 2^bits cells: bits, the one at ``loc``, and mean and scale in coarse cells from it."""
    exponent = np.frexp(scale * CELLS)[1].astype(np.int64)  # scale * CELLS is in [2^(exponent - 1), 2^exponent)
    bits = (exponent - 5).clip(0, _LARGEST_BITS)
    place, spread = loc * CELLS / 2.0**bits, scale * CELLS / 2.0**bits
    start = np.floor(place)
    return bits, start.astype(np.int64), place - start - 0.5, spread  # constriction's cells are [k - 1/2, k + 1/2)


def cell_centers(values: Ints) -> Tensor:
    """The centers of cells, in any shape (...), float32."""
    return torch.from_numpy((values + 0.5) / CELLS).float()


class Codec(Protocol):
    """A distribution over rows of cells, (..., L), as a code; those of a mask (...) are coded together."""

    def push(self, stack: Stack, values: Ints, rows: Mask) -> None:
        """Push the rows of values that the mask names."""

    def pop(self, stack: Stack, values: Ints, rows: Mask) -> None:
        """Fill in the rows of values that the mask names; the others are known."""


def double_array(tensor: Tensor) -> Floats:
    """The same numbers in double precision, in any shape (...)."""
    array: Floats = tensor.detach().double().numpy()
    return array


def all_rows(values: Ints) -> Mask:
    """The mask of all rows of values (..., L)."""
    return np.ones(values.shape[:-1], dtype=bool)
