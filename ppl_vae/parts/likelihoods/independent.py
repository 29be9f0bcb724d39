"""Independent pixels fitted by maximum likelihood: the baseline without dependence between pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae import data
from ppl_vae.data import NUM_LEVELS
from ppl_vae.parts.likelihoods import counts
from ppl_vae.parts.likelihoods.base import ascend, level_counts, mask_missing, median_and_deviation, unbounded
from ppl_vae.parts.likelihoods.level_mass import log_level_mass
from ppl_vae.parts.likelihoods.levels import PIXELS_AT_ONCE, Categorical, LevelCategorical
from ppl_vae.parts.likelihoods.real import LOG_DF_LIMIT, Laplace, RealPixels, StudentT
from ppl_vae.parts.likelihoods.unit_interval import Beta, ContinuousBernoulli, Logit, LogitNormal, Sigmoid
from ppl_vae.protocols import Likelihood
from ppl_vae.runtime.numerics import bounded, mean_and_variance, sum_over_images

_STEPS = 100  # of an ascent
_MOST_NUMBERS = 2**21  # of the images that a Student's t or a negative binomial is fitted to
_LOG_SCALE_LIMIT = 3.0  # a fitted scale is between 1/20 and 20 times the one that it starts from
_NOISE_SCALE = 1 / (NUM_LEVELS * math.sqrt(12))  # the spread of u / 256, u uniform: no fit to levels is narrower
_SMALLEST_SCALE = 1e-3  # of a constant pixel, as a share of the spread of all pixels


def fit_independent_pixels(
    family: Likelihood, x: Tensor, *, is_dequantized: bool = False
) -> Callable[[Tensor], Tensor]:
    """log prod_d p(x_d), each p of the family's kind, fitted to its own pixel or column by maximum likelihood.

    Every pixel has its own parameters: a normal has a location and a scale in each. For a density of dequantized
    levels, the exact masses of levels are maximized and returned. A rate or a share of 0 is replaced by half a count,
    or 1/256 of one; a constant pixel's scale is a thousandth of the spread of all pixels. Other families are fitted by
    their ``fit_marginals``.

    Args:
        family: A likelihood, whose parameters may change, as by ``fit_marginals``.
        x: (N, *E) training images as the model sees them.
        is_dequantized: Whether x is (level + u) / 256.

    Returns:
        Images (n, *E) -> (n,) nats; where x is dequantized, of levels.

    Raises:
        ValueError: Every pixel is constant, under a density of real numbers.
    """
    if isinstance(family, RealPixels | Logit | LogitNormal):
        pixels = _fit_location_and_scale(family, x.flatten(1), is_dequantized=is_dequantized)
    elif isinstance(family, Categorical):
        pixels = LevelCategorical(logits=(level_counts(x) + 1 / NUM_LEVELS).log().to(x.dtype))
    elif isinstance(family, counts.Poisson):
        pixels = counts.StablePoisson(((0.5 + sum_over_images(x.flatten(1))) / len(x)).to(x.dtype))
    elif isinstance(family, counts.NegativeBinomial):
        pixels = _fit_negative_binomial(x.flatten(1))
    elif isinstance(family, Beta | ContinuousBernoulli) and is_dequantized:
        pixels = _fit_unit_interval(family, x)
    else:
        p_x = family(family.fit_marginals(x))
        return lambda images: _log_prob_observed(p_x, images, x[:1])
    if is_dequantized:
        return lambda levels: log_level_mass(pixels, levels.flatten(1)).sum(-1)
    return lambda images: _log_prob_observed(pixels.to_event(1), images.flatten(1), x[:1].flatten(1))


def _log_prob_observed(p_x: dist.TorchDistribution, images: Tensor, filling: Tensor) -> Tensor:
    """(n,) log p(x_observed) of images (n, *E), NaN where missing; the filling is an image on the support."""
    missing = images.isnan()
    if not missing.any():
        return p_x.log_prob(images)
    return mask_missing(p_x, images).log_prob(torch.where(missing, filling, images))


# --- Families ---


def _fit_location_and_scale(family: nn.Module, x: Tensor, *, is_dequantized: bool) -> dist.TorchDistribution:
    """A normal, Laplace or Student's t distribution for each column of x (N, D), or of its logit."""
    family = family.logit if isinstance(family, LogitNormal) else family
    has_logit = isinstance(family, Logit)
    base = family.base if isinstance(family, Logit) else family
    y = data.map_images(lambda part: data.clamp_to_unit_interval(part).logit(), x, dtype=x.dtype) if has_logit else x
    if isinstance(base, Laplace | StudentT):
        loc, scale = median_and_deviation(y)
    else:
        loc, variance = mean_and_variance(y)
        scale = variance.sqrt()
    spread = scale.square().mean().sqrt()
    if not spread > 0:
        raise ValueError("x: expected pixels that vary, got the same image every time: no scale fits")
    scale = torch.where(scale > 0, scale, _SMALLEST_SCALE * spread)
    least = _NOISE_SCALE if is_dequantized and not has_logit else 0.0

    def pixels(h: Tensor, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        own_loc, own_scale = loc + scale * h[0], (scale * bounded(h[1], _LOG_SCALE_LIMIT).exp()).clamp(min=least)
        if isinstance(base, StudentT):
            return dist.StudentT(1 + bounded(math.log(4) + h[2], LOG_DF_LIMIT).exp(), own_loc, own_scale)
        return (dist.Laplace if isinstance(base, Laplace) else dist.Normal)(own_loc, own_scale)

    def x_pixels(h: Tensor, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return Sigmoid(pixels(h, loc, scale)) if has_logit else pixels(h, loc, scale)

    constants = [loc.to(x.dtype), scale.to(x.dtype)]
    num_parameters = 3 if isinstance(base, StudentT) else 2
    if is_dequantized:
        return _fit_levels(x_pixels, constants, num_parameters, x)
    if isinstance(base, StudentT):
        rows = _sample_rows(y)
        h = _ascend(lambda p, rows: p.log_prob(rows.T).mean(0), pixels, constants, num_parameters, rows.T)
        return x_pixels(h, *constants)
    return x_pixels(x.new_zeros(num_parameters, x.shape[1]), *constants)


def _fit_negative_binomial(x: Tensor) -> counts.StableNegativeBinomial:
    """The maximum likelihood mean and total count of each column; the best mean is the same for every total count."""
    mean, variance = mean_and_variance(x)
    mean = mean + 0.5 / len(x)
    start = unbounded((mean.square() / (variance - mean).clamp(min=0)).log(), counts.LOG_TOTAL_LIMIT)

    def pixels(h: Tensor, log_mean: Tensor, start: Tensor) -> counts.StableNegativeBinomial:
        return counts.StableNegativeBinomial(log_mean, bounded(start + h[0], counts.LOG_TOTAL_LIMIT))

    constants = [mean.log().to(x.dtype), start.to(x.dtype)]
    if x.max() < NUM_LEVELS:
        levels = torch.arange(NUM_LEVELS, dtype=x.dtype)[:, None]
        h = _ascend(lambda p, n: (n.T * p.log_prob(levels)).sum(0), pixels, constants, 1, _shares(x))
    else:
        h = _ascend(lambda p, rows: p.log_prob(rows.T).mean(0), pixels, constants, 1, _sample_rows(x).T)
    return pixels(h, *constants)


def _fit_unit_interval(family: Beta | ContinuousBernoulli, x: Tensor) -> dist.TorchDistribution:
    """A beta or a continuous Bernoulli for each pixel of levels, x (N, *E) dequantized."""
    start = family.fit_marginals(x).unflatten(-1, (family.features_per_pixel, -1))
    if isinstance(family, Beta):
        return _fit_levels(lambda h, a, b: family.pixel(a + h[0], b + h[1]), list(start), 2, x.flatten(1))
    return _fit_levels(lambda h, logit: family.pixel(logit * h[0].exp()), list(start), 1, x.flatten(1))


# --- Gradient ascent ---


def _fit_levels(
    pixels: Callable[..., dist.TorchDistribution], constants: Sequence[Tensor], num_parameters: int, x: Tensor
) -> dist.TorchDistribution:
    """Pixels fitted to the masses of levels, x (N, D) dequantized."""
    h = _ascend(_log_mass_of_levels, pixels, constants, num_parameters, _shares((NUM_LEVELS * x).floor()))
    return pixels(h, *constants)


def _shares(levels: Tensor) -> Tensor:
    """(N, D) levels -> (D, 256), the share of images that have a level."""
    return (level_counts(levels) / len(levels)).to(levels.dtype)


def _sample_rows(x: Tensor) -> Tensor:
    """All rows of x (N, D), or a fixed random subset where there are too many."""
    return x[data.subset(len(x), min(len(x), max(1000, _MOST_NUMBERS // x.shape[1])))]


def _log_mass_of_levels(p: dist.TorchDistribution, share: Tensor) -> Tensor:
    """sum_v share_v log P(v), (D,), share (D, 256): exact at the ends, and by the density in the middle of others."""
    middle = (torch.arange(1, NUM_LEVELS - 1, dtype=share.dtype)[:, None] + 0.5) / NUM_LEVELS
    inner = (share[:, 1:-1].T * (p.log_prob(middle) - math.log(NUM_LEVELS))).sum(0)
    ends = (share[:, v] * log_level_mass(p, torch.full_like(share[:, v], v)) for v in (0, NUM_LEVELS - 1))
    return inner + sum(ends)


def _ascend(
    log_p: Callable[[dist.TorchDistribution, Tensor], Tensor],
    pixels: Callable[..., dist.TorchDistribution],
    constants: Sequence[Tensor],
    num_parameters: int,
    statistics: Tensor,
) -> Tensor:
    """The h (num_parameters, D) that maximizes log_p(pixels(h, *constants), statistics) in each pixel, from h = 0.

    Args:
        log_p: The distribution of D pixels, and their statistics, (D, ...) -> (D,) nats.
        pixels: Parameters h and the constants, each (D,) -> the distribution.
        statistics: (D, ...) rows of the data, or shares of levels.
    """

    def objective(h: Tensor, *, part: Tensor, own: Sequence[Tensor]) -> Tensor:
        return log_p(pixels(h, *own), part)

    parts = zip(*(t.split(PIXELS_AT_ONCE) for t in (statistics, *constants)), strict=True)
    zero = statistics.new_zeros
    found = [
        ascend(partial(objective, part=part, own=own), zero(num_parameters, len(part)), steps=_STEPS)
        for part, *own in parts
    ]
    return torch.cat(found, 1)
