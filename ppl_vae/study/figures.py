"""The study's figures: each a function from its numbers to a Figure, drawn for light and for dark pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.study import plan
from ppl_vae.study.results import Difference, RunNumbers, StudyNumbers
from ppl_vae.study.tables import name_data

Scheme = Literal["light", "dark"]
Value = Estimate | Difference | float | None

_DOTS_PER_INCH = 144
_PALETTE_SIZE = 128  # lines and letters need no more colors, and the file is a third in size
_BACKGROUNDS: dict[Scheme, tuple[int, int, int]] = {"light": (255, 255, 255), "dark": (20, 22, 26)}  # the page's
_INKS: dict[Scheme, tuple[str, str]] = {"light": ("#1f2328", "#d8dde3"), "dark": ("#e4e6ea", "#3a414a")}
_COLORS: dict[Scheme, tuple[str, ...]] = {
    "light": ("#2b6cb0", "#c2571a", "#2f855a", "#7b4fb5", "#8a6d1d"),
    "dark": ("#7cb7f0", "#f0a06a", "#7fcfa0", "#bfa0ee", "#d9bf6b"),
}
_WIDTH, _HEIGHT = 9.0, 3.6  # inches
_MOST_EIGENVALUES = 200
_NEAR = 3.0  # nats below the best bound that its figure shows


class Drawn(NamedTuple):
    """A figure as PNG, for light pages and for dark ones."""

    light: bytes
    dark: bytes


def draw_figures(study: StudyNumbers) -> dict[str, Drawn]:
    """Every figure for which the study has numbers, by name."""
    drawn = {name: [_render(draw, study, scheme) for scheme in _BACKGROUNDS] for name, draw in FIGURES.items()}
    return {name: Drawn(light, dark) for name, (light, dark) in drawn.items() if light is not None and dark is not None}


def _render(draw: Callable[[StudyNumbers], Figure | None], study: StudyNumbers, scheme: Scheme) -> bytes | None:
    """The figure as a PNG with few colors and a transparent background."""
    with matplotlib.rc_context(page_style(scheme)):
        figure = draw(study)
        if figure is None:
            return None
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=_DOTS_PER_INCH)
    image = Image.open(raw).convert("RGBA")
    page = Image.new("RGBA", image.size, (*_BACKGROUNDS[scheme], 255))
    few = Image.alpha_composite(page, image).convert("RGB")
    few = few.quantize(_PALETTE_SIZE, kmeans=1, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, format="png", transparency=few.getpixel((0, 0)))  # no figure draws in its corner
    return out.getvalue()


def page_style(scheme: Scheme) -> dict[Any, Any]:
    """Settings for ``matplotlib.rc_context`` for a light or a dark page, whose background shows through."""
    ink, grid = _INKS[scheme]
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    clear = dict.fromkeys(("axes.facecolor", "figure.facecolor", "legend.facecolor", "savefig.facecolor"), "none")
    small = dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8.5)
    off = dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False)
    grid_style = {"axes.grid": True, "axes.axisbelow": True, "grid.color": grid, "grid.linewidth": 0.6}
    return (
        inks | clear | small | off | grid_style | {"font.size": 9.5, "axes.prop_cycle": cycler(color=_COLORS[scheme])}
    )


# --- Parts of figures ---


def _ink() -> str:
    return matplotlib.rcParams["text.color"]


def _color(place: int) -> str:
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return colors[place % len(colors)]


def _make_panels(columns: int, rows: int = 1, *, height: float = _HEIGHT, width: float = _WIDTH) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns); ``height`` is one row's."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}"


def _mean(value: Value) -> float:
    """The number itself, or the mean; NaN where it is not known."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) else value.mean


def _stderr(value: Value) -> float:
    return value.stderr or 0.0 if isinstance(value, Estimate | Difference) else 0.0


def _draw_curve(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Value],
    *,
    label: str,
    place: int,
    style: str = "-",
    hollow: Sequence[bool] | None = None,
) -> None:
    """Means with their errors in the color of that place; the marks of what has not settled are hollow."""
    color, at, mean = _color(place), np.array(x, dtype=float), np.array([_mean(value) for value in values])
    axes.errorbar(at, mean, yerr=[_stderr(v) for v in values], color=color, linestyle=style, linewidth=1.4, capsize=2)
    is_hollow = np.array(hollow if hollow is not None else [False] * len(mean), dtype=bool)
    for mask, fill in ((~is_hollow, "full"), (is_hollow, "none")):
        axes.plot(at[mask], mean[mask], "o", color=color, markersize=4.5, fillstyle=fill)
    axes.plot([], [], marker="o", color=color, markersize=4.5, linewidth=1.4, linestyle=style, label=label)


