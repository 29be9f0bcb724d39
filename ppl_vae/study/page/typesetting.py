"""A true minus before the numbers of a section."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ppl_vae.reports.page import Section, Slider, SliderStop, Table, true_minus


def typeset(section: Section) -> Section:
    """With a true minus before numbers, in text, captions and tables."""
    return replace(section, blocks=[_with_minus(block) for block in section.blocks])


def _with_minus(block: Any) -> Any:
    if isinstance(block, Table):
        rows = [[true_minus(cell) if isinstance(cell, str) else cell for cell in row] for row in block.rows]
        return replace(block, rows=rows)
    if isinstance(block, Slider):
        return replace(block, positions=[_stop_with_minus(stop) for stop in block.positions])
    fields = {name: getattr(block, name) for name in ("text", "caption") if hasattr(block, name)}
    return replace(block, **{name: true_minus(words) for name, words in fields.items()})


def _stop_with_minus(stop: SliderStop) -> SliderStop:
    return replace(stop, numbers={name: true_minus(words) for name, words in stop.numbers.items()})
