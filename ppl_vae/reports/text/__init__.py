"""The wording of the program's reports, and of their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.results import Provenance

BINARY_SCALE = "mass of binary pixels"  # as ``describe_scale`` words it


def make_sentence(words: str) -> str:
    """Words with a capital letter and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def format_number(value: float | None, digits: int) -> str:
    """A rounded number, or "unknown" for None and NaN."""
    return "unknown" if value is None or math.isnan(value) else f"{value + 0.0:.{digits}f}"


def plus_minus(estimate: Estimate | None, digits: int = 2) -> str:
    """A mean ± its standard error. The error of a single image is unknown."""
    if estimate is None:
        return "unknown"
    return f"{format_number(estimate.mean, digits)} ± {format_number(estimate.stderr, digits)}"


def describe_measure(provenance: Provenance) -> str:
    """Whether the numbers are masses or densities; nothing for binary pixels, whose binarization says it."""
    scale = provenance.scale
    if provenance.pixels == "dequantized" and scale.startswith("mass"):
        return f"{scale}, exact, under a density"
    if provenance.measure == "density":
        return f"a {scale}: never comparable with a mass"
    return "" if scale == BINARY_SCALE else scale


def describe_sample(images: str, provenance: Provenance, seed: int) -> str:
    """What a reader must know of a result before comparing it: its images, binarization and scale, and its errors."""
    words = [images, f"binarization {provenance.binarization}"]
    if provenance.protocol == "iwae":
        words.append(f"iwae protocol, drawn by seed {seed}")
    words += filter(None, [describe_measure(provenance)])
    return f"{', '.join(words)}; ± is the standard error over images"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *body])
