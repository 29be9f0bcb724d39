"""The figures of comparisons, diagnoses and certificates, from their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ppl_vae.diagnostics import ACTIVE_VARIANCE
from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.evidence.guide_calibration import GuideCalibration, Ranks, bin_edges, count_ranks, cumulative_band
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.evidence.typicality import Typicality
from ppl_vae.reports.figures.charts import make_figure
from ppl_vae.reports.figures.images import choose_display, image_rows
from ppl_vae.reports.text.pages import TITLES
from ppl_vae.runs.certificates import Certificate, CertifiedImages
from ppl_vae.runs.command_results import Comparison
from ppl_vae.runs.open import Run

_NUM_SHOWN = 10  # doubtful images
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
    right.set_xlabel(fill(f"{second_name} minus {first_name}, nats per image", 55))


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


def draw_latents(numbers: Measurements) -> Figure:
    """KL, and variance of the posterior mean, of each latent, the most used first; inactive ones are gray."""
    active, kl = numbers.active, numbers.kl_by_latent
    variance = active.mean.numpy()
    figure = make_figure(TITLES["diagnosis-latents"].format(active=active.count, num_latents=numbers.latent_dim))
    panels = figure.subplots(1, 1 if kl is None else 2, squeeze=False)[0]
    order = np.argsort(-(variance if kl is None else kl.mean.numpy()))
    colors = np.where(variance[order] > ACTIVE_VARIANCE, "tab:blue", "0.7")
    rank = np.arange(1, len(order) + 1)
    if kl is not None:
        panels[0].bar(rank, kl.mean.numpy()[order], yerr=kl.stderr.numpy()[order], color=colors, ecolor="0.3")
        panels[0].set_ylabel("KL(q(z_l | x) || p(z_l)), nats")
    panels[-1].bar(
        rank, np.maximum(variance[order], 1e-12), yerr=active.stderr.numpy()[order], color=colors, ecolor="0.3"
    )
    panels[-1].set_yscale("log")
    least = min(ACTIVE_VARIANCE / 100, max(1e-6, float(variance.min()) / 2))
    panels[-1].set_ylim(bottom=least, top=max(2 * ACTIVE_VARIANCE, 2 * float(variance.max())))
    panels[-1].axhline(ACTIVE_VARIANCE, color="black", linestyle="--", label=f"active above {ACTIVE_VARIANCE}")
    panels[-1].set_ylabel("variance over images of E[z_l | x] / the prior's", fontsize=9)
    panels[-1].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel("latents, the most used first (gray: inactive)", fontsize=8)
    return figure


def draw_aggregate(numbers: Measurements) -> Figure:
    """Mean and log scale of the aggregate posterior of each latent, and its distance from the prior."""
    found = numbers.aggregate
    mean, log_scale = (each.mean.numpy() for each in (found.moments.mean, found.moments.log_scale))
    figure = make_figure(TITLES["diagnosis-aggregate"])
    left, right = figure.subplots(1, 2)
    left.scatter(mean, log_scale, s=14, label="a latent")
    left.plot(0, 0, "+", color="black", markersize=12, label="the prior")
    reach = 1.1 * max(0.3, float(np.abs(mean).max()), float(np.abs(log_scale).max()))
    left.set(xlim=(-reach, reach), ylim=(-reach, reach))
    left.set_xlabel("mean of the aggregate posterior, in scales of the prior", fontsize=8)
    left.set_ylabel("log(its scale / the prior's)", fontsize=8)
    left.legend(fontsize=8, loc="lower left")
    distance, effect = np.sort(found.kolmogorov_smirnov.statistic.numpy())[::-1], found.classifier.effect
    right.bar(np.arange(1, len(distance) + 1), distance)
    right.set_ylim(0, 1)
    words = f"all latents together, a classifier's effect: {effect.mean:.2f} ± {effect.stderr:.2f}"
    right.axhline(max(0.0, effect.mean), color="tab:red", label=words)
    right.set_xlabel("latents, the farthest first", fontsize=8)
    right.set_ylabel("Kolmogorov-Smirnov distance to the prior", fontsize=8)
    right.legend(fontsize=8)
    return figure


def draw_noise(numbers: Measurements) -> Figure:
    """Eigenvalues of the data's covariance in units of the noise, and the thresholds for live directions."""
    noise = numbers.noise
    assert noise is not None
    beta = numbers.trained_with.beta if numbers.trained_with else 1.0
    own = f"beta = {beta:g}" if beta >= noise.edge else f"independent pixels by chance (beta = {beta:g} is lower)"
    thresholds = {own: max(beta, noise.edge)}
    mean = float(numbers.num_pixels)  # beta = D
    if math.isclose(thresholds[own], mean, rel_tol=0.01):  # two lines would hide each other
        thresholds = {f"{own}, and a mean over pixels": mean}
    else:
        thresholds["a mean over pixels"] = mean
    figure = make_figure(TITLES["diagnosis-noise"])
    axes, eigenvalues = figure.subplots(), noise.eigenvalues.numpy()
    axes.loglog(np.arange(1, len(eigenvalues) + 1), np.maximum(eigenvalues, 1e-12), marker=".", markersize=3)
    for (name, value), color in zip(thresholds.items(), ("black", "tab:orange"), strict=False):
        live = int((eigenvalues > value).sum())
        axes.axhline(value, color=color, label=f"{name}: {live:,} directions live above {value:.3g}")
    if numbers.active.count:
        words = f"this run: {numbers.active.count:,} active latents"
        axes.axvline(numbers.active.count, color="tab:green", linestyle=":", label=words)
    axes.set_ylim(bottom=min([*thresholds.values(), float(eigenvalues.max()) / 1e3]) / 3)
    axes.set(xlabel="directions of the data, the largest first", ylabel="variance in units of the noise")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def certificate_figures(run: Run, certificate: Certificate, found: CertifiedImages, x: Tensor) -> dict[str, Figure]:
    """The figures for which there are numbers, by the name that follows "certificate-SPLIT-".

    Args:
        run: The run.
        certificate: The summary.
        found: The numbers of each image.
        x: (N, *E) the images of the split.
    """
    figures = {"agreement": _draw_agreement(certificate, found), "convergence": _draw_convergence(certificate)}
    if found.ranks is not None and certificate.calibration is not None:
        figures["calibration"] = _draw_calibration(certificate.calibration, found.ranks)
    if found.scored is not None and certificate.against is not None:
        figures["against"] = _draw_other(certificate, certificate.against, found.scored)
    if len(run.splits.event_shape) > 1:
        figures["images"] = _draw_doubtful_images(run, found, x)
    return figures


