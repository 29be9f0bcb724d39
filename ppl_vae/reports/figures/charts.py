"""Charts of a run: its training, log p(x) over images and particles, its latents, and the calibration of its pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.diagnostics.latents import active_units
from ppl_vae.diagnostics.likelihood import PixelCalibration
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import PosteriorMoments, compute_moments, sample_latents
from ppl_vae.reports.figures.images import Images, elongation, show_tiles
from ppl_vae.reports.text.pages import NO_ACTIVE_LATENT, TITLES

_COLUMNS = 4  # of a table of calibrations
_PRIOR_SHOWN = 2000  # draws
_MOST_CLASSES = 20  # in the legend: the colors of more could not be told apart
_MOST_NUMBERED = 20  # classes of a table that shows its counts


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
    panels[0].set_ylabel("nats per image")
    if has_terms:
        distortion = [-value for value in _read(metrics, "reconstruction")]
        panels[1].plot(epochs, distortion, label="-E_q[log p(x | z)]", marker=marker)
        panels[1].plot(epochs, _read(metrics, "kl"), label="KL(q(z | x) || p(z))", marker=marker)
        panels[1].set_ylabel("nats per image (validation)")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    return figure


def _read(metrics: Records, name: str) -> list[float]:
    return [record[f"validation_{name}_nats_per_image"] for record in metrics]


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
    top.set(xlabel=f"{name}, nats per image", ylabel="images")
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
        axes.set_xlabel("s, importance samples per image")
    elbo = float(bounds[0].mean())
    left.axhline(elbo, color="tab:gray", linestyle="--", label=f"ELBO, s = 1: {elbo:.2f}")
    left.legend(fontsize=8)
    left.set_ylabel("L_s, nats per image")
    right.set_ylabel("L_s - ELBO on the same images, nats")
    return figure


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str) -> Figure:
    """Counts of images (K x K) by their class (row) and the class that they are taken for (column)."""
    K = len(names)
    figure = make_figure(title, width=max(4.5, 0.55 * K + 1.5), height=max(4.0, 0.45 * K + 1.5))
    axes = figure.add_subplot()
    shares = np.array(counts, dtype=float)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(counts if K <= _MOST_NUMBERED else ()):
        for j, count in enumerate(row):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count}" if count else "", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="most probable label", ylabel="label")
    axes.set_xticks(range(K), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(K), names)
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


def latents_figure(
    codes: PosteriorMoments,
    prior: Distribution,
    *,
    kind: str,
    classes: Tensor | None = None,
    class_names: tuple[str, ...] = (),
) -> Figure:
    """Posterior means in the two latents of the largest variance, colored by class, over draws of the prior in gray.

    A single latent has a histogram. The draws are from torch's global generator.

    Args:
        codes: The posterior moments of N images.
        prior: p(z), event (L,).
        kind: One of the images in words, such as "test image".
        classes: (N,) int64, where they are known.
        class_names: The word for each class.
    """
    N, L = codes.mean.shape
    active = active_units(codes, compute_moments(prior).scale)
    variance = active.mean
    order = list(range(L)) if L <= 2 else variance.argsort(descending=True)[:2].tolist()
    names = [f"z{k}, variance {variance[k]:.2f}" for k in order]
    points, draws = (each[:, order].cpu().numpy() for each in (codes.mean, sample_latents(prior, _PRIOR_SHOWN)))
    title = TITLES["latents-chosen" if L > 2 else "latents"].format(num_images=N, kind=kind, num_latents=L)
    title += f"\n{NO_ACTIVE_LATENT}" * (active.count == 0 and N > 1)
    figure = make_figure(title, width=6.8, height=5.0)
    axes, words = figure.subplots(), f"prior: {len(draws):,} draws"
    groups = _group_by_class(classes, N, class_names)
    if L == 1:
        both = np.concatenate([points, draws])[:, 0]
        bins = np.linspace(both.min(), both.max(), number_of_bins(N) + 1).tolist()
        weights = np.full(len(draws), N / len(draws))
        axes.hist(draws[:, 0], bins, weights=weights, histtype="step", color="0.4", label=words)
        masks, colors, labels = zip(*groups, strict=True)
        axes.hist([points[mask, 0] for mask in masks], bins, stacked=True, color=colors, label=labels)
        axes.set(xlabel=names[0], ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        axes.scatter(draws[:, 0], draws[:, 1], s=4, linewidths=0, color="0.8", label=words)
        for mask, color, word in groups:
            axes.scatter(points[mask, 0], points[mask, 1], s=6, linewidths=0, alpha=0.8, color=color, label=word)
        axes.set(xlabel=names[0], ylabel=names[1], aspect="equal", anchor="W")
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, fontsize=8, markerscale=2, loc="outside right center", frameon=False)
    return figure


def _group_by_class(
    classes: Tensor | None, count: int, class_names: tuple[str, ...]
) -> list[tuple[np.ndarray, tuple[float, float, float, float] | str, str]]:
    """For each class, which of the points are in it, its color and its word, which a legend of many leaves out."""
    if classes is None:
        return [(np.ones(count, dtype=bool), "tab:blue", "images")]
    present = classes.unique().tolist()
    few = len(present) <= _MOST_CLASSES
    palette = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20" if few else "turbo"]
    words = [class_names[value] if 0 <= value < len(class_names) else str(value) for value in present]
    return [
        ((classes == value).numpy(), palette(i if few else i / len(present)), words[i] if few else f"_{words[i]}")
        for i, value in enumerate(present)
    ]
