"""Renders blocks as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ppl_vae.reports.page.blocks import (
    Cell,
    DecoderWeights,
    Explorer,
    NamedPicture,
    Picture,
    Section,
    Slider,
    SliderStop,
    Table,
    Text,
    VerdictBlock,
)

_CODE = re.compile(r"`([^`]+)`")
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_NUMBER = re.compile(r"\s*[<>≤≥≈~]?\s*[-+−]?[\d.][\d.,eE+−–\- ±()\[\]×^%/]*[a-zA-Z%]{0,5}\s*")
_MINUS = re.compile(r"(?<![\w-])-(?=[\d.])")
_NOTHING = "–"
_HERE = Path(__file__).parent
_SMALL = 480  # pixels; a picture up to this width is of single pixels, and is enlarged without smoothing
_BROAD = 900  # pixels; a picture from this width on has words in it, which a phone would make too small to read
_LONG = 32  # letters, from which a table's text is broken into lines


# --- Text as HTML, with everything escaped except two marks ---


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


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _base64(values: bytes | np.ndarray) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else values.tobytes()).decode("ascii")


def _image(png: bytes, alt: str) -> str:
    width, height = png_size(png)
    kind = "pixelated" if width <= _SMALL else "card broad" if width >= _BROAD else "card"
    source = f"data:image/png;base64,{_base64(png)}"
    return f'<img class="{kind}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _caption(words: str) -> str:
    return f"<figcaption>{inline(words)}</figcaption>" if words else ""


# --- Blocks, each to HTML. ``number`` is the block's own on its page. ---


def _text(block: Text, number: int) -> str:
    return paragraphs(block.text)


def _picture(block: Picture, number: int) -> str:
    image = _image(block.png, block.alt)
    return f'<figure class="picture wide"><div class="scroll">{image}</div>{_caption(block.caption)}</figure>'


def _verdict(block: VerdictBlock, number: int) -> str:
    sign = {"healthy": "✓", "warning": "!"}[block.severity]
    return (
        f'<section class="verdict {block.severity}" aria-label="Verdict: {escape(block.word)}">'
        f'<h3><span class="sign" aria-hidden="true">{sign}</span>{inline(block.word)}</h3>\n'
        f"{paragraphs(block.evidence)}{paragraphs(block.advice) if block.advice else ''}"
        f"{_picture(block.figure, number) if block.figure else ''}</section>"
    )


def _column_class(cells: Sequence[Cell]) -> str:
    if all(map(is_number, cells)):
        return ' class="number"'
    return ' class="long"' if max(len(str(value)) for value in cells) > _LONG else ""


def _table(block: Table, number: int) -> str:
    columns = range(len(block.columns))
    kinds = [_column_class([row[k] for row in block.rows]) for k in columns]
    head = "".join(f'<th scope="col"{kinds[k]}>{inline(block.columns[k])}</th>' for k in columns)
    body = []
    for i, row in enumerate(block.rows):
        cells = "".join(f"<td{kinds[k]}>{cell(row[k])}</td>" for k in columns)
        mark = ' class="highlight"' if i == block.highlight else ""
        body.append(f"<tr{mark}>{cells}</tr>")
    name = f' aria-labelledby="caption-{number}"' if block.caption else ' aria-label="Table"'
    caption = f'<figcaption id="caption-{number}">{inline(block.caption)}</figcaption>' if block.caption else ""
    return (
        f'<figure class="table wide"><div class="scroll" tabindex="0" role="region"{name}>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{caption}</figure>"
    )


def _strip(row: NamedPicture, where: str) -> str:
    name, png = row
    return f'<div class="strip"><span class="name">{inline(name)}</span>{_image(png, f"{name}, {where}")}</div>'


def _stop(stop: SliderStop, label: str, *, is_shown: bool) -> str:
    numbers = "".join(
        f"<div><dt>{inline(name)}</dt><dd>{inline(value)}</dd></div>" for name, value in stop.numbers.items()
    )
    return (
        f'<div class="stop" data-label="{escape(stop.label)}"{"" if is_shown else " hidden"}>'
        f"{''.join(_strip(row, f'{label} = {stop.label}') for row in stop.rows)}"
        f"{f'<dl>{numbers}</dl>' if numbers else ''}</div>"
    )


def _slider(block: Slider, number: int) -> str:
    stops = [_stop(stop, block.label, is_shown=k == block.start) for k, stop in enumerate(block.positions)]
    ends = block.positions[0].label, block.positions[-1].label
    now = block.positions[block.start].label
    return (
        f'<figure class="slider wide" id="slider-{number}"><div class="panel">'
        f'<div class="control"><label for="range-{number}">{inline(block.label)} '
        f'= <output for="range-{number}">{escape(now)}</output></label>'
        f'<input type="range" id="range-{number}" min="0" max="{len(stops) - 1}" step="1" value="{block.start}" '
        f'aria-valuetext="{escape(block.label)} = {escape(now)}" autocomplete="off">'
        f'<div class="ends" aria-hidden="true"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div></div>'
        f"{_strip(block.fixed, 'unchanged')}"
        f'<div class="stops">{"".join(stops)}</div></div>{_caption(block.caption)}</figure>'
    )


def _decoder(decoder: DecoderWeights) -> dict[str, object]:
    """The decoder for explorer.js: the weights of all layers in one string, each matrix by rows, then its bias."""
    flat = [part.ravel() for layer in decoder.layers for part in (layer.weight, layer.bias)]
    return {
        "layers": [[*layer.weight.shape, layer.activation] for layer in decoder.layers],
        "shape": list(decoder.event_shape),
        "link": decoder.link.name,
        "bound": decoder.link.bound if np.isfinite(decoder.link.bound) else None,
        "scale": decoder.link.gain / decoder.link.white,
        "weights": _base64(np.concatenate(flat).astype("<f2")),
    }


def _explorer_data(block: Explorer) -> dict[str, object]:
    base = np.zeros(block.decoder.latent_dim) if block.base is None else block.base
    return {
        "decoder": _decoder(block.decoder),
        "start": list(block.start),
        "extent": block.extent,
        "axes": list(block.axes),
        "base": base.tolist(),
        "points": _base64(np.clip(block.points, -60000, 60000).astype("<f2")),
        "labels": None if block.labels is None else _base64(block.labels.astype("u1")),
    }


def _legend(block: Explorer) -> str:
    if block.labels is None:
        return ""
    kinds = np.unique(block.labels).tolist()
    names = block.label_names or [str(kind) for kind in range(max(kinds, default=0) + 1)]
    keys = "".join(f'<li><span class="dot label-{kind % 10}"></span>{escape(names[kind])}</li>' for kind in kinds)
    return f'<ul class="legend" aria-label="Colors of the points">{keys}</ul>'


def _explorer(block: Explorer, number: int) -> str:
    _, height, width = block.decoder.event_shape
    i, j = block.axes
    names = f"z<sub>{i}</sub>", f"z<sub>{j}</sub>"
    return (
        f'<figure class="explorer wide" id="explorer-{number}"><div class="panel"><div class="stage">'
        f'<div class="pad-box"><canvas class="pad" width="640" height="640" tabindex="0" role="application" '
        f'aria-roledescription="plane of two latents" aria-describedby="help-{number}" '
        f'aria-label="Latent plane: latent {i} to the right, latent {j} up"></canvas></div>'
        f'<div class="view"><canvas class="drawn" width="{width}" height="{height}" role="img" '
        f'aria-label="The decoder’s mean at the chosen point" style="aspect-ratio:{width}/{height}"></canvas>'
        f'<p class="readout"><span>{names[0]} = <output class="first"></output></span> '
        f'<span>{names[1]} = <output class="second"></output></span></p></div>'
        f'<div class="notes"><p class="help" id="help-{number}">Move over the plane, or touch it. With the keyboard: '
        f"arrow keys, with Shift for larger steps, and Home to return.</p>{_legend(block)}"
        "<noscript><p>The plane is drawn by a script, which this browser does not run.</p></noscript></div></div></div>"
        f'<script type="application/json">{json_script(_explorer_data(block))}</script>'
        f"{_caption(block.caption)}</figure>"
    )


_RENDERERS: dict[type, Callable[[Any, int], str]] = {
    Text: _text,
    VerdictBlock: _verdict,
    Table: _table,
    Picture: _picture,
    Slider: _slider,
    Explorer: _explorer,
}


# --- The page ---


def _contents(sections: Sequence[Section]) -> str:
    items = "".join(f'<li><a href="#{section.anchor}">{inline(section.title)}</a></li>' for section in sections)
    return f'<nav class="contents" aria-label="Contents"><h2>Contents</h2><ol>{items}</ol></nav>'


GENERATOR = '<meta name="generator" content="ppl_vae">'  # by which a page is known as one that may be written again


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """One self-contained HTML page, for light and dark displays.

    What is interactive in it also says what it shows without a script.

    Args:
        title: Of the page.
        sections: In order, below a list of contents.
        subtitle: A sentence below the title.
    """
    numbers = count(1)
    body = "\n".join(
        f'<section id="{section.anchor}"><h2>{inline(section.title)}</h2>\n'
        + "\n".join(_RENDERERS[type(block)](block, next(numbers)) for block in section.blocks)
        + "</section>"
        for section in sections
    )
    lead = f'<p class="subtitle">{inline(subtitle)}</p>' if subtitle else ""
    scripts = "\n".join(f"<script>\n{_file(name)}</script>" for name in ("slider.js", "explorer.js"))
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
{_file("style.css")}</style>
<noscript><style>
input {{ display: none; }} .stop[hidden] {{ display: block; }}
.stop::before {{ content: attr(data-label); font-weight: 600; }}
</style></noscript>
</head>
<body>
<header><h1>{inline(title)}</h1>{lead}</header>
{_contents(sections)}
<main>
{body}
</main>
{scripts}
</body>
</html>
"""