def _set_beta_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_xlabel("beta")
    axes.axvline(1, color=_ink(), linewidth=0.7, linestyle=":")


def _betas(runs: Sequence[RunNumbers]) -> list[float]:
    return [run.options["beta"] for run in runs]


def _sweeps(study: StudyNumbers) -> dict[str, list[RunNumbers]]:
    """The runs along beta, by data set, where there are any."""
    found = {dataset: study.find_sweep(dataset) for dataset in study.datasets}
    return {dataset: sweep for dataset, sweep in found.items() if sweep}


# --- Along beta ---


def draw_rate_distortion(study: StudyNumbers) -> Figure | None:
    """Distortion against rate, with the line of the best ELBO and the mean over pixels."""
    sweeps = _sweeps(study)
    if not sweeps:
        return None
    figure, (panels,) = _make_panels(len(sweeps), height=4.2)
    for axes, (dataset, sweep) in zip(panels, sweeps.items(), strict=True):
        rate = np.array([_mean(run.kl) for run in sweep])
        distortion = np.array([-_mean(run.reconstruction) for run in sweep])
        axes.plot(rate, distortion, "o-", color=_color(0), linewidth=1.4, markersize=4.5, label="along beta")
        low, high = distortion.min(), distortion.max()
        _label_points(
            axes, _betas(sweep), rate / rate.max(), (distortion - low) / (high - low or 1.0), rate, distortion
        )
        mean = study.find_run(plan.mean_name(dataset))
        if mean is not None:
            at = (_mean(mean.kl), -_mean(mean.reconstruction))
            axes.plot(*at, "X", color=_color(1), markersize=8, label="a mean over pixels", linestyle="none")
            low, high = min(low, at[1]), max(high, at[1])
        best = (rate + distortion).min()
        axes.axline((0, best), slope=-1, color=_ink(), linewidth=0.7, linestyle=":", label="the best ELBO")
        axes.set(
            xlabel="rate: KL, nats per image", ylabel="distortion: -E[log p(x | z)], nats", title=name_data(dataset)
        )
        margin = high - low
        axes.set(xlim=(-0.06 * rate.max(), None), ylim=(low - 0.08 * margin, high + 0.12 * margin))
        axes.legend()
    return figure


def _label_points(
    axes: Axes, labels: Sequence[float], x: np.ndarray, y: np.ndarray, rate: np.ndarray, distortion: np.ndarray
) -> None:
    """Writes each beta next to its point, except those that would cover the last one written. x, y: from 0 to 1."""
    last: tuple[float, float] | None = None
    for k, label in enumerate(labels):
        if last is None or max(abs(x[k] - last[0]), abs(y[k] - last[1])) >= 0.05:
            axes.annotate(f"{label:g}", (rate[k], distortion[k]), (5, 5), textcoords="offset points", fontsize=8)
            last = x[k], y[k]


def draw_bounds(study: StudyNumbers) -> Figure | None:
    """Paired differences to beta = 1 of the betas within some nats of the best; a panel for each data set."""
    sweeps = {dataset: sweep for dataset, sweep in _sweeps(study).items() if study.differences.get("beta")}
    if not sweeps:
        return None
    figure, (panels,) = _make_panels(len(sweeps))
    for axes, (dataset, sweep) in zip(panels, sweeps.items(), strict=True):
        near: list[tuple[float, float]] = []
        for place, (bound, word) in enumerate((("elbo", "ELBO"), ("log_likelihood", "L_S, the bound on log p(x)"))):
            found = [study.find_differences("beta", run.name)[place] for run in sweep]
            values = [each or Estimate(0.0, 0.0) for each in found]  # beta = 1 itself has no difference
            hollow = [bound == "log_likelihood" and run.reliable is False for run in sweep]
            _draw_curve(axes, _betas(sweep), values, label=word, place=place, hollow=hollow)
            for beta, gain in find_seed_gains(study, dataset, bound):
                axes.plot(beta, gain, ".", color=_color(place), alpha=0.6, markersize=5)
            best = max(value.mean for value in values)
            near += [(b, v.mean) for b, v in zip(_betas(sweep), values, strict=True) if v.mean > best - _NEAR]
        _set_beta_axis(axes)
        axes.axhline(0, color=_ink(), linewidth=0.7, linestyle=":")
        betas, gains = zip(*near, strict=True)
        margin, ticks = 0.12 * max(max(gains) - min(gains), 0.5), sorted(set(betas))
        axes.set(xlim=(min(betas) / 1.4, max(betas) * 1.4), ylim=(min(gains) - margin, max(gains) + margin))
        axes.set_xticks(ticks, [f"{beta:g}" for beta in ticks])
        axes.minorticks_off()
        axes.set(ylabel="nats per image, minus those of beta = 1", title=name_data(dataset))
        axes.legend()
    return figure


