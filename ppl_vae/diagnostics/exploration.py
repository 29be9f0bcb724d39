"""The images along each latent, and over a plane of two latents.

Networks should be in evaluation mode. Draws come from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.diagnostics.mixture import factors
from ppl_vae.evidence.moments import PRIOR_DRAWS, compute_moments, sample_latents
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.global_state import serialize_threads


@serialize_threads()
@torch.no_grad()
def decode_traversals(vae: LatentModel, z: Tensor, latents: Sequence[int], steps: Tensor) -> Tensor:
    """E[x | z] as one latent at a time moves to m_l + t s_l, the prior's mean and scale, and the others stay.

    Under a prior whose latents depend on each other, some of these z may have almost no density.

    Args:
        vae: the VAE.
        z: (L,).
        latents: (R,) the latents to move.
        steps: (K,) the t.

    Returns:
        (R, K, *E).
    """
    p = compute_moments(vae.prior())
    moved = z.repeat(len(latents), len(steps), 1)
    for row, latent in enumerate(latents):
        moved[row, :, latent] = p.mean[latent] + steps * p.scale[latent]
    return vae.likelihood(moved).mean


@serialize_threads()
@torch.no_grad()
def latent_quantiles(prior: Distribution, count: int) -> Tensor:
    """(count, L) F_l^-1((k + 1/2) / count), k = 0..count - 1: values of z_l that stand for equal probabilities.

    F_l is the marginal distribution function of latent l. A prior that is not a product over latents with such
    functions is represented by 20,000 draws.
    """
    middles = (torch.arange(count, dtype=torch.double) + 0.5) / count
    try:
        marginals = factors(prior)
        if marginals is None:
            raise NotImplementedError
        return marginals.icdf(middles.to(marginals.mean)[:, None])
    except NotImplementedError:
        z = sample_latents(prior, PRIOR_DRAWS)
        return torch.stack([z[:, latent].quantile(middles.to(z)) for latent in range(z.shape[1])], dim=-1)


@serialize_threads()
@torch.no_grad()
def decode_plane(vae: LatentModel, grid: Tensor) -> Tensor:
    """E[x | z] over the plane of two latents.

    Args:
        vae: the VAE, L = 2.
        grid: (K, 2) the values of each latent.

    Returns:
        (K, K, *E): the second latent along the first dimension, the first along the second.
    """
    second, first = torch.meshgrid(grid[:, 1], grid[:, 0], indexing="ij")
    return vae.likelihood(torch.stack([first, second], dim=-1)).mean
