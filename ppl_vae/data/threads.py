"""Map a function over items in threads, for work that releases the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MOST_THREADS = 16
_AHEAD = 4  # results that may wait for their turn, a thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_threads() -> int:
    """Number of cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield f(item) for each item, in order; only a few results wait at any time."""
    if num_threads() == 1:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(num_threads(), "ppl_vae-data"), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _AHEAD * num_threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
