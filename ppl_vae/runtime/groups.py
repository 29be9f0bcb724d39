"""Images in groups that are computed one by one: each with noise of its own, on whichever rank, now or later."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.ranks import end_together

# How often several ranks exchange what they found, and learn of an error or of a wish to stop on another.
_SECONDS_BETWEEN_EXCHANGES = 2.0


class Stopped(Exception):
    """The work was asked to stop before its end. What was done until then has been given to ``on_group``."""


def group_seed(seed: int, first: int) -> int:
    """The seed of a group's noise: the first 64 bits of SHA-256 of (seed, place of the group's first image)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {first}".encode()).digest()[:8], "big")


def compute_groups(
    compute: Callable[[slice], Tensor],
    num_images: int,
    size: int,
    *,
    num_columns: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
    done: Mapping[int, Tensor] | None = None,
    on_group: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """The rows of all images, by groups of ``size``: rank r of R takes the groups r, r + R, ... of those that are left.

    Every rank calls this with the same images, and has all rows at the end, bit for bit as they were computed. An error
    on one rank ends all of them.

    Args:
        compute: a slice of the images -> (n, F) float64, by draws that depend on the slice alone (``group_seed``).
        num_images: N.
        num_columns: F.
        device: where ``compute`` leaves its rows.
        progress: called with the number of images after each group; with several ranks, after one group of each.
        done: (n, F) rows by the place of their group's first image, from before; rank 0's count, for all.
        on_group: called with the place of a group's first image and its (n, F) rows, for each that was computed now;
            with several ranks every two seconds or so, on every rank.
        should_stop: asked after every group, or every two seconds or so; one rank's True is all ranks'.

    Returns:
        (N, F) float64, on the device.

    Raises:
        Stopped: ``should_stop`` said so before the last group.
        ValueError: what is done is not of these groups.
        ConnectionError: another rank met an error, which that one raises.
    """
    # It has its place before the work: small tensors kept between large ones would fragment memory for good.
    table = torch.empty(num_images, num_columns, dtype=torch.double, device=device)
    left = _taken_up(table, size, done or {})
    num_ranks, rounds = distributed.num_ranks(), 1
    while left:
        started = time.monotonic()
        now, left = left[: rounds * num_ranks], left[rounds * num_ranks :]
        with end_together():
            computed = _compute_own(compute, now, progress)
        _exchange(table, now, computed)
        with end_together():
            if on_group is not None:
                for group in now:
                    on_group(group.start, table[group])
        if left and distributed.agree(should_stop is not None and should_stop()):
            raise Stopped
        if num_ranks > 1:
            a_round = (time.monotonic() - started) / rounds
            rounds = distributed.broadcast(max(1, int(_SECONDS_BETWEEN_EXCHANGES / a_round)))
    return table


def _taken_up(table: Tensor, size: int, done: Mapping[int, Tensor]) -> list[slice]:
    """Writes rank 0's finished groups into every rank's table; returns the groups that are left."""
    groups = [slice(first, min(first + size, len(table))) for first in range(0, len(table), size)]
    mine = done if distributed.is_writer() else {}
    expected = {group.start: (group.stop - group.start, table.shape[1]) for group in groups}
    for first, rows in mine.items():
        if tuple(rows.shape) != expected.get(first):
            raise ValueError(f"done: expected rows of groups of {size}, got {tuple(rows.shape)} at image {first}")
    firsts = set(distributed.broadcast(sorted(mine)))
    if firsts:
        finished = [group for group in groups if group.start in firsts]
        _exchange(table, finished, [(group, mine[group.start].to(table)) for group in finished if mine])
    return [group for group in groups if group.start not in firsts]


def _compute_own(
    compute: Callable[[slice], Tensor], now: list[slice], progress: Callable[[int], None] | None
) -> list[tuple[slice, Tensor]]:
    """This rank's groups of ``now``, one of each round, with their rows."""
    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    computed = []
    for start in range(0, len(now), num_ranks):
        a_round = now[start : start + num_ranks]
        if rank < len(a_round):
            computed.append((a_round[rank], compute(a_round[rank])))
        if progress is not None:
            progress(sum(group.stop - group.start for group in a_round))
    return computed


def _exchange(table: Tensor, groups: list[slice], computed: list[tuple[slice, Tensor]]) -> None:
    """table[group] <- its rows, from the rank that has them, for all of the groups."""
    first, end = groups[0].start, groups[-1].stop
    rows = torch.cat([table.new_empty(0, table.shape[1]), *(rows for _, rows in computed)])
    of_table = torch.arange(first, end, device=table.device)
    places = torch.cat([of_table[:0], *(of_table[group.start - first : group.stop - first] for group, _ in computed)])
    found = distributed.gather_rows(rows, end - first, places - first)
    for group in groups:
        table[group] = found[group.start - first : group.stop - first]
