"""How much is computed at once, by one rule for what fits into memory; and resumable work in blocks.

    items per pass = bytes of a pass / (floats per item x bytes per float)

An item is an image, a pair of one particle and one image, or a latent vector. A pass is one call of the decoder. A
group is the images whose noise comes from one seed (``images_per_group``); a batch of an evaluation is the particles
and images that draw at once (``evaluation_batch_size``). A block is work that is kept when it is finished: it has its
own seed, and any rank may compute it, now or in a later call.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.errors import is_out_of_memory, pluralize
from ppl_vae.runtime.records import Data, further_of, images_of

Result = TypeVar("Result")

# Bytes of features, logits and log-probabilities in one pass through the decoder. Measured on two cores: passes of a
# quarter of this size took 1.3 times as long, and larger ones were no faster. Not measured on a GPU.
PASS_BYTES = {"cpu": 32e6, "cuda": 1e9}

# The most images per group: 2, 4 and 8 ranks then share 10,000 images evenly. Measured at S = 1 on one thread: groups
# of 1,250 took 1.00 times as long as groups of 1,700, groups of 625 took 1.07 times and groups of 250 1.32 times.
_MAX_IMAGES_PER_GROUP = 1250

_FLOATS_PER_PIXEL = 6  # features, values and log-probabilities, for a likelihood that does not say
_FLOATS_PER_SPLINE = 24  # features per latent in a layer of a flow, whose spline has eight bins


def floats_per_pixel(likelihood: object) -> int:
    """The floats per pixel that log p(x | z) holds at once, as the likelihood or its family says; 6 by default."""
    family = getattr(likelihood, "family", None)
    return getattr(likelihood, "floats_per_pixel", getattr(family, "floats_per_pixel", _FLOATS_PER_PIXEL))


def floats_per_latent(distribution: Distribution) -> int:
    """The floats per latent vector in the largest tensor that log p(z) takes.

    This is L for most distributions, the features of all latents for a flow, and K times a component's for a mixture.
    """
    # The distributions that others are made of: transformed ones, layers (``first``), defensive mixtures.
    parts = (getattr(distribution, name, None) for name in ("base_dist", "first", "wide", "proposal"))
    vectors = [part for part in parts if isinstance(part, Distribution) and part.event_shape]
    most = max([distribution.event_shape.numel(), *map(floats_per_latent, vectors)])
    if hasattr(distribution, "flow") or hasattr(distribution, "layers"):
        most *= _FLOATS_PER_SPLINE
    components = getattr(distribution, "component_distribution", None)
    return most if components is None else components.batch_shape[-1] * max(most, floats_per_latent(components))


def items_per_pass(floats_per_item: int, device_type: str = "cpu", *, bytes_per_float: int = 4) -> int:
    """The number of items that fit into one pass, at least 1."""
    return max(1, int(PASS_BYTES[device_type] / max(1, floats_per_item * bytes_per_float)))


def images_per_pass(x: Data, likelihood: object = None, *, extra_floats: int = 0) -> int:
    """The number of images, or of pairs of a particle and an image, that one pass through the decoder holds.

    Args:
        x: Images (N, *E), for their size and device.
        likelihood: See ``floats_per_pixel``.
        extra_floats: Floats per pixel in addition.
    """
    images = images_of(x)
    floats = (floats_per_pixel(likelihood) + extra_floats) * images[:1].numel()
    return items_per_pass(floats, x.device.type, bytes_per_float=max(4, images.element_size()))


def latents_per_pass(distribution: Distribution, device_type: str = "cpu") -> int:
    """The number of latent vectors that are drawn from a distribution, or evaluated under it, in one pass."""
    return items_per_pass(floats_per_latent(distribution), device_type)


@torch.no_grad()
def pairs_per_pass(vae: object, x: Data) -> int:
    """The number of pairs of a particle and an image x (N, *E) whose log-weights one pass takes.

    It follows from the likelihood and the prior of ``vae``; any other program counts as one that holds little.
    """
    pairs = images_per_pass(x, getattr(vae, "likelihood", None))
    prior = getattr(vae, "prior", None)
    return pairs if prior is None else min(pairs, latents_per_pass(prior(*further_of(x[:1])), x.device.type))


def even_divisor(total: int, most: int) -> int:
    """The largest divisor of ``total`` in (most / 2, most], or ``most`` where there is none.

    A compiled graph is for one size, and a remainder would run without it.
    """
    if total <= most:
        return total
    return next((size for size in range(most, most // 2, -1) if total % size == 0), most)


def images_per_group(x: Data, num_particles: int) -> int:
    """The number of images x (N, *E) whose noise comes from one seed.

    It depends on the size of an image, S and the kind of device alone, so that models and processes have equal groups.
    """
    pairs = images_per_pass(x)
    return min(_MAX_IMAGES_PER_GROUP, max(1, pairs // even_divisor(num_particles, pairs)))


def evaluation_batch_size(vae: object, x: Data, num_particles: int) -> tuple[int, int]:
    """The numbers of particles, and of images x (N, *E), that an evaluation of S particles draws at once.

    The noise of two models is matched only if these numbers are equal.
    """
    pairs = pairs_per_pass(vae, x)
    particles = even_divisor(num_particles, pairs)
    return particles, even_divisor(images_per_group(x, num_particles), max(1, pairs // particles))


class BatchSize:
    """The numbers of particles and of images that are computed at once; halved for good where memory runs out.

    The particles are halved first, down to one, and then the images. ``say`` is called at the first halving.
    """

    def __init__(
        self, particles: int, images: int, *, device: torch.device, say: Callable[[str], None] | None = None
    ) -> None:
        self.particles, self.images = particles, images
        self._device, self._say = device, say

    def run(self, attempt: Callable[[int, int], Result]) -> Result:
        """attempt(particles, images), repeated with half of them until it fits; raises its error if 1 x 1 does not."""
        while True:
            try:
                return attempt(self.particles, self.images)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.particles == self.images == 1:
                    raise
            release(self._device)  # after the except clause, see there
            if self.particles > 1:
                word, before, self.particles = "particle", self.particles, self.particles // 2
            else:
                word, before, self.images = "image", self.images, self.images // 2
            if self._say is not None:
                self._say(f"Out of memory with {pluralize(before, word)} at once: continuing with {before // 2:,}.")
                self._say = None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process, unless the environment has settings of its own for that.

    Blocks below 32 MB then come from the heap, whose free end is returned to the system only above 256 MB. Otherwise
    each pass of an evaluation may return its memory and fetch it again page by page, with which log p(x) of a dense
    network took 1.25 times as long. It holds for the whole process, and cannot be undone.
    """
    if sys.platform != "linux" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    mallopt, trim_threshold, mmap_threshold = getattr(ctypes.CDLL(None), "mallopt", None), -1, -3
    # Older versions refuse more than 32 MB; with the other threshold alone, every block above 128 kB would be fetched.
    if mallopt is not None and mallopt(mmap_threshold, 2**25):
        mallopt(trim_threshold, 2**28)


