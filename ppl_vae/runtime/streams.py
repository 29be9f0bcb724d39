"""Standard output and error of a script, on terminals and in files that lack some characters."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_ASCII = {"±": "+/-", "−": "-", "–": "-", "×": "x", "≈": "~", "≤": "<=", "≥": ">=", "’": "'"}
_HANDLER = "ppl_vae.ascii"


def prepare_streams() -> None:
    """Writes each line at once, and characters that an encoding lacks in ASCII.

    Without it a "±" ends a script whose output is ASCII or Latin-2, and so does a file name that is no valid UTF-8;
    and a log file shows nothing before its buffer is full.
    """
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER, line_buffering=True)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The error handler of a codec: a replacement, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(map(_ascii_of, characters)), error.end


def _ascii_of(character: str) -> str:
    """+/- for a plus-minus sign, e for an e with an accent, else an escape."""
    without_accents = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _ASCII.get(character) or without_accents or character.encode("ascii", "backslashreplace").decode()
