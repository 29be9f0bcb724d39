"""log p(x) over images and over particles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
