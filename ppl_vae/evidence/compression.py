"""Bits-back coding: images as a file of about -log2 p(x) bits, from which every image comes back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.evidence.ans import CELLS, Floats, Ints, Mask, OutOfBits, Stack, all_rows, as_array, to_floats
from ppl_vae.evidence.latent_codes import make_latent_codec
from ppl_vae.evidence.pixel_codes import claims_too_much, find_num_bits, make_pixel_codec
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, LayeredDistribution
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.support import check_support
from ppl_vae.vae import check_batch_shape

_FIXED_IMAGES = 3
_MOST_IMAGES = 64  # that are coded together
_MOST_FLOATS = 2**23  # of the masses of one group


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
    vae: LatentModel,
    x: Tensor,
    *,
    num_particles: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
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
        x: (N, *E) whole numbers from 0.
        num_particles: K.
        seed: Of the initial bits.
        progress: Called with the number of images after each group.

    Raises:
        ValueError: Another model, double precision, pixels off the support, or masses that do not sum to one.

    Reference: Townsend et al. 2019, arXiv 1901.04866; Kingma et al. 2019, arXiv 1905.06845 (Bit-Swap); Ruan et al.
    2021, arXiv 2102.11086, section 3.1 (importance-weighted).
    """
    check_support(vae.model, x)
    if any(w.dtype != torch.float32 for w in vae.parameters()):
        raise ValueError("vae: expected weights in single precision; vae.float() converts them")
    with _repeatable(vae):
        coder = _Coder(vae, x.shape[1:], int(x.max()), check_count("num_particles", num_particles))
        words_per_image = coder.find_words_per_image(x)
        initial = words_per_image + 4
        while True:
            try:
                return _compress(coder, x, initial, words_per_image, seed, progress or (lambda n: None))
            except OutOfBits:  # nearly always the first image's
                initial *= 2
                words_per_image *= 2


