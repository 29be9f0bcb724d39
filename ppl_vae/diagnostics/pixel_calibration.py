"""Calibration of pixels: is a pixel above the model's 90% quantile a tenth of the time? Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.support import check_support
from ppl_vae.vae import VAE

BINS = 20
_TAIL = BINS // 10  # bins of the lowest and of the highest tenth

# A share of pixels is called wrong where it is off by this and by so many standard errors: among thousands of images
# every model is distinguishable from a right one, and what matters is by how much. Source: ours.
_RIGHT_WITHIN = 0.02
_STDERRS = 3.0


@dataclass(frozen=True)
class Share:
    """A share of the pixels, with its standard error over images: the pixels of one image depend on each other."""

    mean: float
    stderr: float

    def is_off(self, expected: float) -> bool:
        """By more than 2 points and more than three standard errors."""
        error = abs(self.mean - expected)
        return error > _RIGHT_WITHIN and error > _STDERRS * self.stderr  # a NaN, of one image, says nothing

    def to_json(self) -> dict[str, float]:
        """As reports hold it."""
        return {"mean": self.mean, "stderr": self.stderr}


@dataclass(frozen=True)
class Calibration:
    """The histogram of the probability integral transform of pixels: uniform on (0, 1) where all is right.

    Args:
        mean: (20,) float64, the share of pixels in each of 20 equal bins of (0, 1), averaged over images.
        covariance: (20, 20) float64, of those means over images: NaN for one image.
        num_images: N.
        num_draws: J.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int
    num_draws: int

    def _share(self, weights: Sequence[float]) -> Share:
        """sum_k a_k share_k, with variance a' C a."""
        a = torch.tensor(weights, dtype=torch.double)
        return Share(float(a @ self.mean), float((a @ self.covariance @ a).clamp(min=0).sqrt()))

    @property
    def shares(self) -> list[Share]:
        """Of the pixels in each bin."""
        return [self._share(row) for row in torch.eye(BINS).tolist()]

    @property
    def brighter(self) -> Share:
        """P(PIT > 0.9): of the pixels above the model's 90% quantile, 10% where it is right."""
        return self._share([0.0] * (BINS - _TAIL) + [1.0] * _TAIL)

    @property
    def darker(self) -> Share:
        """P(PIT < 0.1): of the pixels below its 10% quantile, 10% where it is right."""
        return self._share([1.0] * _TAIL + [0.0] * (BINS - _TAIL))

    def _below(self, k: int) -> Share:
        """P(PIT < k / 20)."""
        return self._share([1.0] * k + [0.0] * (BINS - k))

    @property
    def deviation(self) -> float:
        """max_k |P(PIT < k / 20) - k / 20|: the largest deviation of the cumulative histogram from the uniform one."""
        return max(abs(self._below(k).mean - k / BINS) for k in range(1, BINS))

    @property
    def verdict(self) -> str:
        """What is wrong, by its size: "calibrated" where nothing is, to 2 points and three standard errors."""
        middle = [0.0] * (BINS - 2 * _TAIL)
        outer = self._share([1.0] * _TAIL + middle + [1.0] * _TAIL)
        lean = self._share([-1.0] * _TAIL + middle + [1.0] * _TAIL)
        half = self._below(BINS // 2)
        found = []
        if outer.is_off(2 * _TAIL / BINS):
            found.append(f"scales are too {'wide' if outer.mean < 2 * _TAIL / BINS else 'narrow'}")
        if lean.is_off(0.0):
            found.append(f"{'bright' if lean.mean > 0 else 'dark'} pixels surprise more")
        if half.is_off(0.5):
            found.append(f"medians are too {'bright' if half.mean > 0.5 else 'dark'}")
        if not found and any(self._below(k).is_off(k / BINS) for k in range(1, BINS)):
            found.append("tails and medians are right, what lies between is not")
        return ", ".join(found) or "calibrated"

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {
            "above_90_percent_quantile": self.brighter.to_json(),
            "below_10_percent_quantile": self.darker.to_json(),
            "largest_deviation": self.deviation,
            "verdict": self.verdict,
            "histogram": [share.to_json() for share in self.shares],
            "num_images": self.num_images,
            "num_draws": self.num_draws,
        }


@serialize_threads()
@torch.no_grad()
def calibration(
    vae: VAE,
    x: Tensor,
    *,
    num_draws: int = 99,
    observe: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """The histogram over pixels of PIT_d = (#{j: x^j_d < x_d} + v_d (1 + #{j: x^j_d = x_d})) / (J + 1).

    For each image z ~ q(z | x), once, then x^1, ..., x^J ~ p(x | z) and v_d ~ Uniform(0, 1). Let x ~ p(x), the model,
    and q(z | x) = p(z | x), its posterior. Then (x, z) is one draw of p(x, z), so given z the pixel x_d and the x^j_d
    are J + 1 independent draws of one distribution, whatever it is. Order them, ties at random: the place R of x_d is
    uniform on 0, ..., J. It has #{x^j_d < x_d} before it and, with T = #{x^j_d = x_d} ties, 0 to T more with equal
    probabilities, which is the whole part of v_d (1 + T); the rest of it is uniform on (0, 1) and independent. So PIT_d
    is (R + uniform) / (J + 1), exactly uniform for every J, for masses as for densities.

    Where it is not uniform, the likelihood, the guide or the prior is wrong; it cannot say which. Uniform pixels prove
    nothing of how pixels go together. The edges of the bins are quantiles of J draws, not of the model: what is wrong
    is blurred by at most 1 / (2 sqrt(J)), what is right stays as it is. A new z for each draw would not do: the x^j and
    x would be draws of several distributions.

    Draws come from torch's global generator. Memory depends on neither N nor J.

    Args:
        vae: in evaluation mode.
        x: images (N, *E) as the VAE sees them.
        num_draws: J.
        observe: what makes of the draws of p(x | z) pixels as they are in x, such as ``dequantization.levels_of`` where
            p is a density of dequantized levels; by default they are. With it x is not compared with
            the support of p(x | z).
        progress: called with the number of images after each group of them.

    Raises:
        ValueError: an argument out of its range, or an image off the support of p(x | z).

    Reference: Dawid 1984, Statistical theory: the prequential approach; Czado, Gneiting and Held 2009, Predictive model
    assessment for count data (ties); Talts et al. 2018, arXiv 1804.06788, theorem 1 (ranks). Pixels given a draw of the
    posterior: ours.
    """
    num_draws = check_count("num_draws", num_draws)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    if observe is None:
        check_support(vae.model, x)
    sums = torch.zeros(BINS, dtype=torch.double, device=x.device)
    products = torch.zeros(BINS, BINS, dtype=torch.double, device=x.device)
    draws = images_per_pass(x)
    images_a_pass = max(1, min(draws // num_draws, images_per_pass(x, vae.likelihood)))
    for images in x.split(images_a_pass):
        shares = _histograms(_transformed(vae, images, num_draws, observe, chunk=draws))
        sums += shares.sum(0)
        products += shares.T @ shares
        if progress is not None:
            progress(len(images))
    N = len(x)
    mean = sums / N
    covariance = (products / N - torch.outer(mean, mean)) / (N - 1) if N > 1 else torch.full_like(products, math.nan)
    return Calibration(mean.cpu(), covariance.cpu(), N, num_draws)


def _transformed(
    vae: VAE, x: Tensor, num_draws: int, observe: Callable[[Tensor], Tensor] | None, *, chunk: int
) -> Tensor:
    """(B, D) the PIT of each pixel, float64. x: (B, *E)."""
    p = vae.likelihood(vae.posterior(x).sample())
    below, equal = torch.zeros_like(x, dtype=torch.double), torch.zeros_like(x, dtype=torch.double)
    for start in range(0, num_draws, chunk):
        drawn = p.sample((min(chunk, num_draws - start),))
        drawn = drawn if observe is None else observe(drawn)
        below += (drawn < x).sum(0)
        equal += (drawn == x).sum(0)
    return ((below + torch.rand_like(below) * (1 + equal)) / (num_draws + 1)).flatten(1)


def _histograms(pit: Tensor) -> Tensor:
    """(B, 20) the share of each image's pixels in each bin. pit: (B, D) in [0, 1)."""
    place = (pit * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(len(pit), BINS, dtype=torch.double, device=pit.device)
    return counts.scatter_add_(1, place, torch.ones_like(pit)) / pit.shape[1]
