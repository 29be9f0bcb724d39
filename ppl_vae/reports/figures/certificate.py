"""The figures of a certificate, from the numbers of each image and their summary."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.evidence.guide_calibration import GuideCalibration, Ranks, bin_edges, count_ranks, cumulative_band
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.evidence.typicality import Typicality
from ppl_vae.reports.display import choose_display
from ppl_vae.reports.figures.charts import draw_pair, make_figure
from ppl_vae.reports.figures.images import image_rows
from ppl_vae.runs.certificates import Certificate, CertifiedImages
from ppl_vae.runs.open import Run

_NUM_SHOWN = 10


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
    title = (
        f"Two ways to log p(x), {certificate.num_images:,} {certificate.split} images: all are lower bounds, and the "
        "higher is the tighter\nOn the line they agree, so that either has lost little, or both have lost the same"
    )
    figure = make_figure(title, width=9.5, height=7.8)
    margin, words = (-UNRELIABLE_BIAS, UNRELIABLE_BIAS), f"within {UNRELIABLE_BIAS:g} nats"
    for row, (name, bound) in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], others.items(), strict=True):
        draw_pair(row, {name: bound} | chains, interval=margin, interval_name=words, flagged=found.unreliable)
    return figure


def _draw_convergence(certificate: Certificate) -> Figure:
    found = certificate.convergence
    figure = make_figure(
        f"How the bounds rise with effort, on {found.num_images:,} of the images: flat at the right is settled"
    )
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
    figure = make_figure(f"Is the guide the posterior, on images of the model's own?\n{verdict.verdict}")
    axes = figure.subplots()
    axes.fill_between(edges, lower - edges, upper - edges, color="0.85", label="95% of exact guides")
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
    auroc = found.auroc_of_density
    figure = make_figure(
        f"log p(x) of {found.dataset} under a model of {certificate.dataset}: tells the two apart with an AUROC of "
        f"{auroc.mean:.3f} ± {auroc.stderr:.3f}\nA density says how probable an image is, not whether it is like the "
        "data: simpler images can score higher"
    )
    own, other = scored
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
    title = (
        f"Images whose bounds are farthest apart, with their places\n{int(flagged.sum()):,} of {len(flagged):,}, "
        "marked !, are unreliable"
    )
    return image_rows({"image": choose_display(run)(x[order])}, columns=captions, title=title)
