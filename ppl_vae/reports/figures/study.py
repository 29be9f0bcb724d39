"""What the study measured: numbers along beta, spectra, bars. Arrays in, a Figure out.

Inks follow matplotlib's settings, so one drawing serves light and dark pages: ``page_style`` holds the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Array = NDArray[Any]

_HEIGHT, _WIDTH = 3.6, 9.0
_LIGHT = ("#2b6cb0", "#c2571a", "#2f855a", "#7b4fb5", "#8a6d1d")
_DARK = ("#7cb7f0", "#f0a06a", "#7fcfa0", "#bfa0ee", "#d9bf6b")
_FAINT = 0.35


def page_style(scheme: Literal["light", "dark"]) -> dict[Any, Any]:
    """Settings for ``matplotlib.rc_context``, under which a figure suits a light or a dark page.

    Its background is transparent, so that the page's own shows.
    """
    ink, grid = ("#1f2328", "#d8dde3") if scheme == "light" else ("#e4e6ea", "#3a414a")
    colors = _LIGHT if scheme == "light" else _DARK
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    return inks | {
        "axes.prop_cycle": cycler(color=colors),
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.size": 9.5,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "savefig.facecolor": "none",
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
    }


def _ink() -> str:
    return matplotlib.rcParams["text.color"]


def _colors() -> Any:
    return cycle(matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])


def _color(place: int) -> str:
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return colors[place % len(colors)]


def _panels(count: int, *, height: float = _HEIGHT, width: float = _WIDTH) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _plain(value: float, _: Any = None) -> str:
    return f"{value:g}"


def _along_beta(axes: Any, betas: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_xlabel("beta")
    if betas and min(betas) <= 1 <= max(betas):
        axes.axvline(1, color=_ink(), linewidth=0.7, linestyle=":")


class Curve(NamedTuple):
    """Numbers along one quantity, in its order; None where a number is not known.

    Args:
        x: (K,).
        mean: (K,).
        stderr: (K,), or None.
        reliable: (K,), False where the marker is hollow; all are reliable where None.
    """

    x: Sequence[float]
    mean: Sequence[float | None]
    stderr: Sequence[float | None] | None = None
    reliable: Sequence[bool] | None = None


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _draw(axes: Any, curve: Curve, *, label: str, color: str, style: str = "-") -> None:
    mean = np.array([_number(value) for value in curve.mean])
    stderr = None if curve.stderr is None else np.array([_number(value) for value in curve.stderr])
    axes.errorbar(curve.x, mean, yerr=stderr, color=color, linestyle=style, linewidth=1.4, capsize=2)
    sure = np.ones(len(mean), dtype=bool) if curve.reliable is None else np.array(curve.reliable, dtype=bool)
    at = np.array(curve.x, dtype=float)
    axes.plot(at[sure], mean[sure], "o", color=color, markersize=4.5, linestyle="none")
    axes.plot(at[~sure], mean[~sure], "o", color=color, markersize=4.5, linestyle="none", fillstyle="none")
    axes.plot([], [], marker="o", color=color, markersize=4.5, linewidth=1.4, linestyle=style, label=label)


class Tradeoff(NamedTuple):
    """Rate against distortion of one data set.

    Args:
        betas: (K,) ascending.
        rate, distortion: (K,) nats an image.
        others: further points by name, (rate, distortion).
    """

    betas: Sequence[float]
    rate: Sequence[float]
    distortion: Sequence[float]
    others: Mapping[str, tuple[float, float]] = {}


def rate_distortion(tradeoffs: Mapping[str, Tradeoff]) -> Figure:
    """Distortion over rate, a panel for each data set, each point with its beta.

    Raises:
        ValueError: no data set.
    """
    if not tradeoffs:
        raise ValueError("tradeoffs: expected at least one data set, got none")
    figure, panels = _panels(len(tradeoffs), height=4.0)
    for axes, (name, tradeoff) in zip(panels, tradeoffs.items(), strict=True):
        axes.plot(tradeoff.rate, tradeoff.distortion, "o-", color=_color(0), markersize=4.5, linewidth=1.4)
        _label_points(axes, tradeoff)
        for place, (word, (rate, distortion)) in enumerate(tradeoff.others.items(), start=1):
            axes.plot(rate, distortion, "X", color=_color(place), markersize=8, label=word, linestyle="none")
        best = min(r + d for r, d in zip(tradeoff.rate, tradeoff.distortion, strict=True))
        axes.axline((0, best), slope=-1, color=_ink(), linewidth=0.7, linestyle=":", label="the best ELBO")
        axes.set(xlabel="rate: KL, nats an image", ylabel="distortion: -E[log p(x | z)], nats", title=name)
        reached = [*tradeoff.distortion, *(distortion for _, distortion in tradeoff.others.values())]
        low, high = min(reached), max(reached)
        axes.set(xlim=(-0.06 * max(tradeoff.rate), None), ylim=(low - 0.08 * (high - low), high + 0.12 * (high - low)))
        axes.legend()
    return figure


def _label_points(axes: Any, tradeoff: Tradeoff) -> None:
    """Each beta beside its point, but for those that would lie on the last one that was written."""
    spans = max(tradeoff.rate) or 1.0, (max(tradeoff.distortion) - min(tradeoff.distortion)) or 1.0
    last: tuple[float, float] | None = None
    for value, rate, distortion in zip(tradeoff.betas, tradeoff.rate, tradeoff.distortion, strict=True):
        at = rate / spans[0], distortion / spans[1]
        if last is not None and max(abs(at[0] - last[0]), abs(at[1] - last[1])) < 0.05:
            continue
        axes.annotate(f"{value:g}", (rate, distortion), (5, 5), textcoords="offset points", fontsize=8)
        last = at


class Bounds(NamedTuple):
    """What one data set's bounds gain or lose on beta = 1, on the same images.

    Args:
        log_likelihood, elbo: differences, nats an image.
        seeds: by bound ("log_likelihood", "elbo"): beta and what each further seed says of the same difference.
    """

    log_likelihood: Curve
    elbo: Curve
    seeds: Mapping[str, Sequence[tuple[float, float]]] = {}


BOUNDS = {"log_likelihood": "L_S, the bound on log p(x)", "elbo": "ELBO"}


def bounds_along_beta(bounds: Mapping[str, Bounds], *, near: float = 3.0) -> Figure:
    """Paired differences to beta = 1 along beta: for each data set all of them, and those within some nats of the best.

    Args:
        bounds: by data set, at least one.
        near: nats below the best that the second panel shows.

    Raises:
        ValueError: no data set.
    """
    if not bounds:
        raise ValueError("bounds: expected at least one data set, got none")
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(bounds)), layout="constrained")
    rows = figure.subplots(len(bounds), 2, squeeze=False)
    for (left, right), (name, both) in zip(rows, bounds.items(), strict=True):
        for axes in (left, right):
            for place, (bound, word) in enumerate(BOUNDS.items()):
                curve: Curve = getattr(both, bound)
                _draw(axes, curve, label=word, color=_color(place))
                for value, gain in both.seeds.get(bound, ()):
                    axes.plot(value, gain, ".", color=_color(place), alpha=0.6, markersize=5)
            _along_beta(axes, both.elbo.x)
            axes.axhline(0, color=_ink(), linewidth=0.7, linestyle=":")
        left.set(title=f"{name}: all betas", ylabel="nats an image, minus those of beta = 1")
        left.legend()
        _zoom(right, [both.log_likelihood, both.elbo], near)
        right.set_title(f"{name}: within {near:g} nats of the best")
    return figure


def _zoom(axes: Any, curves: Sequence[Curve], near: float) -> None:
    """To what lies within some nats of the best of each curve, and the betas where any does."""
    kept = []
    for curve in curves:
        known = [value for value in curve.mean if value is not None]
        best = max(known, default=0.0)
        kept += [
            (x, value)
            for x, value in zip(curve.x, curve.mean, strict=True)
            if value is not None and value > best - near
        ]
    if kept:
        xs, values = zip(*kept, strict=True)
        margin = 0.12 * max(max(values) - min(values), 0.5)
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.set_xlim(min(xs) / 1.4, max(xs) * 1.4)
        axes.set_xticks(sorted(set(xs)), [f"{x:g}" for x in sorted(set(xs))])
        axes.minorticks_off()


class Activity(NamedTuple):
    """Active latents of one data set, measured and predicted.

    Args:
        betas: (K,).
        active: (K,), None where it is not known.
        predicted: (K,).
        latent_dim: L.
        mean: the same of the mean over pixels: its equal beta, active, predicted; None where there is none.
    """

    betas: Sequence[float]
    active: Sequence[int | None]
    predicted: Sequence[int]
    latent_dim: int
    mean: tuple[float, int, int] | None = None


def active_along_beta(activities: Mapping[str, Activity]) -> Figure:
    """Active latents along beta, measured over what the eigenvalues predict; a panel for each data set."""
    figure, panels = _panels(len(activities))
    for axes, (name, activity) in zip(panels, activities.items(), strict=True):
        axes.plot(
            activity.betas, activity.predicted, "--", color=_color(1), linewidth=1.4, label="predicted: linear VAE"
        )
        _draw(axes, Curve(activity.betas, activity.active), label="measured", color=_color(0))
        betas = list(activity.betas)
        if activity.mean is not None:
            beta, active, _ = activity.mean
            axes.plot(beta, active, "X", color=_color(3), markersize=9, linestyle="none", label="a mean over pixels")
            betas.append(beta)
        _along_beta(axes, betas)
        axes.set(
            ylabel=f"active latents of {activity.latent_dim}", title=name, ylim=(-0.04 * activity.latent_dim, None)
        )
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def eigenvalue_spectrum(spectra: Mapping[str, Sequence[float]], thresholds: Mapping[str, float]) -> Figure:
    """Eigenvalues of the data's covariance in units of the likelihood's noise, with thresholds.

    Args:
        spectra: by data set, descending.
        thresholds: by name; a direction lives where its eigenvalue is above.
    """
    figure, (axes,) = _panels(1, width=7.0, height=4.0)
    for place, (name, values) in enumerate(spectra.items()):
        axes.plot(
            np.arange(1, len(values) + 1), values, ".-", color=_color(place), linewidth=1, label=name, markersize=4
        )
    for name, threshold in thresholds.items():
        axes.axhline(threshold, color=_ink(), linewidth=0.9, linestyle="--")
        axes.annotate(
            f"{name}: {threshold:,.4g}",
            (0.985, threshold),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
    axes.set(xscale="log", yscale="log", xlabel="direction, by eigenvalue", ylabel="eigenvalue / noise")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_ylim(top=2.2 * max([*thresholds.values(), *(max(values) for values in spectra.values())]))
    axes.legend(loc="center right")
    return figure


def aggregate_along_beta(
    panels_of: Mapping[str, Mapping[str, Curve]],
    *,
    autoencoders: Mapping[str, Mapping[str, float]],
    shares: Sequence[str],
) -> Figure:
    """How far codes are from the prior along beta, a panel for each measure, a curve for each data set.

    Args:
        panels_of: measure -> data set -> its curve.
        autoencoders: measure -> data set -> the value of its autoencoder, a dashed line.
        shares: the measures that lie between 0 and 1.
    """
    columns = min(2, len(panels_of))
    rows = -(-len(panels_of) // columns)
    figure = Figure(figsize=(_WIDTH, 2.9 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (measure, curves) in zip(places, panels_of.items(), strict=False):
        for place, (name, curve) in enumerate(curves.items()):
            _draw(axes, curve, label=name, color=_color(place))
            value = autoencoders.get(measure, {}).get(name)
            if value is not None:
                axes.axhline(value, color=_color(place), linewidth=1, linestyle="--", label=f"{name}, autoencoder")
        _along_beta(axes, [x for curve in curves.values() for x in curve.x])
        axes.set_title(measure)
        if measure in shares:
            axes.set_ylim(-0.04, 1.04)
    for axes in places[len(panels_of) :]:
        axes.set_visible(False)
    places[0].legend()
    return figure


class Bar(NamedTuple):
    """One bar with its error."""

    name: str
    mean: float
    stderr: float | None = None


def bar_panels(
    panels_of: Mapping[str, Sequence[Bar]],
    *,
    marks: Mapping[str, tuple[str, float]] | None = None,
    height: float = _HEIGHT,
) -> Figure:
    """Bars side by side, a panel for each quantity.

    Args:
        panels_of: quantity -> its bars, in order.
        marks: quantity -> the name and value of a line across.
        height: inches.
    """
    marks = marks or {}
    figure, panels = _panels(len(panels_of), height=height)
    for axes, (quantity, bars) in zip(panels, panels_of.items(), strict=True):
        known = any(bar.stderr is not None for bar in bars)
        stderr = [bar.stderr or 0.0 for bar in bars] if known else None
        colors = [color for _, color in zip(bars, _colors(), strict=False)]
        axes.bar(
            range(len(bars)), [bar.mean for bar in bars], yerr=stderr, capsize=3, color=colors, ecolor=_ink(), width=0.7
        )
        axes.set_xticks(range(len(bars)), [bar.name.replace(", ", ",\n") for bar in bars])
        axes.grid(visible=False, axis="x")
        if quantity in marks:
            word, value = marks[quantity]
            axes.axhline(value, color=_ink(), linewidth=1, linestyle="--", label=word)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, borderpad=0)  # above: bars fill it
        axes.set_title(quantity, loc="left")
    return figure


def blur_parts(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each data set, stacked from the parts of the reconstruction's squared error; they add up to it.

    Args:
        parts: data set -> part -> squared pixel units; a negative part is drawn to the left of 0.
    """
    figure, (axes,) = _panels(1, height=1.5 + 0.6 * len(parts))
    names = list(dict.fromkeys(name for of_set in parts.values() for name in of_set))
    for row, of_set in enumerate(parts.values()):
        ends = {1: 0.0, -1: 0.0}
        for place, name in enumerate(names):
            value = of_set.get(name, 0.0)
            side = 1 if value >= 0 else -1
            axes.barh(row, value, left=ends[side], color=_color(place), height=0.6, label=name if row == 0 else None)
            ends[side] += value
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=_ink(), linewidth=0.8)
    axes.set_xlabel("squared error a pixel")
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure


