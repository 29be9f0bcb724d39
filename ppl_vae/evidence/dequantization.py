"""The mass of 8-bit levels under a density: what makes the numbers of masses and of densities comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.data import NUM_LEVELS, clamp_to_unit_interval, dequantize_uniformly
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.parts.likelihoods.level_mass import has_exact_mass, log_level_mass
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import floats_per_pixel
from ppl_vae.runtime.errors import check_count
from ppl_vae.vae import VAE


class Dequantized(dist.TorchDistribution):
    """P(x) = int_0^1 p((x + u) / 256) du / 256, the mass that a density p over (0, 1) gives to a level x of a pixel.

    Where the density is of a kind whose masses are known (``likelihoods.level_mass``: normal, Laplace, Student's t,
    their images under the sigmoid, beta, continuous Bernoulli), ``log_prob`` is exact and draws nothing. For any other
    it estimates the integral with M stratified draws, u_m = (m + v) / M for m = 0..M-1 and one v ~ U(0, 1)
    for each pixel, by torch's global generator:

        log P^(x) = log (1/M) sum_m p((x + u_m) / 256) - log 256,    E[P^(x)] = P(x).

    P^ is unbiased for each pixel, and pixels draw their own v, so that the product over pixels is unbiased as well:
    exp(log P^ summed) may stand in an importance weight in the place of the mass. By Jensen's inequality
    E[log P^] <= log P, and E[log (1/S) sum_s w_s] <= log P(image): every bound stays a bound for every M, and is
    tighter for a larger one. M = 1 is the bound of uniform dequantization. A density over all real numbers has mass
    outside (0, 1) too, which no level gets: then the masses sum to less than one, exact or not. Next to a pole at 0 or
    1, what is nearer to it than single precision can tell (2^-33, 1 - 2^-24) is never drawn.

    Args:
        base: the density of a pixel (x + u) / 256: batch shape (..., *E), event shape ().
        num_draws: M, at least 1; without effect where masses are exact.

    ``sample`` gives floor(256 y) for y ~ p, at the ends for y outside (0, 1); ``mean`` is 256 E[y] - 1/2, and ``mode``
    the level of the density's mode, both cut to [0, 255].

    Raises:
        ValueError: M below 1.

    Reference: Theis et al. 2016, arXiv 1511.01844, section 3.1; Ho et al. 2019, arXiv 1902.00275, equation 13
    (importance-weighted). Stratified draws for each pixel, which independence given z allows: ours.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.integer_interval(0, NUM_LEVELS - 1)

    def __init__(self, base: Distribution, num_draws: int, validate_args: bool | None = None) -> None:
        num_draws = check_count("num_draws", num_draws)
        self.base = base
        self.num_draws = num_draws
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

    @property
    def mode(self) -> Tensor:
        return levels_of(self.base.mode).clamp(0, NUM_LEVELS - 1)


def levels_of(y: Tensor) -> Tensor:
    """floor(256 y): the level of y in (0, 1), and whole numbers below 0 and above 255 for y beyond."""
    return (NUM_LEVELS * y).floor()


class LevelsLikelihood(nn.Module):
    """p(x | z) of levels x: every pixel's density, ``Dequantized``. z (..., L) -> batch (...), event E.

    Raises:
        ValueError: pixels that are not independent given z.
    """

    def __init__(self, likelihood: Callable[[Tensor], Distribution], num_draws: int) -> None:
        super().__init__()
        self.part = likelihood
        self.num_draws = num_draws
        self.floats_per_pixel = floats_per_pixel(likelihood) + 3 * num_draws

    def forward(self, z: Tensor) -> dist.Independent:
        return mass_of_levels(self.part(z), self.num_draws)


def mass_of_levels(p_x: dist.TorchDistribution, num_draws: int = 16) -> dist.Independent:
    """Mass of levels under a density of images in (0, 1)^E whose pixels are independent; M as in ``Dequantized``."""
    p_x = independent_pixels(p_x, "each pixel is dequantized by itself")
    return Dequantized(p_x.base_dist, num_draws).to_event(p_x.reinterpreted_batch_ndims)


class LevelsPosterior(nn.Module):
    """q(z | x) of levels x: q(z | (x + u) / 256) with one draw of u, whose choice no bound depends on."""

    def __init__(self, posterior: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        self.part = posterior

    def forward(self, x: Tensor) -> Distribution:
        return self.part(dequantize_uniformly(x))


def dequantized(vae: LatentModel, *, num_draws: int = 16) -> VAE:
    """The same VAE as a model of levels x in {0, ..., 255}^E, for one that was trained on (x + u) / 256.

    Its log-weights are log P^(x | z) + log p(z) - log q(z | x) (see ``Dequantized``): nats on the scale of a mass, of
    which ``log_evidence`` is a bound. Bits per dimension are -log P(x) / (D log 2). It shares the VAE's weights.

    Args:
        vae: of a density over (0, 1), or over real numbers, with pixels that are independent given z.
        num_draws: M, draws of u per pixel and particle, where the likelihood's masses are not exact (``Dequantized``).

    Raises:
        ValueError: M below 1, or a likelihood that says it is a mass; from the likelihood: pixels that are not
            independent.

    Reference: Theis et al. 2016, arXiv 1511.01844, section 3.1 (the bound).
    """
    num_draws = check_count("num_draws", num_draws)
    family = getattr(vae.likelihood, "family", None)
    if getattr(family, "measure", "density") != "density":
        raise ValueError(
            f"vae: expected a density of pixels, got {type(family).__name__}, a mass, which needs no draws"
        )
    levels = VAE(vae.prior, LevelsLikelihood(vae.likelihood, num_draws), LevelsPosterior(vae.posterior))
    return levels.train(vae.training)
