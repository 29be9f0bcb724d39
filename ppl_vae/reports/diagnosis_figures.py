"""The figures of a diagnosis, from its measurements and the run's weights."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.diagnostics import ACTIVE_VARIANCE
from ppl_vae.diagnostics.measurement import AggregateNumbers, Measurements
from ppl_vae.diagnostics.pixel_calibration import PixelCalibration
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import mean_or_draw
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import choose_display
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run

_SHOWN = 12


def list_figures(run: Run, numbers: Measurements) -> list[str]:
    """The names of the figures that these measurements have."""
    has_images = len(run.splits.event_shape) > 1
    pictures = numbers.pictures
    is_drawn = {
        "diagnosis-latents.png": True,
        "diagnosis-aggregate.png": True,
        "diagnosis-elbo.png": numbers.elbo_split is not None,
        "diagnosis-noise.png": numbers.noise is not None and not numbers.autoencoder,
        "diagnosis-holes.png": has_images and numbers.aggregate.holes is not None,
        "diagnosis-pictures.png": pictures.variation is not None or pictures.blur is not None,
        "diagnosis-pixels.png": numbers.calibration is not None,
    }
    return [name for name, drawn in is_drawn.items() if drawn]


def diagnosis_figures(run: Run, numbers: Measurements, x: Tensor) -> dict[str, Figure]:
    """Every figure by the name of its file. x: (N, *E) the images, as the model sees them."""
    draw = {
        "diagnosis-latents.png": lambda: _draw_latents(numbers),
        "diagnosis-aggregate.png": lambda: _draw_aggregate(numbers.aggregate),
        "diagnosis-elbo.png": lambda: _draw_split(numbers),
        "diagnosis-noise.png": lambda: _draw_noise(numbers),
        "diagnosis-holes.png": lambda: _draw_holes(run, numbers.aggregate, x),
        "diagnosis-pictures.png": lambda: _draw_pictures(numbers),
        "diagnosis-pixels.png": lambda: _draw_pixels(run, numbers.calibration),
    }
    return {name: draw[name]() for name in list_figures(run, numbers)}


def _bar(value: Estimate, sign: int = 1) -> plots.Bar:
    return plots.Bar(sign * value.mean, value.stderr)


def _draw_latents(numbers: Measurements) -> Figure:
    active, kl = numbers.active, numbers.kl_by_latent
    return plots.latents_used(
        variance=active.mean.numpy(),
        variance_stderr=active.stderr.numpy(),
        threshold=ACTIVE_VARIANCE,
        kl=None if kl is None else kl.mean.numpy(),
        kl_stderr=None if kl is None else kl.stderr.numpy(),
        title=f"Which latents carry anything: {active.count} of {numbers.latent_dim} are active",
    )


def _draw_aggregate(found: AggregateNumbers) -> Figure:
    return plots.aggregate_against_prior(
        mean=found.moments.mean.mean.numpy(),
        log_scale=found.moments.log_scale.mean.numpy(),
        distance=found.kolmogorov_smirnov.statistic.numpy(),
        effect=_bar(found.classifier.effect),
        title="Is the aggregate posterior the prior? Each latent alone can look right while all together do not",
    )


def _draw_split(numbers: Measurements) -> Figure:
    split, kl = numbers.elbo_split, numbers.kl
    assert split is not None
    assert kl is not None
    parts = [("mutual information", _bar(split.mutual_information))]
    if split.total_correlation is None or split.sum_of_dimension_kl is None:
        parts.append(("KL(q(z) || p(z))", _bar(split.marginal_kl)))
    else:
        parts.append(("total correlation", _bar(split.total_correlation)))
        parts.append(("sum of KL(q(z_l) || p(z_l))", _bar(split.sum_of_dimension_kl)))
    bars = {"rate": parts}
    if numbers.reconstruction.mean < 0:  # a density above 1 has no distortion to draw
        bars = {"-ELBO": [("distortion", _bar(numbers.reconstruction, -1)), ("rate", _bar(kl))], **bars}
    cap = f"log {split.num_images:,} = {split.cap:.1f} nats"
    reached = "is at its cap" if split.saturated else "is below its cap"
    return plots.split_bars(bars, title=f"What the ELBO is made of; the mutual information {reached}, {cap}")


def _draw_noise(numbers: Measurements) -> Figure:
    noise = numbers.noise
    assert noise is not None
    beta = numbers.trained_with.beta if numbers.trained_with else 1.0
    betas = {"beta = 1": 1.0} | ({f"beta = {beta:g}, as trained": beta} if beta not in (0, 1) else {})
    thresholds = {
        f"{name}, above what independent pixels reach" if noise.edge > value else name: max(value, noise.edge)
        for name, value in betas.items()
    }
    return plots.noise_spectrum(
        noise.eigenvalues.numpy(),
        thresholds=thresholds | {"a mean over pixels": float(numbers.num_pixels)},
        active=numbers.active.count,
        title="Which directions of the data rise above the likelihood's noise\n"
        "A linear decoder near the state that ignores z learns those above the line",
    )


def _draw_holes(run: Run, numbers: AggregateNumbers, x: Tensor) -> Figure:
    vae, display, found = load(run.folder), choose_display(run), numbers.holes
    assert found is not None
    dtype = next(vae.parameters()).dtype
    some = x[torch.linspace(0, len(x) - 1, min(_SHOWN, len(x))).long()].cpu()
    rows = {
        "prior draws\nthat posteriors\ncover least": vae.likelihood(torch.tensor(found.worst, dtype=dtype)).mean,
        "ordinary\nprior draws": vae.likelihood(torch.tensor(found.ordinary, dtype=dtype)).mean,
        "reconstructions": vae.likelihood(mean_or_draw(vae.posterior(some))).mean,
        "their images": some,
    }
    shown = min(map(len, rows.values()))
    title = (
        "Does E[x | z] of prior draws look like that of images?\n"
        f"{found.share.mean:.1%} of prior draws are in holes ({found.expected:.0%} if the aggregate posterior were the "
        f"prior), a classifier tells the two apart with an effect of {numbers.classifier.effect.mean:.2f} "
        "(0: alike, 1: apart)"
    )

    def pictures(images: Tensor) -> np.ndarray:
        """Dequantized levels are drawn as levels, which is what the display expects."""
        return display(256 * images - 0.5 if run.pixels == "dequantized" else images)

    return plots.image_rows({name: pictures(images[:shown]) for name, images in rows.items()}, title=title)


def _draw_pictures(numbers: Measurements) -> Figure:
    variation, blur = numbers.pictures.variation, numbers.pictures.blur
    rows = {}
    if blur is not None:
        rows = {
            "sharpness at the posterior's mean": _bar(blur.at_mean),
            "sharpness at a draw of the posterior": _bar(blur.at_draw),
            "sharpness averaged over its draws": _bar(blur.averaged),
        }
    return plots.sharpness_strip(
        rows,
        variation=None if variation is None else _bar(variation),
        title="Reconstructions against the data: 0 all the same or without edges, 1 as the data",
    )


def _draw_pixels(run: Run, found: PixelCalibration | None) -> Figure:
    assert found is not None
    mean, stderr = (np.array([getattr(share, name) for share in found.histogram]) for name in ("mean", "stderr"))
    histogram = plots.PixelHistogram(mean, np.nan_to_num(stderr), found.verdict)
    title = f"Where pixels lie in p(x | z), {found.num_images:,} images: flat is right"
    return plots.pixel_calibration({run.options.likelihood: histogram}, title=title)
