"""Numbers of the study as cells of tables, and strips of pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.page import Block, Picture, Table, true_minus
from ppl_vae.study.results import Difference

Value = Estimate | Difference | str | float | int | None

_TWO_DIGITS = 3.55  # an error whose digits are below it has two of them. Source: the Particle Data Group's rule


def format_mean(value: Estimate | Difference | None, *, scale: float = 1.0, signed: bool = False) -> str | None:
    """mean ± stderr, with one or two digits of the error; None where nothing is known.

    >>> format_mean(Estimate(-85.118, 0.217))
    '-85.12 ± 0.22'
    """
    if value is None:
        return None
    mean, stderr = scale * value.mean, abs(scale) * value.stderr
    sign = "+" if signed and mean > 0 else ""
    if not stderr or not math.isfinite(stderr):
        return f"{sign}{mean:.4g}"
    power = math.floor(math.log10(stderr))
    decimals = (1 if stderr / 10**power < _TWO_DIGITS else 0) - power
    if decimals > 6:
        return f"{sign}{mean:.3g} ± {stderr:.1g}"
    decimals = max(0, decimals)
    return f"{sign}{round(mean, decimals) + 0.0:,.{decimals}f} ± {stderr:,.{decimals}f}"


def format_share(value: Estimate | None) -> str | None:
    """A share with its error, as a percentage."""
    text = format_mean(value, scale=100.0)
    return None if text is None else f"{text}%"


def format_cell(value: Value) -> str | float | int | None:
    """A cell of a table: estimates with their errors, and differences with their signs."""
    if isinstance(value, Difference):
        return true_minus(f"{format_mean(value, signed=True)}" + (f" ({value.remark})" if value.remark else ""))
    value = format_mean(value) if isinstance(value, Estimate) else value
    return true_minus(value) if isinstance(value, str) else value


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Value]], caption: str) -> list[Block]:
    """A table without columns that are empty in every row; nothing if there is no row."""
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    cells = [[format_cell(row[k]) for k in kept] for row in rows]
    return [Table([columns[k] for k in kept], cells, caption)] if rows else []


def stack_strips(named: Sequence[tuple[str, bytes | None]], caption: str) -> list[Block]:
    """Strips of one width below each other, named from the top in the caption; nothing for fewer than two."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    images = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")) for _, strip in known]
    gap = np.full((2, *images[0].shape[1:]), 128, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.concatenate([part for image in images for part in (image, gap)][:-1])).save(out, format="png")
    words = f"From the top: {'; '.join(name for name, _ in known)}. {caption}"
    return [Picture(out.getvalue(), words, words)]
