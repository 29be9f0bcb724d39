"""The blocks of a page: small frozen dataclasses that check their values.

``Text``, captions and evidence know three marks: ``**bold**``, ```code``` between backticks, and links
``[words](#anchor)`` into the page. All else is escaped. A blank line starts a new paragraph.
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

_PNG = b"\x89PNG\r\n\x1a\n"


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG, pixels.

    Raises:
        ValueError: the bytes are no PNG.
    """
    if png[:8] != _PNG or len(png) < 24:
        raise ValueError(f"png: expected the bytes of a PNG file, got {bytes(png[:8])!r}...")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Args:
        png: one of more than 480 pixels lies on a light card in the dark.
        caption: says what to see.
        alt: what the figure shows, for those who do not see it.
    """

    png: bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class VerdictBlock:
    """A verdict with its evidence, and the advice on what would change it.

    Args:
        word: such as "over-regularized".
        evidence: the numbers.
        advice: empty if there is nothing to change.
        figure: what shows it.
        severity: "healthy" or "warning".
    """

    word: str
    evidence: str
    advice: str = ""
    figure: Picture | None = None
    severity: Literal["healthy", "warning"] = "warning"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; columns of numbers are set to the right.

    Args:
        columns: their headings.
        rows: of cells, as many as there are columns: text, numbers, or None for nothing.
        caption: says what to see.
        highlight: the row or rows that stand out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows: expected {len(self.columns)} cells in each, got {len(row)}: {row}")


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
    fixed: NamedPicture | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < len(self.positions):
            raise ValueError(f"start: expected one of {len(self.positions)} stops, got {self.start}")
        names = {(tuple(name for name, _ in stop.rows), tuple(stop.numbers)) for stop in self.positions}
        if len(names) > 1:
            raise ValueError(f"positions: expected the same rows and numbers at every stop, got {sorted(names)}")


@dataclass(frozen=True)
class Explorer:
    """The plane of two latents, and the decoder's mean at the pointer, computed by the page itself.

    Args:
        decoder: its weights.
        caption: says what to see.
        start: where it begins, (z_i, z_j).
        extent: the plane shows -extent to extent in both.
        points: (N, 2) codes to show in the plane, such as posterior means.
        labels: (N,) whole numbers from 0 that color the points.
        label_names: of the labels, for the legend; their numbers where empty.
        axes: (i, j), which latents are moved.
        base: (L,), where the others stay; 0 where None.
    """

    decoder: DecoderWeights
    caption: str
    start: tuple[float, float] = (0.0, 0.0)
    extent: float = 3.0
    points: npt.NDArray[np.floating] | None = None
    labels: npt.NDArray[np.integer] | None = None
    label_names: Sequence[str] = ()
    axes: tuple[int, int] = (0, 1)
    base: npt.NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        dim = self.decoder.latent_dim
        if len(set(self.axes)) != 2 or not all(0 <= axis < dim for axis in self.axes):
            raise ValueError(f"axes: expected two different latents of {dim}, got {self.axes}")
        if self.base is not None and np.shape(self.base) != (dim,):
            raise ValueError(f"base: expected shape ({dim},), got {np.shape(self.base)}")
        if not self.extent > 0:
            raise ValueError(f"extent: expected a number above 0, got {self.extent}")
        if self.points is not None and (np.ndim(self.points) != 2 or np.shape(self.points)[1] != 2):
            raise ValueError(f"points: expected shape (N, 2), got {np.shape(self.points)}")
        if self.labels is not None and (self.points is None or np.shape(self.labels) != (len(self.points),)):
            raise ValueError(f"labels: expected one for each point, got shape {np.shape(self.labels)}")
        if self.labels is not None and not all(0 <= label < self._num_labels for label in np.unique(self.labels)):
            raise ValueError(f"labels: expected whole numbers from 0 to {self._num_labels - 1}, got others")

    @property
    def _num_labels(self) -> int:
        """The number of possible labels: as many as have names, or 256."""
        return len(self.label_names) or 256


Block: TypeAlias = Text | VerdictBlock | Table | Picture | Slider | Explorer


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Args:
        title: the heading.
        blocks: in order.
        anchor: what links to it are called, "#anchor"; made from the title where None.
    """

    title: str
    blocks: Sequence[Block]
    anchor: str | None = None
