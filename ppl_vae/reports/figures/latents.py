"""Latents of images, next to the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ppl_vae.reports.figures.likelihoods import number_of_bins

Array = NDArray[Any]


class Scales(NamedTuple):
    """A normal prior of the latents that are drawn.

    Args:
        mean: (R,).
        scale: (R,).
    """

    mean: Sequence[float]
    scale: Sequence[float]


# More classes than this are only counted in the legend: their colors could not be told apart.
_MOST_CLASSES = 20

_TAIL = 0.005  # of a prior's draws at either end, which may lie outside the axes


def latent_plane(
    points: Array,
    *,
    names: tuple[str, str],
    prior: Scales | Array,
    title: str,
    classes: Array | None = None,
    class_names: Sequence[str] = (),
) -> Figure:
    """Each image's place in the plane of two latents, colored by class, and the prior.

    A normal prior is circles at 1, 2 and 3 scales, any other gray draws.

    Args:
        points: (n, 2).
        names: of the two latents.
        prior: p(z) of the two latents: the scales of a normal, or draws (M, 2).
        title: over the figure; it may have several lines.
        classes: (n,) integers, or None where they are not known.
        class_names: the word for each integer; where there is none, the integer is its own.
    """
    figure, axes = _panel(title)
    if isinstance(prior, Scales):
        center, reach = np.asarray(prior.mean), _reach_of_circles(axes, points, prior)
    else:
        axes.scatter(*prior.T, s=4, linewidths=0, color="0.75", label=f"prior: {len(prior):,} draws")
        center, reach = _middle_and_reach(np.concatenate([points, _clip_tails(prior)]))
    for mask, style in _group_by_class(classes, len(points), class_names):
        axes.scatter(*points[mask].T, s=6, linewidths=0, alpha=0.8, **style)
    axes.set(
        xlabel=names[0],
        ylabel=names[1],
        aspect="equal",
        anchor="W",  # the layout knows the labels on the left only if the square stays there
        xlim=(center[0] - reach, center[0] + reach),
        ylim=(center[1] - reach, center[1] + reach),
    )
    _legend(axes, classes)
    return figure


def _reach_of_circles(axes: Axes, points: Array, prior: Scales) -> float:
    """Draws circles at 1, 2 and 3 scales, and returns how far the axes reach from their middle."""
    center = (prior.mean[0], prior.mean[1])
    for radius in (1, 2, 3):
        width, height = (2 * radius * scale for scale in prior.scale)
        label = "prior: 1, 2, 3 scales" if radius == 1 else None
        axes.add_patch(Ellipse(center, width, height, fill=False, edgecolor="0.4", linewidth=0.8, label=label))
    return float(1.05 * np.maximum(np.abs(points - center).max(0), 3 * np.asarray(prior.scale)).max())


def _clip_tails(prior: Array) -> Array:
    """The draws (R, M) with the rarest ones clipped, since a single one far out would set the axes."""
    low, high = np.quantile(prior, [_TAIL, 1 - _TAIL], axis=0)
    return np.clip(prior, low, high)


def _middle_and_reach(points: Array) -> tuple[Array, float]:
    low, high = points.min(0), points.max(0)
    return (low + high) / 2, float(1.05 * max(1e-6, (high - low).max() / 2))


def latent_line(
    points: Array,
    *,
    name: str,
    prior: Scales | Array,
    title: str,
    classes: Array | None = None,
    class_names: Sequence[str] = (),
) -> Figure:
    """A histogram of the images' places on the line of one latent, the classes stacked, and the prior.

    A normal prior is lines at its mean and 1, 2 and 3 scales, any other a histogram of as much area.

    Args:
        points: (n,).
        name: of the latent.
        prior: p(z) of the latent: the scale of a normal, or draws (M, 1).
        title, classes, class_names: as ``latent_plane``.
    """
    figure, axes = _panel(title)
    parts = _group_by_class(classes, len(points), class_names)
    if isinstance(prior, Scales):
        low, high = (prior.mean[0] + sign * 3 * prior.scale[0] for sign in (-1, 1))
    else:
        low, high = _clip_tails(prior).min(), _clip_tails(prior).max()
    reach = {"bins": number_of_bins(len(points)), "range": (min(low, points.min()), max(high, points.max()))}
    axes.hist(
        [points[mask] for mask, _ in parts],
        **reach,
        stacked=True,
        color=[style["color"] for _, style in parts],
        label=[style["label"] for _, style in parts],
    )
    if isinstance(prior, Scales):
        for position in range(-3, 4):
            label = "prior: mean, and 1, 2, 3 scales" if position == 0 else None
            axes.axvline(prior.mean[0] + position * prior.scale[0], color="0.4", linewidth=0.8, label=label)
    else:
        each = np.full(len(prior), len(points) / len(prior))
        words = f"prior: {len(prior):,} draws"
        axes.hist(prior[:, 0], **reach, weights=each, histtype="step", color="0.4", label=words)
    axes.set(xlabel=name, ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes, classes)
    return figure


def _panel(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.8, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.add_subplot()


def _group_by_class(
    classes: Array | None, count: int, class_names: Sequence[str]
) -> list[tuple[Array, dict[str, Any]]]:
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


def _legend(axes: Axes, classes: Array | None) -> None:
    """Adds a legend next to the axes. With too many classes a single entry counts them."""
    handles, _ = axes.get_legend_handles_labels()
    count = 0 if classes is None else len(np.unique(classes))
    if count > _MOST_CLASSES:
        handles.insert(0, Line2D([], [], linestyle="none", label=f"{count:,} classes,\none color each"))
    axes.figure.legend(handles=handles, fontsize=8, markerscale=2, loc="outside right upper", frameon=False)
