"""The study's figures, its numbers as cells of tables, and its pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ppl_vae import runs
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.page import Block, Picture, Table, true_minus
from ppl_vae.study.plan import name_run
from ppl_vae.study.results import Difference, RunNumbers, StudyNumbers

Value = Estimate | Difference | float | None

_MOST_EIGENVALUES = 200
_NEAR = 3.0  # nats below the best bound that its figure shows


def draw_figures(study: StudyNumbers) -> dict[str, Figure]:
    """Every figure of the study, by name."""
    return {name: draw(study) for name, draw in _FIGURES.items()}


def _make_panels(study: StudyNumbers, *, height: float = 3.6) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel for each data set, and its panels."""
    figure = Figure(figsize=(9.0, height), layout="constrained")
    panels = figure.subplots(1, len(study.datasets), squeeze=False)[0]
    for axes, dataset in zip(panels, study.datasets, strict=True):
        axes.set_title(dataset)
    return figure, dict(zip(study.datasets, panels, strict=True))


def _mean(value: Value) -> float:
    """The number itself, or the mean; NaN where it is not known."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) else value.mean


def _draw_curve(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Value],
    *,
    label: str,
    place: int,
    hollow: Sequence[bool] | None = None,
) -> None:
    """Means with their errors in the color of that place; the marks of what has not settled are hollow."""
    color, mean = f"C{place}", [_mean(value) for value in values]
    stderr = [value.stderr if isinstance(value, Estimate | Difference) else 0.0 for value in values]
    axes.errorbar(x, mean, yerr=stderr, color=color, capsize=2, label=label)
    for k, is_hollow in enumerate(hollow or [False] * len(mean)):
        axes.plot(x[k], mean[k], "o", color=color, markersize=4.5, fillstyle="none" if is_hollow else "full")


def _set_beta_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("beta")
    axes.axvline(1, color="black", linewidth=0.7, linestyle=":")


def _betas(runs: Sequence[RunNumbers]) -> list[float]:
    return [run.beta for run in runs]


def draw_rate_distortion(study: StudyNumbers) -> Figure:
    """Distortion against rate, with the line of the best ELBO and the mean over pixels."""
    figure, panels = _make_panels(study, height=4.2)
    for dataset, axes in panels.items():
        sweep = study.find_sweep(dataset)
        rate = np.array([_mean(run.kl) for run in sweep])
        distortion = np.array([-_mean(run.reconstruction) for run in sweep])
        axes.plot(rate, distortion, "o-", markersize=4.5, label="along beta")
        for run, *at in zip(sweep, rate, distortion, strict=True):
            axes.annotate(f"{run.beta:g}", (at[0], at[1]), (5, 5), textcoords="offset points", fontsize=8)
        limits = axes.get_xlim(), axes.get_ylim()
        for mean in study.find_runs([name_run(dataset, "mean-over-pixels")]):
            axes.plot(_mean(mean.kl), -_mean(mean.reconstruction), "X", markersize=8, label="a mean over pixels")
        best = (rate + distortion).min()
        axes.axline((0, best), slope=-1, color="black", linewidth=0.7, linestyle=":", label="the best ELBO")
        axes.set(xlabel="rate: KL, nats per image", ylabel="distortion: -E[log p(x | z)], nats")
        axes.set(xlim=limits[0], ylim=limits[1])
        axes.legend()
    return figure


def draw_bounds(study: StudyNumbers) -> Figure:
    """Paired differences to beta = 1 of the betas within some nats of the best; a panel for each data set."""
    figure, panels = _make_panels(study)
    for dataset, axes in panels.items():
        sweep = study.find_sweep(dataset)
        near: list[tuple[float, float]] = []
        for place, label in enumerate(("ELBO", "L_S, the bound on log p(x)")):
            found = [study.find_differences("beta", run.name)[place] for run in sweep]
            values = [each or Estimate(0.0, 0.0) for each in found]  # beta = 1 itself has no difference
            hollow = [place == 1 and run.reliable is False for run in sweep]
            _draw_curve(axes, _betas(sweep), values, label=label, place=place, hollow=hollow)
            best = max(value.mean for value in values)
            near += [(b, v.mean) for b, v in zip(_betas(sweep), values, strict=True) if v.mean > best - _NEAR]
        _set_beta_axis(axes)
        axes.axhline(0, color="black", linewidth=0.7, linestyle=":")
        betas, gains = zip(*near, strict=True)
        margin = 0.12 * max(max(gains) - min(gains), 0.5)
        axes.set(xlim=(min(betas) / 1.4, max(betas) * 1.4), ylim=(min(gains) - margin, max(gains) + margin))
        axes.set_xticks(sorted(set(betas)), [f"{beta:g}" for beta in sorted(set(betas))])
        axes.set_ylabel("nats per image, minus those of beta = 1")
        axes.legend()
    return figure


def draw_active(study: StudyNumbers) -> Figure:
    """Active latents along beta, measured and predicted by the eigenvalues; a panel for each data set."""
    figure, panels = _make_panels(study)
    for dataset, axes in panels.items():
        runs = study.find_sweep(dataset) + study.find_runs([name_run(dataset, "beta-of-mean")])
        L = runs[0].options["latent_dim"]
        predicted = [min(L, study.count_directions(run)) for run in runs]
        axes.plot(_betas(runs), predicted, "--", color="C1", label="predicted: linear VAE")
        _draw_curve(axes, _betas(runs), [run.active for run in runs], label="measured", place=0)
        for mean in study.find_runs([name_run(dataset, "mean-over-pixels")]):
            axes.plot(study.threshold(mean), _mean(mean.active), "X", color="C3", label="a mean over pixels")
        _set_beta_axis(axes)
        axes.set_ylabel(f"active latents of {L}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def draw_spectrum(study: StudyNumbers) -> Figure:
    """Eigenvalues of the data's covariance in units of the likelihood's noise, with the thresholds of sum and mean."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    thresholds = {"sum over pixels": 1.0}
    for name, data in study.data.items():
        values = data.eigenvalues[:_MOST_EIGENVALUES]
        axes.plot(range(1, len(values) + 1), values, ".-", linewidth=1, label=name, markersize=4)
        thresholds[f"mean over {data.num_pixels:,} pixels"] = float(data.num_pixels)
    for name, threshold in thresholds.items():
        axes.axhline(threshold, color="black", linewidth=0.9, linestyle="--")
        axes.text(0.985, 1.08 * threshold, name, transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="direction, by eigenvalue", ylabel="eigenvalue / noise")
    axes.legend(loc="center right")
    return figure


