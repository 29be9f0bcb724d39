"""Latents of images, beside the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ppl_vae.plots.likelihoods import number_of_bins

Array = NDArray[Any]

# More classes than this are only counted in the legend: their colors could not be told apart.
_MOST_CLASSES = 20


def latent_plane(
    points: Array,
    *,
    names: tuple[str, str],
    prior_mean: Sequence[float],
    prior_scale: Sequence[float],
    title: str,
    classes: Array | None = None,
    class_names: Sequence[str] = (),
) -> Figure:
    """Each image's place in the plane of two latents, colored by class; circles at 1, 2 and 3 scales of the prior.

    Args:
        points: (n, 2).
        names: of the two latents.
        prior_mean, prior_scale: of the two latents under p(z).
        title: over the figure; it may have several lines.
        classes: (n,) integers, or None where they are not known.
        class_names: the word for each integer; where there is none, the integer is its own.
    """
    figure, axes = _panel(title)
    for mask, style in _by_class(classes, len(points), class_names):
        axes.scatter(*points[mask].T, s=6, linewidths=0, alpha=0.8, **style)
    for radius in (1, 2, 3):
        width, height = (2 * radius * scale for scale in prior_scale)
        label = "prior: 1, 2, 3 scales" if radius == 1 else None
        center = (prior_mean[0], prior_mean[1])
        axes.add_patch(Ellipse(center, width, height, fill=False, edgecolor="0.4", linewidth=0.8, label=label))
    reach = 1.05 * np.maximum(np.abs(points - prior_mean).max(0), 3 * np.asarray(prior_scale)).max()
    axes.set(
        xlabel=names[0],
        ylabel=names[1],
        aspect="equal",
        anchor="W",  # the layout knows the labels on the left only if the square stays there
        xlim=(prior_mean[0] - reach, prior_mean[0] + reach),
        ylim=(prior_mean[1] - reach, prior_mean[1] + reach),
    )
    _legend(axes, classes)
    return figure


def latent_line(
    points: Array,
    *,
    name: str,
    prior_mean: float,
    prior_scale: float,
    title: str,
    classes: Array | None = None,
    class_names: Sequence[str] = (),
) -> Figure:
    """A histogram of the images' places on the line of one latent, the classes stacked; lines at scales of the prior.

    Args:
        points: (n,).
        name: of the latent.
        prior_mean, prior_scale: of the latent under p(z).
        title, classes, class_names: as ``latent_plane``.
    """
    figure, axes = _panel(title)
    parts = _by_class(classes, len(points), class_names)
    low, high = prior_mean - 3 * prior_scale, prior_mean + 3 * prior_scale
    axes.hist(
        [points[mask] for mask, _ in parts],
        bins=number_of_bins(len(points)),
        range=(min(low, points.min()), max(high, points.max())),
        stacked=True,
        color=[style["color"] for _, style in parts],
        label=[style["label"] for _, style in parts],
    )
    for position in range(-3, 4):
        label = "prior: mean, and 1, 2, 3 scales" if position == 0 else None
        axes.axvline(prior_mean + position * prior_scale, color="0.4", linewidth=0.8, label=label)
    axes.set(xlabel=name, ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes, classes)
    return figure


def _panel(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.8, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.add_subplot()


def _by_class(classes: Array | None, count: int, class_names: Sequence[str]) -> list[tuple[Array, dict[str, Any]]]:
    """For each class, which of the points are in it, and their color and label."""
    if classes is None:
        return [(np.ones(count, dtype=bool), {"color": "tab:blue", "label": "images"})]
    present = [int(value) for value in np.unique(classes)]
    few = len(present) <= _MOST_CLASSES
    palette = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20" if few else "turbo"]
    parts = []
    for i, value in enumerate(present):
        word = class_names[value] if 0 <= value < len(class_names) else str(value)
        color = palette(i if few else i / (len(present) - 1))
        parts.append((classes == value, {"color": color, "label": word if few else f"_{word}"}))
    return parts


def _legend(axes: Any, classes: Array | None) -> None:
    """Beside the axes; one entry counts the classes where there are too many for one each."""
    handles, _ = axes.get_legend_handles_labels()
    count = 0 if classes is None else len(np.unique(classes))
    if count > _MOST_CLASSES:
        handles.insert(0, Line2D([], [], linestyle="none", label=f"{count:,} classes,\none color each"))
    axes.figure.legend(handles=handles, fontsize=8, markerscale=2, loc="outside right upper", frameon=False)
