"""The mass that a density gives to 8-bit levels, by which densities can be compared with masses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.data import NUM_LEVELS, clamp_to_unit_interval, dequantize_uniformly
from ppl_vae.labels import ConditionalVAE
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.parts.likelihoods.level_mass import has_exact_mass, log_level_mass
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.batching import floats_per_pixel
from ppl_vae.runtime.errors import check_count
from ppl_vae.vae import VAE


class Dequantized(dist.TorchDistribution):
    """P(x) = int_0^1 p((x + u) / 256) du / 256, the mass that a density p over (0, 1) gives to a level x of a pixel.

    ``log_prob`` is exact for the densities of ``likelihoods.level_mass``. For any other density it estimates the
    integral with M stratified draws, u_m = (m + v) / M for m = 0..M-1 and one v ~ U(0, 1) per pixel:

        log P^(x) = log (1/M) sum_m p((x + u_m) / 256) - log 256,    E[P^(x)] = P(x).

    Pixels draw their own v, so the product over pixels is unbiased too, and P^ may replace P in an importance weight.
    By Jensen's inequality every bound on log P stays a bound, and is tighter for a larger M; M = 1 is the bound of
    uniform dequantization. A density over all real numbers has mass outside (0, 1), which no level gets.

    ``sample`` gives floor(256 y) for y ~ p, and ``mean`` is 256 E[y] - 1/2, both clamped to [0, 255].

    Args:
        base: The density of a pixel (x + u) / 256: batch shape (..., *E), event shape ().
        num_draws: M, without effect where masses are exact.

    Reference: Theis et al. 2016, arXiv 1511.01844, section 3.1; Ho et al. 2019, arXiv 1902.00275, equation 13
    (importance-weighted). Stratified draws for each pixel: ours.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.integer_interval(0, NUM_LEVELS - 1)

    def __init__(self, base: Distribution, num_draws: int, validate_args: bool | None = None) -> None:
        self.base, self.num_draws = base, check_count("num_draws", num_draws)
        super().__init__(base.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Dequantized:
        return Dequantized(self.base.expand(torch.Size(batch_shape)), self.num_draws, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if has_exact_mass(self.base):
            return log_level_mass(self.base, value)
        M = self.num_draws
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        v = torch.rand((1, *shape), dtype=value.dtype, device=value.device)
        m = torch.arange(M, dtype=value.dtype, device=value.device).reshape(M, *[1] * len(shape))
        y = clamp_to_unit_interval((value + (m + v) / M) / NUM_LEVELS)
        log_p = self.base.log_prob(y)
        return log_p.logsumexp(0) - math.log(M * NUM_LEVELS)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return levels_of(self.base.sample(torch.Size(sample_shape))).clamp(0, NUM_LEVELS - 1)

    @property
    def mean(self) -> Tensor:
        return (NUM_LEVELS * self.base.mean - 0.5).clamp(0, NUM_LEVELS - 1)


def levels_of(y: Tensor) -> Tensor:
    """floor(256 y): the level of y in (0, 1), in the shape of y."""
    return (NUM_LEVELS * y).floor()


class LevelsLikelihood(nn.Module):
    """p(x | z) of levels x: ``Dequantized`` for every pixel. z (..., L), and a label -> batch (...), event E."""

    def __init__(self, likelihood: Callable[..., Distribution], num_draws: int) -> None:
        super().__init__()
        self.part = likelihood
        self.num_draws = num_draws
        self.floats_per_pixel = floats_per_pixel(likelihood) + 3 * num_draws

    def forward(self, z: Tensor, *label: Tensor) -> dist.Independent:
        return mass_of_levels(self.part(z, *label), self.num_draws)


def mass_of_levels(p_x: dist.TorchDistribution, num_draws: int = 16) -> dist.Independent:
    """The mass of levels under a density of images in (0, 1)^E, event E, with M draws; see ``Dequantized``."""
    p_x = independent_pixels(p_x, "each pixel is dequantized by itself")
    return Dequantized(p_x.base_dist, num_draws).to_event(p_x.reinterpreted_batch_ndims)


class LevelsPosterior(nn.Module):
    """q(z | (x + u) / 256) for levels x (B, *E), and a label, with one draw of u."""

    def __init__(self, posterior: Callable[..., Distribution]) -> None:
        super().__init__()
        self.part = posterior

    def forward(self, x: Tensor, *label: Tensor) -> Distribution:
        return self.part(dequantize_uniformly(x), *label)


def dequantized(vae: LatentModel, *, num_draws: int = 16) -> VAE:
    """A VAE, or a conditional one, that was trained on (x + u) / 256, as a model of levels x in {0, ..., 255}^E.

    Its log-weights are log P^(x | z) + log p(z) - log q(z | x) (see ``Dequantized``), so that ``log_evidence`` bounds
    the log-mass of the levels. Bits per dimension are -log P(x) / (D log 2). The weights are shared.

    Args:
        vae: A VAE with a density over (0, 1), or over real numbers, and pixels that are independent given z.
        num_draws: M, draws of u per pixel and particle, where masses are not exact.

    Raises:
        ValueError: M is below 1, or the likelihood is a mass; when called: pixels are not independent.

    Reference: Theis et al. 2016, arXiv 1511.01844, section 3.1 (the bound).
    """
    if not isinstance(vae, ConditionalVAE):
        check_latent_model(vae, images_alone=True)
    num_draws = check_count("num_draws", num_draws)
    family = getattr(vae.likelihood, "family", None)
    if getattr(family, "measure", "density") != "density":
        raise ValueError(
            f"vae: expected a density of pixels, got {type(family).__name__}, a mass, which needs no draws"
        )
    parts = vae.prior, LevelsLikelihood(vae.likelihood, num_draws), LevelsPosterior(vae.posterior)
    if isinstance(vae, ConditionalVAE):
        return cast(VAE, ConditionalVAE(*parts, vae.class_probs).train(vae.training))
    return VAE(*parts).train(vae.training)
