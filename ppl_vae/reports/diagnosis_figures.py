"""The figures of a diagnosis, drawn from its numbers and the run's weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae.diagnostics import ACTIVE_VARIANCE
from ppl_vae.evidence.moments import mean_or_draw
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import display_of
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run

_SHOWN = 12

_SHARPNESS = {
    "at_mean": "sharpness at the posterior's mean",
    "at_draw": "sharpness at a draw of the posterior",
    "averaged": "sharpness averaged over its draws",
}


def names_drawn(run: Run, numbers: dict[str, Any]) -> list[str]:
    """The figures that these numbers have."""
    has_images = len(run.splits.event_shape) > 1
    has = {
        "diagnosis-latents.png": True,
        "diagnosis-aggregate.png": True,
        "diagnosis-elbo.png": numbers["elbo_split"] is not None,
        "diagnosis-noise.png": numbers["noise"] is not None and not numbers["autoencoder"],
        "diagnosis-holes.png": has_images and numbers["aggregate"]["holes"] is not None,
        "diagnosis-pictures.png": any(numbers["pictures"].values()),
        "diagnosis-pixels.png": numbers["calibration"] is not None,
    }
    return [name for name, drawn in has.items() if drawn]


def diagnosis_figures(run: Run, numbers: dict[str, Any], x: Tensor) -> dict[str, Figure]:
    """Every figure by its file's name.

    Args:
        run: the run.
        numbers: as ``measure`` returns them.
        x: (N, *E) the images that they are of, as the model sees them.
    """
    draw = {
        "diagnosis-latents.png": lambda: _latents(numbers),
        "diagnosis-aggregate.png": lambda: _aggregate(numbers),
        "diagnosis-elbo.png": lambda: _split(numbers),
        "diagnosis-noise.png": lambda: _noise(numbers),
        "diagnosis-holes.png": lambda: _holes(run, numbers, x),
        "diagnosis-pictures.png": lambda: _pictures(numbers),
        "diagnosis-pixels.png": lambda: _pixels(run, numbers),
    }
    return {name: draw[name]() for name in names_drawn(run, numbers)}


def _bar(value: dict[str, Any]) -> plots.Bar:
    return plots.Bar(*(math.nan if value[key] is None else value[key] for key in ("mean", "stderr")))


def _array(values: list[float]) -> Any:
    return np.array(values, dtype=float)


def _latents(numbers: dict[str, Any]) -> Figure:
    active, kl = numbers["active"], numbers["kl_by_latent"]
    return plots.latents_used(
        variance=_array(active["mean"]),
        variance_stderr=_array(active["stderr"]),
        threshold=ACTIVE_VARIANCE,
        kl=None if kl is None else _array(kl["mean"]),
        kl_stderr=None if kl is None else _array(kl["stderr"]),
        title=f"Which latents carry anything: {active['count']} of {numbers['latent_dim']} are active",
    )


def _aggregate(numbers: dict[str, Any]) -> Figure:
    found = numbers["aggregate"]
    return plots.aggregate_against_prior(
        mean=_array(found["moments"]["mean"]["mean"]),
        log_scale=_array(found["moments"]["log_scale"]["mean"]),
        distance=_array(found["kolmogorov_smirnov"]["statistic"]),
        effect=_bar(found["classifier"]["effect"]),
        title="Is the aggregate posterior the prior? Each latent alone can look right while all together do not",
    )


def _split(numbers: dict[str, Any]) -> Figure:
    split = numbers["elbo_split"]
    distortion = {"mean": -numbers["reconstruction"]["mean"], "stderr": numbers["reconstruction"]["stderr"]}
    parts = [("mutual information", _bar(split["mutual_information"]))]
    if split["total_correlation"] is None:
        parts.append(("KL(q(z) || p(z))", _bar(split["marginal_kl"])))
    else:
        parts.append(("total correlation", _bar(split["total_correlation"])))
        parts.append(("sum of KL(q(z_l) || p(z_l))", _bar(split["sum_of_dimension_kl"])))
    bars = {"rate": parts}
    if distortion["mean"] > 0:  # a density can be above 1
        bars = {"-ELBO": [("distortion", _bar(distortion)), ("rate", _bar(numbers["kl"]))], **bars}
    cap = f"log {split['num_images']:,} = {split['cap']:.1f} nats"
    reached = "is at its cap" if split["saturated"] else "is below its cap"
    return plots.split_bars(bars, title=f"What the ELBO is made of; the mutual information {reached}, {cap}")


def _noise(numbers: dict[str, Any]) -> Figure:
    noise, beta = numbers["noise"], (numbers["trained_with"] or {}).get("beta")
    edge = noise.get("edge") or 0.0
    thresholds = {_above_chance("beta = 1", 1.0, edge): max(1.0, edge)}
    if beta not in (None, 0, 1):
        thresholds[_above_chance(f"beta = {beta:g}, as trained", beta, edge)] = max(beta, edge)
    thresholds["a mean over pixels"] = float(numbers["num_pixels"])
    return plots.noise_spectrum(
        _array(noise["eigenvalues"]),
        thresholds=thresholds,
        active=numbers["active"]["count"],
        title="Which directions of the data rise above the likelihood's noise\n"
        "A linear decoder near the state that ignores z learns those above the line",
    )


def _above_chance(name: str, threshold: float, edge: float) -> str:
    return f"{name}, above what independent pixels reach" if edge > threshold else name


def _holes(run: Run, numbers: dict[str, Any], x: Tensor) -> Figure:
    vae, display, found = load(run.folder), display_of(run), numbers["aggregate"]["holes"]
    dtype = next(vae.parameters()).dtype
    some = x[torch.linspace(0, len(x) - 1, min(_SHOWN, len(x))).long()].cpu()
    rows = {
        "prior draws\nthat posteriors\ncover least": vae.likelihood(torch.tensor(found["worst"], dtype=dtype)).mean,
        "ordinary\nprior draws": vae.likelihood(torch.tensor(found["ordinary"], dtype=dtype)).mean,
        "reconstructions": vae.likelihood(mean_or_draw(vae.posterior(some))).mean,
        "their images": some,
    }
    shown = min(map(len, rows.values()))
    share, effect = found["share"]["mean"], numbers["aggregate"]["classifier"]["effect"]["mean"]
    title = (
        "Does E[x | z] of prior draws look like that of images?\n"
        f"{share:.1%} of prior draws are in holes ({found['expected']:.0%} if the aggregate posterior were the prior), "
        f"a classifier tells the two apart with an effect of {effect:.2f} (0: alike, 1: apart)"
    )
    return plots.image_rows({name: _shown(run, display, images[:shown]) for name, images in rows.items()}, title=title)


def _shown(run: Run, display: Any, images: Tensor) -> Any:
    """As ``display`` takes them: of dequantized levels it is for levels."""
    return display(256 * images - 0.5 if run.pixels == "dequantized" else images)


def _pictures(numbers: dict[str, Any]) -> Figure:
    found = numbers["pictures"]
    blur = found["blur"] or {}
    return plots.sharpness_strip(
        {words: _bar(blur[name]) for name, words in _SHARPNESS.items() if name in blur},
        variation=None if found["variation"] is None else _bar(found["variation"]),
        title="Reconstructions against the data: 0 all the same or without edges, 1 as the data",
    )


def _pixels(run: Run, numbers: dict[str, Any]) -> Figure:
    found = numbers["calibration"]
    shares = [_bar(share) for share in found["histogram"]]
    histogram = plots.PixelHistogram(
        np.array([bar.mean for bar in shares]), np.nan_to_num([bar.stderr for bar in shares]), found["verdict"]
    )
    title = f"Where pixels lie in p(x | z), {found['num_images']:,} images: flat is right"
    return plots.pixel_calibration({run.options.likelihood: histogram}, title=title)
