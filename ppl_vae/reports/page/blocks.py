"""The blocks of a page, as frozen dataclasses.

``Text``, captions and evidence know two marks, ``**bold**`` and ```code``` between backticks. All else is escaped. A
blank line starts a new paragraph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ppl_vae.reports.page.decoder import DecoderWeights

Cell: TypeAlias = str | float | int | None
NamedPicture: TypeAlias = tuple[str, bytes]


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, and ``alt``, what it shows, for those who do not see it."""

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class VerdictBlock:
    """A verdict with its evidence, the advice on what would change it, if any, and the figure that shows it."""

    word: str
    evidence: str
    advice: str = ""
    figure: Picture | None = None
    severity: Literal["healthy", "warning"] = "warning"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; columns of numbers are set to the right.

    Args:
        columns: Their headings.
        rows: As many cells as there are columns: text, numbers, or None for nothing.
        caption: Says what to see.
        highlight: The row that stands out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: int | None = None


@dataclass(frozen=True)
class SliderStop:
    """What a slider shows at one position.

    Args:
        label: the value there, such as "0.1".
        rows: named strips of images, the same names at every stop.
        numbers: named values in words, the same names at every stop.
    """

    label: str
    rows: Sequence[NamedPicture]
    numbers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slider:
    """Strips of images and numbers that change together as one quantity is moved.

    Args:
        label: what is moved, such as "beta".
        positions: at least one stop, in order.
        caption: says what to see.
        fixed: a strip that stays, such as the originals.
        start: the stop shown first.
    """

    label: str
    positions: Sequence[SliderStop]
    caption: str
    fixed: NamedPicture
    start: int = 0


@dataclass(frozen=True)
class Explorer:
    """The plane of two latents, and the decoder's mean at the pointer, computed by the page itself.

    Args:
        decoder: Its weights.
        caption: Says what to see.
        points: (N, 2) codes to show in the plane, such as posterior means.
        start: Where it begins, (z_i, z_j).
        extent: The plane shows -extent to extent in both.
        labels: (N,) whole numbers from 0 that color the points.
        label_names: Of the labels, for the legend; their numbers where empty.
        axes: (i, j), which latents are moved.
        base: (L,), where the others stay; 0 where None.
    """

    decoder: DecoderWeights
    caption: str
    points: npt.NDArray[np.floating]
    start: tuple[float, float] = (0.0, 0.0)
    extent: float = 3.0
    labels: npt.NDArray[np.integer] | None = None
    label_names: Sequence[str] = ()
    axes: tuple[int, int] = (0, 1)
    base: npt.NDArray[np.floating] | None = None


Block: TypeAlias = Text | VerdictBlock | Table | Picture | Slider | Explorer


@dataclass(frozen=True)
class Section:
    """A heading, the blocks below it, and the anchor that links to it, "#anchor"."""

    title: str
    blocks: Sequence[Block]
    anchor: str
