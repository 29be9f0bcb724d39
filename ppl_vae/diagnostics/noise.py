"""The noise that a likelihood, a reduction and beta amount to, and which directions of the data rise above it."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppl_vae.diagnostics.values import CannotMeasure
from ppl_vae.parts.likelihoods import Categorical, DiscretizedLogisticMixture
from ppl_vae.parts.likelihoods.family import independent_pixels
from ppl_vae.runtime.batching import images_per_pass

Reduction = Literal["sum", "mean"]

# Of a single one the edge can be that of two pixels, each on a few times, that meet in one image: of 20,000 binarized
# MNIST images three gave 1.59, 1.45 and 1.43. Source: ours.
_PERMUTATIONS = 3

# A pixel whose standardized variance is below this does not vary: what is left is rounding.
_CONSTANT = 1e-12


def threshold(*, beta: float = 1.0, reduction: Reduction = "sum", num_pixels: int = 1) -> float:
    """t = beta where log p(x | z) is summed over pixels, t = beta D where it is averaged over D of them.

    reconstruction / D - beta KL = (reconstruction - beta D KL) / D: a mean over pixels is a sum with beta D.

    Args:
        beta: the KL's weight.
        reduction: of log p(x | z) over pixels, "sum" or "mean".
        num_pixels: D, of a mean.

    Raises:
        ValueError: a reduction that is neither.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    return beta * (num_pixels if reduction == "mean" else 1)


def has_location(family: Any) -> bool:
    """Whether each pixel's first feature is its location, and pixels are independent given features.

    So it is of all likelihoods of the package but ``Categorical`` and ``DiscretizedLogisticMixture``.
    """
    return not isinstance(family, Categorical | DiscretizedLogisticMixture)


def _in_double(family: Any) -> Any:
    """A copy in float64, so that neither weights nor fitted scales of the caller's change."""
    return copy.deepcopy(family).double() if isinstance(family, nn.Module) else family