def find_seed_gains(study: StudyNumbers, dataset: str, bound: str) -> list[tuple[float, float]]:
    """(beta, gain) of each further seed: its bound minus that of the same seed at beta = 1."""
    gains = []
    for seed in study.settings.seeds:
        runs = {b: study.find_run(plan.sweep_name(dataset, b, seed)) for b in (*study.settings.close_betas, 1.0)}
        reference = _mean(None if (at_one := runs[1.0]) is None else getattr(at_one, bound))
        gains += [(b, _mean(getattr(run, bound)) - reference) for b, run in runs.items() if run is not None]
    return [(beta, gain) for beta, gain in gains if not math.isnan(gain)]


def draw_active(study: StudyNumbers) -> Figure | None:
    """Active latents along beta, measured and predicted by the eigenvalues; a panel for each data set."""
    sweeps = _sweeps(study)
    if not sweeps:
        return None
    figure, (panels,) = _make_panels(len(sweeps))
    for axes, (dataset, sweep) in zip(panels, sweeps.items(), strict=True):
        of_mean = study.find_run(plan.beta_of_mean_name(dataset))
        runs = sorted([*sweep, *([] if of_mean is None else [of_mean])], key=lambda run: run.options["beta"])
        L = runs[0].options["latent_dim"]
        predicted = [min(L, study.count_directions(run)) for run in runs]
        axes.plot(_betas(runs), predicted, "--", color=_color(1), linewidth=1.4, label="predicted: linear VAE")
        _draw_curve(axes, _betas(runs), [run.active for run in runs], label="measured", place=0)
        mean = study.find_run(plan.mean_name(dataset))
        if mean is not None and mean.active is not None:
            at = study.threshold(mean), mean.active
            axes.plot(*at, "X", color=_color(3), markersize=9, linestyle="none", label="a mean over pixels")
        _set_beta_axis(axes)
        axes.set(ylabel=f"active latents of {L}", title=name_data(dataset), ylim=(-0.04 * L, None))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def draw_spectrum(study: StudyNumbers) -> Figure | None:
    """Eigenvalues of the data's covariance in units of the likelihood's noise, with the thresholds of sum and mean."""
    spectra = {name: data.eigenvalues[:_MOST_EIGENVALUES] for name, data in study.data.items() if data.eigenvalues}
    if not spectra:
        return None
    figure, ((axes,),) = _make_panels(1, width=7.0, height=4.0)
    thresholds = {"sum over pixels": 1.0}
    for place, (name, values) in enumerate(spectra.items()):
        ranks = np.arange(1, len(values) + 1)
        axes.plot(ranks, values, ".-", color=_color(place), linewidth=1, label=name_data(name), markersize=4)
        D = study.data[name].num_pixels
        thresholds[f"mean over {D:,} pixels"] = float(D)
    for name, threshold in thresholds.items():
        axes.axhline(threshold, color=_ink(), linewidth=0.9, linestyle="--")
        label, to_right = f"{name}: {threshold:,.4g}", axes.get_yaxis_transform()
        axes.text(0.985, 1.08 * threshold, label, transform=to_right, ha="right", va="bottom", fontsize=8.5)
    axes.set(xscale="log", yscale="log", xlabel="direction, by eigenvalue", ylabel="eigenvalue / noise")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_ylim(top=2.2 * max([*thresholds.values(), *(max(values) for values in spectra.values())]))
    axes.legend(loc="center right")
    return figure


_MEASURES: dict[str, str] = {
    "classifier": "classifier's effect: 0 alike, 1 apart",
    "largest_distance": "largest Kolmogorov-Smirnov distance",
    "holes": "share of prior draws in holes",
    "mutual_information": "mutual information, nats",
}


