"""What a trained VAE does with its latents: where it puts images, which latents it uses, what each of them moves.

Networks should be in evaluation mode. Draws come from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from ppl_vae.runtime.batching import images_per_pass, latents_per_pass, pairs_per_pass
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.support import check_support
from ppl_vae.vae import VAE
from ppl_vae.weights import log_weight_terms

# A latent whose mean KL is below this many nats is called unused. Source: ours.
UNUSED_NATS = 0.01

_DRAWS_FOR_MOMENTS = 200  # of each of many distributions
PRIOR_DRAWS = 20_000  # of a prior that says its moments or its distribution function only by draws


class PosteriorMoments(NamedTuple):
    """Where q(z | x) puts each image.

    Args:
        mean: (N, L).
        scale: (N, L), the square roots of the variances.
        num_draws: of how many draws an image they are, so that each mean has an error of scale / sqrt(num_draws); None
            where they are exact.
    """

    mean: Tensor
    scale: Tensor
    num_draws: int | None = None


@serialize_threads()
def mean_or_draw(distribution: Any) -> Tensor:
    """The mean of a distribution over latents where it has one in closed form, else a draw. -> batch shape + (L,)."""
    try:
        return distribution.mean
    except NotImplementedError:
        return distribution.sample()


@serialize_threads()
@torch.no_grad()
def sampled(distribution: Any, count: int) -> Tensor:
    """(count, *batch, L) draws of a distribution over latents, in passes that fit into memory."""
    chunk = max(1, latents_per_pass(distribution) // max(1, distribution.batch_shape.numel()))
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    return torch.cat([distribution.sample((size,)) for size in sizes])


@serialize_threads()
@torch.no_grad()
def log_density(distribution: Any, z: Tensor) -> Tensor:
    """(M,) log p(z), nats, float64, in passes that fit into memory. z: (M, L)."""
    return torch.cat([distribution.log_prob(part).double() for part in z.split(latents_per_pass(distribution))])


@serialize_threads()
def moments(distribution: Any) -> PosteriorMoments:
    """Mean and scale of each latent: in closed form where the distribution has them, else of draws.

    200 of each distribution of a batch, and 20,000 of a prior, which is one.
    """
    try:
        return PosteriorMoments(distribution.mean, distribution.variance.sqrt())
    except NotImplementedError:
        count = _DRAWS_FOR_MOMENTS if len(distribution.batch_shape) else PRIOR_DRAWS
        draws = sampled(distribution, count)
        return PosteriorMoments(draws.mean(0), draws.std(0), count)


@serialize_threads()
@torch.no_grad()
def encode(vae: VAE, x: Tensor) -> PosteriorMoments:
    """Mean and scale of q(z | x), in passes that fit into memory.

    Args:
        vae: the VAE.
        x: images (N, *E), as the model sees them.
    """
    parts = [moments(vae.posterior(group)) for group in x.split(images_per_pass(x))]
    mean, scale = torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts])
    return PosteriorMoments(mean, scale, parts[0].num_draws)


@serialize_threads()
@torch.no_grad()
def drawn(vae: VAE, x: Tensor) -> Tensor:
    """(N, L) one z ~ q(z | x) an image, in passes that fit into memory. x: (N, *E)."""
    return torch.cat([vae.posterior(group).sample() for group in x.split(images_per_pass(x))])


@serialize_threads()
@torch.no_grad()
def decoded(vae: VAE, z: Tensor) -> Tensor:
    """(N, *E) E[x | z], in passes that fit into memory. z: (N, L)."""
    first = vae.likelihood(z[:1]).mean
    chunk = images_per_pass(first, vae.likelihood)
    return torch.cat([vae.likelihood(part).mean for part in z.split(chunk)])


@serialize_threads()
@torch.no_grad()
def kl_by_latent(codes: PosteriorMoments, prior: Any) -> Tensor:
    """(1/N) sum_n KL(q(z_l | x_n) || p(z_l)) of normals that are products over latents, by their means and scales.

    Of a guide or a prior that is none a latent has no KL of its own, or another one: see ``diagnostics.latent_kl``.

    Args:
        codes: of N images.
        prior: p(z), event (L,).

    Returns:
        (L,) nats.
    """
    p = moments(prior)
    return kl_divergence(Normal(codes.mean, codes.scale), Normal(p.mean, p.scale)).mean(0)


@serialize_threads()
@torch.no_grad()
def traversals(vae: VAE, z: Tensor, latents: Sequence[int], steps: Tensor) -> Tensor:
    """E[x | z] as one latent at a time moves to m_l + t s_l, the prior's mean and scale, the others as they are in z.

    Under a prior whose latents depend on each other, some of these places may be where it puts nothing.

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


@serialize_threads()
@torch.no_grad()
def quantiles(prior: Any, count: int) -> Tensor:
    """(count, L) F_l^-1 of the middles of as many equal parts of [0, 1]: each stands for the same probability of z_l.

    F_l is the distribution function of latent l by itself. Where the prior is no product over latents that have one,
    its place is taken by 20,000 draws.
    """
    middles = (torch.arange(count, dtype=torch.double) + 0.5) / count
    try:
        if not isinstance(prior, Independent):
            raise NotImplementedError
        marginals = prior.base_dist
        return marginals.icdf(middles.to(marginals.mean)[:, None])
    except NotImplementedError:
        z = sampled(prior, PRIOR_DRAWS)
        return torch.stack([z[:, latent].quantile(middles.to(z)) for latent in range(z.shape[1])], dim=-1)


@serialize_threads()
@torch.no_grad()
def manifold(vae: VAE, grid: Tensor) -> Tensor:
    """E[x | z] over the plane of two latents.

    Args:
        vae: the VAE, L = 2.
        grid: (K, 2) the places of each latent.

    Returns:
        (K, K, *E): the second latent along the first dimension, the first along the second.
    """
    second, first = torch.meshgrid(grid[:, 1], grid[:, 0], indexing="ij")
    return vae.likelihood(torch.stack([first, second], dim=-1)).mean


@serialize_threads()
@torch.no_grad()
def gather_log_weights(vae: VAE, x: Tensor, num_particles: int) -> Tensor:
    """(S, N) log-weights, nats, in passes that fit into memory. x: (N, *E)."""
    check_support(vae.model, x)
    pairs = pairs_per_pass(vae, x)
    chunk = max(1, pairs // len(x))
    parts = []
    with pyro.validation_enabled(False):
        for start in range(0, num_particles, chunk):
            S = min(chunk, num_particles - start)
            terms = (log_weight_terms(vae.model, vae.guide, group, S) for group in x.split(pairs))
            parts.append(torch.cat([log_p_x + log_ratio for log_p_x, log_ratio in terms], dim=1))
    return torch.cat(parts)
