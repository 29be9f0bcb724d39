"""Text as HTML, with everything escaped except two marks; and embedded pictures and JSON."""

from __future__ import annotations

import html
import json
import re
from numbers import Integral

_CODE = re.compile(r"`([^`]+)`")
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_NUMBER = re.compile(r"\s*[<>≤≥≈~]?\s*[-+−]?[\d.][\d.,eE+−–\- ±()\[\]×^%/]*[a-zA-Z%]{0,5}\s*")
_MINUS = re.compile(r"(?<![\w-])-(?=[\d.])")
_NOTHING = "–"


def escape(words: str) -> str:
    """As text or between quotes."""
    return html.escape(words, quote=True)


def inline(words: str) -> str:
    """``**bold**`` and ```code```; everything else is escaped."""
    return _BOLD.sub(r"<strong>\1</strong>", _CODE.sub(r"<code>\1</code>", escape(words)))


def paragraphs(words: str) -> str:
    """HTML paragraphs; a blank line starts a new one."""
    return "\n".join(f"<p>{inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", words) if part.strip())


def true_minus(words: str) -> str:
    """The same text with a true minus before numbers, but not within words, options or ranges."""
    return _MINUS.sub("−", words)


def cell(value: str | float | None) -> str:
    """A table's cell: numbers to four digits, whole and large ones in full, with a true minus."""
    if value is None:
        return _NOTHING
    if isinstance(value, str):
        return inline(value)
    in_full = isinstance(value, Integral) or abs(value) >= 1e4
    return (f"{value:,.0f}" if in_full else f"{value:.4g}").replace("-", "−")


def is_number(value: object) -> bool:
    """Whether a cell is one, also as text such as "-86.1 ± 0.2"; an empty cell may stand among them."""
    return value in (None, "", _NOTHING) or not isinstance(value, str) or _NUMBER.fullmatch(value) is not None


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG, pixels."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def json_script(value: object) -> str:
    """JSON for a script element, without a "<" that could close it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
