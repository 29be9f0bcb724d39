"""One run, by the processes that torchrun started: rank 0 speaks and decides, and what is read, it reads first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.groups import end_together

Result = TypeVar("Result")
Say = Callable[[str], None]  # takes one line for a person to read


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Together with the other processes that torchrun started, if any."""
    distributed.join(device)
    try:
        yield
    finally:
        distributed.leave()


def rank_zero_only(say: Say) -> Say:
    """One process speaks."""
    return say if distributed.is_writer() else lambda line: None


def rank_zero_first(read: Callable[[], Result]) -> Result:
    """What is read on every rank, on rank 0 first: it makes what is not there yet, a cache or a copy."""
    with end_together():
        found = read() if distributed.is_writer() else None
    with end_together():
        return read() if found is None else found


def broadcast_decision(decide: Callable[[], bool]) -> bool:
    """What rank 0 decides by the files, on every rank."""
    with end_together():
        found = decide() if distributed.is_writer() else None
    return bool(distributed.broadcast(found))
