"""Figures of a certificate: bounds image by image, from both sides and by effort, gaps, calibration and doubts."""

from __future__ import annotations

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


class EffortCurve(NamedTuple):
    """A bound by the effort that was spent on it.

    Args:
        effort: (K,) ascending.
        lacking: (K,) the mean over images of the bound minus that of AIS with full effort, nats.
        stderr: (K,) of that paired difference.
    """

    effort: Sequence[int]
    lacking: Array
    stderr: Array


def agreement(
    first: Array, rows: Mapping[str, Array], *, name: str, flagged: Array, title: str, margin: float
) -> Figure:
    """One row per other bound: a scatter plot against the first bound, and a histogram of the difference.

    Args:
        first: (N,) nats, the bound on the horizontal axis.
        rows: other bounds (N,) on the same images, nats, by name.
        name: the first bound's.
        flagged: (N,) bool, the images to mark.
        title: over the figure; it may have several lines.
        margin: nats within which two bounds agree.
    """
    figure = Figure(figsize=(9.5, 3.9 * len(rows) + 0.3 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), 2, width_ratios=[1, 1.25], squeeze=False)
    for (left, right), (other, values) in zip(grid, rows.items(), strict=True):
        _scatter(left, first, values, flagged)
        left.set_xlabel(f"{name}, nats", fontsize=9)
        left.set_ylabel(fill(f"{other}, nats", 35), fontsize=9)
        _differences(right, first - values, margin)
        right.set_xlabel(fill(f"{name} minus {other}, nats an image", 55), fontsize=9)
    return figure


def _scatter(axes: Axes, first: Array, second: Array, flagged: Array) -> None:
    for chosen, color, words in ((~flagged, "tab:blue", None), (flagged, "tab:red", "unreliable")):
        if chosen.any():
            axes.scatter(first[chosen], second[chosen], s=9, alpha=0.7, linewidths=0, color=color, label=words)
    low, high = min(first.min(), second.min()), max(first.max(), second.max())
    space = 0.05 * (high - low) + 1e-6
    axes.axline((low, low), slope=1, color="black", linewidth=0.8)
    axes.set(xlim=(low - space, high + space), ylim=(low - space, high + space), aspect="equal")
    if flagged.any():
        axes.legend(fontsize=8, loc="upper left")


