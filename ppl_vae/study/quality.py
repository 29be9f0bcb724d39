"""How far generated images are from real ones: sharpness, a Fréchet distance, and a classifier's accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vae import diagnostics
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.study.data import Components
from ppl_vae.study.results import Quality

_GROUPS = 20  # of the jackknife
_LEAST_SCALE = 1e-6  # of a component in which no training image varies


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), the squared distance between two fitted normals.

    Args:
        a, b: Points (N, K) and (M, K), each more than K.

    Returns:
        In the square of the points' unit. It is above 0 for samples of one distribution, by about K^2 / N variances.

    Reference: Dowson and Landau 1982, The Fréchet distance between multivariate normal distributions; as a measure of
    generated images, in a network's features, Heusel et al. 2017, arXiv 1706.08500, equation 6.
    """
    a, b = a.double(), b.double()
    C_a, C_b = (torch.cov(points.T).reshape(points.shape[1], -1) for points in (a, b))
    values, vectors = torch.linalg.eigh(C_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ C_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + C_a.trace() + C_b.trace() - 2 * cross)


def jackknife(statistic: Callable[..., float], *samples: Tensor) -> Estimate:
    """T with stderr^2 = (G - 1) / G sum_g (T_-g - mean T_-g)^2, T_-g without the g-th of 20 groups of every sample.

    Rows in the same place are left out together, so that the error accounts for what samples share.

    Args:
        statistic: A function of the samples.
        samples: Rows (N, K), (M, K), ...

    Reference: Quenouille 1956; Tukey 1958.
    """
    G = min(_GROUPS, *map(len, samples))
    left = [statistic(*(sample[torch.arange(len(sample)) % G != g] for sample in samples)) for g in range(G)]
    each = torch.tensor(left, dtype=torch.double)
    return Estimate(statistic(*samples), float(math.sqrt((G - 1) / G) * (each - each.mean()).norm()))


def sample_quality(images: Tensor, real: Tensor, components: Components) -> Quality:
    """Images against real ones.

    "sharpness" is 1 where they have as much fine detail; "frechet" is measured in the first principal components of
    the training images, in squared pixel units; "classifier" is 2 accuracy - 1 of a classifier between the two in the
    same components, each divided by its scale: 0 where they are alike, 1 where they are always told apart. The first
    says nothing about what is shown, the second nothing beyond means and covariances, the third nothing beyond those
    components. Network features are usual, but those networks were trained on photos.

    Args:
        images: (N, C, H, W).
        real: (M, C, H, W), real images of the same unit. Only the first min(N, M) of each count.
        components: Of the training images.

    Source: See ``diagnostics.sharpness``, ``frechet_distance`` and ``diagnostics.classifier_test``; the choice is ours.
    """
    count = min(len(images), len(real))
    images, real = images[:count], real[:count]
    points, real_points = components.project(images), components.project(real)
    scale = components.scale.clamp(min=_LEAST_SCALE)
    found = diagnostics.classifier_test((points / scale).float(), (real_points / scale).float())
    return Quality(diagnostics.sharpness(images, real), jackknife(frechet_distance, points, real_points), found.effect)
