"""What a likelihood says of pixels: its noise, the directions of the data above that noise, and its calibration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.parts.likelihoods import Categorical, DiscretizedLogisticMixture
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.protocols import LatentModel, Likelihood, check_latent_model
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.records import Data, arguments_of, further_of, images_of
from ppl_vae.support import check_support

# The edge of a single permutation can come from two rare pixels that meet in one image: for 20,000 binarized MNIST
# images three permutations gave 1.59, 1.45 and 1.43. Source: ours.
_PERMUTATIONS = 3
_CONSTANT = 1e-12  # a pixel with a smaller standardized variance is constant up to rounding


@dataclass(frozen=True)
class NoiseSpectrum:
    """The data's covariance in units of the likelihood's noise, at the state where the decoder ignores z.

    Args:
        eigenvalues: (D',) descending.
        edge: what independent pixels reach by chance; eigenvalues are counted above it.
        live_by_sum: directions above the noise at beta = 1, with log p(x | z) summed over pixels.
        live_by_mean: the same with log p(x | z) averaged over pixels.
    """

    eigenvalues: Tensor
    edge: float = 0.0
    live_by_sum: int = 0
    live_by_mean: int = 0

    def count_live(self, beta: float) -> int:
        """The directions of the data above the noise at this beta, and above what independent pixels reach."""
        return live_directions(self.eigenvalues, beta=beta, edge=self.edge)


def measure_noise(family: Likelihood, x: Tensor) -> NoiseSpectrum | None:
    """The spectrum of training images (N, *E), as the model sees them, in units of the likelihood's noise.

    Returns None if the likelihood's first feature is not a location, and if no training pixel varies.
    """
    if not has_location(family):
        return None
    with seeded(0, x.device):
        scores = whiten_scores(family, x)
    if not scores.shape[1]:
        return None
    eigenvalues, edge = compute_eigenvalues(scores), compute_edge(scores)
    by_mean = live_directions(eigenvalues, beta=x[0].numel(), edge=edge)
    return NoiseSpectrum(eigenvalues, edge, live_directions(eigenvalues, edge=edge), by_mean)


def has_location(family: Likelihood) -> bool:
    """Whether each pixel's first feature is its location, and pixels are independent given the features.

    That holds for all likelihoods of the package except ``Categorical`` and ``DiscretizedLogisticMixture``.
    """
    return not isinstance(family, Categorical | DiscretizedLogisticMixture)


@torch.no_grad()
def whiten_scores(family: Likelihood, x: Tensor, *, features: Tensor | None = None) -> Tensor:
    """(N, D') H^-1/2 (s - mean s), whose covariance is that of the data in units of the likelihood's noise.

    A decoder that ignores z has the features h of the pixels' marginals. Around them, log p(x | h + d) is
    log p(x | h) + s'd - d'H d / 2 to second order, with an image's score s = d log p / dh and the curvature
    H = -E[d2 log p / dh2], which is diagonal since pixels are independent. For d = W z that is a linear VAE of the data
    H^-1/2 s with unit noise. A linear decoder leaves the state that ignores z exactly along the eigenvectors whose
    eigenvalue exceeds beta, or beta D if log p is averaged over D pixels. See ``live_directions``.

    For a Normal of scale sigma the eigenvalues are those of Cov(x) / sigma^2, without approximation. For a Bernoulli
    they are those of the pixels' correlation matrix, and describe the neighborhood of the collapsed state. For a deeper
    decoder the count is only a guide. A learned scale is that of the marginals here; once the decoder explains pixels,
    it falls and more directions live. If log p has no second derivative (``Laplace``), H is E[s^2], which is the same
    for data that the likelihood fits.

    Args:
        family: p(x | h), with ``has_location`` (another raises ValueError); a copy of it is used.
        x: images (N, *E), as the model sees them, at least two.
        features: (F,) the h to expand around; by default those of ``fit_marginals(x)``, which also fits the copy's own
            parameters.

    Returns:
        float64, for the D' pixels that vary.

    Reference: Lucas et al. 2019, arXiv 1911.02469, and Dai et al. 2020, arXiv 1912.10702 (Gaussian noise). The
    expansion for other likelihoods is ours.
    """
    if not has_location(family):
        raise ValueError(f"family: expected a location for each pixel, got {type(family).__name__}, which has none")
    if len(x) < 2:
        raise ValueError(f"x: expected at least two images, got {len(x)}")
    copied = copy.deepcopy(family).double()
    h = (copied.fit_marginals(x) if features is None else features).double()
    passes = x.split(images_per_pass(x[:1].double(), family))
    scores, curvatures = zip(*(_derive_scores(copied, h, group.double()) for group in passes), strict=True)
    score = torch.cat(scores)
    curvature = sum((part.sum(0) for part in curvatures), torch.zeros_like(score[0])) / len(x)
    if not (curvature != 0).any():
        curvature = score.square().mean(0)
    score = score - score.mean(0)
    varies = (curvature > 0) & (score.square().mean(0) > _CONSTANT * curvature)
    return score[:, varies] / curvature[varies].sqrt()


def _derive_scores(family: Likelihood, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d log p / dh and -d2 log p / dh2 for the first feature of each pixel, (B, D). h: (F,), x: (B, *E)."""
    D = x[0].numel()
    with torch.enable_grad():
        features = h.expand(len(x), -1).detach().clone().requires_grad_()
        p_x = independent_pixels(family(features), "the expansion takes its curvature pixel by pixel")
        score = torch.autograd.grad(p_x.log_prob(x).sum(), features, create_graph=True)[0][:, :D]
        if not score.requires_grad:  # piecewise linear in h
            return score, torch.zeros_like(score)
        second = torch.autograd.grad(score.sum(), features, allow_unused=True)[0]
    second = torch.zeros_like(score) if second is None else second[:, :D]
    return score.detach(), -second


def compute_eigenvalues(scores: Tensor) -> Tensor:
    """(min(N, D'),) eigenvalues of scores' scores / N, descending, on the CPU. scores: (N, D'), of mean 0."""
    few = scores if scores.shape[0] > scores.shape[1] else scores.T
    return torch.linalg.eigvalsh(few.T @ few / len(scores)).flip(0).clamp(min=0).cpu()


def compute_edge(scores: Tensor, *, seed: int = 0) -> float:
    """The largest eigenvalue that independent pixels reach by chance, in units of the likelihood's noise.

    It is the largest eigenvalue of Cov(u), u_d = P_d (H^-1/2 s)_d / scale_d: each pixel's scores, scaled to unit
    variance, are permuted over the images by their own permutation P_d, and become independent of other pixels. The
    eigenvalues spread to about (1 + sqrt(D / N))^2, and further for rare pixels, so an eigenvalue of the data between 1
    and this edge is not evidence of a direction. The result is the median of three permutations.

    Args:
        scores: (N, D') from ``whiten_scores``.
        seed: of the permutations; torch's global generator is not changed.

    Reference: Horn 1965, Psychometrika 30(2), 179-185 (parallel analysis); Buja and Eyuboglu 1992, Multivariate
    Behavioral Research 27(4), 509-540 (by permutation). At the likelihood's own noise: ours.
    """
    scores = scores / scores.square().mean(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    edges = []
    for _ in range(_PERMUTATIONS):
        for d in range(scores.shape[1]):
            scores[:, d] = scores[torch.randperm(len(scores), generator=generator).to(scores.device), d]
        edges.append(compute_eigenvalues(scores)[0])
    return float(torch.stack(edges).median())


def live_directions(eigenvalues: Tensor, *, beta: float = 1.0, edge: float = 0.0) -> int:
    """#{d: lambda_d > max(beta, e)}: the directions that can stay live.

    reconstruction / D - beta KL = (reconstruction - beta D KL) / D, so for log p(x | z) averaged over D pixels beta is
    D times as large. The edge e (``compute_edge``) leaves out what finitely many images of independent pixels show by
    chance.

    Args:
        eigenvalues: (D',) in noise units, from ``compute_eigenvalues``.
        beta: the KL's weight.
        edge: e; 0 for eigenvalues without sampling noise.

    Reference: as ``whiten_scores``.
    """
    return int((eigenvalues > max(edge, beta)).sum())


# --- Calibration of pixels ---

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
        num_images, num_draws: N and J.
    """

    above_90_percent_quantile: Estimate
    below_10_percent_quantile: Estimate
    largest_deviation: float
    verdict: str
    histogram: tuple[Estimate, ...]
    num_images: int
    num_draws: int


@serialize_threads(gradients=False)
def calibrate_pixels(
    vae: LatentModel,
    x: Data,
    *,
    num_draws: int = 99,
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> PixelCalibration:
    """The histogram over pixels of PIT_d = (#{j: x^j_d < x_d} + v_d (1 + #{j: x^j_d = x_d})) / (J + 1).

    Each image has one z ~ q(z | x), J draws x^j ~ p(x | z) and v_d ~ Uniform(0, 1). If x ~ p(x) and q is the exact
    posterior, then given z the pixel x_d and the x^j_d are J + 1 independent draws of one distribution, and PIT_d is
    exactly uniform for every J, for masses as for densities. (With a new z for each draw it would not be.) If it is not
    uniform, the likelihood, the guide or the prior is wrong. Uniform pixels prove nothing about how pixels depend on
    each other. The bins' edges are quantiles of J draws, which blurs deviations by at most 1 / (2 sqrt(J)).

    Args:
        x: images (N, *E) as the VAE sees them, or ``Records``.
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
    check_latent_model(vae)
    num_draws = check_count("num_draws", num_draws)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    if transform is None:
        check_support(vae.model, x)
    sums = torch.zeros(BINS, dtype=torch.double, device=x.device)
    products = torch.zeros(BINS, BINS, dtype=torch.double, device=x.device)
    draws = images_per_pass(x)
    for images in x.split(max(1, min(draws // num_draws, images_per_pass(x, vae.likelihood)))):
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
    vae: LatentModel, data: Data, num_draws: int, transform: Callable[[Tensor], Tensor] | None, *, chunk: int
) -> Tensor:
    """(B, D) the PIT of each pixel, float64, in [0, 1). data: images (B, *E), or ``Records``."""
    x = images_of(data)
    p = vae.likelihood(vae.posterior(*arguments_of(data)).sample(), *further_of(data))
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
