"""How far generated images are from real ones: their sharpness, a Fréchet distance, and a classifier's accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_vae import diagnostics
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.study.material import Components

GROUPS = 20  # of the jackknife


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), the squared distance between two fitted normals.

    Args:
        a, b: points (N, K) and (M, K), each more than K.

    Returns:
        In the square of the points' unit. Of samples of one distribution it is above 0, by about K^2 / N variances.

    Reference: Dowson and Landau 1982, The Fréchet distance between multivariate normal distributions; as a measure of
    generated images, in a network's features, Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    a, b = a.double(), b.double()
    C_a, C_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = _square_root(C_a)
    cross = torch.linalg.eigvalsh(root @ C_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + C_a.trace() + C_b.trace() - 2 * cross)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def jackknife(statistic: Callable[..., float], *samples: Tensor) -> Estimate:
    """T with stderr^2 = (G - 1) / G sum_g (T_-g - mean T_-g)^2, T_-g without the g-th of 20 groups of every sample.

    Samples that share rows, in the same places, leave them out together, so that the error knows of what they share.

    Args:
        statistic: of the samples.
        samples: rows (N, K), (M, K), ...

    Reference: Quenouille 1956; Tukey 1958.
    """
    G = min(GROUPS, *map(len, samples))
    left = [statistic(*(_without(sample, g, G) for sample in samples)) for g in range(G)]
    each = torch.tensor(left, dtype=torch.double)
    return Estimate(statistic(*samples), float(math.sqrt((G - 1) / G) * (each - each.mean()).norm()))


def _without(points: Tensor, group: int, groups: int) -> Tensor:
    keep = torch.arange(len(points)) % groups != group
    return points[keep]


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """``frechet_distance`` with the error of a ``jackknife`` over both samples. a, b: points (N, K) and (M, K)."""
    return jackknife(frechet_distance, a, b)


def frechet_ratio(a: Tensor, b: Tensor, real: Tensor) -> Estimate:
    """d(a, real) / d(b, real), which of finite samples is biased toward 1: either has the floor's part in it.

    Args:
        a, b, real: points (N, K) each.
    """
    return jackknife(lambda a, b, real: frechet_distance(a, real) / frechet_distance(b, real), a, b, real)


def frechet_excess_ratio(a: Tensor, b: Tensor, other: Tensor, real: Tensor) -> Estimate | None:
    """(d(a, real) - d_0) / (d(b, real) - d_0), d_0 = d(other, real) the floor: what other real images come to.

    Args:
        a, b, other, real: points (N, K) each; ``other`` are real images too.

    Returns:
        None where d(b, real) is not above the floor by two standard errors: there is then nothing to divide by.

    Source: ours.
    """

    def excess(points: Tensor, other: Tensor, real: Tensor) -> float:
        return frechet_distance(points, real) - frechet_distance(other, real)

    def ratio(a: Tensor, b: Tensor, other: Tensor, real: Tensor) -> float:
        return excess(a, other, real) / excess(b, other, real)

    above = jackknife(excess, b, other, real)
    return jackknife(ratio, a, b, other, real) if above.mean > 2 * above.stderr else None


def sample_quality(images: Tensor, real: Tensor, components: Components, *, seed: int = 0) -> dict[str, Any]:
    """Images against real ones: what the study says of samples.

    "sharpness" is 1 where they have as much fine detail; "frechet" is in the first principal components of the
    training images, squared pixel units; "classifier" is 2 accuracy - 1 of a classifier between the two in the same
    components, each divided by its scale: 0 where they are alike, 1 where they are told apart. The first says nothing
    of what is shown, the second nothing beyond means and covariances, the third nothing beyond those components.

    Args:
        images: (N, C, H, W).
        real: (M, C, H, W), real images of the same unit. Of the larger sample only the first min(N, M) count.
        components: of the training images.
        seed: of the classifier.

    Source: the measures are theirs (see ``diagnostics.sharpness``, ``frechet``, ``diagnostics.classifier_test``); the
    choice is ours, since the usual features are of a network that was trained on photos.
    """
    count = min(len(images), len(real))
    images, real = images[:count], real[:count]
    points, real_points = components.of(images), components.of(real)
    scale = components.scale.clamp(min=1e-6)  # of a component in which nothing varies
    told = diagnostics.classifier_test((points / scale).float(), (real_points / scale).float(), seed=seed)
    return {
        "sharpness": diagnostics.sharpness(images, real).to_json(),
        "frechet": frechet(points, real_points).to_json(),
        "classifier": {"mean": told.effect, "stderr": 2 * told.accuracy.stderr},
    }