_MEASURES: dict[str, str] = {
    "classifier": "classifier's effect: 0 alike, 1 apart",
    "largest_distance": "largest Kolmogorov-Smirnov distance",
    "holes": "share of prior draws in holes",
    "mutual_information": "mutual information, nats",
}


def draw_aggregate(study: StudyNumbers) -> Figure:
    """Four measures of codes against the prior along beta; dashed: the autoencoder."""
    figure = Figure(figsize=(9.0, 5.8), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, (measure, title) in zip(panels.flat, _MEASURES.items(), strict=True):
        for place, dataset in enumerate(study.datasets):
            sweep = study.find_sweep(dataset)
            values = [getattr(run.prior_match, measure, None) for run in sweep]
            _draw_curve(axes, _betas(sweep), values, label=dataset, place=place)
            for run in study.find_runs([name_run(dataset, "autoencoder")]):
                value = _mean(getattr(run.prior_match, measure, None))
                axes.axhline(value, color=f"C{place}", linewidth=1, linestyle="--")
        _set_beta_axis(axes)
        axes.set_title(title)
    panels[0, 0].legend()
    return figure


_FIGURES: dict[str, Callable[[StudyNumbers], Figure]] = {
    "spectrum": draw_spectrum,
    "active": draw_active,
    "rate-distortion": draw_rate_distortion,
    "bounds": draw_bounds,
    "aggregate": draw_aggregate,
}


# --- Tables ---


Cell = Estimate | Difference | str | float | int | None

_TWO_DIGITS = 3.55  # an error whose digits are below it has two of them. Source: the Particle Data Group's rule


def format_mean(value: Estimate | Difference | None, *, scale: float = 1.0, signed: bool = False) -> str | None:
    """mean ± stderr, with one or two digits of the error; None where nothing is known.

    >>> format_mean(Estimate(-85.118, 0.217))
    '-85.12 ± 0.22'
    """
    if value is None:
        return None
    mean, stderr = scale * value.mean, abs(scale) * value.stderr
    sign = "+" if signed and mean > 0 else ""
    if not stderr or not math.isfinite(stderr):
        return f"{sign}{mean:.4g}"
    power = math.floor(math.log10(stderr))
    decimals = (1 if stderr / 10**power < _TWO_DIGITS else 0) - power
    if decimals > 6:
        return f"{sign}{mean:.3g} ± {stderr:.1g}"
    decimals = max(0, decimals)
    return f"{sign}{round(mean, decimals) + 0.0:,.{decimals}f} ± {stderr:,.{decimals}f}"


def format_share(value: Estimate | None) -> str | None:
    """A share with its error, as a percentage."""
    text = format_mean(value, scale=100.0)
    return None if text is None else f"{text}%"


def format_cell(value: Cell) -> str | float | int | None:
    """A cell of a table: estimates with their errors, and differences with their signs."""
    if isinstance(value, Difference):
        return true_minus(f"{format_mean(value, signed=True)}" + (f" ({value.remark})" if value.remark else ""))
    value = format_mean(value) if isinstance(value, Estimate) else value
    return true_minus(value) if isinstance(value, str) else value


def make_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> list[Block]:
    """A table without columns that are empty in every row; nothing if there is no row."""
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    cells = [[format_cell(row[k]) for k in kept] for row in rows]
    return [Table([columns[k] for k in kept], cells, caption)] if rows else []


# --- Pictures ---


@dataclass(frozen=True)
class PageSource:
    """What the page is made of: the numbers, and the study's folder with its pictures and figures."""

    study: StudyNumbers
    folder: Path

    def show_figure(self, name: str, caption: str) -> list[Block]:
        """The figure, if it was drawn."""
        png = self.read_picture(f"{runs.FIGURES}/{name}.png")
        return [] if png is None else [Picture(png, caption, caption)]

    def read_picture(self, path: str | None) -> bytes | None:
        """The bytes of a picture in the study's folder, if it exists."""
        place = None if path is None else self.folder / path
        return place.read_bytes() if place is not None and place.is_file() else None

    def read_run_picture(self, run: str, name: str) -> bytes | None:
        """A run's picture by its name, if it exists."""
        found = self.study.runs.get(run)
        return None if found is None else self.read_picture(found.pictures.get(name))

    def read_originals(self, dataset: str) -> bytes | None:
        """The test images of a data set that are shown."""
        return self.read_picture(self.study.data[dataset].originals)


def stack_strips(named: Sequence[tuple[str, bytes | None]], caption: str) -> list[Block]:
    """Strips of one width below each other, named from the top in the caption; nothing for fewer than two."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    images = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")) for _, strip in known]
    gap = np.full((2, *images[0].shape[1:]), 128, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.concatenate([part for image in images for part in (image, gap)][:-1])).save(out, format="png")
    words = f"From the top: {'; '.join(name for name, _ in known)}. {caption}"
    return [Picture(out.getvalue(), words, words)]
