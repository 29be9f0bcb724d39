"""Figures of a diagnosis: latents, aggregate posterior, parts of the ELBO, noise and sharpness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[Any]


class Bar(NamedTuple):
    """A mean and its standard error, which may be NaN.

    Args:
        mean: its height or length.
        stderr: of the mean.
    """

    mean: float
    stderr: float


def latents_used(
    *,
    variance: Array,
    variance_stderr: Array,
    threshold: float,
    kl: Array | None = None,
    kl_stderr: Array | None = None,
    title: str,
) -> Figure:
    """KL, and variance of the posterior mean, of each latent, the most used first.

    Args:
        variance, variance_stderr: (L,) of the posterior mean over images, in variances of the prior.
        threshold: above which a latent is active.
        kl, kl_stderr: (L,) nats, or None.
        title: over the figure; it may have several lines.
    """
    figure = _figure(title, width=9.0 if kl is not None else 5.0)
    panels = figure.subplots(1, 2 if kl is not None else 1, squeeze=False)[0]
    order = np.argsort(-(variance if kl is None else kl))
    rank = np.arange(1, len(order) + 1)
    active = variance[order] > threshold
    if kl is not None:
        _colored_bars(panels[0], rank, kl[order], None if kl_stderr is None else kl_stderr[order], active)
        panels[0].set_ylabel("KL(q(z_l | x) || p(z_l)), nats")
    _colored_bars(panels[-1], rank, np.maximum(variance[order], 1e-12), variance_stderr[order], active)
    panels[-1].set_yscale("log")
    panels[-1].set_ylim(bottom=min(threshold / 100, max(1e-6, float(variance.min()) / 2)))
    panels[-1].axhline(threshold, color="black", linewidth=1, linestyle="--", label=f"active above {threshold}")
    panels[-1].set_ylabel("variance over images of E[z_l | x] / the prior's", fontsize=9)
    panels[-1].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel("latents, the most used first (gray: inactive)", fontsize=8)
    return figure


def aggregate_against_prior(
    *,
    mean: Array,
    log_scale: Array,
    distance: Array,
    effect: Bar,
    title: str,
) -> Figure:
    """Mean and log scale of the aggregate posterior of each latent, and its distance from the prior.

    Args:
        mean, log_scale: (L,) in the prior's units; 0 if they are the prior's.
        distance: (L,) the Kolmogorov-Smirnov statistic.
        effect: of a classifier between draws of the two; 0 if they are alike, 1 if they are apart.
        title: over the figure; it may have several lines.
    """
    figure = _figure(title)
    left, right = figure.subplots(1, 2)
    left.axhline(0, color="0.7", linewidth=0.8)
    left.axvline(0, color="0.7", linewidth=0.8)
    left.scatter(mean, log_scale, s=14, color="tab:blue", label="a latent")
    left.plot(0, 0, "+", color="black", markersize=12, label="the prior")
    reach = 1.1 * max(0.3, float(np.abs(mean).max()), float(np.abs(log_scale).max()))
    left.set(xlim=(-reach, reach), ylim=(-reach, reach))
    left.set_xlabel("mean of the aggregate posterior, in scales of the prior", fontsize=8)
    left.set_ylabel("log(its scale / the prior's)", fontsize=8)
    left.legend(fontsize=8, loc="lower left")
    order = np.argsort(-distance)
    right.bar(np.arange(1, len(order) + 1), distance[order], color="tab:blue", alpha=0.8)
    right.set_ylim(0, 1)
    words = f"all latents together, a classifier's effect: {effect.mean:.2f} ± {effect.stderr:.2f}"
    right.axhline(max(0.0, effect.mean), color="tab:red", linewidth=1, label=words)
    right.set_xlabel("latents, the farthest first", fontsize=8)
    right.set_ylabel("Kolmogorov-Smirnov distance to the prior", fontsize=8)
    right.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, frameon=False)
    return figure


def split_bars(bars: Mapping[str, Sequence[tuple[str, Bar]]], *, title: str) -> Figure:
    """Stacked horizontal bars, nats: one bar per name, with the parts that sum to it.

    Args:
        bars: by name, the parts with their words; each part is at least 0 up to its error.
        title: over the figure; it may have several lines.
    """
    figure = _figure(title, height=0.9 + 0.75 * len(bars))
    axes = figure.add_subplot()
    colors = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
    reach = max(sum(max(0.0, bar.mean) for _, bar in parts) for parts in bars.values())
    for row, parts in enumerate(bars.values()):
        start = 0.0
        for (words, bar), color in zip(parts, colors, strict=False):
            length = max(0.0, bar.mean)
            axes.barh(row, length, left=start, xerr=_or_none(bar.stderr), color=color, alpha=0.8, ecolor="0.3")
            label = f"{words}\n{bar.mean:.2f} ± {bar.stderr:.2f}"
            wide = length > 0.3 * reach
            place = start + length / 2 if wide else start + length + 0.012 * reach
            if wide or (words, bar) == parts[-1]:
                axes.text(place, row, label, fontsize=7, va="center", ha="center" if wide else "left")
            else:
                axes.text(start, row - 0.43, label.replace("\n", " "), fontsize=7, va="bottom", ha="left")
            start += length
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * max(reach, 1e-9))
    axes.set_xlabel("nats an image")
    return figure


def noise_spectrum(eigenvalues: Array, *, thresholds: Mapping[str, float], active: int | None, title: str) -> Figure:
    """Eigenvalues of the data's covariance in units of the noise, and the thresholds for live directions.

    Args:
        eigenvalues: (D',) descending.
        thresholds: by name.
        active: number of latents that the run uses, or None.
        title: over the figure; it may have several lines.
    """
    figure = _figure(title)
    axes = figure.add_subplot()
    rank = np.arange(1, len(eigenvalues) + 1)
    axes.loglog(rank, np.maximum(eigenvalues, 1e-12), color="tab:blue", marker=".", markersize=3)
    for (name, value), color in zip(thresholds.items(), ("black", "tab:red", "tab:orange"), strict=False):
        live = int((eigenvalues > value).sum())
        axes.axhline(value, color=color, linewidth=1, label=f"{name}: {live:,} directions live above {value:.3g}")
    if active is not None and active > 0:
        axes.axvline(active, color="tab:green", linestyle=":", label=f"this run: {active:,} active latents")
    low = min([*thresholds.values(), float(eigenvalues.max(initial=1e-3)) / 1e3])
    axes.set_ylim(bottom=low / 3)
    axes.set_xlabel("directions of the data, the largest first")
    axes.set_ylabel("variance in units of the noise")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def sharpness_strip(rows: Mapping[str, Bar], *, variation: Bar | None, title: str) -> Figure:
    """Sharpness of reconstructions relative to the data, and how much they vary from image to image.

    Args:
        rows: by name, power at high frequencies divided by the data's.
        variation: between reconstructions, divided by that between images; None if it is unknown.
        title: over the figure; it may have several lines.
    """
    bars = dict(rows) if variation is None else {"vary from image to image": variation, **rows}
    figure = _figure(title, width=7.5, height=1.0 + 0.36 * len(bars))
    axes = figure.add_subplot()
    for row, bar in enumerate(bars.values()):
        color = "tab:orange" if bar is variation else "tab:blue"
        axes.barh(row, bar.mean, xerr=_or_none(bar.stderr), color=color, alpha=0.8, ecolor="0.3")
        axes.text(max(0.0, bar.mean) + 0.02, row, f"{bar.mean:.2f}", fontsize=8, va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(1.0, *(bar.mean for bar in bars.values())))
    axes.set_xlabel("1: as the data")
    return figure


def _figure(title: str, *, width: float = 9.0, height: float = 3.4) -> Figure:
    figure = Figure(figsize=(width, height + 0.25 * (1 + title.count("\n"))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def _or_none(stderr: float) -> float | None:
    return None if np.isnan(stderr) else stderr


def _colored_bars(axes: Axes, rank: Array, heights: Array, stderr: Array | None, active: Array) -> None:
    colors = ["tab:blue" if one else "0.7" for one in active]
    axes.bar(rank, heights, yerr=None if stderr is None else np.nan_to_num(stderr), color=colors, ecolor="0.3")
