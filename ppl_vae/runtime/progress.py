"""Progress bars on a terminal, and lines in a log."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60
_LINE = "{desc}: {percentage:.0f}% of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left"


def has_terminal() -> bool:
    """Whether standard error is a terminal, on which a bar can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(**options: object) -> tqdm:
    """tqdm's bar; without a terminal one line per minute, and none for shorter work."""
    if has_terminal():
        return tqdm(**options)
    seconds: dict[str, object] = dict.fromkeys(("mininterval", "maxinterval", "delay"), _SECONDS_BETWEEN_LINES)
    return tqdm(**(options | seconds | {"file": _Lines(), "bar_format": _LINE}))


class _Lines:
    """A file for tqdm that prints each state of a bar as a line, without the codes that move a cursor."""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            print(line, file=sys.stderr)

    def flush(self) -> None:
        """Nothing is buffered."""


@contextmanager
def running_clock(words: str) -> Iterator[None]:
    """Show the words and a running clock on a terminal."""
    ended = threading.Event()
    with tqdm(desc=words, bar_format="{desc} ... {elapsed}", leave=False) as clock:

        def tick() -> None:
            while not ended.wait(1):
                clock.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            ended.set()
            ticking.join()


class Progress:
    """A progress bar that starts with the first step, so that its estimate leaves out the time to compile.

    Args:
        options: As ``progress_bar`` takes them.

    Attributes:
        count: How much is done.
    """

    def __init__(self, *, initial: int = 0, **options: object) -> None:
        self.count = initial
        self._options = options
        self._bar: tqdm | None = None
        self._shown = ExitStack()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the clock or the bar."""
        self._shown.close()
        self._bar = None

    def show_clock(self, words: str, say: Callable[[str], None]) -> None:
        """Show a running clock until ``show_bar``; without a terminal, ``say`` prints the words."""
        if has_terminal():
            self._shown.enter_context(running_clock(words))
        else:
            say(f"{words} ...")

    def show_bar(self) -> None:
        """End the clock, and start the bar."""
        self.close()
        self._bar = self._shown.enter_context(progress_bar(initial=self.count, **self._options))

    def update(self, count: int = 1) -> None:
        """Add what was done since the last call."""
        if self._bar is None:
            self.show_bar()
        assert self._bar is not None
        self._bar.update(count)
        self.count += count

    def describe(self, words: str) -> None:
        """Show these words behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(words)
