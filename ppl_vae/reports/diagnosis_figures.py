"""The figures of a diagnosis, from its measurements and the run's weights."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.diagnostics import ACTIVE_VARIANCE
from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.evidence.moments import mean_or_draw
from ppl_vae.reports.display import choose_display
from ppl_vae.reports.figures.charts import make_figure, pixel_calibration
from ppl_vae.reports.figures.images import image_rows
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run

_SHOWN = 12


def list_figures(run: Run, numbers: Measurements) -> list[str]:
    """The names of the figures that these measurements have."""
    has_images = len(run.splits.event_shape) > 1
    is_drawn = {
        "diagnosis-latents.png": True,
        "diagnosis-aggregate.png": True,
        "diagnosis-noise.png": numbers.noise is not None and not numbers.autoencoder,
        "diagnosis-holes.png": has_images and numbers.aggregate.holes is not None,
        "diagnosis-pixels.png": numbers.calibration is not None,
    }
    return [name for name, drawn in is_drawn.items() if drawn]


def diagnosis_figures(run: Run, numbers: Measurements, x: Tensor) -> dict[str, Figure]:
    """Every figure by the name of its file. x: (N, *E) the images, as the model sees them."""
    draw = {
        "diagnosis-latents.png": lambda: _draw_latents(numbers),
        "diagnosis-aggregate.png": lambda: _draw_aggregate(numbers),
        "diagnosis-noise.png": lambda: _draw_noise(numbers),
        "diagnosis-holes.png": lambda: _draw_holes(run, numbers, x),
        "diagnosis-pixels.png": lambda: _draw_pixels(run, numbers),
    }
    return {name: draw[name]() for name in list_figures(run, numbers)}


def _draw_latents(numbers: Measurements) -> Figure:
    """KL, and variance of the posterior mean, of each latent, the most used first; inactive ones are gray."""
    active, kl = numbers.active, numbers.kl_by_latent
    variance = active.mean.numpy()
    figure = make_figure(f"Which latents carry anything: {active.count} of {numbers.latent_dim} are active")
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
    panels[-1].set_ylim(bottom=min(ACTIVE_VARIANCE / 100, max(1e-6, float(variance.min()) / 2)))
    panels[-1].axhline(ACTIVE_VARIANCE, color="black", linestyle="--", label=f"active above {ACTIVE_VARIANCE}")
    panels[-1].set_ylabel("variance over images of E[z_l | x] / the prior's", fontsize=9)
    panels[-1].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel("latents, the most used first (gray: inactive)", fontsize=8)
    return figure


def _draw_aggregate(numbers: Measurements) -> Figure:
    """Mean and log scale of the aggregate posterior of each latent, and its distance from the prior."""
    found = numbers.aggregate
    mean, log_scale = (each.mean.numpy() for each in (found.moments.mean, found.moments.log_scale))
    figure = make_figure("Is the aggregate posterior the prior? Each latent alone can look right while all do not")
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


def _draw_noise(numbers: Measurements) -> Figure:
    """Eigenvalues of the data's covariance in units of the noise, and the thresholds for live directions."""
    noise = numbers.noise
    assert noise is not None
    beta = numbers.trained_with.beta if numbers.trained_with else 1.0
    betas = {"beta = 1": 1.0} | ({f"beta = {beta:g}, as trained": beta} if beta not in (0, 1) else {})
    thresholds = {
        f"{name}, above what independent pixels reach" if noise.edge > value else name: max(value, noise.edge)
        for name, value in betas.items()
    } | {"a mean over pixels": float(numbers.num_pixels)}
    figure = make_figure(
        "Which directions of the data rise above the likelihood's noise\n"
        "A linear decoder near the state that ignores z learns those above the line"
    )
    axes, eigenvalues = figure.subplots(), noise.eigenvalues.numpy()
    axes.loglog(np.arange(1, len(eigenvalues) + 1), np.maximum(eigenvalues, 1e-12), marker=".", markersize=3)
    for (name, value), color in zip(thresholds.items(), ("black", "tab:red", "tab:orange"), strict=False):
        live = int((eigenvalues > value).sum())
        axes.axhline(value, color=color, label=f"{name}: {live:,} directions live above {value:.3g}")
    if numbers.active.count:
        words = f"this run: {numbers.active.count:,} active latents"
        axes.axvline(numbers.active.count, color="tab:green", linestyle=":", label=words)
    axes.set_ylim(bottom=min([*thresholds.values(), float(eigenvalues.max()) / 1e3]) / 3)
    axes.set(xlabel="directions of the data, the largest first", ylabel="variance in units of the noise")
    axes.legend(fontsize=8, loc="lower left")
    return figure


def _draw_holes(run: Run, numbers: Measurements, x: Tensor) -> Figure:
    vae, display, found = load(run.folder), choose_display(run), numbers.aggregate.holes
    assert found is not None
    dtype = next(vae.parameters()).dtype
    some = x[torch.linspace(0, len(x) - 1, min(_SHOWN, len(x))).long()].cpu()
    rows = {
        "prior draws\nthat posteriors\ncover least": vae.likelihood(torch.tensor(found.worst, dtype=dtype)).mean,
        "ordinary\nprior draws": vae.likelihood(torch.tensor(found.ordinary, dtype=dtype)).mean,
        "reconstructions": vae.likelihood(mean_or_draw(vae.posterior(some))).mean,
        "their images": some,
    }
    if run.pixels == "dequantized":  # drawn as levels, which is what the display expects
        rows = {name: 256 * images - 0.5 for name, images in rows.items()}
    shown = min(map(len, rows.values()))
    title = (
        "Does E[x | z] of prior draws look like that of images?\n"
        f"{found.share.mean:.1%} of prior draws are in holes ({found.expected:.0%} if the aggregate posterior were the "
        f"prior), a classifier tells the two apart with an effect of {numbers.aggregate.classifier.effect.mean:.2f} "
        "(0: alike, 1: apart)"
    )
    return image_rows({name: display(images[:shown]) for name, images in rows.items()}, title=title)


def _draw_pixels(run: Run, numbers: Measurements) -> Figure:
    found = numbers.calibration
    assert found is not None
    title = f"Where pixels lie in p(x | z), {found.num_images:,} images: flat is right"
    return pixel_calibration({run.options.likelihood: found}, title=title)
