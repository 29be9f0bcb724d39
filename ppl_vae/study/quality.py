"""How far generated images are from real ones: their sharpness, a Fréchet distance, and a classifier's accuracy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ppl_vae import diagnostics
from ppl_vae.diagnostics import Value
from ppl_vae.study.material import Components

_GROUPS = 20  # of the jackknife


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


def frechet(a: Tensor, b: Tensor) -> Value:
    """``frechet_distance`` with the error of a jackknife over 20 groups of both samples.

    stderr^2 = (G - 1) / G sum_g (d_-g - mean d_-g)^2, d_-g without the g-th group.

    Args:
        a, b: points (N, K) and (M, K).

    Reference: Quenouille 1956; Tukey 1958.
    """
    G = min(_GROUPS, len(a), len(b))
    left = [frechet_distance(_without(a, g, G), _without(b, g, G)) for g in range(G)]
    each = torch.tensor(left, dtype=torch.double)
    return Value(frechet_distance(a, b), float(math.sqrt((G - 1) / G) * (each - each.mean()).norm()))


def _without(points: Tensor, group: int, groups: int) -> Tensor:
    keep = torch.arange(len(points)) % groups != group
    return points[keep]


def sample_quality(images: Tensor, real: Tensor, components: Components, *, seed: int = 0) -> dict[str, Any]:
    """Images against real ones: what the study says of samples.

    "sharpness" is 1 where they have as much fine detail; "frechet" is in the first principal components of the
    training images, squared pixel units; "classifier" is 2 accuracy - 1 of a classifier between the two in the same
    components, each divided by its scale: 0 where they are alike, 1 where they are told apart. The first says nothing
    of what is shown, the second nothing beyond means and covariances, the third nothing beyond those components.

    Args:
        images: (N, C, H, W).
        real: (M, C, H, W), real images of the same unit.
        components: of the training images.
        seed: of the classifier.

    Source: the measures are theirs (see ``diagnostics.sharpness``, ``frechet``, ``diagnostics.classifier_test``); the
    choice is ours, since the usual features are of a network that was trained on photos.
    """
    points, real_points = components.of(images), components.of(real)
    count = min(len(points), len(real_points))
    scale = components.scale.clamp(min=1e-6)  # of a component in which nothing varies
    told = diagnostics.classifier_test(
        (points / scale)[:count].float(), (real_points / scale)[:count].float(), seed=seed
    )
    return {
        "sharpness": diagnostics.sharpness(images, real).to_json(),
        "frechet": frechet(points, real_points).to_json(),
        "classifier": {"mean": told.effect, "stderr": 2 * told.accuracy.stderr},
    }
