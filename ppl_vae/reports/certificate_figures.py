"""The figures of a certificate, drawn from its numbers of each image."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.commands.certificate_numbers import Measured
from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.evidence.rank_statistics import Ranks, bin_edges, count_ranks, cumulative_band
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import choose_display
from ppl_vae.runs.open import Run

_SHOWN, _COLUMNS = 20, 10
_WORST = 2  # latents


def certificate_figures(run: Run, entry: dict[str, Any], found: Measured, x: Tensor) -> dict[str, Figure]:
    """By the name that follows "certificate-SPLIT-": those that there are numbers for.

    Args:
        run: the run.
        entry: of evaluation.json.
        found: the numbers of each image.
        x: (N, *E) the images of the split.
    """
    figures = {"agreement": _agreement(entry, found), "convergence": _convergence(entry)}
    if found.simulated is not None:
        figures["simulated"] = _sandwich(entry, found)
    if entry["gaps"] is not None:
        figures["gaps"] = _gaps(entry)
    if found.ranks is not None:
        figures["calibration"] = _calibration(entry, found.ranks)
    if found.scored is not None:
        figures["against"] = _against(entry, *found.scored)
    if len(run.splits.event_shape) > 1:
        figures["images"] = _doubtful(run, found, x)
    return figures


def _agreement(entry: dict[str, Any], found: Measured) -> Figure:
    S, margin = entry["num_particles"], UNRELIABLE_BIAS
    rows = {
        f"L_{S} with the guide": found.plain.log_evidence.numpy(),
        f"L_{S} with a normal refined for each image": found.improved.log_evidence.numpy(),
    }
    title = (
        f"Two ways to log p(x), {entry['num_images']:,} {entry['split']} images: all are lower bounds, and the higher "
        "is the tighter\nOn the line they agree, so that either has lost little, or both have lost the same"
    )
    first, flagged = found.chains.bound.numpy(), found.unreliable.numpy()
    return plots.agreement(
        first, rows, name="annealed importance sampling", flagged=flagged, title=title, margin=margin
    )


def _sandwich(entry: dict[str, Any], found: Measured) -> Figure:
    assert found.simulated is not None
    below, above = found.simulated
    title = (
        f"log p(x) from both sides, on {len(below.bound):,} images simulated from the model\n"
        "The upper bound needs an exact draw of p(z | x), so it says nothing certain about real data"
    )
    return plots.sandwich(below.bound.numpy(), above.bound.numpy(), title=title)


def _convergence(entry: dict[str, Any]) -> Figure:
    found = entry["convergence"]
    curves = {
        words: plots.Curve(
            found[name]["effort"], np.array(found[name]["minus_ais"]), np.nan_to_num(found[name]["minus_ais_stderr"])
        )
        for name, words in (("temperatures", "temperatures"), ("particles", "importance samples with the guide"))
    }
    title = f"How the bounds rise with effort, on {found['num_images']:,} of the images: flat at the right is settled"
    return plots.convergence(curves, title=title)


def _gaps(entry: dict[str, Any]) -> Figure:
    words = {
        "approximation": "approximation: the best guide of this family, image by image",
        "amortization": "amortization: one network for all images",
    }
    rows = {
        f"{split}, {found['num_images']:,} images": {
            text: (found[name]["mean"], found[name]["stderr"]) for name, text in words.items()
        }
        for split, found in entry["gaps"].items()
    }
    title = "Where log p(x) - ELBO is lost; what is much longer for validation than for train is overfitted inference"
    return plots.gap_bars(rows, title=title)


def _calibration(entry: dict[str, Any], ranks: Ranks) -> Figure:
    """The rank of log p(x, z), those of the latents that are most off, and those of all latents together."""
    N, M, L = len(ranks.log_joint), ranks.num_draws, ranks.latents.shape[1]
    bins = bin_edges(N, M)
    shares = bins.diff().double() / (M + 1)
    counts = count_ranks(ranks.all, bins)  # (L + 1, K), the last of log p(x, z)
    histograms = {"log p(x, z)": plots.RankHistogram(counts[-1].numpy())}
    for latent in judge(ranks).worst[:_WORST]:
        words = entry["calibration"]["words"][latent]
        histograms[f"z{latent}: {words}"] = plots.RankHistogram(counts[latent].numpy())
    if L > 1:
        histograms[f"all {L} latents together"] = plots.RankHistogram(counts[:-1].sum(0).numpy(), band=False)
    inner, lower, upper = cumulative_band(N, M)
    below = counts.cumsum(1)[:, :-1].double() / N
    title = fill(f"Is the guide the posterior, on images of the model's own? {entry['calibration']['verdict']}", 125)
    return plots.calibration_ranks(
        histograms,
        shares=shares.numpy(),
        edges=inner.numpy(),
        lower=lower.numpy(),
        upper=upper.numpy(),
        latents=below[:-1].numpy(),
        joint=below[-1].numpy(),
        title=title,
    )


def _against(entry: dict[str, Any], own: Tensor, other: Tensor) -> Figure:
    found = entry["against"]
    auroc = found["auroc_of_density"]
    title = (
        f"log p(x) of {found['dataset']} under a model of {entry['dataset']}: tells the two apart with an AUROC of "
        f"{auroc['mean']:.3f} ± {auroc['stderr']:.3f}\nA density says how probable an image is, not whether it is like "
        "the data: simpler images can score higher"
    )
    return plots.against(
        own.numpy(),
        other.numpy(),
        name=f"L_{entry['num_particles']}",
        names=(f"{entry['dataset']}, {entry['split']}", f"{found['dataset']}, test"),
        median=float(own.median()),
        title=title,
    )


def _doubtful(run: Run, found: Measured, x: Tensor) -> Figure:
    """The images whose bounds lie farthest apart, the farthest first; all of the unreliable ones that fit."""
    apart = (found.chains.bound - found.improved.log_evidence).abs()
    flagged = found.unreliable
    order = (apart + 1e9 * flagged).argsort(descending=True)[: max(_COLUMNS, min(_SHOWN, int(flagged.sum())))]
    captions = [
        f"{'! ' if flagged[i] else ''}{int(found.index[i])}\nAIS {found.chains.bound[i]:.1f}\n"
        f"refined {found.improved.log_evidence[i]:.1f}\nguide {found.plain.log_evidence[i]:.1f}"
        for i in order.tolist()
    ]
    count = int(flagged.sum())
    told = (
        f"{count:,} of {len(flagged):,}, marked !, are unreliable"
        if count
        else f"none of {len(flagged):,} is unreliable"
    )
    title = f"Images whose bounds are farthest apart: {told}"
    return plots.pictured(choose_display(run)(x[order]), captions, columns=_COLUMNS, title=title)