class Model(NamedTuple):
    """One point of a comparison.

    Args:
        name: beside the point.
        group: points of one group have one color.
        seconds: of training.
        parameters: weights.
        mean, stderr: nats an image.
        latent_dim: L.
    """

    name: str
    group: str
    seconds: float | None
    parameters: int
    mean: float
    stderr: float | None
    latent_dim: int


def nats_of_models(models: Sequence[Model], *, bound: str) -> Figure:
    """log p(x) over latents, over seconds of training, and over parameters."""
    figure, panels = _panels(3, height=3.9, width=10.0)
    x_of = {
        "latents": lambda model: model.latent_dim,
        "seconds of training": lambda model: model.seconds,
        "weights": lambda model: model.parameters,
    }
    groups = list(dict.fromkeys(model.group for model in models))
    for axes, (what, x) in zip(panels, x_of.items(), strict=True):
        for place, group in enumerate(groups):
            shown = [model for model in models if model.group == group and x(model)]
            axes.errorbar(
                [x(model) for model in shown],
                [model.mean for model in shown],
                yerr=[model.stderr or 0.0 for model in shown],
                fmt="o",
                color=_color(place),
                markersize=5,
                capsize=2,
                label=group,
            )
            for model in shown:
                axes.annotate(model.name, (x(model), model.mean), (5, 4), textcoords="offset points", fontsize=7.5)
        axes.set(xscale="log", xlabel=what)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axes.margins(x=0.18, y=0.1)
    panels[0].set_ylabel(f"{bound}, nats an image")
    panels[0].legend(loc="lower right")
    return figure


