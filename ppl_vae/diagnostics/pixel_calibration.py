"""Calibration of pixels: whether a pixel is above the model's 90% quantile a tenth of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.support import check_support

BINS = 20
_TAIL = BINS // 10  # bins in the lowest and in the highest tenth

# A share of pixels is wrong if it is off by this much and by so many standard errors: thousands of images distinguish
# every model from a right one, and what matters is by how much. Source: ours.
_RIGHT_WITHIN = 0.02
_STDERRS = 3.0


@dataclass(frozen=True)
class PixelCalibration:
    """The histogram of the probability integral transform of pixels, which is uniform on (0, 1) for a right model.

    All shares are of pixels, with standard errors over images, since the pixels of one image depend on each other.

    Args:
        above_90_percent_quantile: P(PIT > 0.9), the pixels brighter than the model's 90% quantile.
        below_10_percent_quantile: P(PIT < 0.1), the pixels darker than its 10% quantile.
        largest_deviation: max_k |P(PIT < k / 20) - k / 20|, that of the cumulative histogram from the uniform one.
        verdict: what is wrong; "calibrated" if nothing is wrong by more than 2 points and three standard errors.
        histogram: the shares in 20 equal bins of (0, 1).
        num_images: N.
        num_draws: J.
    """

    above_90_percent_quantile: Estimate
    below_10_percent_quantile: Estimate
    largest_deviation: float
    verdict: str
    histogram: tuple[Estimate, ...]
    num_images: int
    num_draws: int


def summarize_histogram(mean: Tensor, covariance: Tensor, *, num_images: int, num_draws: int) -> PixelCalibration:
    """The calibration from the shares in 20 bins, their mean over images (20,) and its covariance (20, 20), float64."""
    bin_of = torch.arange(BINS)

    def share(weights: Tensor) -> Estimate:
        """sum_k a_k share_k, with variance a' C a."""
        a = weights.double()
        return Estimate(float(a @ mean), float((a @ covariance @ a).clamp(min=0).sqrt()))

    is_dark, is_bright = bin_of < _TAIL, bin_of >= BINS - _TAIL
    below = [share(bin_of < k) for k in range(BINS)]
    outer, lean = share(is_dark | is_bright), share(is_bright.double() - is_dark.double())
    found = []
    if _is_off(outer, 2 * _TAIL / BINS):
        found.append(f"scales are too {'wide' if outer.mean < 2 * _TAIL / BINS else 'narrow'}")
    if _is_off(lean, 0.0):
        found.append(f"{'bright' if lean.mean > 0 else 'dark'} pixels surprise more")
    if _is_off(below[BINS // 2], 0.5):
        found.append(f"medians are too {'bright' if below[BINS // 2].mean > 0.5 else 'dark'}")
    if not found and any(_is_off(below[k], k / BINS) for k in range(1, BINS)):
        found.append("tails and medians are right, what lies between is not")
    return PixelCalibration(
        above_90_percent_quantile=share(is_bright),
        below_10_percent_quantile=share(is_dark),
        largest_deviation=max(abs(below[k].mean - k / BINS) for k in range(1, BINS)),
        verdict=", ".join(found) or "calibrated",
        histogram=tuple(share(row) for row in torch.eye(BINS)),
        num_images=num_images,
        num_draws=num_draws,
    )


def _is_off(share: Estimate, expected: float) -> bool:
    """Whether a share is off by more than 2 points and more than three standard errors; False if it has no error."""
    error = abs(share.mean - expected)
    return error > _RIGHT_WITHIN and error > _STDERRS * share.stderr


@serialize_threads()
@torch.no_grad()
def calibrate_pixels(
    vae: LatentModel,
    x: Tensor,
    *,
    num_draws: int = 99,
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> PixelCalibration:
    """The histogram over pixels of PIT_d = (#{j: x^j_d < x_d} + v_d (1 + #{j: x^j_d = x_d})) / (J + 1).

    Each image has one z ~ q(z | x), J draws x^j ~ p(x | z) and v_d ~ Uniform(0, 1). If x ~ p(x) and q is the exact
    posterior, then (x, z) is one draw of p(x, z), so given z the pixel x_d and the x^j_d are J + 1 independent draws of
    one distribution. The rank R of x_d, with ties broken at random, is then uniform on 0, ..., J, and
    PIT_d = (R + uniform) / (J + 1) is exactly uniform for every J, for masses as for densities. A new z for each draw
    would not do: x and the x^j would come from several distributions.

    If it is not uniform, the likelihood, the guide or the prior is wrong; it cannot tell which. Uniform pixels prove
    nothing about how pixels depend on each other. The bins' edges are quantiles of J draws, which blurs deviations by
    at most 1 / (2 sqrt(J)). Draws come from torch's global generator. Memory depends on neither N nor J.

    Args:
        x: images (N, *E) as the VAE sees them.
        num_draws: J.
        transform: turns draws of p(x | z) into pixels as in x, such as ``dequantization.levels_of`` for a density of
            dequantized levels; x is then not checked against the support of p(x | z). By default draws are not changed.
        progress: called with the number of images after each pass.

    Raises:
        ValueError: an argument out of its range, or an image off the support of p(x | z).

    Reference: Dawid 1984, Statistical theory: the prequential approach; Czado, Gneiting and Held 2009, Predictive model
    assessment for count data (ties); Talts et al. 2018, arXiv 1804.06788, theorem 1 (ranks). Pixels given a draw of the
    posterior: ours.
    """
    num_draws = check_count("num_draws", num_draws)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    if transform is None:
        check_support(vae.model, x)
    sums = torch.zeros(BINS, dtype=torch.double, device=x.device)
    products = torch.zeros(BINS, BINS, dtype=torch.double, device=x.device)
    draws = images_per_pass(x)
    images_a_pass = max(1, min(draws // num_draws, images_per_pass(x, vae.likelihood)))
    for images in x.split(images_a_pass):
        shares = _histograms(_compute_pit(vae, images, num_draws, transform, chunk=draws))
        sums += shares.sum(0)
        products += shares.T @ shares
        if progress is not None:
            progress(len(images))
    N = len(x)
    mean = sums / N
    covariance = (products / N - torch.outer(mean, mean)) / (N - 1) if N > 1 else torch.full_like(products, math.nan)
    return summarize_histogram(mean.cpu(), covariance.cpu(), num_images=N, num_draws=num_draws)


def _compute_pit(
    vae: LatentModel, x: Tensor, num_draws: int, transform: Callable[[Tensor], Tensor] | None, *, chunk: int
) -> Tensor:
    """(B, D) the PIT of each pixel, float64. x: (B, *E)."""
    p = vae.likelihood(vae.posterior(x).sample())
    below, equal = torch.zeros_like(x, dtype=torch.double), torch.zeros_like(x, dtype=torch.double)
    for start in range(0, num_draws, chunk):
        drawn = p.sample((min(chunk, num_draws - start),))
        drawn = drawn if transform is None else transform(drawn)
        below += (drawn < x).sum(0)
        equal += (drawn == x).sum(0)
    return ((below + torch.rand_like(below) * (1 + equal)) / (num_draws + 1)).flatten(1)


def _histograms(pit: Tensor) -> Tensor:
    """(B, 20) the share of each image's pixels in each bin. pit: (B, D) in [0, 1)."""
    place = (pit * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(pit), BINS, dtype=torch.double, device=pit.device)
    return counts.scatter_add_(1, place, torch.ones_like(pit)) / pit.shape[1]
