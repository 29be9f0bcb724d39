"""Ctrl-C and SIGTERM: the work goes on to its next safe point, and ends there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ppl_vae.runtime.ending import Interrupted


@contextmanager
def stop_on_signals(words: str = "") -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT or SIGTERM has come since; the second of them ends at once.

    At its next safe point the block then raises ``Interrupted(words)``, with what is kept and how to go on in words, or
    just ends. Either way ``Interrupted`` leaves here, with the signal's number. Outside the main thread, which alone
    is told of signals, the function says False. What ignores a signal goes on ignoring it.

    Args:
        words: those of an ``Interrupted`` for a block that came to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        if received:
            raise Interrupted(number=number)
        received.append(number)

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    former = {number: signal.signal(number, take) for number in heard}
    try:
        yield lambda: bool(received)
    except KeyboardInterrupt as error:
        if not received:
            raise
        raise Interrupted(str(error), number=received[-1]) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(words, number=received[0])
