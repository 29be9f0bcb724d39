"""Tables of what is known: cells from values with errors, and no column of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppl_vae.reports.page import Block, Table
from ppl_vae.study.words import number, percent_plus_minus, plus_minus, signed


def known_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, highlight: Any = None
) -> list[Block]:
    """A table without the columns of which nothing is known; no table of nothing."""
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    if not rows:
        return []
    shown = [[row[k] for k in kept] for row in rows]
    return [Table([columns[k] for k in kept], shown, caption, highlight=highlight)]


def mean_cell(value: Any) -> str | None:
    """A mean with its error."""
    return None if not value or value.get("mean") is None else plus_minus(value)


def paired_cell(value: Any) -> str | None:
    """A difference with its sign and its error."""
    return None if not value or value.get("mean") is None else signed(value)


def share_cell(value: Any) -> str | None:
    """A share with its error, as percent."""
    return None if not value or value.get("mean") is None else percent_plus_minus(value)


def number_cell(value: float | None) -> str | None:
    """A number without an error."""
    return None if value is None else number(value)


def percent_cell(value: float | None) -> str | None:
    """A share without an error, as percent."""
    return None if value is None else f"{100 * value:.3g}%"
