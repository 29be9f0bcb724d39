"""Two models on the same images: image by image, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray


class PairShown(NamedTuple):
    """The bounds of two models, and their difference.

    Args:
        names: of the first model and of the second.
        first, second: (N,) nats, the bound of each image.
        difference: (N,) nats, second minus first.
        mean, lower, upper: of the difference, with its interval, nats an image.
        words: the verdict, a line or two.
    """

    names: tuple[str, str]
    first: NDArray[Any]
    second: NDArray[Any]
    difference: NDArray[Any]
    mean: float
    lower: float
    upper: float
    words: str


def paired_bounds(pairs: Sequence[PairShown], *, bound: str, title: str) -> Figure:
    """A row for each pair: the second's bounds over the first's, and the histogram of their differences.

    Args:
        pairs: at least one.
        bound: what the numbers are, such as "L_200".
        title: over all of it.
    """
    figure = Figure(figsize=(9.5, 4.3 * len(pairs) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    rows = figure.subfigures(len(pairs), 1, squeeze=False)[:, 0]
    for row, pair in zip(rows, pairs, strict=True):
        row.suptitle(fill(pair.words, 135), fontsize=9)
        left, right = row.subplots(1, 2, width_ratios=[1, 1.25])
        _draw_scatter(left, pair, bound)
        _draw_differences(right, pair)
    return figure


def _draw_scatter(axes: Any, pair: PairShown, bound: str) -> None:
    faint = 0.8 if len(pair.first) < 300 else 0.25
    axes.scatter(pair.first, pair.second, s=6, alpha=faint, linewidths=0, color="tab:blue")
    axes.axline((pair.first[0], pair.first[0]), slope=1, color="black", linewidth=0.8)
    low = min(*axes.get_xlim(), *axes.get_ylim())
    high = max(*axes.get_xlim(), *axes.get_ylim())
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    x_label, y_label = (fill(f"{bound} of an image under {name}, nats", 45) for name in pair.names)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.annotate(
        "above the line: the vertical axis has the better run",
        (0.03, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=8,
    )


def _draw_differences(axes: Any, pair: PairShown) -> None:
    """The middle 99% of many differences: a few images far out would squeeze the others into one bar."""
    few = len(pair.difference) < 300
    low, high = np.quantile(pair.difference, [0, 1] if few else [0.005, 0.995])
    shown = pair.difference[(pair.difference >= low) & (pair.difference <= high)]
    axes.hist(shown, bins="auto" if few else 60, color="tab:blue", alpha=0.6)
    if len(shown) < len(pair.difference):
        axes.set_title(f"{len(pair.difference) - len(shown):,} of {len(pair.difference):,} lie beyond", fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8, label="no difference")
    axes.axvspan(pair.lower, pair.upper, color="tab:red", alpha=0.3, linewidth=0, label="interval of the mean")
    axes.axvline(pair.mean, color="tab:red", linewidth=1.2, label=f"mean {pair.mean:+.3g}")
    axes.set(xlabel=fill(f"{pair.names[1]} minus {pair.names[0]}, nats an image", 55), ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(fontsize=8)
