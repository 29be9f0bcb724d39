"""Moments and samples of distributions over latents, encoding and decoding, in passes that fit into memory.

Networks should be in evaluation mode. Draws come from torch's global generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import images_per_pass, latents_per_pass
from ppl_vae.runtime.global_state import serialize_threads

_DRAWS_PER_POSTERIOR = 200
PRIOR_DRAWS = 20_000  # for a prior without moments, or without a distribution function, in closed form


class PosteriorMoments(NamedTuple):
    """Mean and scale of q(z | x) for each image.

    Args:
        mean: (N, L).
        scale: (N, L), the square roots of the variances.
        num_draws: The number of draws per image that the moments are from, so that each mean has an error of
            scale / sqrt(num_draws); None where they are exact.
    """

    mean: Tensor
    scale: Tensor
    num_draws: int | None = None


@serialize_threads()
def mean_or_draw(distribution: Distribution) -> Tensor:
    """The mean of a distribution over latents in closed form, else one draw. -> batch shape + (L,)."""
    try:
        return distribution.mean
    except NotImplementedError:
        return distribution.sample()


@serialize_threads()
@torch.no_grad()
def sample_latents(distribution: Distribution, count: int) -> Tensor:
    """(count, *batch, L) draws of a distribution over latents."""
    chunk = max(1, latents_per_pass(distribution) // max(1, distribution.batch_shape.numel()))
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    return torch.cat([distribution.sample((size,)) for size in sizes])


@serialize_threads()
@torch.no_grad()
def compute_log_prob(distribution: Distribution, z: Tensor) -> Tensor:
    """(M,) log p(z), nats, float64. z: (M, L)."""
    return torch.cat([distribution.log_prob(part).double() for part in z.split(latents_per_pass(distribution))])


@serialize_threads()
def compute_moments(distribution: Distribution) -> PosteriorMoments:
    """Mean and scale of each latent, in closed form where the distribution has them, else from draws.

    These are 200 draws of each distribution in a batch, and 20,000 of a single one, such as a prior.
    """
    try:
        return PosteriorMoments(distribution.mean, distribution.variance.sqrt())
    except NotImplementedError:
        count = _DRAWS_PER_POSTERIOR if len(distribution.batch_shape) else PRIOR_DRAWS
        draws = sample_latents(distribution, count)
        return PosteriorMoments(draws.mean(0), draws.std(0), count)


@serialize_threads()
@torch.no_grad()
def encode(vae: LatentModel, x: Tensor) -> PosteriorMoments:
    """Mean and scale of q(z | x). x: (N, *E), as the model sees images."""
    parts = [compute_moments(vae.posterior(group)) for group in x.split(images_per_pass(x))]
    mean, scale = torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts])
    return PosteriorMoments(mean, scale, parts[0].num_draws)


@serialize_threads()
@torch.no_grad()
def sample_posterior(vae: LatentModel, x: Tensor) -> Tensor:
    """(N, L) one z ~ q(z | x) per image. x: (N, *E)."""
    return torch.cat([vae.posterior(group).sample() for group in x.split(images_per_pass(x))])


@serialize_threads()
@torch.no_grad()
def decode_mean(vae: LatentModel, z: Tensor) -> Tensor:
    """(N, *E) E[x | z]. z: (N, L)."""
    first = vae.likelihood(z[:1]).mean
    chunk = images_per_pass(first, vae.likelihood)
    return torch.cat([vae.likelihood(part).mean for part in z.split(chunk)])
