"""How a script ends: in one line where a user caused it, and with an exit code that says so."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from ppl_vae.runtime.streams import prepare_streams

# What torch and its libraries say where memory ran out, on a CPU and on a GPU; torch has a type of its own for some of
# it only, and here is no torch.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the work.

    Args:
        words: what is kept, and how to go on.
        number: of the signal; the exit code is 128 more.
    """

    def __init__(self, words: str = "", *, number: int = signal.SIGINT) -> None:
        super().__init__(words)
        self.number = number


class EndedElsewhere(ConnectionError):
    """Another process of the same training or evaluation met an error, which it says itself."""


def command(main: Callable[[], None]) -> None:
    """Runs a script's main: what users can cause ends in one line and a non-zero exit, without a traceback.

    Ctrl-C ends with 130, SIGTERM with 143. Set PPL_VAE_TRACEBACK=1 to see where an error came from.
    """
    prepare_streams()
    # Figures are only written to files. A notebook sets a backend of its own here, which importing matplotlib refuses
    # where the notebook's packages are not installed.
    os.environ["MPLBACKEND"] = "agg"
    with suppress(ValueError):  # of another thread than the main one, which no signal reaches
        signal.signal(signal.SIGTERM, _end)
    try:
        main()
        _end_of_several()
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        for ignored in (signal.SIGINT, signal.SIGTERM):  # impatience, while Python ends, shows no traceback
            with suppress(ValueError):
                signal.signal(ignored, signal.SIG_IGN)
        if _speaks():
            what = "interrupted" if number == signal.SIGINT else "terminated"
            print(f"\n{what}: {error}" if str(error) else f"\n{what}", file=sys.stderr)
        sys.exit(128 + number)
    except EndedElsewhere:
        sys.exit(1)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("PPL_VAE_TRACEBACK"):
            raise
        _end_with(_in_words(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        first = str(error).splitlines()[:1]
        _end_with(f"out of memory; a smaller batch, network, or number of particles needs less {first}")


def _end_of_several() -> None:
    """Under torchrun, ends at once what went well: threads of its libraries can abort a Python that takes itself down.

    Rank 1 of 2 was once seen to end so, by SIGABRT and after all its work.
    """
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number=number)


def _speaks() -> bool:
    """Under torchrun, the first process."""
    return os.environ.get("RANK", "0") == "0"


def _in_words(error: Exception) -> str:
    """A failed read or write as FILE: WHY, and what else the error says."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _end_with(error: object) -> NoReturn:
    first = (str(error).splitlines() or ["unknown"])[0]  # Pyro appends the shapes of a whole trace
    print(f"error: {first}" if _speaks() else f"error on rank {os.environ['RANK']}: {first}", file=sys.stderr)
    sys.exit(1)