def draw_aggregate(study: StudyNumbers) -> Figure | None:
    """Four measures of codes against the prior along beta; dashed: the autoencoder."""
    sweeps = {name: [run for run in sweep if run.prior_match] for name, sweep in _sweeps(study).items()}
    if not any(sweeps.values()):
        return None
    figure, panels = _make_panels(2, 2, height=2.9)
    for axes, (measure, title) in zip(panels.flat, _MEASURES.items(), strict=True):
        for place, (dataset, sweep) in enumerate(sweeps.items()):
            values = [getattr(run.prior_match, measure) for run in sweep]
            _draw_curve(axes, _betas(sweep), values, label=name_data(dataset), place=place)
            run = study.find_run(plan.autoencoder_name(dataset))
            value = None if run is None else getattr(run.prior_match, measure, None)
            if value is not None:
                label = f"{name_data(dataset)}, autoencoder"
                axes.axhline(_mean(value), color=_color(place), linewidth=1, linestyle="--", label=label)
        _set_beta_axis(axes)
        axes.set_title(title)
        if measure != "mutual_information":
            axes.set_ylim(-0.04, 1.04)
    panels[0, 0].legend()
    return figure


# --- Bars ---


def _draw_bars(axes: Axes, title: str, bars: dict[str, Value], mark: tuple[str, Value]) -> None:
    """Bars with their errors, and a dashed line across."""
    means, places = [_mean(value) for value in bars.values()], range(len(bars))
    colors, stderr = [_color(place) for place in places], [_stderr(value) for value in bars.values()]
    axes.bar(places, means, yerr=stderr, capsize=3, color=colors, ecolor=_ink(), width=0.7)
    axes.set_xticks(places, [name.replace(", ", ",\n") for name in bars])
    axes.grid(visible=False, axis="x")
    axes.axhline(_mean(mark[1]), color=_ink(), linewidth=1, linestyle="--", label=mark[0])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, borderpad=0)  # above, for bars fill it
    axes.set_title(title, loc="left")


def draw_sharpness(study: StudyNumbers) -> Figure | None:
    """Sharpness of reconstructions and distances of samples, of the first data set."""
    dataset = next(iter(study.blur), None)
    if dataset is None:
        return None
    sharpness: dict[str, Value] = {}
    distances: dict[str, Value] = {}
    for model, name in (("VAE", plan.sweep_name(dataset, 1.0)), ("AE", plan.autoencoder_name(dataset))):
        run = study.find_run(name)
        if run is not None and run.blur is not None and run.samples is not None:
            sharpness["autoencoder" if model == "AE" else model] = run.blur.sharpness
            distances[f"{model}, prior"] = run.samples.frechet
            distances |= {f"{model}, {word}": density.quality.frechet for word, density in run.densities.items()}
    figure, ((left, right),) = _make_panels(2)
    _draw_bars(left, "power of reconstructions", sharpness, ("the test images", 1.0))
    _draw_bars(
        right, "Fréchet distance of samples", distances, ("other real images", study.blur[dataset].floor.frechet)
    )
    right.tick_params(axis="x", labelsize=7)
    return figure


_BLUR_PARTS = {
    "autoencoder_error": "the autoencoder's error",
    "posterior_noise": "posterior noise",
    "lost": "the rest",
}


def draw_blur(study: StudyNumbers) -> Figure | None:
    """A stacked bar for each data set of the parts of the squared error; a negative part is drawn to the left of 0."""
    if not study.blur:
        return None
    figure, ((axes,),) = _make_panels(1, height=1.5 + 0.6 * len(study.blur))
    for row, blur in enumerate(study.blur.values()):
        ends = {True: 0.0, False: 0.0}
        for place, (name, words) in enumerate(_BLUR_PARTS.items()):
            value = blur.parts[name].mean
            label = words if row == 0 else None
            axes.barh(row, value, left=ends[value >= 0], color=_color(place), height=0.6, label=label)
            ends[value >= 0] += value
    axes.set_yticks(range(len(study.blur)), [name_data(dataset) for dataset in study.blur])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=_ink(), linewidth=0.8)
    axes.set_xlabel("squared error per pixel")
    figure.legend(loc="outside upper center", ncols=len(_BLUR_PARTS))
    return figure


FIGURES: dict[str, Callable[[StudyNumbers], Figure | None]] = {
    "spectrum": draw_spectrum,
    "active": draw_active,
    "rate-distortion": draw_rate_distortion,
    "bounds": draw_bounds,
    "sharpness": draw_sharpness,
    "blur": draw_blur,
    "aggregate": draw_aggregate,
}
