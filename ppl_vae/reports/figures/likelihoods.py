"""log p(x) over images and over particles, and the calibration of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.diagnostics.pixel_calibration import PixelCalibration
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.figures import make_figure
from ppl_vae.reports.figures.images import Images, elongation, show_tiles

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
    mean = Estimate.from_values(values)
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
        estimates = [Estimate.from_values(row) for row in values]
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