def _differences(axes: Axes, difference: Array, margin: float) -> None:
    axes.hist(difference, bins="auto" if len(difference) < 300 else 60, color="tab:blue", alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvspan(-margin, margin, color="0.5", alpha=0.12, linewidth=0, label=f"within {margin:g} nats")
    mean = float(difference.mean())
    axes.axvline(mean, color="tab:red", linewidth=1.2, label=f"mean {mean:+.3f}")
    axes.set_ylabel("images", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, frameon=False)


def sandwich(lower: Array, upper: Array, *, title: str) -> Figure:
    """Both bounds of each simulated image, and the sorted gaps between them.

    Args:
        lower, upper: (N,) nats.
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(9.5, 3.5 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    middle = (lower + upper) / 2
    order = np.argsort(middle)
    rank = np.arange(1, len(order) + 1)
    left.plot(rank, upper[order], "v", color="tab:red", markersize=4, label="upper bound")
    left.plot(rank, lower[order], "^", color="tab:blue", markersize=4, label="lower bound")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("images simulated from the model, by log p(x)", fontsize=9)
    left.set_ylabel("log p(x), nats", fontsize=9)
    left.legend(fontsize=8, loc="lower right")
    gap = np.sort(upper - lower)
    right.bar(rank, gap, color="tab:purple", alpha=0.7, width=0.8)
    right.axhline(0, color="black", linewidth=0.8)
    mean = float(gap.mean())
    right.axhline(mean, color="tab:red", linewidth=1.2, label=f"mean {mean:+.3f}")
    right.set_xlabel("the same images, by their gap", fontsize=9)
    right.set_ylabel("upper minus lower bound, nats\n(below 0: by the noise of both)", fontsize=9)
    right.legend(fontsize=8, loc="upper left")
    return figure


def convergence(curves: Mapping[str, EffortCurve], *, title: str) -> Figure:
    """Bounds by effort, minus that of AIS with full effort, on one scale of nats.

    Args:
        curves: by the name of the effort, such as "temperatures".
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(4.7 * len(curves), 3.4 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (words, curve) in zip(panels, curves.items(), strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.errorbar(curve.effort, curve.lacking, yerr=curve.stderr, marker=".", capsize=2, color="tab:blue")
        axes.set_xscale("log")
        axes.set_xticks(curve.effort, [f"{effort:,}" for effort in curve.effort], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(words, fontsize=9)
    panels[0].set_ylabel("bound minus that of the most temperatures, nats", fontsize=9)
    return figure


def gap_bars(rows: Mapping[str, Mapping[str, tuple[float, float]]], *, title: str) -> Figure:
    """log p(x) - ELBO of each split as stacked bars, one part per cause, with standard errors.

    Parts below 0, which are noise, are stacked to the left of 0.

    Args:
        rows: by split, the mean and the standard error of each part, nats; the same parts in each.
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(8.5, 1.7 + 0.75 * len(rows) + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.add_subplot()
    colors = ("tab:blue", "tab:orange", "tab:green")
    for row, parts in enumerate(rows.values()):
        reached = {False: 0.0, True: 0.0}  # to the right of 0, and to the left
        for (words, (mean, stderr)), color in zip(parts.items(), colors, strict=False):
            start = reached[mean < 0]
            label = words if row == 0 else None
            axes.barh(row, mean, left=start, height=0.55, color=color, alpha=0.8, label=label)
            axes.errorbar(start + mean, row, xerr=0 if np.isnan(stderr) else stderr, color="0.2", capsize=2)
            axes.text(start + mean / 2, row - 0.31, f"{mean:.2f} ± {stderr:.2f}", fontsize=8, ha="center", va="bottom")
            reached[mean < 0] += mean
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.65)
    if all(mean >= 0 for parts in rows.values() for mean, _ in parts.values()):
        axes.set_xlim(left=0)
    else:
        axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("nats an image", fontsize=9)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def pictured(images: Images, captions: Sequence[str], *, columns: int, title: str) -> Figure:
    """Rows of images with captions below them.

    Args:
        images: (N, C, H, W), values in [0, 1].
        captions: (N) below the images; they may have several lines.
        columns: images per row, at most.
        title: over the figure; it may have several lines.
    """
    across = min(columns, len(images))
    rows = -(-len(images) // across)
    lines = max(caption.count("\n") + 1 for caption in captions)
    tile = 0.95 / elongation(images.shape)
    height = rows * (tile + 0.16 * lines + 0.1) + 0.35 + 0.2 * title.count("\n")
    figure = Figure(figsize=(max(6.5, 0.95 * across), height), layout="constrained")
    figure.suptitle(fill(title, 110), fontsize=10)
    for row, axes in enumerate(figure.subplots(rows, 1, squeeze=False)[:, 0]):
        shown = images[row * across : (row + 1) * across]
        missing = np.full((across - len(shown), *images.shape[1:]), np.nan)
        show_tiles(axes, np.concatenate([shown, missing])[None])
        words = captions[row * across : (row + 1) * across]
        axes.set_xticks([i + 0.5 for i in range(len(words))], words, fontsize=6)
    return figure


class RankHistogram(NamedTuple):
    """A histogram of the ranks of one quantity, or of several together.

    Args:
        counts: (K,) in K bins.
        band: whether to draw two standard errors of uniform ranks, which must be independent.
    """

    counts: Array
    band: bool = True


def calibration_ranks(
    histograms: Mapping[str, RankHistogram],
    *,
    shares: Array,
    edges: Array,
    lower: Array,
    upper: Array,
    latents: Array,
    joint: Array,
    title: str,
) -> Figure:
    """Rank histograms, flat for an exact guide, and the distance of cumulative ranks from a straight line.

    Args:
        histograms: by name.
        shares: (K,) of uniform ranks in each bin.
        edges: (K - 1,) edges between the bins, as shares of all ranks.
        lower, upper: (K - 1,) a simultaneous band for the shares of uniform ranks below the edges.
        latents: (L, K - 1) the share of each latent's ranks below each edge.
        joint: (K - 1,) the same for log p(x, z).
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(2.4 * max(4, len(histograms)), 5.2 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    top, below = figure.subfigures(2, 1, height_ratios=[1, 1.25], squeeze=False)[:, 0]
    panels = top.subplots(1, len(histograms), squeeze=False)[0]
    for axes, (name, histogram) in zip(panels, histograms.items(), strict=True):
        _rank_histogram(axes, histogram, shares)
        axes.set_title(fill(name, 34), fontsize=8)
    panels[0].set_ylabel("density, 1 if right", fontsize=8)
    top.supxlabel("rank of the z that made an image, among draws of the guide", fontsize=8)
    axes = below.subplots()
    at = np.concatenate([[0], edges, [1]])
    axes.fill_between(
        at, _subtract_line(lower, edges), _subtract_line(upper, edges), color="0.85", label="95% of exact guides"
    )
    for row, latent in enumerate(latents):
        words = "latents" if row == 0 else None
        axes.plot(at, _subtract_line(latent, edges), color="tab:blue", alpha=0.5, linewidth=0.7, label=words)
    axes.plot(at, _subtract_line(joint, edges), color="tab:red", linewidth=1.8, label="log p(x, z)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("rank, as a share of the draws", fontsize=8)
    axes.set_ylabel("share of ranks below, minus what is right", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _rank_histogram(axes: Axes, histogram: RankHistogram, shares: Array) -> None:
    total = histogram.counts.sum()
    left = np.concatenate([[0], shares.cumsum()[:-1]])
    axes.bar(left, histogram.counts / (total * shares), width=shares, align="edge", color="tab:blue", alpha=0.7)
    if histogram.band:  # two standard errors of each bin's share
        error = 2 * np.sqrt((1 - shares) / (total * shares))
        axes.bar(left, 2 * error, bottom=1 - error, width=shares, align="edge", color="0.5", alpha=0.25)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)


def _subtract_line(below: Array, edges: Array) -> Array:
    """A cumulative share minus that of uniform ranks, from edge to edge."""
    return np.concatenate([[0], below - edges, [0]])


def against(own: Array, other: Array, *, name: str, names: tuple[str, str], median: float, title: str) -> Figure:
    """Histograms of log p(x) for the images of two data sets.

    The axis is linear near the own images and logarithmic far from them, since the other set's values may spread a
    hundred times as far. Bins are equally wide on the axis.

    Args:
        own, other: (m,) and (n,) nats.
        name: of the bound.
        names: the two data sets.
        median: of the own images, which is marked.
        title: over the figure; it may have several lines.
    """
    figure = Figure(figsize=(9, 3.7 + 0.2 * title.count("\n")), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.add_subplot()
    low, high = (float(value) for value in np.quantile(own, [0.05, 0.95]))
    unit = max(high - low, 1e-6)
    both = np.concatenate([own, other])
    ends = np.arcsinh((np.array([both.min(), both.max()]) - median) / unit)
    bins = median + unit * np.sinh(np.linspace(ends[0] - 0.05, ends[1] + 0.05, 61))
    ticks = [low, median, high]
    ticks += _far_ticks(ticks, unit, bins[0], bins[-1])
    for values, words, color in ((own, names[0], "tab:blue"), (other, names[1], "tab:orange")):
        weights = np.full(len(values), 100 / len(values))
        label = f"{words}: {len(values):,} images, mean {values.mean():,.1f}"
        axes.hist(values, bins=bins.tolist(), weights=weights, color=color, alpha=0.6, label=label)
    axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median of {names[0]}: {median:,.1f}")
    axes.set_xscale(
        "function", functions=(lambda x: np.arcsinh((x - median) / unit), lambda y: median + unit * np.sinh(y))
    )
    axes.set_xlim(bins[0], bins[-1])
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
    axes.set_xlabel(f"{name}, nats an image (of {names[0]} 5%, 50% and 95% are marked; far from them in logarithms)")
    axes.xaxis.label.set_fontsize(9)
    axes.set_ylabel("% of its images", fontsize=9)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def _far_ticks(own: Sequence[float], unit: float, low: float, high: float) -> list[float]:
    """Those of 1, 2, 5, 10, ... and their negatives that are on the axis and far enough from other ticks."""
    median, kept = own[1], list(own)
    space = 0.05 * (np.arcsinh((high - median) / unit) - np.arcsinh((low - median) / unit))
    for size in (m * 10.0**k for k in range(-3, 18) for m in (1, 2, 5)):
        for tick in (-size, size):
            apart = [abs(np.arcsinh((tick - median) / unit) - np.arcsinh((old - median) / unit)) for old in kept]
            if low < tick < high and min(apart) >= space:
                kept.append(tick)
    return kept[len(own) :]