def _scores(family: Any, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """s = d log p / dh and -d2 log p / dh2 of each pixel's first feature, (B, D). h: (F,), x: (B, *E)."""
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


@torch.no_grad()
def eigenvalues_in_noise_units(family: Any, x: Tensor, *, features: Tensor | None = None) -> Tensor:
    """lambda = eigenvalues of H^-1/2 Cov(s) H^-1/2: the data's covariance in units of the likelihood's own noise.

    Where the decoder ignores z, its features h are those of the pixels' marginals. About them, log p(x | h + d) is
    log p(x | h) + s'd - d'H d / 2 to second order, with the score s = d log p / dh of an image, and the curvature
    H = -E[d2 log p / dh2], diagonal since pixels are independent. For d = W z that is a linear VAE of the data
    H^-1/2 s with unit noise: weighing the KL by beta, a linear decoder leaves the state that ignores z along an
    eigenvector where its eigenvalue exceeds beta (beta D, where log p is averaged over D pixels), and along no other.
    See ``live_directions``.

    For a Normal of scale sigma, lambda is an eigenvalue of Cov(x) over sigma^2, and nothing is approximated: in the
    linear VAE the live directions are these. For a Bernoulli they are the eigenvalues of the pixels' correlation
    matrix, and say what happens near the collapsed state. A deeper decoder can do more with a direction, and less well
    with many, so there the count is a scale and no law. Features other than the location are held.

    A likelihood with a scale of its own has it at the collapsed state, where it is that of the marginals: once the
    decoder explains pixels, that scale falls and more directions live. (``StudentT`` fits its marginals only roughly.)
    Pixels that do not vary are left out. Where log p has no second derivative (``Laplace``), H is E[s^2], which is the
    same for data that the likelihood fits. A binary pixel that is hardly ever on is one direction of its own, near 1.

    Args:
        family: p(x | h), with ``has_location``. It is copied, and stays as it is.
        x: images (N, *E), as the model sees them, at least two. N D numbers in float64 are held.
        features: (F,) the h to expand about, with the family's own scales as they are; by default those that
            ``fit_marginals(x)`` gives.

    Returns:
        (D',) float64, descending, on the CPU: min(N, number of pixels that vary) of them; the others are 0.

    Raises:
        ValueError: a family without a location, fewer than two images, or no pixel that varies.

    Reference: Lucas et al. 2019, arXiv 1911.02469, and Dai et al. 2020, arXiv 1912.10702 (Gaussian noise). The
    expansion for other likelihoods is ours.
    """
    return _spectrum(_whitened(family, x, features))


@torch.no_grad()
def noise_edge(family: Any, x: Tensor, *, features: Tensor | None = None, seed: int = 0) -> float:
    """e = the largest eigenvalue of Cov(u), u_d = P_d (H^-1/2 s)_d / scale_d: what independent pixels reach by chance.

    Each pixel's scores, at unit variance, are permuted over the images by a P_d of its own: they keep their
    distribution, and nothing ties them to other pixels. The covariance of infinitely many such images is the identity;
    of N images and D pixels its eigenvalues spread to about (1 + sqrt(D / N))^2, and further for pixels that are hardly
    ever on. An eigenvalue of the data between 1 and this edge is no sign of a direction: half of the eigenvalues of
    independent pixels are above 1. It is the median of three permutations.

    Args:
        family, x, features: as of ``eigenvalues_in_noise_units``, x (N, *E).
        seed: of the permutations; torch's global generator is left as it is.

    Returns:
        In the unit of ``eigenvalues_in_noise_units``.

    Raises:
        ValueError: as ``eigenvalues_in_noise_units``.

    Reference: Horn 1965, Psychometrika 30(2), 179-185 (parallel analysis); Buja and Eyuboglu 1992, Multivariate
    Behavioral Research 27(4), 509-540 (by permutation). At the likelihood's own noise: ours.
    """
    scores = _whitened(family, x, features)
    scores = scores / scores.square().mean(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    edges = []
    for _ in range(_PERMUTATIONS):
        for d in range(scores.shape[1]):
            scores[:, d] = scores[torch.randperm(len(scores), generator=generator).to(scores.device), d]
        edges.append(_spectrum(scores)[0])
    return float(torch.stack(edges).median())


def _spectrum(scores: Tensor) -> Tensor:
    """(min(N, D'),) eigenvalues of scores' scores / N, descending, on the CPU. scores: (N, D'), each of mean 0."""
    few = scores if scores.shape[0] > scores.shape[1] else scores.T
    return torch.linalg.eigvalsh(few.T @ few / len(scores)).flip(0).clamp(min=0).cpu()


def _whitened(family: Any, x: Tensor, features: Tensor | None) -> Tensor:
    """(N, D') H^-1/2 (s - mean s), float64, of the D' pixels that vary."""
    if not has_location(family):
        raise ValueError(f"family: expected a location for each pixel, got {type(family).__name__}, which has none")
    if len(x) < 2:
        raise ValueError(f"x: expected at least two images, got {len(x)}")
    copied = _in_double(family)
    h = (copied.fit_marginals(x) if features is None else features).double()
    passes = x.split(images_per_pass(x.double()[:1], family))
    scores, curvatures = zip(*(_scores(copied, h, group.double()) for group in passes), strict=True)
    score = torch.cat(scores)
    curvature = sum((part.sum(0) for part in curvatures), torch.zeros_like(score[0])) / len(x)
    if not (curvature != 0).any():
        curvature = score.square().mean(0)
    score = score - score.mean(0)
    varies = (curvature > 0) & (score.square().mean(0) > _CONSTANT * curvature)
    if not varies.any():
        raise CannotMeasure("x: expected pixels that vary, got the same image every time")
    return score[:, varies] / curvature[varies].sqrt()


def live_directions(
    eigenvalues: Tensor,
    *,
    beta: float = 1.0,
    reduction: Reduction = "sum",
    num_pixels: int = 1,
    edge: float = 0.0,
) -> int:
    """#{d: lambda_d > max(t, e)}, t = beta for a sum over pixels and beta D for a mean: directions that can stay live.

    Above the threshold alone are also directions of chance, of the images at hand: with e the edge of those, only such
    are counted as more images would show, too.

    Args:
        eigenvalues: (D',) in noise units, as ``eigenvalues_in_noise_units`` gives them.
        beta: the KL's weight.
        reduction: of log p(x | z) over pixels, "sum" or "mean".
        num_pixels: D, of a mean.
        edge: e, as ``noise_edge`` gives it; 0 for eigenvalues without sampling noise.

    Returns:
        Their number; of L latents, no more than L can be used.

    Reference: as ``eigenvalues_in_noise_units``.
    """
    return int((eigenvalues > max(edge, threshold(beta=beta, reduction=reduction, num_pixels=num_pixels))).sum())


def predicted_live(eigenvalues_of_covariance: Tensor, *, sigma2: float, beta: float = 1.0) -> Tensor:
    """lambda_d > beta sigma^2: which directions the linear VAE x = W z + b + sigma e keeps at its optimum.

    There W W' + beta sigma^2 I has the covariance's eigenvalues in the directions that live, and beta sigma^2 in the
    others: probabilistic PCA with noise beta sigma^2, and L at least as many as live.

    Args:
        eigenvalues_of_covariance: (D,) of Cov(x), squared units of pixels.
        sigma2: the likelihood's variance, in those units. Where its log is averaged over D pixels, beta is beta D.
        beta: the KL's weight.

    Returns:
        (D,) bool.

    Reference: Tipping and Bishop 1999, Journal of the Royal Statistical Society B 61(3), 611-622, equation 7; Lucas
    et al. 2019, arXiv 1911.02469.
    """
    return eigenvalues_of_covariance > beta * sigma2


@torch.no_grad()
def gaussian_variance(family: Any, x: Tensor) -> float | None:
    """sigma^2 = (1/D) sum_d Var(x_d | h_d), h the features of the pixels' marginals: a Gaussian of as much noise.

    For a Normal with one scale that is its scale squared, as it is at present; for a Bernoulli, mean_d p_d (1 - p_d).
    Times beta (and times D, where log p is averaged over pixels), it is the noise that a linear VAE trained so would
    have against the eigenvalues of Cov(x).

    Args:
        family: p(x | h). It stays as it is.
        x: images (N, *E), as the model sees them.

    Returns:
        Squared units of pixels, or None where the likelihood states no finite variance.
    """
    h = copy.deepcopy(family).fit_marginals(x) if hasattr(family, "fit_marginals") else None
    if h is None:
        return None
    try:
        variance = float(_in_double(family)(h.double()).variance.mean())
    except (NotImplementedError, AttributeError):
        return None
    return variance if 0 < variance < float("inf") else None


def variance_of_mean_squared_error(num_pixels: int) -> float:
    """sigma^2 = D / 2: (1/D) |x - y|^2 is -log Normal(x; y, sigma^2 I) up to a constant, as 1 / D = 1 / (2 sigma^2).

    392 for 28 x 28 pixels, in the unit of the pixels squared: above every eigenvalue of such images' covariance. Half
    of that error, or an error summed over pixels, amounts to D and 1/2.

    Args:
        num_pixels: D.
    """
    return num_pixels / 2