class ScaleMap(NamedTuple):
    """What one map does to gradients.

    Args:
        largest_feature: (K,) ascending.
        gradient_norm: (K,), None where no gradient is finite.
        not_finite: (K,) share of images with NaN or infinity in the gradient.
        sampled_norm, sampled_not_finite: the same of the objective with a sampled KL; None where it was not measured.
    """

    largest_feature: Sequence[float]
    gradient_norm: Sequence[float | None]
    not_finite: Sequence[float | None]
    sampled_norm: Sequence[float | None] | None = None
    sampled_not_finite: Sequence[float | None] | None = None


def scale_map_gradients(maps: Mapping[str, ScaleMap]) -> Figure:
    """The gradient's norm, and how often it is not finite, over the largest feature; dashed where KL is sampled."""
    figure, (left, right) = _panels(2)
    for place, (word, of_map) in enumerate(maps.items()):
        kinds = [(word, "-", of_map.gradient_norm, of_map.not_finite)]
        if of_map.sampled_norm is not None and of_map.sampled_not_finite is not None:
            kinds.append((f"{word}, sampled KL", "--", of_map.sampled_norm, of_map.sampled_not_finite))
        for label, style, norms, not_finite in kinds:
            norm = [value or None for value in norms]  # zero has no place on a log scale
            _draw(left, Curve(of_map.largest_feature, norm), label=label, color=_color(place), style=style)
            _draw(right, Curve(of_map.largest_feature, not_finite), label=label, color=_color(place), style=style)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="largest feature |h|")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    left.set(yscale="log", ylabel="norm of the gradient, where finite", title="How large")
    right.set(ylim=(-0.04, 1.04), ylabel="share of images", title="NaN or infinite")
    left.legend()
    return figure
