"""Pixel values as gray and color, images in rows and grids, and the picture of missing pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae import data
from ppl_vae.evidence.missing import Imputation
from ppl_vae.reports.text.pages import TITLES
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.open import Run

Images = NDArray[np.floating]

# Pixels of a tile's shorter side, at least: below it the lines between tiles would be as wide as the images.
_SMALLEST_TILE = 56

# Images more elongated than this are stretched to it: a row of 1 x 100 pixels would be a line.
_MOST_ELONGATED = 5.0

_LINE = 0.75  # the gray of the line around an image
_INCHES_A_TITLE_LETTER = 0.08
_LARGEST = 15.0  # inches
MOST_CLASSES = 20  # rows of a figure with one for each class

_DISPLAY_IMAGES = 500
_DISPLAY_SHARES = (0.005, 0.995)
_IMPUTATIONS_SHOWN, _DRAWS_SHOWN = 10, 3  # images and draws in the picture of missing pixels
_MISSING_COLOR = (0.36, 0.55, 0.80)


class Display(NamedTuple):
    """(x - low) / (high - low), cut to [0, 1].

    Args:
        low, high: the pixel values that are drawn black and white.
        words: what a title says of it, with a line break before it; nothing where pixels are drawn as they are.
    """

    low: float = 0.0
    high: float = 1.0
    words: str = ""

    def __call__(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels of any shape -> the same shape, values in [0, 1], float32."""
        return ((x.float() - self.low) / (self.high - self.low)).clamp(0, 1).cpu().numpy()

    def levels(self, x: Tensor) -> NDArray[np.uint8]:
        """The same in 8 bits, 0 to 255, in the shape of x."""
        return np.rint(255 * self(x)).astype(np.uint8)


def choose_display(run: Run, pixels: Tensor | None = None) -> Display:
    """Pixels in [0, 1] as they are, levels by 0 and 255, all others by the range of the training images.

    Densities are over real numbers, and so are their means: for them, and for pixels beyond [0, 1], black and white
    are where 0.5% of the training pixels lie below and above (of 500 images).

    Args:
        run: the run.
        pixels: (N, *E) in the place of the training images, where there are none.
    """
    if run.binarization != "none":
        return Display()
    if run.evaluated_pixels == "levels":
        return Display(0, 255)
    if pixels is None:
        stored, transform = data.training_images(run.splits, run.pixels)
        generator = torch.Generator().manual_seed(0)
        pixels = transform(stored[data.subset(len(stored), _DISPLAY_IMAGES)], generator)
    density = build_likelihood(run.options, run.splits.event_shape).measure == "density"
    if not density and pixels.min() >= 0 and pixels.max() <= 1:
        return Display()
    low, high = np.quantile(pixels.numpy(), _DISPLAY_SHARES).tolist()
    high = high if high > low else low + 1
    return Display(low, high, TITLES["display"].format(low=low, high=high))


def show_rows(
    display: Display, rows: Mapping[str, Tensor], title: str, *, columns: Sequence[str] = (), **words: object
) -> Figure:
    """Rows of images (N, *E) as the model sees them, with the title of that name, filled in with the words."""
    shown = {label: display(images) for label, images in rows.items()}
    return image_rows(shown, title=TITLES[title].format(**words) + display.words, columns=columns)


def samples_figure(display: Display, means: Tensor, images: Tensor, *, autoencoder: bool = False) -> Figure:
    """Means E[x | z] beside draws x ~ p(x | z), for z ~ p(z). means, images: (N, *E)."""
    grids = {"means E[x | z]": display(means), "images x ~ p(x | z)": display(images)}
    title = TITLES["prior-samples-autoencoder" if autoencoder else "prior-samples"] + display.words
    return image_grids(grids, columns=math.ceil(math.sqrt(len(means))), title=title)


def name_classes(run: Run) -> list[str]:
    """The names of the classes of a model of labelled images, or their numbers."""
    return list(run.splits.class_names) or [str(k) for k in range(run.options.classes or 0)]


def samples_by_class(display: Display, means: Mapping[str, Tensor]) -> Figure:
    """A row of means E[x | z, y] (n, *E) for each of the first classes, by its name."""
    return show_rows(display, {name: means[name] for name in list(means)[:MOST_CLASSES]}, "samples-by-class")


