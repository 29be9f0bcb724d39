"""One group of images on a stack of bits: latents popped by the guide, pixels and latents pushed by the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.evidence.ans import Floats, Ints, Mask, Stack, cell_centers, double_array
from ppl_vae.evidence.latent_codes import make_latent_codec
from ppl_vae.evidence.pixel_codes import claims_too_much, find_num_bits, make_pixel_codec
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, LayeredDistribution
from ppl_vae.protocols import LatentModel
from ppl_vae.vae import check_batch_shape

_MOST_IMAGES = 64  # in a group, which is coded together
_MOST_FLOATS = 2**23  # in the masses of a group


@dataclass
class Coder:
    """Pushes and pops groups of images (n, *E).

    Raises ValueError for a model without a code, for values whose masses do not fit into memory, and for
    log-probabilities of masses that do not sum to one.
    """

    vae: LatentModel
    event_shape: Sequence[int]
    largest: int
    num_particles: int

    def __post_init__(self) -> None:
        prior = self.vae.prior()
        self._prior, self._num_latents = make_latent_codec(prior, is_far=True), prior.event_shape[0]
        net = getattr(self.vae.likelihood, "net", None)
        p = self.vae.likelihood(torch.zeros(2, self._num_latents))
        self._num_pixels, self._num_values = p.event_shape.numel(), 1 << find_num_bits(p, self.largest)
        self._swaps = (
            self.num_particles == 1 and isinstance(self.vae.posterior, BottomUp) and isinstance(net, BottomLayerOnly)
        )
        # Bit-Swap pushes a layer before it pops the next but one.
        dims = prior.latent_dims if self._swaps and isinstance(prior, LayeredDistribution) else (self._num_latents,)
        self._words_per_vector = max(dims)

    def check(self, x: Tensor) -> None:
        """Raises ValueError where images like these (N, *E) cannot be coded."""
        make_latent_codec(self._infer(x[:1], x[:0]), is_far=False)
        if self._num_pixels * max(self._num_values, 16 * self.num_particles) > 8 * _MOST_FLOATS:
            raise ValueError(
                f"x: expected values whose masses fit into memory, got up to {self.largest:,} in each of "
                f"{self._num_pixels:,} pixels"
            )

    def choose_size(self, num_images: int, num_words: int) -> int:
        """The number of images in the next group: a power of two, since sizes are stored.

        Args:
            num_images: How many are left.
            num_words: On the stack. Each latent that is popped needs one at most, apart from very wide guides.
        """
        most = max(1, min(num_images, _MOST_IMAGES, _MOST_FLOATS // (self._num_pixels * max(self._num_values, 16))))
        size = 1 << (most.bit_length() - 1)
        while size > 1 and self.count_words(size) > num_words:
            size //= 2
        return size

    def count_words(self, size: int) -> int:
        """About how many words the latents of a group of images need, at most."""
        return (size + self._find_num_together(size) * self.num_particles) * self._words_per_vector + 8

    def _find_num_together(self, size: int) -> int:
        """How many images of a group have their particles popped at once; all would need too many words."""
        fit = _MOST_FLOATS // (16 * self._num_pixels * self.num_particles)
        return max(1, min(size, fit, max(_MOST_IMAGES // self.num_particles, size // 16)))

    # --- One group of images ---

    def push(self, stack: Stack, x: Tensor, following: Tensor, seed: tuple[int, int]) -> Floats:
        """Push images (n, *E), given some that were pushed before; returns their log-weights (n,)."""
        n = len(x)
        if self._swaps:
            q = self._infer(x, following)
            z = self._push_swapping(stack, x, q, seed)
            return double_array(self._find_log_weights(x, z[None], q)[0])
        z, j, log_w = np.zeros((n, self._num_latents), np.int64), np.zeros(n, np.int64), np.zeros(n)
        for part in self._split(n):
            z[part], j[part], log_w[part] = self._push_particles(stack, x[part], following, (*seed, part.start))
        self._push_pixels(stack, x, z)
        self._prior.push(stack, z)
        stack.push_uniform(j, np.full(n, self.num_particles))
        return log_w

    def pop(self, stack: Stack, n: int, seed: tuple[int, int]) -> Tensor:
        """The inverse of ``push``: images (n, *E)."""
        if self._swaps:
            return self._pop_swapping(stack, n, seed)
        j, z = stack.pop_uniform(np.full(n, self.num_particles)), np.zeros((n, self._num_latents), np.int64)
        self._prior.pop(stack, z)
        x = self._pop_pixels(stack, z)
        for part in reversed(self._split(n)):
            self._pop_particles(stack, x[part], z[part], j[part], (*seed, part.start))
        return x

    def _split(self, n: int) -> list[slice]:
        """The images of a group whose particles are popped at once."""
        size = self._find_num_together(n)
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def _push_particles(
        self, stack: Stack, x: Tensor, following: Tensor, seed: tuple[int, ...]
    ) -> tuple[Ints, Ints, Floats]:
        """Pop K latents of each image (n, *E), and push all but one: its cells (n, L), which it is, and log-weights."""
        n, K = len(x), self.num_particles
        latents, q = self._make_latents(n, K), self._infer(x, following)
        codec, j = make_latent_codec(q), np.zeros(n, dtype=np.int64)
        stack.scramble(latents[:, :-1].size, *seed)
        codec.pop(stack, latents, _find_images(latents))
        log_w = self._find_log_weights(x, latents, q)
        if K > 1:
            j = stack.pop("choice", double_array(log_w.T.softmax(-1)))
            codec.push(stack, latents, _find_images(latents, j))
        return latents[j, np.arange(n)], j, double_array(log_w.double().logsumexp(0) - np.log(K))

    def _pop_particles(self, stack: Stack, x: Tensor, z: Ints, j: Ints, seed: tuple[int, ...]) -> None:
        """The inverse of ``_push_particles``."""
        latents, q = self._make_latents(len(x), self.num_particles), self._infer(x, x[:0])
        codec = make_latent_codec(q)
        latents[j, np.arange(len(x))] = z
        if self.num_particles > 1:
            codec.pop(stack, latents, _find_images(latents, j))
            stack.push("choice", j, double_array(self._find_log_weights(x, latents, q).T.softmax(-1)))
        codec.push(stack, latents, _find_images(latents))
        stack.scramble(latents[:, :-1].size, *seed)

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
        make_latent_codec(q.first).pop(stack, layers[0], rows)
        self._push_pixels(stack, x, found[:-1])  # z_2 and above are still 0
        for below, above, up, down in zip(layers, layers[1:], q.links, p.links[::-1], strict=False):
            stack.scramble(above.size, *seed)
            make_latent_codec(up(cell_centers(below))).pop(stack, above, rows)
            make_latent_codec(down(cell_centers(above)), is_far=True).push(stack, below, rows)
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
            make_latent_codec(down(cell_centers(above)), is_far=True).pop(stack, below, rows)
            make_latent_codec(up(cell_centers(below))).push(stack, above, rows)
            stack.scramble(above.size, *seed)
        x = self._pop_pixels(stack, np.where(np.arange(found.shape[1]) < p.latent_dims[0], found, 0)[:-1])
        make_latent_codec(first(torch.cat([x, torch.zeros_like(x[:1])]))).push(stack, layers[0], rows)
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
        return self.vae.likelihood(torch.cat([cell_centers(z), other]))

    def _push_pixels(self, stack: Stack, x: Tensor, z: Ints) -> None:
        unknown = x[:1].flatten(1).repeat(1, -(-z.shape[1] // x[0].numel()))[:, : z.shape[1]]
        p = self._decode(z, unknown.float())
        claimed = double_array(p.log_prob(torch.cat([x, x[:1]])))[:-1]
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
        z = cell_centers(latents)
        log_q, z = q.log_prob(z)[:, : len(x)], z[:, : len(x)]
        return self.vae.likelihood(z).log_prob(x) + self.vae.prior().log_prob(z) - log_q


def _find_images(latents: Ints, without: Ints | None = None) -> Mask:
    """The mask of latents (..., n + 1, L) that belong to images, for (K, n + 1, L) without particle j of each image."""
    rows = np.ones(latents.shape[:-1], dtype=bool)
    rows[..., -1] = False
    if without is not None:
        rows[without, np.arange(len(without))] = False
    return rows