def _compress(
    coder: _Coder, x: Tensor, initial: int, words_per_image: int, seed: int, progress: Callable[[int], None]
) -> Code:
    stack, end, sizes = Stack.make_random(initial, seed), len(x), []
    most = coder.find_most_images()
    log_weights = np.zeros(len(x))
    while end:  # from the last image to the first, since the first that is decoded is the last that was coded
        size = min(most, end, max(1, stack.num_words // words_per_image))
        size = 1 << (size.bit_length() - 1)  # few different sizes, which are stored
        log_weights[end - size : end] = coder.push(stack, x[end - size : end], x[end : end + 1], (seed, end - size))
        sizes.append(size)
        end -= size
        progress(size)
    return Code(stack.words, initial, tuple(sizes[::-1]), log_weights)


def decompress(
    vae: LatentModel,
    code: Code,
    *,
    event_shape: Sequence[int],
    largest: int,
    num_particles: int = 1,
    seed: int = 0,
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
        coder = _Coder(vae, event_shape, largest, check_count("num_particles", num_particles))
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
    """What this machine makes of a few fixed latents, to the last bit: pixels, latents, weights and a code.

    Where they differ, a file of ``compress`` cannot be decoded. Arguments as in ``decompress``.
    """
    with _repeatable(vae), seeded(0, torch.device("cpu")):
        z = vae.prior().sample((_FIXED_IMAGES,))
        p = vae.likelihood(z)
        x = p.mean.round().clamp(0, largest)
        coder = _Coder(vae, x.shape[1:], largest, 1)
        words, log_w = coder.push_fixed(x, np.floor(z.double().numpy() * CELLS).astype(np.int64))
        return [p.mean.numpy(), vae.posterior(x).sample().numpy(), log_w, words]


@dataclass
class _Coder:
    """Pushes and pops groups of images."""

    vae: LatentModel
    event_shape: Sequence[int]
    largest: int
    num_particles: int

    def __post_init__(self) -> None:
        prior = self.vae.prior()
        self._prior, self._num_latents = make_latent_codec(prior, is_far=True), prior.event_shape[0]
        net = getattr(self.vae.likelihood, "net", None)
        self._swaps = (
            self.num_particles == 1 and isinstance(self.vae.posterior, BottomUp) and isinstance(net, BottomLayerOnly)
        )

    def find_words_per_image(self, x: Tensor) -> int:
        """About how many words the latents of one image need, at most."""
        q, num_latents = self._infer(x[:1], x[:0]), self._num_latents
        make_latent_codec(q, is_far=False)  # refuses what has no code
        if self._swaps and isinstance(q, LayeredDistribution):
            num_latents = max(q.latent_dims)  # a layer is pushed before the next but one is popped
        return (self.num_particles + 1) * num_latents + 4

    def find_most_images(self) -> int:
        """The number of images whose masses fit into memory."""
        p = self.vae.likelihood(torch.zeros(2, self._num_latents))
        values = 1 << find_num_bits(p, self.largest)
        floats = p.event_shape.numel() * max(values, 16 * self.num_particles)
        if floats > 8 * _MOST_FLOATS:
            raise ValueError(
                f"x: expected values whose masses fit into memory, got up to {self.largest:,} in each of "
                f"{p.event_shape.numel():,} pixels"
            )
        return max(1, min(_MOST_IMAGES, _MOST_FLOATS // floats))

    def push_fixed(self, x: Tensor, z: Ints) -> tuple[NDArray[np.uint32], Floats]:
        """The words and log-weights of images (n, *E) with these latents (n, L)."""
        q, latents, stack = self._infer(x, x[:0]), self._make_latents(len(x), 1), Stack.make_random(2**16, 0)
        latents[0, :-1] = z
        log_w = as_array(self._find_log_weights(x, latents, q))
        self._push_pixels(stack, x, z)
        self._prior.push(stack, z, all_rows(z))
        make_latent_codec(q, is_far=False).pop(stack, latents, _find_images(latents))
        return stack.words, log_w

    # --- One group of images ---

    def push(self, stack: Stack, x: Tensor, following: Tensor, seed: tuple[int, int]) -> Floats:
        """Push images (n, *E), given some that were pushed before; returns their log-weights (n,)."""
        n, K = len(x), self.num_particles
        q = self._infer(x, following)
        if self._swaps:
            z = self._push_swapping(stack, x, q, seed)
            return as_array(self._find_log_weights(x, z[None], q)[0])
        latents, codec = self._make_latents(n, K), make_latent_codec(q, is_far=False)
        stack.scramble(latents[..., :-1, :].size, *seed)
        codec.pop(stack, latents, _find_images(latents))
        log_w = self._find_log_weights(x, latents, q)
        j = np.zeros(n, dtype=np.int64)
        if K > 1:
            j = stack.pop_choice(as_array(log_w.T.softmax(-1)))
            codec.push(stack, latents, _find_images(latents, j))
        chosen = latents[j, np.arange(n)]
        self._push_pixels(stack, x, chosen)
        self._prior.push(stack, chosen, all_rows(chosen))
        stack.push_uniform(j, np.full(n, K))
        return as_array(log_w.double().logsumexp(0) - np.log(K))

    def pop(self, stack: Stack, n: int, seed: tuple[int, int]) -> Tensor:
        """The inverse of ``push``: images (n, *E)."""
        if self._swaps:
            return self._pop_swapping(stack, n, seed)
        K, latents = self.num_particles, self._make_latents(n, self.num_particles)
        j, chosen = stack.pop_uniform(np.full(n, K)), self._make_latents(n - 1)
        self._prior.pop(stack, chosen, all_rows(chosen))
        x = self._pop_pixels(stack, chosen)
        q = self._infer(x, x[:0])
        codec = make_latent_codec(q, is_far=False)
        latents[j, np.arange(n)] = chosen
        if K > 1:
            codec.pop(stack, latents, _find_images(latents, j))
            stack.push_choice(j, as_array(self._find_log_weights(x, latents, q).T.softmax(-1)))
        codec.push(stack, latents, _find_images(latents))
        stack.scramble(latents[..., :-1, :].size, *seed)
        return x

    def _make_latents(self, n: int, *particles: int) -> Ints:
        """Cells of n images and of one more row, to be filled in."""
        return np.zeros((*particles, n + 1, self._num_latents), dtype=np.int64)

    # --- Bit-Swap: z_l is pushed as soon as z_{l+1} is popped ---

    def _push_swapping(self, stack: Stack, x: Tensor, q: Distribution, seed: tuple[int, int]) -> Ints:
        p = self.vae.prior()
        assert isinstance(p, LayeredDistribution)
        assert isinstance(q, LayeredDistribution)
        dims, found = q.latent_dims, self._make_latents(len(x))
        rows = _find_images(found)
        layers = np.split(found, np.cumsum(dims[:-1]), axis=1)  # views
        stack.scramble(layers[0].size, *seed)
        make_latent_codec(q.first, is_far=False).pop(stack, layers[0], rows)
        self._push_pixels(stack, x, found[:-1])  # z_2 and above are still 0
        for below, above, up, down in zip(layers, layers[1:], q.links, p.links[::-1], strict=False):
            stack.scramble(above.size, *seed)
            make_latent_codec(up(to_floats(below)), is_far=False).pop(stack, above, rows)
            make_latent_codec(down(to_floats(above)), is_far=True).push(stack, below, rows)
        make_latent_codec(p.first, is_far=True).push(stack, layers[-1], rows)
        return found

    def _pop_swapping(self, stack: Stack, n: int, seed: tuple[int, int]) -> Tensor:
        p, guide = self.vae.prior(), self.vae.posterior
        assert isinstance(p, LayeredDistribution)
        assert isinstance(guide, BottomUp)
        found, (first, *further) = self._make_latents(n), guide.layers
        rows = _find_images(found)
        layers = np.split(found, np.cumsum(p.latent_dims[:-1]), axis=1)
        make_latent_codec(p.first, is_far=True).pop(stack, layers[-1], rows)
        for below, above, up, down in zip(layers[-2::-1], layers[::-1], further[::-1], p.links, strict=False):
            make_latent_codec(down(to_floats(above)), is_far=True).pop(stack, below, rows)
            make_latent_codec(up(to_floats(below)), is_far=False).push(stack, above, rows)
            stack.scramble(above.size, *seed)
        x = self._pop_pixels(stack, np.where(np.arange(found.shape[1]) < p.latent_dims[0], found, 0)[:-1])
        make_latent_codec(first(torch.cat([x, torch.zeros_like(x[:1])])), is_far=False).push(stack, layers[0], rows)
        stack.scramble(layers[0].size, *seed)
        return x

    # --- Networks, with one row more than is coded ---

    def _infer(self, x: Tensor, following: Tensor) -> Distribution:
        """q(z | x) of images (n, *E), and of one that is decoded later, or zeros."""
        other = following if len(following) else torch.zeros_like(x[:1])
        given = torch.cat([x, other])
        return check_batch_shape(self.vae.posterior(given), given)

    def _decode(self, z: Ints, other: Tensor) -> Distribution:
        """p(x | z) of latents (n, L), and of others (1, L)."""
        return self.vae.likelihood(torch.cat([to_floats(z), other]))

    def _push_pixels(self, stack: Stack, x: Tensor, z: Ints) -> None:
        unknown = x[:1].flatten(1).repeat(1, -(-z.shape[1] // x[0].numel()))[:, : z.shape[1]]
        p = self._decode(z, unknown.float())
        claimed = as_array(p.log_prob(torch.cat([x, x[:1]])))[:-1]
        coded = make_pixel_codec(p, len(x), self.largest).push(stack, x.flatten(1).long().numpy())
        if claims_too_much(claimed, coded):
            place = int((claimed - coded).argmax())
            raise ValueError(
                f"likelihood: expected masses that sum to one, got log p(x | z) = {claimed[place]:,.2f} nats for an "
                f"image that masses which sum to one give {coded[place]:,.2f}"
            )

    def _pop_pixels(self, stack: Stack, z: Ints) -> Tensor:
        p = self._decode(z, torch.zeros(1, z.shape[1]))
        shape = (len(z), *self.event_shape)
        x = make_pixel_codec(p, len(z), self.largest).pop(stack, len(z), int(np.prod(self.event_shape)))
        return torch.from_numpy(x).float().reshape(shape)

    def _find_log_weights(self, x: Tensor, latents: Ints, q: Distribution) -> Tensor:
        """log w of latents (K, n + 1, L) of images (n, *E): (K, n) nats."""
        z = to_floats(latents)
        log_q, z = q.log_prob(z)[:, : len(x)], z[:, : len(x)]
        return self.vae.likelihood(z).log_prob(x) + self.vae.prior().log_prob(z) - log_q


def _find_images(latents: Ints, without: Ints | None = None) -> Mask:
    """The mask of latents (..., n + 1, L) that belong to images, for (K, n + 1, L) without particle j of each image."""
    rows = all_rows(latents)
    rows[..., -1] = False
    if without is not None:
        rows[without, np.arange(len(without))] = False
    return rows
