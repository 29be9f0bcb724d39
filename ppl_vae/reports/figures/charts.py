"""Charts of training, of log p(x) over images and particles, of two bounds, and of the calibration of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.diagnostics.likelihood import PixelCalibration
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.figures.images import Images, elongation, show_tiles
from ppl_vae.runs.command_results import Comparison


def make_figure(title: str, *, width: float = 9.0, height: float = 3.4) -> Figure:
    """An empty figure of that size in inches, and more for the lines of its title."""
    figure = Figure(figsize=(width, height + 0.25 * (1 + title.count("\n"))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


Records = Sequence[Mapping[str, float]]


def training_curves(metrics: Records, *, title: str, autoencoder: bool = False) -> Figure:
    """Over epochs: the training objective with the validation bound, and the ELBO's two terms.

    The objective is minus the training loss, at the beta of the step. Without validation images it stands alone. An
    autoencoder has one panel, of reconstructions.

    Args:
        metrics: The records of metrics.jsonl, at least one.
        title: Over the figure.
        autoencoder: Whether they are an autoencoder's.
    """
    several = {record.get("validation_particles", 1) for record in metrics} - {1}
    key, bound = ("bound", f"L_{max(several)}") if several else ("elbo", "ELBO")
    if autoencoder:
        key, bound = "reconstruction", "log p(x | z(x))"
    validated = any(f"validation_{key}_nats_per_image" in record for record in metrics)
    has_terms = validated and not autoencoder
    curves = {"training objective": [-record["train_loss_nats_per_image"] for record in metrics]}
    if validated:
        curves[f"validation {bound}"] = _read(metrics, key)
    figure = make_figure(title, width=9.0 if has_terms else 5.0)
    panels = figure.subplots(1, 1 + has_terms, squeeze=False)[0]
    epochs, marker = [record["epoch"] for record in metrics], "." if len(metrics) < 5 else ""
    for (label, curve), color in zip(curves.items(), ("tab:gray", "tab:blue"), strict=False):
        panels[0].plot(epochs, curve, label=label, color=color, marker=marker)
    if validated:
        best, epoch = max(zip(_read(metrics, key), epochs, strict=True), key=lambda pair: pair[0])
        panels[0].plot(epoch, best, "o", color="tab:blue", label="best")
    if len(metrics) > 5:  # the first epochs would squeeze everything that matters into a line
        shown = [value for curve in curves.values() for value in curve[len(metrics) // 5 :]]
        panels[0].set_ylim(bottom=min(shown) - 0.3 * (max(shown) - min(shown)))
    panels[0].set_ylabel("nats an image")
    if has_terms:
        distortion = [-value for value in _read(metrics, "reconstruction")]
        panels[1].plot(epochs, distortion, label="-E_q[log p(x | z)]", marker=marker)
        panels[1].plot(epochs, _read(metrics, "kl"), label="KL(q(z | x) || p(z))", marker=marker)
        panels[1].set_ylabel("nats an image (validation)")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    return figure


def _read(metrics: Records, name: str) -> list[float]:
    return [record[f"validation_{name}_nats_per_image"] for record in metrics]


_COLUMNS = 4


def likelihood_histogram(
    values: Tensor, *, name: str, title: str, examples: Mapping[str, tuple[Images, Sequence[str]]]
) -> Figure:
    """How log p(x) is spread over images, with the mean marked, and rows of examples below.

    Args:
        values: (n,) nats.
        name: Of the bound.
        title: Over the figure; it may have several lines.
        examples: A label, images (N, C, H, W) with values in [0, 1], and what stands below each of them.
    """
    heights = [min(1.6, 7.6 / len(images) / elongation(images.shape)) + 0.45 for images, _ in examples.values()]
    figure = make_figure(title, height=3.0 + sum(heights))
    top, *below = figure.subplots(1 + len(examples), 1, height_ratios=[3.0, *heights], squeeze=False)[:, 0]
    top.hist(values.numpy(), bins=number_of_bins(len(values)), alpha=0.8)
    mean = Estimate.mean_of(values)
    error = "" if math.isnan(mean.stderr) else f" ± {mean.stderr:.2f}"
    top.axvline(mean.mean, color="black", linewidth=1, label=f"mean {mean.mean:.2f}{error}")
    top.set(xlabel=f"{name}, nats an image", ylabel="images")
    top.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    top.legend(fontsize=8)
    for axes, (label, (images, captions)) in zip(below, examples.items(), strict=True):
        show_tiles(axes, images[None])
        axes.set_xticks([i + 0.5 for i in range(len(captions))], captions, fontsize=7)
        axes.set_yticks([0.5], [label], fontsize=8)
    return figure


def number_of_bins(count: int) -> int:
    """The number of bins of a histogram: 2 sqrt(n), from 5 to 60. Source: ours."""
    return min(60, max(5, round(2 * math.sqrt(count))))


def bound_by_particles(sizes: Sequence[int], bounds: Tensor, *, title: str) -> Figure:
    """The bound L_s over the number of particles s, and what it gains over s = 1, the ELBO, on the same images.

    Args:
        sizes: (K,) the numbers s, the first of them 1.
        bounds: (K, N) L_s of each image, nats.
        title: Over the figure; it may have several lines.
    """
    figure = make_figure(title)
    left, right = figure.subplots(1, 2)
    for axes, values in ((left, bounds), (right, bounds - bounds[0])):
        estimates = [Estimate.mean_of(row) for row in values]
        stderr = np.nan_to_num([each.stderr for each in estimates])
        axes.errorbar(sizes, [each.mean for each in estimates], yerr=stderr, marker=".", capsize=2)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("s, importance samples an image")
    elbo = float(bounds[0].mean())
    left.axhline(elbo, color="tab:gray", linestyle="--", label=f"ELBO, s = 1: {elbo:.2f}")
    left.legend(fontsize=8)
    left.set_ylabel("L_s, nats an image")
    right.set_ylabel("L_s - ELBO on the same images, nats")
    return figure


def pixel_calibration(found: Mapping[str, PixelCalibration], *, title: str) -> Figure:
    """A histogram of the probability integral transform for each model, with the uniform one of a right model.

    Args:
        found: By the model's name.
        title: Over the figure; it may have several lines.
    """
    columns = min(_COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = make_figure(title, width=max(7.0, 3.1 * columns), height=2.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (name, calibration) in zip(grid.flat, found.items(), strict=False):
        bins = len(calibration.histogram)
        middles = (np.arange(bins) + 0.5) / bins
        shares = [bins * share.mean for share in calibration.histogram]  # as densities: 1 is right
        stderr = np.nan_to_num([bins * share.stderr for share in calibration.histogram])
        axes.bar(middles, shares, width=1 / bins, yerr=stderr, alpha=0.7, ecolor="0.3")
        axes.axhline(1, color="black", linewidth=1)
        axes.set_title(f"{name}\n{fill(calibration.verdict, 42)}", fontsize=8)
        axes.set_xlim(0, 1)
    figure.supylabel("density, 1 if right", fontsize=8)
    figure.supxlabel("where the pixel lies in p(x | z), as the share of draws below it", fontsize=8)
    return figure


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
