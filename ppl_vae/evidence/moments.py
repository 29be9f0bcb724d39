"""Distributions over latents: moments, draws, encoding and decoding, and the aggregate posterior.

Everything is computed in passes that fit into memory. Networks should be in evaluation mode. Draws come from torch's
global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from ppl_vae.latent_model import ProgramLikelihood
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.batching import floats_per_latent, images_per_pass, items_per_pass, latents_per_pass
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.records import Data, Records, arguments_of, further_of

_DRAWS_PER_POSTERIOR = 200
PRIOR_DRAWS = 20_000  # for a prior without moments, or without a distribution function, in closed form


class PosteriorMoments(NamedTuple):
    """Mean and scale of q(z | x) for each image, (N, L).

    ``num_draws`` is the number of draws per image that the moments are from, so that each mean has an error of
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


@serialize_threads(gradients=False)
def sample_latents(distribution: Distribution, count: int) -> Tensor:
    """(count, *batch, L) draws of a distribution over latents."""
    chunk = max(1, latents_per_pass(distribution) // max(1, distribution.batch_shape.numel()))
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    return torch.cat([distribution.sample((size,)) for size in sizes])


@serialize_threads(gradients=False)
def sample_prior(vae: LatentModel, count: int, *further: Tensor) -> Tensor:
    """(N, L) z ~ p(z), or one z ~ p(z | c) for each of N rows of further tensors, to simulate images from.

    Raises:
        ValueError: There are not N rows, or the program observes more than its images.
    """
    if isinstance(vae.likelihood, ProgramLikelihood):
        vae.likelihood.runs.check_simulation()
    p = vae.prior(*further)
    if not len(p.batch_shape):
        return sample_latents(p, count)
    if tuple(p.batch_shape) != (count,):
        raise ValueError(f"further: expected {count} rows, one for each draw, got {tuple(p.batch_shape)}")
    return p.sample()


@serialize_threads()
def get_shared_prior(vae: LatentModel, data: Data) -> Distribution:
    """p(z), batch (), of images (N, *E), or of ``Records`` on whose further tensors it does not depend.

    Raises:
        ValueError: The prior depends on a further tensor.
    """
    prior = vae.prior(*further_of(data))
    if len(prior.batch_shape):
        raise ValueError(
            "vae: expected one p(z) for all images, got a prior that depends on a further tensor; fix its value and "
            "take the images that have it, as vae.fix_label(y) does for a ConditionalVAE"
        )
    return prior


@serialize_threads(gradients=False)
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


@serialize_threads(gradients=False)
def encode(vae: LatentModel, x: Data) -> PosteriorMoments:
    """Mean and scale of q(z | x). x: (N, *E), as the model sees images."""
    check_latent_model(vae)
    parts = [compute_moments(vae.posterior(*arguments_of(group))) for group in x.split(images_per_pass(x))]
    mean, scale = torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts])
    return PosteriorMoments(mean, scale, parts[0].num_draws)


@serialize_threads(gradients=False)
def sample_posterior(vae: LatentModel, x: Data) -> Tensor:
    """(N, L) one z ~ q(z | x) per image. x: (N, *E)."""
    return torch.cat([vae.posterior(*arguments_of(group)).sample() for group in x.split(images_per_pass(x))])


@serialize_threads(gradients=False)
def decode_mean(vae: LatentModel, z: Tensor, *further: Tensor) -> Tensor:
    """(N, *E) E[x | z]. z: (N, L); further tensors of N rows where the model takes them."""
    rows = Records(z, *further)
    chunk = images_per_pass(vae.likelihood(*arguments_of(rows[:1])).mean, vae.likelihood)
    return torch.cat([vae.likelihood(*arguments_of(part)).mean for part in rows.split(chunk)])


# --- The aggregate posterior ---


def factors(distribution: Distribution) -> Distribution | None:
    """The distributions of the latents, batch shape (..., L), if they are independent by construction; else None."""
    if not isinstance(distribution, Independent) or distribution.reinterpreted_batch_ndims != 1:
        return None
    base: Distribution = distribution.base_dist
    return None if base.event_shape else base


def normal_factors(distribution: Distribution) -> Normal | None:
    """The distributions of the latents if they are independent normals; else None."""
    found = factors(distribution)
    return found if isinstance(found, Normal) else None


