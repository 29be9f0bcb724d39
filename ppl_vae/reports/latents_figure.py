"""How much each latent is used, and the figure of images' latents next to the prior."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from ppl_vae.diagnostics import ACTIVE_VARIANCE, active_units
from ppl_vae.evidence.moments import PosteriorMoments, compute_moments, normal_factors, sample_latents
from ppl_vae.reports.figures.charts import make_figure, number_of_bins
from ppl_vae.vae import VAE

_UNUSED_NATS = 0.01  # a latent with a smaller mean KL counts as unused. Source: ours
_PRIOR_SHOWN = 2000  # draws
_MOST_CLASSES = 20  # in the legend: the colors of more could not be told apart


@dataclass(frozen=True)
class LatentUse:
    """How much each latent says about an image.

    Args:
        values: (L,), above ``least`` for a latent that is used.
        name: "mean KL" or "variance".
        meaning: The values in words.
        unit: What follows a value, such as " nats".
        least: The smallest value of a used latent.
    """

    values: Tensor
    name: str
    meaning: str
    unit: str
    least: float


@torch.no_grad()
def measure_latent_use(vae: VAE, x: Tensor, codes: PosteriorMoments) -> LatentUse:
    """The mean KL of each latent where guide and prior are products of normals, else the variance of E[z_l | x].

    A latent of another guide or prior has no KL of its own in closed form. Under a deterministic guide it is infinite.

    Args:
        vae: The VAE.
        x: Images (N, *E).
        codes: Their posterior moments.
    """
    prior = vae.prior()
    if bool((codes.scale == 0).any()):
        values = codes.mean.var(0, correction=0)
        return LatentUse(values, "variance", "the variance of z_l", "", ACTIVE_VARIANCE)
    p = normal_factors(prior)
    if p is not None and normal_factors(vae.posterior(x[:1])) is not None:
        kl = kl_divergence(Normal(codes.mean, codes.scale), p).mean(0)
        return LatentUse(kl, "mean KL", "KL(q(z_l | x) || p(z_l)), the mean", " nats", _UNUSED_NATS)
    values = active_units(codes, compute_moments(prior).scale).mean
    meaning = "the variance of E[z_l | x] in variances of the prior, taken"
    return LatentUse(values, "variance", meaning, "", ACTIVE_VARIANCE)


def latents_figure(
    codes: PosteriorMoments,
    use: LatentUse,
    prior: Distribution,
    *,
    kind: str,
    classes: Tensor | None = None,
    class_names: tuple[str, ...] = (),
) -> Figure:
    """Posterior means in the two latents that are used most, colored by class, over draws of the prior in gray.

    A single latent has a histogram. The draws are from torch's global generator.

    Args:
        codes: The posterior moments of N images.
        use: How much each latent is used.
        prior: p(z), event (L,).
        kind: One of the images in words, such as "test image".
        classes: (N,) int64, where they are known.
        class_names: The word for each class.
    """
    N, L = codes.mean.shape
    order = list(range(L)) if L <= 2 else use.values.argsort(descending=True)[:2].tolist()
    names = [f"z{k}, {use.name.removeprefix('mean ')} {use.values[k]:.2f}{use.unit}" for k in order]
    points, draws = (each[:, order].cpu().numpy() for each in (codes.mean, sample_latents(prior, _PRIOR_SHOWN)))
    title = f"Posterior means of {N:,} {kind}s"
    if L > 2:
        title += f",\nin the two of {L} latents with the highest {use.name}"
    figure = make_figure(title, width=6.8, height=5.0)
    axes, words = figure.subplots(), f"prior: {len(draws):,} draws"
    groups = _group_by_class(classes, N, class_names)
    if L == 1:
        both = np.concatenate([points, draws])[:, 0]
        bins = np.linspace(both.min(), both.max(), number_of_bins(N) + 1).tolist()
        weights = np.full(len(draws), N / len(draws))
        axes.hist(draws[:, 0], bins, weights=weights, histtype="step", color="0.4", label=words)
        masks, colors, labels = zip(*groups, strict=True)
        axes.hist([points[mask, 0] for mask in masks], bins, stacked=True, color=colors, label=labels)
        axes.set(xlabel=names[0], ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        axes.scatter(draws[:, 0], draws[:, 1], s=4, linewidths=0, color="0.8", label=words)
        for mask, color, word in groups:
            axes.scatter(points[mask, 0], points[mask, 1], s=6, linewidths=0, alpha=0.8, color=color, label=word)
        axes.set(xlabel=names[0], ylabel=names[1], aspect="equal", anchor="W")
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles, fontsize=8, markerscale=2, loc="outside right upper", frameon=False)
    return figure


def _group_by_class(
    classes: Tensor | None, count: int, class_names: tuple[str, ...]
) -> list[tuple[np.ndarray, tuple[float, float, float, float] | str, str]]:
    """For each class, which of the points are in it, its color and its word, which a legend of many leaves out."""
    if classes is None:
        return [(np.ones(count, dtype=bool), "tab:blue", "images")]
    present = classes.unique().tolist()
    few = len(present) <= _MOST_CLASSES
    palette = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20" if few else "turbo"]
    words = [class_names[value] if 0 <= value < len(class_names) else str(value) for value in present]
    return [
        ((classes == value).numpy(), palette(i if few else i / len(present)), words[i] if few else f"_{words[i]}")
        for i, value in enumerate(present)
    ]
