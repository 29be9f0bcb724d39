"""One group of images on a stack of bits: latents popped by the guide, pixels and latents pushed by the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.evidence.ans import Floats, Ints, Mask, Stack, all_rows, cell_centers, double_array
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
        log_w = double_array(self._find_log_weights(x, latents, q))
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
            return double_array(self._find_log_weights(x, z[None], q)[0])
        latents, codec = self._make_latents(n, K), make_latent_codec(q, is_far=False)
        stack.scramble(latents[..., :-1, :].size, *seed)
        codec.pop(stack, latents, _find_images(latents))
        log_w = self._find_log_weights(x, latents, q)
        j = np.zeros(n, dtype=np.int64)
        if K > 1:
            j = stack.pop_choice(double_array(log_w.T.softmax(-1)))
            codec.push(stack, latents, _find_images(latents, j))
        chosen = latents[j, np.arange(n)]
        self._push_pixels(stack, x, chosen)
        self._prior.push(stack, chosen, all_rows(chosen))
        stack.push_uniform(j, np.full(n, K))
        return double_array(log_w.double().logsumexp(0) - np.log(K))

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
            stack.push_choice(j, double_array(self._find_log_weights(x, latents, q).T.softmax(-1)))
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
            make_latent_codec(up(cell_centers(below)), is_far=False).pop(stack, above, rows)
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
            make_latent_codec(up(cell_centers(below)), is_far=False).push(stack, above, rows)
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
    rows = all_rows(latents)
    rows[..., -1] = False
    if without is not None:
        rows[without, np.arange(len(without))] = False
    return rows
