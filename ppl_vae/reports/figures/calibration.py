"""Histograms of pixel calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[Any]

_COLUMNS = 4


class PixelHistogram(NamedTuple):
    """The histogram of one model.

    Args:
        shares: (K,) of pixels in K equal bins of (0, 1).
        stderr: (K,) of each.
        words: the verdict.
    """

    shares: Array
    stderr: Array
    words: str


def pixel_calibration(histograms: Mapping[str, PixelHistogram], *, title: str) -> Figure:
    """A histogram of the probability integral transform for each model, beside the uniform one of a right model.

    Args:
        histograms: by the model's name.
        title: over the figure; it may have several lines.
    """
    columns = min(_COLUMNS, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(max(7.0, 3.1 * columns), 2.5 * rows + 0.4 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    for axes, (name, (shares, stderr, words)) in zip(grid.flat, histograms.items(), strict=False):
        bins = len(shares)
        middles = [(k + 0.5) / bins for k in range(bins)]
        # As densities: 1 is right, in whatever number of bins.
        axes.bar(middles, bins * shares, width=1 / bins, yerr=bins * stderr, color="tab:blue", alpha=0.7, ecolor="0.3")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_title(f"{name}\n{fill(words, 42)}", fontsize=8)
        axes.set_xlim(0, 1)
        axes.tick_params(labelsize=7)
    figure.supylabel("density, 1 if right", fontsize=8)
    figure.supxlabel("where the pixel lies in p(x | z), as the share of draws below it", fontsize=8)
    return figure