def release(device: torch.device) -> None:
    """Free what a failed attempt held; after the except clause, since the error's frames hold its tensors."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


# --- Blocks ---

# How often several ranks exchange their rows, and learn of an error or of a request to stop on another rank.
_SECONDS_BETWEEN_EXCHANGES = 2.0


class Stopped(Exception):
    """The work was asked to stop before its end; ``on_block`` has received all finished blocks."""


def block_seed(seed: int, *place: int | str) -> int:
    """The first 64 bits of SHA-256 of "seed place ...": the seed of one block's noise, whatever was drawn before it."""
    words = " ".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big")


def even_block_size(num_items: int, most: int) -> int:
    """ceil(N / ceil(N / most)): blocks of nearly equal size, so that one compiled graph fits most of them."""
    return math.ceil(num_items / math.ceil(num_items / most)) if num_items else most


def compute_blocks(
    compute: Callable[[slice], Tensor],
    num_items: int,
    block_size: int,
    *,
    num_columns: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    done: Mapping[int, Tensor] | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Compute one row of numbers for each item; rank r of R computes the unfinished blocks r, r + R, ...

    Every rank calls this with the same items and returns all rows, bit for bit as one process computes them. It raises
    Stopped if ``should_stop`` returned True before the last block, ConnectionError if another rank met an error, and
    ValueError if ``done`` does not fit these blocks.

    Args:
        compute: Takes the slice of a block's items and returns (n, F) float64; its noise depends on the slice alone.
        num_items: N.
        block_size: Items per block; the last block may be smaller.
        num_columns: F.
        device: Where ``compute`` leaves its rows.
        progress: Called with the number of items after each block.
        done: (n, F) rows of finished blocks by the index of their first item. Only those of rank 0 are used.
        on_block: Called on every rank with the index of a block's first item and its (n, F) rows, for each block that
            this call computes; with several ranks about every two seconds.
        should_stop: Called as ``on_block``; True on one rank stops all ranks.

    Returns:
        (N, F) float64, on the device.
    """
    # Allocated before the work: small tensors kept between large ones would fragment memory for good.
    table = torch.empty(num_items, num_columns, dtype=torch.double, device=device)
    remaining = _fill_finished(table, block_size, done or {})
    num_ranks = distributed.num_ranks()
    rounds = 1  # blocks that each rank computes before the ranks exchange their rows
    while remaining:
        started = time.monotonic()
        current, remaining = remaining[: rounds * num_ranks], remaining[rounds * num_ranks :]
        with distributed.end_together():
            computed = []
            for i in range(0, len(current), num_ranks):
                blocks = current[i : i + num_ranks]
                if distributed.rank() < len(blocks):
                    block = blocks[distributed.rank()]
                    computed.append((block, compute(block)))
                if progress is not None:
                    progress(sum(block.stop - block.start for block in blocks))
        _exchange(table, current, computed)
        with distributed.end_together():
            if on_block is not None:
                for block in current:
                    on_block(block.start, table[block])
        if remaining and distributed.agree(should_stop is not None and should_stop()):
            raise Stopped
        if num_ranks > 1:
            seconds_per_round = (time.monotonic() - started) / rounds
            rounds = distributed.broadcast(max(1, int(_SECONDS_BETWEEN_EXCHANGES / seconds_per_round)))
    return table


def _fill_finished(table: Tensor, block_size: int, done: Mapping[int, Tensor]) -> list[slice]:
    """Write rank 0's finished blocks into every rank's table, and return the blocks that remain."""
    blocks = [slice(first, min(first + block_size, len(table))) for first in range(0, len(table), block_size)]
    own = done if distributed.is_writer() else {}
    expected = {block.start: (block.stop - block.start, table.shape[1]) for block in blocks}
    for first, rows in own.items():
        if tuple(rows.shape) != expected.get(first):
            raise ValueError(f"done: expected rows of blocks of {block_size}, got {tuple(rows.shape)} at item {first}")
    firsts = set(distributed.broadcast(sorted(own)))
    if firsts:
        finished = [block for block in blocks if block.start in firsts]
        # Only rank 0 has rows to give; the others receive them.
        _exchange(table, finished, [(block, own[block.start].to(table)) for block in finished if own])
    return [block for block in blocks if block.start not in firsts]


def _exchange(table: Tensor, blocks: list[slice], computed: list[tuple[slice, Tensor]]) -> None:
    """Set table[block] for all blocks, each from the rank that computed it."""
    first, end = blocks[0].start, blocks[-1].stop
    rows = torch.cat([table.new_empty(0, table.shape[1]), *(rows for _, rows in computed)])
    index = torch.arange(end, device=table.device)
    places = torch.cat([index[:0], *(index[block] for block, _ in computed)])
    found = distributed.gather_rows(rows, end - first, places - first)
    for block in blocks:
        table[block] = found[block.start - first : block.stop - first]
