"""What a trained VAE does with its latents: where it puts images, which latents it uses, what each of them moves.

Networks should be in evaluation mode. Draws come from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ppl_vae.conditional import numbers_a_pixel
from ppl_vae.evidence import particles_a_pass
from ppl_vae.vae import VAE
from ppl_vae.weights import log_weights

# A latent whose mean KL is below this many nats is called unused. Source: ours.
UNUSED_NATS = 0.01

_DRAWS_FOR_MOMENTS = 200


class Codes(NamedTuple):
    """Where q(z | x) puts each image.

    Args:
        mean: (N, L).
        scale: (N, L), the square roots of the variances.
    """

    mean: Tensor
    scale: Tensor


def mean_or_draw(distribution: Any) -> Tensor:
    """The mean of a distribution over latents where it has one in closed form, else a draw. -> batch shape + (L,)."""
    try:
        return distribution.mean
    except NotImplementedError:
        return distribution.sample()


def moments(distribution: Any) -> Codes:
    """Mean and scale of each latent: in closed form where the distribution has them, else of 200 draws."""
    try:
        return Codes(distribution.mean, distribution.variance.sqrt())
    except NotImplementedError:
        draws = distribution.sample((_DRAWS_FOR_MOMENTS,))
        return Codes(draws.mean(0), draws.std(0))


@torch.no_grad()
def encode(vae: VAE, x: Tensor) -> Codes:
    """Mean and scale of q(z | x), in passes that fit into memory.

    Args:
        vae: the VAE.
        x: images (N, *E), as the model sees them.
    """
    parts = [moments(vae.posterior(group)) for group in x.split(particles_a_pass(x))]
    return Codes(torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts]))


@torch.no_grad()
def drawn(vae: VAE, x: Tensor) -> Tensor:
    """(N, L) one z ~ q(z | x) an image, in passes that fit into memory. x: (N, *E)."""
    return torch.cat([vae.posterior(group).sample() for group in x.split(particles_a_pass(x))])


@torch.no_grad()
def decoded(vae: VAE, z: Tensor) -> Tensor:
    """(N, *E) E[x | z], in passes that fit into memory. z: (N, L)."""
    first = vae.likelihood(z[:1]).mean
    chunk = particles_a_pass(first, numbers_a_pixel(vae.likelihood))
    return torch.cat([vae.likelihood(part).mean for part in z.split(chunk)])


@torch.no_grad()
def kl_by_latent(codes: Codes, prior: Any) -> Tensor:
    """(1/N) sum_n KL(q(z_l | x_n) || p(z_l)), both taken as normals of their mean and scale: for normals, exactly that.

    Args:
        codes: of N images.
        prior: p(z), event (L,).

    Returns:
        (L,) nats.
    """
    p = moments(prior)
    return kl_divergence(Normal(codes.mean, codes.scale), Normal(p.mean, p.scale)).mean(0)


@torch.no_grad()
def traversals(vae: VAE, z: Tensor, latents: Sequence[int], steps: Tensor) -> Tensor:
    """E[x | z] as one latent at a time moves to m_l + t s_l, the prior's mean and scale, the others as they are in z.

    Args:
        vae: the VAE.
        z: (L,).
        latents: (R,) the latents that are moved.
        steps: (K,) the t.

    Returns:
        (R, K, *E).
    """
    p = moments(vae.prior())
    moved = z.repeat(len(latents), len(steps), 1)
    for row, latent in enumerate(latents):
        moved[row, :, latent] = p.mean[latent] + steps * p.scale[latent]
    return vae.likelihood(moved).mean


def normal_quantiles(count: int) -> Tensor:
    """(count,) Phi^-1 of the middles of as many equal parts of [0, 1]: each stands for the same prior probability."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.double) + 0.5) / count).float()


@torch.no_grad()
def manifold(vae: VAE, steps: Tensor) -> Tensor:
    """E[x | z] over the plane of two latents, z = m + t s with the prior's mean m and scale s, each t in steps.

    Args:
        vae: the VAE, L = 2.
        steps: (K,).

    Returns:
        (K, K, *E): the second latent along the first dimension, the first along the second.
    """
    p = moments(vae.prior())
    second, first = torch.meshgrid(steps, steps, indexing="ij")
    return vae.likelihood(p.mean + torch.stack([first, second], dim=-1) * p.scale).mean


@torch.no_grad()
def gather_log_weights(vae: VAE, x: Tensor, num_particles: int) -> Tensor:
    """(S, N) log-weights, nats, in passes that fit into memory. x: (N, *E)."""
    pairs = particles_a_pass(x, numbers_a_pixel(vae.likelihood))
    chunk = max(1, pairs // len(x))
    parts = []
    with pyro.validation_enabled(False):
        for start in range(0, num_particles, chunk):
            S = min(chunk, num_particles - start)
            parts.append(torch.cat([log_weights(vae.model, vae.guide, group, S) for group in x.split(pairs)], dim=1))
    return torch.cat(parts)
