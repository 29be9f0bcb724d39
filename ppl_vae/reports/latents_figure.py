"""How much each latent is used, and the figure of images' latents next to the prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from ppl_vae.diagnostics import ACTIVE_VARIANCE, active_units
from ppl_vae.diagnostics.mixture import normal_factors
from ppl_vae.evidence.moments import PosteriorMoments, compute_moments, sample_latents
from ppl_vae.reports import figures as plots
from ppl_vae.reports.text.captions import latent_axis_name, latents_title
from ppl_vae.vae import VAE

_UNUSED_NATS = 0.01  # a latent with a smaller mean KL counts as unused. Source: ours
_PRIOR_SHOWN = 2000  # draws of a prior that is not drawn as circles


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
    """Posterior means in the two latents that are used most; with two latents in their own order; or in the only one.

    A normal prior is drawn by its circles, any other by draws, from torch's global generator.

    Args:
        codes: The posterior moments of N images.
        use: How much each latent is used.
        prior: p(z), event (L,).
        kind: One of the images in words, such as "test image".
        classes: (N,) int64, where they are known.
        class_names: The word for each class.
    """
    L = codes.mean.shape[1]
    order = list(range(L)) if L <= 2 else use.values.argsort(descending=True)[:2].tolist()
    names = [latent_axis_name(latent, use.name, float(use.values[latent]), use.unit) for latent in order]
    points = codes.mean[:, order].numpy()
    is_deterministic = bool((codes.scale == 0).any())
    title = latents_title(len(points), kind, L, use.name, is_deterministic=is_deterministic)
    colored: dict[str, Any] = {
        "classes": None if classes is None else classes.numpy(),
        "class_names": class_names,
        "prior": _describe_prior(prior, order),
    }
    if L == 1:
        return plots.latent_line(points[:, 0], name=names[0], title=title, **colored)
    return plots.latent_plane(points, names=(names[0], names[1]), title=title, **colored)


def _describe_prior(prior: Distribution, order: list[int]) -> plots.Scales | np.ndarray:
    """Mean and scale of these latents where the prior is a product of normals, else draws of them (n, R)."""
    if normal_factors(prior) is None:
        return sample_latents(prior, _PRIOR_SHOWN)[:, order].cpu().numpy()
    p = compute_moments(prior)
    return plots.Scales(p.mean[order].tolist(), p.scale[order].tolist())
