"""The blocks of a page as HTML, and the page that they make: one self-contained file.

Text, captions and evidence know two marks, ``**bold**`` and ```code``` between backticks. All else is escaped. A
blank line starts a new paragraph.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TypeAlias

import numpy as np

Cell: TypeAlias = str | float | int | None

_CODE = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z][\w-]*)")  # a flag is code also without backticks
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_NUMBER = re.compile(r"\s*[<>≤≥≈~]?\s*[-+−]?[\d.][\d.,eE+−–\- ±()\[\]×^%/]*[a-zA-Z%]{0,5}\s*")
_MINUS = re.compile(r"(?<![\w-])-(?=[\d.])")
_NOTHING = "–"
_HERE = Path(__file__).parent
_SMALL = 480  # pixels; a picture up to this width is of single pixels, and is enlarged without smoothing
_LONG = 32  # letters, from which a table's text is broken into lines


# --- Text as HTML, with everything escaped except two marks ---


def escape(words: str) -> str:
    """As text or between quotes."""
    return html.escape(words, quote=True)


def inline(words: str) -> str:
    """``**bold**`` and ```code```; everything else is escaped."""
    return _BOLD.sub(r"<strong>\1</strong>", _CODE.sub(_mark_code, escape(words)))


def _mark_code(found: re.Match[str]) -> str:
    word = found[1] or found[2]
    kind = ' class="word"' if len(word) <= _LONG and " " not in word else ""  # not broken after a dash
    return f"<code{kind}>{word}</code>"


def true_minus(words: str) -> str:
    """The same text with a true minus before numbers, but not within words, options or ranges."""
    return _MINUS.sub("−", words)


def caption_html(words: str) -> str:
    """The caption of a figure, if it has one."""
    return f"<figcaption>{inline(words)}</figcaption>" if words else ""


def encode_base64(values: bytes | np.ndarray) -> str:
    """The bytes as a string."""
    return base64.b64encode(values if isinstance(values, bytes) else values.tobytes()).decode("ascii")


# --- Blocks, as HTML ---


def text(words: str) -> str:
    """Paragraphs."""
    return "\n".join(f"<p>{inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", words) if part.strip())


def picture(png: bytes, caption: str, alt: str) -> str:
    """A PNG with its caption, and ``alt``, what it shows, for those who do not see it."""
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")  # of a PNG's header
    kind = "pixelated" if width <= _SMALL else "card"
    source = f"data:image/png;base64,{encode_base64(png)}"
    image = f'<img class="{kind}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'
    return f'<figure class="picture wide">{image}{caption_html(caption)}</figure>'


def verdict(word: str, evidence: str, advice: str = "", *, figure: str = "", is_healthy: bool = False) -> str:
    """A verdict with its evidence, the advice on what would change it, if any, and the picture that shows it."""
    severity, sign = ("healthy", "✓") if is_healthy else ("warning", "!")
    return (
        f'<section class="verdict {severity}" aria-label="Verdict: {escape(word)}">'
        f'<h3><span class="sign" aria-hidden="true">{sign}</span>{inline(word)}</h3>\n'
        f"{text(evidence)}{text(advice)}{figure}</section>"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", *, highlight: int | None = None
) -> str:
    """Rows under named columns; columns of numbers are set to the right.

    Args:
        columns: Their headings.
        rows: As many cells as there are columns: text, numbers, or None for nothing.
        caption: Says what to see.
        highlight: The row that stands out.
    """
    kinds = [_column_class([row[k] for row in rows]) for k in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{inline(name)}</th>' for kind, name in zip(kinds, columns, strict=True))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{_cell(value)}</td>" for kind, value in zip(kinds, row, strict=True))
        mark = ' class="highlight"' if i == highlight else ""
        body.append(f"<tr{mark}>{cells}</tr>")
    label = escape(re.sub(r"[`*]", "", caption or "Table"))
    return (
        f'<figure class="table wide"><div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"{caption_html(caption)}</figure>"
    )


def _cell(value: Cell) -> str:
    """A table's cell: numbers to four digits, whole and large ones in full, with a true minus."""
    if value is None:
        return _NOTHING
    if isinstance(value, str):
        return inline(value)
    in_full = isinstance(value, Integral) or abs(value) >= 1e4
    return (f"{value:,.0f}" if in_full else f"{value:.4g}").replace("-", "−")


def _column_class(cells: Sequence[Cell]) -> str:
    """The class of a column. Text such as "-86.1 ± 0.2" is a number, and an empty cell may stand among numbers."""
    if all(not isinstance(value, str) or value in ("", _NOTHING) or _NUMBER.fullmatch(value) for value in cells):
        return ' class="number"'
    return ' class="long"' if max(len(str(value)) for value in cells) > _LONG else ""


# --- The page ---


@dataclass(frozen=True)
class Section:
    """A heading, the blocks below it, and the anchor that links to it, "#anchor"."""

    title: str
    blocks: Sequence[str]
    anchor: str


GENERATOR = '<meta name="generator" content="ppl_vae">'  # by which a page is known as one that may be written again


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """One self-contained HTML page, for light and dark displays.

    What is interactive in it also says what it shows without a script.

    Args:
        title: Of the page.
        sections: In order, below a list of contents.
        subtitle: A sentence below the title.
    """
    files = {name: (_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "explorer.js")}
    body = "\n".join(
        f'<section id="{section.anchor}"><h2>{inline(section.title)}</h2>\n' + "\n".join(section.blocks) + "</section>"
        for section in sections
    )
    contents = "".join(f'<li><a href="#{section.anchor}">{inline(section.title)}</a></li>' for section in sections)
    lead = f'<p class="subtitle">{inline(subtitle)}</p>' if subtitle else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{files["style.css"]}</style>
</head>
<body>
<header><h1>{inline(title)}</h1>{lead}</header>
<nav class="contents" aria-label="Contents"><h2>Contents</h2><ol>{contents}</ol></nav>
<main>
{body}
</main>
<script>
{files["explorer.js"]}</script>
</body>
</html>
"""
