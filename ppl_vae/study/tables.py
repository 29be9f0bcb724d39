"""Numbers of the study as cells of tables, and strips of pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.page import Block, Picture, Table, true_minus
from ppl_vae.study.results import Difference

Value = Estimate | Difference | str | float | int | None

_NAMES = {
    "mnist": "MNIST",
    "static-mnist": "static MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "caltech-silhouettes": "Caltech silhouettes",
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
}
_TWO_DIGITS = 3.55  # an error whose digits are below it has two of them. Source: the Particle Data Group's rule


def name_data(dataset: str) -> str:
    """A data set's name as its authors write it, or "your data (NAME)"."""
    return _NAMES.get(dataset, f"your data ({dataset})")


def format_number(value: float | None, digits: int = 3) -> str | None:
    """A number with so many significant digits, without an exponent for numbers of ordinary size."""
    if value is None:
        return None
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > digits + 4:
        return f"{value:.{digits}g}"
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_mean(value: Estimate | Difference | None, *, scale: float = 1.0, signed: bool = False) -> str | None:
    """mean ± stderr, with one or two digits of the error; None where nothing is known.

    >>> format_mean(Estimate(-85.118, 0.217))
    '-85.12 ± 0.22'
    """
    if value is None:
        return None
    mean, stderr = scale * value.mean, abs(scale) * (value.stderr or 0.0)
    sign = "+" if signed and mean > 0 else ""
    if not stderr or not math.isfinite(stderr):
        return sign + str(format_number(mean))
    power = math.floor(math.log10(stderr))
    decimals = (1 if stderr / 10**power < _TWO_DIGITS else 0) - power
    if decimals > 6:
        return f"{sign}{format_number(mean)} ± {stderr:.1g}"
    decimals = max(0, decimals)
    return f"{sign}{round(mean, decimals) + 0.0:,.{decimals}f} ± {stderr:,.{decimals}f}"


def format_share(value: Estimate | None) -> str | None:
    """A share with its error, as a percentage."""
    text = format_mean(value, scale=100.0)
    return None if text is None else f"{text}%"


def format_cell(value: Value) -> str | int | None:
    """A cell of a table: estimates with their errors, differences with their signs, floats with three digits."""
    if isinstance(value, Difference):
        return true_minus(f"{format_mean(value, signed=True)}" + (f" ({value.remark})" if value.remark else ""))
    text = format_mean(value) if isinstance(value, Estimate) else value
    text = format_number(text) if isinstance(text, float) else text
    return true_minus(text) if isinstance(text, str) else text


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[Value]], caption: str, highlight: Sequence[int] | None = None
) -> list[Block]:
    """A table without columns that are empty in every row; nothing if there is no row."""
    if not rows:
        return []
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    cells = [[format_cell(row[k]) for k in kept] for row in rows]
    return [Table([columns[k] for k in kept], cells, caption, highlight=highlight)]


def stack_strips(named: Sequence[tuple[str, bytes | None]], caption: str, what: str) -> list[Block]:
    """Strips of pictures below each other, named from the top in the caption; nothing for fewer than two."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    images = [Image.open(io.BytesIO(strip)) for _, strip in known]
    width, gap = max(image.width for image in images), 2
    mode = "RGB" if any(image.mode == "RGB" for image in images) else "L"
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas, top = Image.new(mode, (width, height), 128 if mode == "L" else (128, 128, 128)), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap
    out = io.BytesIO()
    canvas.save(out, format="png", optimize=True)
    names = "; ".join(name for name, _ in known)
    return [Picture(out.getvalue(), f"From the top: {names}. {caption}", f"{what}: {names}", dark_png=out.getvalue())]