class AggregatePosterior:
    """q(z) = (1/N) sum_n q(z | x_n) over N images, a mixture with one component per image.

    Products of normals are evaluated by two matrix products in float64, -2 log q(z | x_n) = z^2 @ s_n^-2 -
    2 z @ (m_n s_n^-2) + constant; other posteriors by their ``log_prob``. Memory does not grow with N^2.

    Args:
        groups: q(z | x_n), batch (B,) and event (L,), one distribution per group of images. None raises ValueError.
    """

    def __init__(self, groups: Sequence[Distribution]) -> None:
        if not groups:
            raise ValueError("x: expected at least one image, got none")
        self.groups = list(groups)
        self._sizes = [int(q.batch_shape[0]) for q in self.groups]

    @classmethod
    @serialize_threads(gradients=False)
    def encode(cls, vae: LatentModel, x: Data) -> AggregatePosterior:
        """The aggregate posterior of images (N, *E) under the VAE's guide, in passes that fit into memory."""
        return cls([vae.posterior(*arguments_of(group)) for group in x.split(images_per_pass(x))] if len(x) else [])

    @property
    def is_factorized(self) -> bool:
        """Whether each q(z | x_n) is a product over latents by construction."""
        return all(factors(q) is not None for q in self.groups)

    @serialize_threads(gradients=False)
    def sample(self) -> Tensor:
        """(N, L) one z ~ q(z | x_n) per image."""
        return torch.cat([q.sample() for q in self.groups])

    @torch.no_grad()
    def log_prob_per_image(self, z: Tensor) -> Tensor:
        """(N,) log q(z_n | x_n), nats, float64. z: (N, L), in the order of the images."""
        parts = zip(self.groups, z.split(self._sizes), strict=True)
        return torch.cat([q.log_prob(part).double() for q, part in parts])

    @torch.no_grad()
    def log_prob_per_latent(self, z: Tensor) -> Tensor:
        """(N, L) log q(z_nl | x_n), nats, float64, for a factorized guide. z: (N, L)."""
        parts = zip(map(factors, self.groups), z.split(self._sizes), strict=True)
        return torch.cat([q.log_prob(part).double() for q, part in parts if q is not None])

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """(M,) log q(z), nats, float64. z: (M, L)."""
        parts = [_log_sum(q, z) for q in self.groups]
        return torch.stack(parts).logsumexp(0) - math.log(sum(self._sizes))

    @torch.no_grad()
    def log_prob_by_latent(self, z: Tensor) -> Tensor:
        """(M, L) log q(z_l) of each latent's marginal, nats, float64, for a factorized guide. z: (M, L)."""
        parts = []
        for q in map(factors, self.groups):
            assert q is not None
            chunk = items_per_pass(4 * q.batch_shape.numel(), z.device.type, bytes_per_float=8)
            parts.append(torch.cat([q.log_prob(part[:, None]).logsumexp(1).double() for part in z.split(chunk)]))
        return torch.stack(parts).logsumexp(0) - math.log(sum(self._sizes))

    @torch.no_grad()
    def smoothed(self, bandwidth: float) -> AggregatePosterior | None:
        """(1/N) sum_n prod_l Normal(m_nl, s_nl^2 + h^2 Var_n m_nl), with the bandwidth h; None unless normal."""
        normals = [q for q in map(normal_factors, self.groups) if q is not None]
        if len(normals) < len(self.groups):
            return None
        added = bandwidth**2 * torch.cat([q.loc for q in normals]).var(0, correction=0)
        return AggregatePosterior([Independent(Normal(q.loc, (q.scale.square() + added).sqrt()), 1) for q in normals])


def _log_sum(q: Distribution, z: Tensor) -> Tensor:
    """(M,) log sum_n q(z | x_n) over one group of images. z: (M, L)."""
    B, normals = int(q.batch_shape[0]), normal_factors(q)
    if normals is None:
        chunk = items_per_pass(B * floats_per_latent(q), z.device.type, bytes_per_float=8)
        return torch.cat([q.log_prob(part[:, None]).double().logsumexp(1) for part in z.split(chunk)])
    loc, precision = normals.loc.double(), normals.scale.double().pow(-2)
    constant = (loc.square() * precision - precision.log() + math.log(2 * math.pi)).sum(-1)

    def log_prob(part: Tensor) -> Tensor:
        return -(part.square() @ precision.T - 2 * part @ (loc * precision).T + constant) / 2

    chunk = items_per_pass(B, z.device.type, bytes_per_float=8)
    return torch.cat([log_prob(part).logsumexp(1) for part in z.double().split(chunk)])
