"""How a script's process writes its output and its progress, reacts to signals, and ends. It needs no torch."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ppl_vae.runtime.errors import EndedElsewhere, Interrupted, is_out_of_memory

if TYPE_CHECKING:
    from tqdm import tqdm

# --- The end of a process ---


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; an error that a user can cause ends it with one line and no traceback.

    The exit code is 1 after an error, 130 after Ctrl-C, and 143 after SIGTERM. With PPL_VAE_TRACEBACK=1 in the
    environment, the traceback is shown.
    """
    prepare_streams()
    # Figures are only written to files. A notebook sets a backend of its own here, which importing matplotlib refuses
    # where the notebook's packages are not installed.
    os.environ["MPLBACKEND"] = "agg"
    with suppress(ValueError):  # signals can only be handled in the main thread
        signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        main()
        _end_rank()
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        for ignored in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C while Python ends shows no traceback
            with suppress(ValueError):
                signal.signal(ignored, signal.SIG_IGN)
        if _rank() == "0":
            what = "interrupted" if number == signal.SIGINT else "terminated"
            print(f"\n{what}: {error}" if str(error) else f"\n{what}", file=sys.stderr)
        sys.exit(128 + number)
    except EndedElsewhere:
        sys.exit(1)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("PPL_VAE_TRACEBACK"):
            raise
        is_about_a_file = isinstance(error, OSError) and error.filename is not None and error.strerror is not None
        _exit_with(f"{error.filename}: {error.strerror}" if is_about_a_file else error)  # type: ignore[union-attr]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[:1]
        _exit_with(f"out of memory; a smaller batch, network, or number of particles needs less {first}")


def _end_rank() -> None:
    """Under torchrun, end the process at once: threads of its libraries can abort Python's own shutdown (SIGABRT)."""
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _raise_interrupted(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number=number)


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _exit_with(error: object) -> NoReturn:
    first = (str(error).splitlines() or ["unknown"])[0]  # Pyro appends the shapes of a whole trace
    print(f"error: {first}" if _rank() == "0" else f"error on rank {_rank()}: {first}", file=sys.stderr)
    sys.exit(1)


@contextmanager
def stop_on_signals(words: str = "") -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM has arrived; a second signal ends the block at once.

    The block raises ``Interrupted`` at its next safe point, or ends. In both cases ``Interrupted`` with the signal's
    number leaves this context; if the block came to its end, with these words. Outside the main thread, where signals
    cannot be handled, the function returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise Interrupted(number=number)
        received.append(number)

    handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    former = {number: signal.signal(number, handle) for number in handled}
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


# --- Output ---


def prepare_streams() -> None:
    """Write each line of output at once, and characters that the encoding lacks as escape sequences.

    Otherwise a "±" ends a script whose output is ASCII or Latin-2, as does a file name that is no valid UTF-8, and a
    log file shows nothing before its buffer is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


# --- Progress ---

_SECONDS_BETWEEN_LINES = 60
_LINE = "{desc}: {percentage:.0f}% of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left"


def has_terminal() -> bool:
    """Whether standard error is a terminal, on which a bar can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress_bar(**options: object) -> tqdm:
    """tqdm's bar; without a terminal one line per minute, and none for shorter work."""
    from tqdm import tqdm  # --help needs none

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
