"""Two bounds of the same images against each other."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.reports.figures import make_figure
from ppl_vae.runs.command_results import Comparison

_MANY = 300  # images, from which points are fainter and a few differences far out are left out


def paired_bounds(found: Comparison, bounds: Mapping[str, Tensor], *, title: str) -> Figure:
    """A row for each pair of runs: the second's bounds over the first's, and the histogram of their differences.

    Args:
        found: The comparison.
        bounds: By run, the bound of each image, (N,) nats.
        title: Over all of it.
    """
    figure = make_figure(title, width=9.5, height=4.3 * len(found.comparisons))
    rows = figure.subfigures(len(found.comparisons), 1, squeeze=False)[:, 0]
    for row, pair in zip(rows, found.comparisons, strict=True):
        row.suptitle(fill(pair.verdict, 135), fontsize=9)
        names = {name: bounds[name] for name in (pair.baseline, pair.name)}
        draw_pair(row, names, interval=pair.interval, interval_name="interval of the mean")
    return figure


def draw_pair(
    figure: Figure | SubFigure,
    bounds: Mapping[str, Tensor],
    *,
    interval: tuple[float, float],
    interval_name: str,
    flagged: Tensor | None = None,
) -> None:
    """A scatter plot of two bounds, and the histogram of the second minus the first.

    Args:
        figure: Where both are drawn.
        bounds: Two bounds by their names, each (N,) nats.
        interval: Of differences, which is shaded.
        interval_name: What it is.
        flagged: (N,) bool, images to mark.
    """
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    (first_name, first), (second_name, second) = ((name, values.numpy()) for name, values in bounds.items())
    left.scatter(first, second, s=7, alpha=0.8 if len(first) < _MANY else 0.25, linewidths=0)
    if flagged is not None and flagged.any():
        left.scatter(first[flagged], second[flagged], s=9, linewidths=0, color="tab:red", label="unreliable")
        left.legend(fontsize=8)
    left.axline((first[0], first[0]), slope=1, color="black", linewidth=0.8)
    low = min(*left.get_xlim(), *left.get_ylim())
    high = max(*left.get_xlim(), *left.get_ylim())
    left.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    left.set(xlabel=fill(f"{first_name}, nats", 45), ylabel=fill(f"{second_name}, nats", 40))
    _draw_differences(right, second - first, interval, interval_name)
    right.set_xlabel(fill(f"{second_name} minus {first_name}, nats an image", 55))


def _draw_differences(axes: Axes, difference: np.ndarray, interval: tuple[float, float], interval_name: str) -> None:
    """The middle 99% of many differences: a few images far out would squeeze the others into one bar."""
    few = len(difference) < _MANY
    low, high = np.quantile(difference, [0, 1] if few else [0.005, 0.995])
    shown = difference[(difference >= low) & (difference <= high)]
    axes.hist(shown, bins="auto" if few else 60, alpha=0.6)
    if len(shown) < len(difference):
        axes.set_title(f"{len(difference) - len(shown):,} of {len(difference):,} lie beyond", fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvspan(*interval, color="0.5", alpha=0.25, linewidth=0, label=interval_name)
    axes.axvline(difference.mean(), color="tab:red", label=f"mean {difference.mean():+.3g}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel("images")
    axes.legend(fontsize=8)