def image_rows(rows: Mapping[str, Images], *, title: str, columns: Sequence[str] = ()) -> Figure:
    """One labelled row of images for each entry, aligned by column.

    Args:
        rows: a label and images (N, C, H, W) with 1 or 3 channels, values in [0, 1]; the same N in each row.
        title: over the figure; it may have several lines.
        columns: words of one or several lines over each of the N columns, or none.
    """
    channels = max(images.shape[1] for images in rows.values())
    table = np.stack([np.repeat(images, channels // images.shape[1], axis=1) for images in rows.values()])
    width, height = _inches(table, tile=0.75)
    label_width = 0.08 * max(len(line) for label in rows for line in label.splitlines())
    lines = max((words.count("\n") + 1 for words in columns), default=0)
    figure = _figure(width + label_width, height + 0.2 * lines, title)
    axes = figure.add_subplot()
    show_tiles(axes, table)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(rows), fontsize=8)
    if columns:
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, fontsize=8 if lines == 1 else 7)
    return figure


def image_grids(grids: Mapping[str, Images], *, columns: int, title: str) -> Figure:
    """Grids of images side by side, a heading over each. Values and shapes as ``image_rows``."""
    tables = {label: _arrange_in_columns(images, columns) for label, images in grids.items()}
    sizes = [_inches(table, tile=0.52) for table in tables.values()]
    figure = _figure(sum(width for width, _ in sizes) + 0.2, max(height for _, height in sizes) + 0.25, title)
    for axes, (label, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        show_tiles(axes, table)
        axes.set_title(label, fontsize=9)
    return figure


def show_tiles(axes: Axes, table: Images) -> None:
    """Draws images (rows, columns, C, H, W) into axes, the image of row i and column j around (j + 0.5, i + 0.5).

    A NaN is drawn white: where a table has no image.
    """
    rows, columns = table.shape[:2]
    axes.imshow(
        _sheet(table), cmap="gray", vmin=0, vmax=1, extent=(0, columns, rows, 0), aspect=1 / elongation(table.shape)
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def elongation(shape: Sequence[int]) -> float:
    """Width over height of an image (..., H, W) as it is drawn: its own, but within 1/5 to 5."""
    return float(np.clip(shape[-1] / shape[-2], 1 / _MOST_ELONGATED, _MOST_ELONGATED))


def _sheet(table: Images) -> Images:
    """(rows, columns, C, H, W) -> one picture (height, width) or (height, width, 3), thin margins between images.

    A margin is white, for black images and gray ones; a light line around each image bounds those that are white.
    """
    rows, columns, channels, height, width = table.shape
    # Each pixel becomes several, so that a tile has the shape in which it is drawn and lines are of one width.
    drawn = elongation(table.shape)
    across = math.ceil(_SMALLEST_TILE * max(1.0, drawn) / width)
    down = max(1, round(width * across / drawn / height))
    tiles = table.astype(float).repeat(down, axis=3).repeat(across, axis=4)
    line = max(1, round(min(tiles.shape[3:]) / _SMALLEST_TILE))
    margin = 2 * line
    framed = np.ones((rows, columns, channels, tiles.shape[3] + 2 * margin, tiles.shape[4] + 2 * margin))
    framed[..., line:-line, line:-line] = np.where(np.isnan(table[:, :, :1, :1, :1]), 1.0, _LINE)
    framed[..., margin:-margin, margin:-margin] = np.nan_to_num(tiles, nan=1.0)
    sheet = framed.transpose(0, 3, 1, 4, 2).reshape(rows * framed.shape[3], columns * framed.shape[4], channels)
    return sheet.squeeze(-1) if channels == 1 else sheet


def _arrange_in_columns(images: Images, columns: int) -> Images:
    """(N, C, H, W) -> (rows, columns, C, H, W), row by row, NaN where there are no more images."""
    columns = min(columns, len(images))
    missing = np.full((-len(images) % columns, *images.shape[1:]), np.nan)
    return np.concatenate([images, missing]).reshape(-1, columns, *images.shape[1:])


def _inches(table: Images, *, tile: float) -> tuple[float, float]:
    """Width and height of a table of images, each of them of tile^2 square inches, unless all would be too large."""
    shape = math.sqrt(elongation(table.shape))
    width, height = table.shape[1] * tile * shape, table.shape[0] * tile / shape
    shrink = min(1.0, _LARGEST / width, _LARGEST / height)
    return shrink * width, shrink * height


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with space for images of that size and the title."""
    lines = title.splitlines()
    size = (
        max(3.0, width + 0.2, _INCHES_A_TITLE_LETTER * max(map(len, lines))),
        max(1.0, height + 0.2) + 0.2 * len(lines),
    )
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_imputations(display: Display, x: Tensor, truth: Tensor, result: Imputation) -> Figure:
    """Draws the first images with missing pixels: observed pixels, mean, three draws and, if known, the truth.

    Args:
        display: from pixels to gray and color.
        x: (n, C, H, W), NaN where missing: drawn blue.
        truth: (n, C, H, W), NaN where nobody knows.
        result: of ``impute`` for x.
    """
    incomplete = x.isnan().flatten(1).any(1)
    first = (incomplete if incomplete.any() else ~incomplete).nonzero()[:_IMPUTATIONS_SHOWN, 0]
    rows = {"observed": _color_missing(display, x[first]), "mean of\nthe missing": display(result.mean[first])}
    for m in range(min(_DRAWS_SHOWN, len(result.draws))):
        rows[f"draw {m + 1}"] = display(result.draws[m, first])
    if (x.isnan() & ~truth.isnan()).any():
        rows["truth"] = _color_missing(display, truth[first])
    ess = [f"ESS {value:.0f}" for value in result.ess[first].tolist()]
    return image_rows(rows, title=TITLES["imputations"] + display.words, columns=ess)


def _color_missing(display: Display, x: Tensor) -> np.ndarray:
    """Images (n, C, H, W) as colors (n, 3, H, W) in [0, 1], with missing pixels in blue."""
    holes = x.isnan().any(1, keepdim=True).numpy()
    shown = np.broadcast_to(display(x.nan_to_num(0.0)), (len(x), 3, *x.shape[2:]))
    return np.where(holes, np.reshape(_MISSING_COLOR, (1, 3, 1, 1)), shown)