def _draw_agreement(certificate: Certificate, found: CertifiedImages) -> Figure:
    S, chains = certificate.num_particles, {"annealed importance sampling": found.chains.bound}
    others = {
        f"L_{S} with the guide": found.plain.log_evidence,
        f"L_{S} with a normal refined for each image": found.improved.log_evidence,
    }
    title = TITLES["agreement"].format(num_images=certificate.num_images, split=certificate.split)
    figure = make_figure(title, width=9.5, height=7.8)
    margin, words = (-UNRELIABLE_BIAS, UNRELIABLE_BIAS), f"within {UNRELIABLE_BIAS:g} nats"
    for row, (name, bound) in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], others.items(), strict=True):
        draw_pair(row, {name: bound} | chains, interval=margin, interval_name=words, flagged=found.unreliable)
    return figure


def _draw_convergence(certificate: Certificate) -> Figure:
    found = certificate.convergence
    figure = make_figure(TITLES["convergence"].format(num_images=found.num_images))
    panels = figure.subplots(1, 2, sharey=True)
    curves = {"temperatures": found.temperatures, "importance samples with the guide": found.particles}
    for axes, (words, curve) in zip(panels, curves.items(), strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8)
        stderr = np.nan_to_num(curve.minus_ais_stderr)
        axes.errorbar(curve.effort, curve.minus_ais, yerr=stderr, marker=".", capsize=2)
        axes.set_xscale("log")
        axes.set_xticks(curve.effort, [f"{effort:,}" for effort in curve.effort], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(words)
    panels[0].set_ylabel("bound minus that of the most temperatures, nats")
    return figure


def _draw_calibration(verdict: GuideCalibration, ranks: Ranks) -> Figure:
    """The share of ranks below each edge minus that of uniform ranks, of each latent and of log p(x, z)."""
    N, M = len(ranks.log_joint), ranks.num_draws
    edges, lower, upper = (each.numpy() for each in cumulative_band(N, M))
    below = count_ranks(ranks.all, bin_edges(N, M)).cumsum(1)[:, :-1].numpy() / N  # (L + 1, K - 1)
    figure = make_figure(TITLES["guide"].format(verdict=verdict.verdict))
    axes = figure.subplots()
    axes.fill_between(edges, lower - edges, upper - edges, color="0.85", label="at least 95% of exact guides")
    for row, latent in enumerate(below[:-1]):
        axes.plot(edges, latent - edges, color="tab:blue", alpha=0.5, linewidth=0.7, label=None if row else "latents")
    axes.plot(edges, below[-1] - edges, color="tab:red", linewidth=1.8, label="log p(x, z)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("rank of the z that made an image among draws of the guide, as a share of the draws")
    axes.set_ylabel("share of ranks below, minus what is right")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _draw_other(certificate: Certificate, found: Typicality, scored: tuple[Tensor, Tensor]) -> Figure:
    """Histograms of log p(x) minus the own median, linear near it and logarithmic far from it."""
    title = TITLES["against"].format(other=found.dataset, dataset=certificate.dataset, auroc=found.auroc_of_density)
    figure, (own, other) = make_figure(title), scored
    axes, median = figure.subplots(), float(own.median())
    both = {
        f"{certificate.dataset}, {certificate.split}": own.numpy() - median,
        f"{found.dataset}, test": other.numpy() - median,
    }
    unit = max(float(own.std()), 1e-6)
    ends = np.arcsinh([extreme(extreme(each) for each in both.values()) / unit for extreme in (min, max)])
    bins = unit * np.sinh(np.linspace(ends[0] - 0.05, ends[1] + 0.05, 61))
    for name, values in both.items():
        label = f"{name}: {len(values):,} images, mean {values.mean() + median:,.1f}"
        axes.hist(values, bins=bins.tolist(), weights=np.full(len(values), 100 / len(values)), alpha=0.6, label=label)
    axes.set_xscale("symlog", linthresh=unit)
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_xlabel(f"L_{certificate.num_particles} minus {median:,.1f}, the median of its own images, nats")
    axes.set_ylabel("% of its images")
    axes.legend(fontsize=8)
    return figure


def _draw_doubtful_images(run: Run, found: CertifiedImages, x: Tensor) -> Figure:
    """The images whose bounds differ most, unreliable ones first."""
    difference, flagged = (found.chains.bound - found.improved.log_evidence).abs(), found.unreliable
    order = (difference + 1e9 * flagged).argsort(descending=True)[:_NUM_SHOWN]
    captions = [
        f"{'! ' if flagged[i] else ''}{int(found.index[i])}\nAIS {found.chains.bound[i]:.1f}\n"
        f"refined {found.improved.log_evidence[i]:.1f}\nguide {found.plain.log_evidence[i]:.1f}"
        for i in order.tolist()
    ]
    title = TITLES["doubtful"].format(unreliable=int(flagged.sum()), num_images=len(flagged))
    return image_rows({"image": choose_display(run)(x[order])}, columns=captions, title=title)
