"""Resumable work in blocks: each block has its own seed, and any rank may compute it, now or in a later call."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.ranks import end_together

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

    Every rank calls this with the same items and returns all rows, bit for bit as one process computes them.

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

    Raises:
        Stopped: ``should_stop`` returned True before the last block.
        ValueError: ``done`` does not fit these blocks.
        ConnectionError: another rank raised an error.
    """
    # Allocated before the work: small tensors kept between large ones would fragment memory for good.
    table = torch.empty(num_items, num_columns, dtype=torch.double, device=device)
    remaining = _fill_finished(table, block_size, done or {})
    num_ranks, rounds = distributed.num_ranks(), 1
    while remaining:
        started = time.monotonic()
        current, remaining = remaining[: rounds * num_ranks], remaining[rounds * num_ranks :]
        with end_together():
            computed = _compute_own(compute, current, progress)
        _exchange(table, current, computed)
        with end_together():
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
        _exchange(table, finished, [(block, own[block.start].to(table)) for block in finished if own])
    return [block for block in blocks if block.start not in firsts]


def _compute_own(
    compute: Callable[[slice], Tensor], current: list[slice], progress: Callable[[int], None] | None
) -> list[tuple[slice, Tensor]]:
    """Compute this rank's block of each round, and return the blocks with their rows."""
    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    computed = []
    for start in range(0, len(current), num_ranks):
        blocks = current[start : start + num_ranks]
        if rank < len(blocks):
            computed.append((blocks[rank], compute(blocks[rank])))
        if progress is not None:
            progress(sum(block.stop - block.start for block in blocks))
    return computed


def _exchange(table: Tensor, blocks: list[slice], computed: list[tuple[slice, Tensor]]) -> None:
    """Set table[block] for all blocks, each from the rank that computed it."""
    first, end = blocks[0].start, blocks[-1].stop
    rows = torch.cat([table.new_empty(0, table.shape[1]), *(rows for _, rows in computed)])
    index = torch.arange(first, end, device=table.device)
    places = torch.cat([index[:0], *(index[block.start - first : block.stop - first] for block, _ in computed)])
    found = distributed.gather_rows(rows, end - first, places - first)
    for block in blocks:
        table[block] = found[block.start - first : block.stop - first]
