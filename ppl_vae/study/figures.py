"""The study's figures, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.study.plan import name_run
from ppl_vae.study.results import Difference, RunNumbers, StudyNumbers

Value = Estimate | Difference | float | None

_NEAR = 3.0  # nats below the best bound that its figure shows
_APART = 0.06  # of the axes' lengths, between points with a label


def _make_panels(study: StudyNumbers, *, height: float = 3.6) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel for each data set, and its panels."""
    figure = Figure(figsize=(9.0, height), layout="constrained")
    panels = dict(zip(study.datasets, figure.subplots(1, len(study.datasets), squeeze=False)[0], strict=True))
    for dataset, axes in panels.items():
        axes.set_title(dataset)
    return figure, panels


def _mean(value: Value) -> float:
    """The number itself, or the mean; NaN where it is not known."""
    if value is None:
        return math.nan
    return value.mean if isinstance(value, Estimate | Difference) else float(value)


def _draw_curve(
    axes: Axes, runs: Sequence[RunNumbers], values: Sequence[Value], *, label: str, color: str, hollow: bool = False
) -> None:
    """Means with their errors along beta. ``hollow``: with hollow marks where a run's L_S has not settled."""
    means = [_mean(value) for value in values]
    stderr = [getattr(value, "stderr", 0.0) for value in values]
    axes.errorbar([run.beta for run in runs], means, yerr=stderr, color=color, capsize=2, label=label)
    for run, mean in zip(runs, means, strict=True):
        fillstyle = "none" if hollow and run.reliable is False else "full"
        axes.plot(run.beta, mean, "o", color=color, markersize=4.5, fillstyle=fillstyle)


def _set_beta_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("beta")
    axes.axvline(1, color="0.5", linewidth=0.7, linestyle=":")


def draw_rate_distortion(study: StudyNumbers) -> Figure:
    """Distortion against rate, with the line of the best ELBO."""
    figure, panels = _make_panels(study, height=4.2)
    for dataset, axes in panels.items():
        sweep = study.find_sweep(dataset)
        rate = np.array([_mean(run.kl) for run in sweep])
        distortion = np.array([-_mean(run.reconstruction) for run in sweep])
        axes.plot(rate, distortion, "o-", markersize=4.5, label="along beta")
        labelled: list[tuple[float, float]] = []  # where they would not lie on each other, beta = 1 first
        for run, x, y in sorted(
            zip(sweep, rate, distortion, strict=True), key=lambda point: abs(math.log(point[0].beta))
        ):
            at = x / rate.max(), y / distortion.max()
            if all(math.dist(at, other) > _APART for other in labelled):
                axes.annotate(f"{run.beta:g}", (x, y), (5, 5), textcoords="offset points", fontsize=8)
                labelled.append(at)
        axes.margins(0.16)
        best, limits = (rate + distortion).min(), (axes.get_xlim(), axes.get_ylim())
        axes.axline((0, best), slope=-1, color="0.5", linewidth=0.7, linestyle=":", label="the best ELBO")
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
            _draw_curve(axes, sweep, values, label=label, color=f"C{place}", hollow=place == 1)
            best = max(value.mean for value in values)
            near += [(run.beta, v.mean) for run, v in zip(sweep, values, strict=True) if v.mean > best - _NEAR]
        _set_beta_axis(axes)
        axes.axhline(0, color="0.5", linewidth=0.7, linestyle=":")
        betas, gains = zip(*near, strict=True)
        margin = 0.12 * max(max(gains) - min(gains), 0.5)
        axes.set(xlim=(min(betas) / 1.4, max(betas) * 1.4), ylim=(min(gains) - margin, max(gains) + margin))
        axes.set_xticks(sorted(set(betas)), [f"{beta:g}" for beta in sorted(set(betas))])
        axes.set_ylabel("nats per image, minus beta = 1")
        axes.legend(loc="lower center", fontsize=8)
    return figure


def draw_active(study: StudyNumbers) -> Figure:
    """Active latents along beta, measured and predicted by the eigenvalues; a panel for each data set."""
    figure, panels = _make_panels(study)
    for dataset, axes in panels.items():
        runs = study.find_sweep(dataset) + study.find_runs([name_run(dataset, "beta-of-mean")])
        L = runs[0].options["latent_dim"]
        predicted = [min(L, study.count_directions(run)) for run in runs]
        axes.plot([run.beta for run in runs], predicted, "--", color="C1", label="predicted: linear VAE")
        _draw_curve(axes, runs, [run.active for run in runs], label="measured", color="C0")
        _set_beta_axis(axes)
        axes.set_ylabel(f"active latents of {L}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


FIGURES: dict[str, Callable[[StudyNumbers], Figure]] = {
    "active": draw_active,
    "rate-distortion": draw_rate_distortion,
    "bounds": draw_bounds,
}
