"""The figures of a certificate, from the numbers of each image and their summary."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.evidence.rank_statistics import Ranks, bin_edges, count_ranks, cumulative_band
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import choose_display
from ppl_vae.runs.certificate_results import Certificate, ConvergenceCurve, GuideVerdict, OtherDataset, SplitGap
from ppl_vae.runs.certified_images import CertifiedImages, ScoredImages
from ppl_vae.runs.open import Run

_NUM_SHOWN, _NUM_COLUMNS = 20, 10
_NUM_WORST = 2  # latents


def certificate_figures(run: Run, certificate: Certificate, found: CertifiedImages, x: Tensor) -> dict[str, Figure]:
    """The figures for which there are numbers, by the name that follows "certificate-SPLIT-".

    Args:
        run: the run.
        certificate: the summary.
        found: the numbers of each image.
        x: (N, *E) the images of the split.
    """
    figures = {"agreement": _draw_agreement(certificate, found), "convergence": _draw_convergence(certificate)}
    if found.simulated is not None:
        below, above = (side.bound.numpy() for side in found.simulated)
        title = (
            f"log p(x) from both sides, on {len(below):,} images simulated from the model\n"
            "The upper bound needs an exact draw of p(z | x), so it says nothing certain about real data"
        )
        figures["simulated"] = plots.sandwich(below, above, title=title)
    if certificate.gaps is not None:
        figures["gaps"] = _draw_gaps(certificate.gaps)
    if found.ranks is not None and certificate.calibration is not None:
        figures["calibration"] = _draw_calibration(certificate.calibration, found.ranks)
    if found.scored is not None and certificate.against is not None:
        figures["against"] = _draw_other(certificate, certificate.against, found.scored)
    if len(run.splits.event_shape) > 1:
        figures["images"] = _draw_doubtful_images(run, found, x)
    return figures


def _draw_agreement(certificate: Certificate, found: CertifiedImages) -> Figure:
    S = certificate.num_particles
    rows = {
        f"L_{S} with the guide": found.plain.log_evidence.numpy(),
        f"L_{S} with a normal refined for each image": found.improved.log_evidence.numpy(),
    }
    title = (
        f"Two ways to log p(x), {certificate.num_images:,} {certificate.split} images: all are lower bounds, and the "
        "higher is the tighter\nOn the line they agree, so that either has lost little, or both have lost the same"
    )
    first, flagged, name = found.chains.bound.numpy(), found.unreliable.numpy(), "annealed importance sampling"
    return plots.agreement(first, rows, name=name, flagged=flagged, title=title, margin=UNRELIABLE_BIAS)


def _draw_convergence(certificate: Certificate) -> Figure:
    found = certificate.convergence

    def curve(values: ConvergenceCurve) -> plots.EffortCurve:
        return plots.EffortCurve(values.effort, np.array(values.minus_ais), np.nan_to_num(values.minus_ais_stderr))

    title = f"How the bounds rise with effort, on {found.num_images:,} of the images: flat at the right is settled"
    curves = {
        "temperatures": curve(found.temperatures),
        "importance samples with the guide": curve(found.particles),
    }
    return plots.convergence(curves, title=title)


def _draw_gaps(gaps: dict[str, SplitGap]) -> Figure:
    rows = {}
    for split, found in gaps.items():
        parts = {
            "approximation: the best guide of this family, image by image": found.approximation,
            "amortization: one network for all images": found.amortization,
        }
        row = {words: (part.mean, part.stderr) for words, part in parts.items()}
        rows[f"{split}, {found.num_images:,} images"] = row
    title = "Where log p(x) - ELBO is lost; what is much longer for validation than for train is overfitted inference"
    return plots.gap_bars(rows, title=title)


def _draw_calibration(verdict: GuideVerdict, ranks: Ranks) -> Figure:
    """The ranks of log p(x, z), of the latents that are most off, and of all latents together."""
    N, M, L = len(ranks.log_joint), ranks.num_draws, ranks.latents.shape[1]
    bins = bin_edges(N, M)
    counts = count_ranks(ranks.all, bins)  # (L + 1, K), the last of log p(x, z)
    histograms = {"log p(x, z)": plots.RankHistogram(counts[-1].numpy())}
    for latent in judge(ranks).worst[:_NUM_WORST]:
        histograms[f"z{latent}: {verdict.words[latent]}"] = plots.RankHistogram(counts[latent].numpy())
    if L > 1:
        histograms[f"all {L} latents together"] = plots.RankHistogram(counts[:-1].sum(0).numpy(), band=False)
    inner, lower, upper = cumulative_band(N, M)
    below = counts.cumsum(1)[:, :-1].double() / N
    return plots.calibration_ranks(
        histograms,
        shares=(bins.diff().double() / (M + 1)).numpy(),
        edges=inner.numpy(),
        lower=lower.numpy(),
        upper=upper.numpy(),
        latents=below[:-1].numpy(),
        joint=below[-1].numpy(),
        title=fill(f"Is the guide the posterior, on images of the model's own? {verdict.verdict}", 125),
    )


def _draw_other(certificate: Certificate, found: OtherDataset, scored: ScoredImages) -> Figure:
    auroc = found.auroc_of_density
    title = (
        f"log p(x) of {found.dataset} under a model of {certificate.dataset}: tells the two apart with an AUROC of "
        f"{auroc.mean:.3f} ± {auroc.stderr:.3f}\nA density says how probable an image is, not whether it is like the "
        "data: simpler images can score higher"
    )
    return plots.against(
        scored.own.numpy(),
        scored.other.numpy(),
        name=f"L_{certificate.num_particles}",
        names=(f"{certificate.dataset}, {certificate.split}", f"{found.dataset}, test"),
        median=float(scored.own.median()),
        title=title,
    )


def _draw_doubtful_images(run: Run, found: CertifiedImages, x: Tensor) -> Figure:
    """The images whose bounds differ most, unreliable ones first."""
    difference, flagged = (found.chains.bound - found.improved.log_evidence).abs(), found.unreliable
    count = int(flagged.sum())
    order = (difference + 1e9 * flagged).argsort(descending=True)[: max(_NUM_COLUMNS, min(_NUM_SHOWN, count))]
    captions = [
        f"{'! ' if flagged[i] else ''}{int(found.index[i])}\nAIS {found.chains.bound[i]:.1f}\n"
        f"refined {found.improved.log_evidence[i]:.1f}\nguide {found.plain.log_evidence[i]:.1f}"
        for i in order.tolist()
    ]
    title = f"Images whose bounds are farthest apart: {count:,} of {len(flagged):,}, marked !, are unreliable"
    return plots.pictured(choose_display(run)(x[order]), captions, columns=_NUM_COLUMNS, title=title)
