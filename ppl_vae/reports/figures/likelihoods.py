"""log p(x) over images, over particles and of two models; and the calibration of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ppl_vae.reports.figures.images import Images, elongation, show_tiles

Array = NDArray[Any]


def likelihood_histogram(
    values: Array,
    *,
    mean: float,
    stderr: float,
    name: str,
    title: str,
    examples: Mapping[str, tuple[Images, Sequence[str]]] | None = None,
) -> Figure:
    """How log p(x) is spread over images, with the mean marked, and rows of examples below.

    Args:
        values: (n,) nats.
        mean, stderr: of the values; stderr may be NaN.
        name: of the bound.
        title: over the figure; it may have several lines.
        examples: a label, images (N, C, H, W) with values in [0, 1], and what stands below each of them.
    """
    examples = examples or {}
    shapes = [elongation(images.shape) for images, _ in examples.values()]
    counts = [len(images) for images, _ in examples.values()]
    heights = [min(1.6, 7.6 / count / shape) + 0.45 for count, shape in zip(counts, shapes, strict=True)]
    figure = Figure(figsize=(9, 3.2 + sum(heights) + 0.2 * title.count("\n")), layout="constrained")
    top, *below = figure.subplots(1 + len(examples), 1, height_ratios=[3.0, *heights], squeeze=False)[:, 0]
    top.hist(values, bins=number_of_bins(len(values)), color="tab:blue", alpha=0.8)
    error = "" if math.isnan(stderr) else f" ± {stderr:.2f}"
    top.axvline(mean, color="black", linewidth=1, label=f"mean {mean:.2f}{error}")
    top.set(xlabel=f"{name}, nats an image", ylabel="images")
    top.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    top.legend(fontsize=8)
    for axes, (label, (images, captions)) in zip(below, examples.items(), strict=True):
        show_tiles(axes, images[None])
        axes.set_xticks([i + 0.5 for i in range(len(captions))], captions, fontsize=7)
        axes.set_yticks([0.5], [label], fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def number_of_bins(count: int) -> int:
    """The number of bins of a histogram: 2 sqrt(n), from 5 to 60. Source: ours."""
    return min(60, max(5, round(2 * math.sqrt(count))))


def bound_by_particles(
    sizes: Sequence[int],
    *,
    bound: tuple[Array, Array],
    gain: tuple[Array, Array],
    title: str,
) -> Figure:
    """The bound L_s over the number of particles s, and what it gains over s = 1, the ELBO.

    Args:
        sizes: (K,) the numbers s, the first of them 1.
        bound: the mean over images of L_s and its standard error, each (K,) nats.
        gain: the same of L_s - L_1: paired, so without what images differ in from each other.
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(9, 3.4 + 0.2 * title.count("\n")), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, (mean, stderr) in ((left, bound), (right, gain)):
        axes.errorbar(sizes, mean, yerr=stderr, marker=".", capsize=2, color="tab:blue")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("s, importance samples an image")
    left.axhline(bound[0][0], color="tab:gray", linestyle="--", linewidth=1, label=f"ELBO, s = 1: {bound[0][0]:.2f}")
    # Above the axes: the curve rises from the lower left to the upper right, and bars are long, so no corner is free.
    left.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, borderpad=0, frameon=False)
    left.set_ylabel("L_s, nats an image")
    right.set_ylabel("L_s - ELBO on the same images, nats")
    figure.suptitle(title, fontsize=10)
    return figure


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


def _draw_scatter(axes: Axes, pair: PairShown, bound: str) -> None:
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


def _draw_differences(axes: Axes, pair: PairShown) -> None:
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
