"""Bits-back coding: images as a file of about -log2 p(x) bits, from which every image comes back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae.evidence._bits_back import Coder
from ppl_vae.evidence.ans import Floats, OutOfBits, Stack
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.support import CHECKED_AT_ONCE, check_support, find_missing

_FIXED_IMAGES = 3


class Code(NamedTuple):
    """Images as bits."""

    words: NDArray[np.uint32]
    initial_words: int  # of pseudo-random bits, which are below the images' and come back too
    sizes: tuple[int, ...]  # of the groups of images that are decoded together, in the order of decoding
    log_weights: Floats  # (N,) log (1/K) sum_k w_k at the latents that were coded, nats

    @property
    def net_bits(self) -> int:
        """The bits without the initial ones."""
        return 32 * (len(self.words) - self.initial_words)


class CannotDecode(ValueError):
    """The bits do not give back what was coded."""


@contextmanager
def _repeatable(vae: LatentModel) -> Iterator[None]:
    """One thread, evaluation mode, no gradients and no validation, which would refuse what a wrong file decodes to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with evaluation_mode(vae), torch.no_grad(), pyro.validation_enabled(False):
            yield
    finally:
        torch.set_num_threads(threads)


def compress(
    vae: LatentModel, x: Tensor, *, num_particles: int = 1, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Code:
    """Code images so that ``decompress`` gives them back, by bits-back with ANS.

    With one particle, z is popped by q(z | x), x is pushed by p(x | z) and z by p(z). The net length is
    -log2 [p(x, z) / q(z | x)] bits, on average -ELBO / log 2. With K particles, K latents are popped by q and one of
    them, j, in proportion to its weight w_k = p(x, z_k) / q(z_k | x). Then z_k for k != j are pushed by q, x by
    p(x | z_j), z_j by p(z) and j by 1 / K: -log2 [(1/K) sum_k w_k] bits, on average the bound L_K. With several layers
    of latents that the guide draws upward, z_l is pushed as soon as z_{l+1} is popped, where the likelihood sees z_1
    alone.

    A group of images is coded with one more row of pixels that ``decompress`` does not know: next to what is coded, a
    row of the networks holds other images here and zeros there. Masses that depend on them cannot be decoded.

    Args:
        vae: Its prior a normal, a mixture of normals, a flow, or layers of normals below one; its guide diagonal or
            full normals; its likelihood a mass. On the CPU.
        x: (N, *E) whole numbers from 0, of any type; a group at a time is in single precision.
        num_particles: K.
        seed: Of the initial bits.
        progress: Called with the number of images after each group.

    Raises:
        ValueError: Another model, double precision, pixels off the support, or masses that do not sum to one.

    Reference: Townsend et al. 2019, arXiv 1901.04866; Kingma et al. 2019, arXiv 1905.06845 (Bit-Swap); Ruan et al.
    2021, arXiv 2102.11086, section 3.1 (importance-weighted).
    """
    if any(w.dtype != torch.float32 for w in vae.parameters()):
        raise ValueError("vae: expected weights in single precision; vae.float() converts them")
    if find_missing(x) is not None:
        raise ValueError("x: expected whole images, got one with a missing pixel (NaN), which has no code")
    for part in x.split(CHECKED_AT_ONCE):
        check_support(vae.model, part.float())
    with _repeatable(vae):
        coder = Coder(vae, x.shape[1:], int(x.max()), check_count("num_particles", num_particles))
        coder.check(x[:1].float())
        scale = 1
        while True:
            try:
                return _compress(coder, x, scale, seed, progress or (lambda n: None))
            except OutOfBits:  # nearly always the first image's
                scale *= 2


def _compress(coder: Coder, x: Tensor, scale: int, seed: int, progress: Callable[[int], None]) -> Code:
    """``compress`` with this many times the words that latents are thought to need."""
    stack = Stack.make_random(scale * coder.count_words(1), seed)
    initial, end, sizes, log_weights = stack.num_words, len(x), [], np.zeros(len(x))
    while end:  # from the last image to the first, since the first that is decoded is the last that was coded
        size = coder.choose_size(end, stack.num_words // scale)
        sizes.append(size)
        following, end = x[end : end + 1].float(), end - size
        log_weights[end : end + size] = coder.push(stack, x[end : end + size].float(), following, (seed, end))
        progress(size)
    return Code(stack.words, initial, tuple(sizes[::-1]), log_weights)


def decompress(
    vae: LatentModel, code: Code, *, event_shape: Sequence[int], largest: int, num_particles: int = 1, seed: int = 0
) -> Iterator[Tensor]:
    """Decode the images of ``compress``, group by group: (n, *E) each.

    Args:
        vae, num_particles, seed: As in ``compress``.
        code: Its ``log_weights`` are not used.
        event_shape: E.
        largest: The largest value of a pixel.

    Raises:
        CannotDecode: A ValueError, at the latest after the last group: the bits that are left are not the initial ones.
    """
    stack = Stack(code.words)
    with _repeatable(vae):
        coder = Coder(vae, event_shape, largest, check_count("num_particles", num_particles))
    place = 0
    for size in code.sizes:
        try:
            with _repeatable(vae):
                x = coder.pop(stack, size, (seed, place))
        except (OutOfBits, KeyError, ValueError, IndexError, OverflowError) as error:  # what wrong numbers lead to
            raise CannotDecode(f"the bits cannot be decoded by this model ({type(error).__name__})") from None
        yield x
        place += size
    if not np.array_equal(stack.words, Stack.make_random(code.initial_words, seed).words):
        raise CannotDecode("the bits that are left are not the initial ones: this model computes other numbers")


def compute_fingerprint(vae: LatentModel, *, largest: int) -> list[NDArray[np.generic]]:
    """What this machine makes of a few fixed draws, to the last bit: pixels, latents, weights and a code.

    Where they differ, a file of ``compress`` cannot be decoded. Arguments as in ``decompress``.
    """
    with _repeatable(vae), seeded(0, torch.device("cpu")):
        mean = vae.likelihood(vae.prior().sample((_FIXED_IMAGES,))).mean
        x, stack = mean.round().clamp(0, largest), Stack.make_random(2**16, 0)
        log_w = Coder(vae, x.shape[1:], largest, 1).push(stack, x, x[:0], (0, 0))
        return [mean.numpy(), vae.posterior(x).sample().numpy(), log_w, stack.words]
