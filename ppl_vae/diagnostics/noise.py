"""The noise that a likelihood, a reduction and beta amount to, and the directions of the data above that noise."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.parts.likelihoods import Categorical, DiscretizedLogisticMixture
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.protocols import Likelihood
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import CannotMeasure
from ppl_vae.runtime.global_state import seeded

# The edge of a single permutation can come from two rare pixels that meet in one image: for 20,000 binarized MNIST
# images three permutations gave 1.59, 1.45 and 1.43. Source: ours.
_PERMUTATIONS = 3

# A pixel with a standardized variance below this is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class NoiseSpectrum:
    """The data's covariance in units of the likelihood's noise, at the state where the decoder ignores z.

    Args:
        eigenvalues: (D',) descending.
        edge: what independent pixels reach by chance; eigenvalues are counted above it.
        num_images: N.
        gaussian_variance: the likelihood's mean variance, squared pixel units; None if it has none.
        live_by_sum: directions above the noise at beta = 1, with log p(x | z) summed over pixels.
        live_by_mean: the same with log p(x | z) averaged over pixels.
    """

    eigenvalues: Tensor
    edge: float = 0.0
    num_images: int = 0
    gaussian_variance: float | None = None
    live_by_sum: int = 0
    live_by_mean: int = 0

    def count_live(self, beta: float) -> int:
        """The directions of the data above the noise at this beta, and above what independent pixels reach."""
        return live_directions(self.eigenvalues, beta=beta, edge=self.edge)


def measure_noise(family: Likelihood, x: Tensor) -> NoiseSpectrum | None:
    """The spectrum of training images (N, *E) in units of the likelihood's noise.

    Its Gaussian variance is sigma^2 = (1/D) sum_d Var(x_d | h_d) at the features h of the pixels' marginals. Times beta
    (and times D if log p is averaged over pixels), it is the noise that a linear VAE compares with the eigenvalues of
    Cov(x).

    Args:
        family: the likelihood; a copy of it is fitted to the pixels' marginals.
        x: training images, as the model sees them.

    Returns:
        None if the likelihood's first feature is not a location.

    Raises:
        CannotMeasure: no training pixel varies.
    """
    if not has_location(family):
        return None
    with torch.no_grad(), seeded(0, x.device):
        fitted = copy.deepcopy(family)
        h = fitted.fit_marginals(x)
        scores = whiten_scores(fitted, x)
        eigenvalues, edge = compute_eigenvalues(scores), compute_edge(scores)
        try:
            variance = float(fitted.double()(h.double()).variance.mean())
        except (NotImplementedError, AttributeError):
            variance = 0.0
    return NoiseSpectrum(
        eigenvalues,
        edge,
        len(x),
        variance if 0 < variance < float("inf") else None,
        live_by_sum=live_directions(eigenvalues, edge=edge),
        live_by_mean=live_directions(eigenvalues, beta=x[0].numel(), edge=edge),
    )


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
    they are those of the pixels' correlation matrix, and describe the neighborhood of the collapsed state. A deeper
    decoder can do more with one direction, and less well with many, so for it the count is only a guide.

    A learned scale is that of the marginals here; once the decoder explains pixels, it falls and more directions live.
    (``StudentT`` fits its marginals only roughly.) If log p has no second derivative (``Laplace``), H is E[s^2], which
    is the same for data that the likelihood fits. A rare binary pixel is one direction with an eigenvalue near 1.

    Args:
        family: p(x | h), with ``has_location``; a copy of it is used.
        x: images (N, *E), as the model sees them, at least two.
        features: (F,) the h to expand around; by default those of ``fit_marginals(x)``, which also fits the copy's own
            parameters.

    Returns:
        float64, for the D' pixels that vary.

    Raises:
        ValueError: a family without a location, or fewer than two images.
        CannotMeasure: a ValueError: no pixel varies.

    Reference: Lucas et al. 2019, arXiv 1911.02469, and Dai et al. 2020, arXiv 1912.10702 (Gaussian noise). The
    expansion for other likelihoods is ours.
    """
    if not has_location(family):
        raise ValueError(f"family: expected a location for each pixel, got {type(family).__name__}, which has none")
    if len(x) < 2:
        raise ValueError(f"x: expected at least two images, got {len(x)}")
    copied = copy.deepcopy(family).double()
    h = (copied.fit_marginals(x) if features is None else features).double()
    passes = x.split(images_per_pass(x.double()[:1], family))
    scores, curvatures = zip(*(_derive_scores(copied, h, group.double()) for group in passes), strict=True)
    score = torch.cat(scores)
    curvature = sum((part.sum(0) for part in curvatures), torch.zeros_like(score[0])) / len(x)
    if not (curvature != 0).any():
        curvature = score.square().mean(0)
    score = score - score.mean(0)
    varies = (curvature > 0) & (score.square().mean(0) > _CONSTANT * curvature)
    if not varies.any():
        raise CannotMeasure("x: expected pixels that vary, got the same image every time")
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
    variance, are permuted over the images by their own permutation P_d. They keep their distribution and become
    independent of other pixels. For infinitely many images the covariance is the identity; for N images and D pixels
    its eigenvalues spread to about (1 + sqrt(D / N))^2, and further for rare pixels. An eigenvalue of the data between
    1 and this edge is not evidence of a direction. The result is the median of three permutations.

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
    D times as large. The edge e leaves out the directions that finitely many images of independent pixels show by
    chance.

    Args:
        eigenvalues: (D',) in noise units, from ``compute_eigenvalues``.
        beta: the KL's weight.
        edge: e, from ``compute_edge``; 0 for eigenvalues without sampling noise.

    Reference: as ``whiten_scores``.
    """
    return int((eigenvalues > max(edge, beta)).sum())
