"""The images on which runs are measured, and how far generated images are from real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae import data, diagnostics
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import write_picture
from ppl_vae.runs.resolve import choose_evaluated_pixels, resolve
from ppl_vae.study.plan import dataset_word
from ppl_vae.study.results import Quality

PICTURES = "pictures"  # a folder in the study's
NUM_SHOWN = 10  # images in a row of a picture
MOST_TRAINING_IMAGES = 20_000  # for principal components and for eigenvalues

_NUM_COMPONENTS = 50
_PRIOR_SEED = 20_140_501
_GROUPS = 20  # of the jackknife
_LEAST_SCALE = 1e-6  # of a component in which no training image varies


class Components(NamedTuple):
    """y = (x - mean) V: images as points in the directions in which the training images vary most.

    Args:
        mean: (D,).
        directions: (D, K), orthonormal, the greatest variance first.
        scale: (K,) Standard deviations of the training images in those directions.
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor

    def project(self, images: Tensor) -> Tensor:
        """(N, *E) -> (N, K) float64, in the unit of pixels."""
        return (images.flatten(1).double() - self.mean) @ self.directions


def principal_components(images: Tensor, *, most: int = _NUM_COMPONENTS) -> Components:
    """The first min(most, D) principal components of images (N, *E).

    Reference: Pearson 1901.
    """
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    variance, directions = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))  # ascending
    K = min(most, len(variance))
    return Components(mean, directions.flip(1)[:, :K], variance.flip(0)[:K].clamp(min=0).sqrt())


@dataclass(frozen=True)
class StudyData:
    """A data set as the study's runs see it.

    Args:
        options: The resolved options of any run on it.
        splits: The data.
        num_images: The number of test images that are measured.
    """

    options: Options
    splits: data.Splits
    num_images: int

    @property
    def word(self) -> str:
        """The data set in the names of runs."""
        return dataset_word(self.options.dataset)

    @property
    def num_pixels(self) -> int:
        """D."""
        return math.prod(self.splits.event_shape)

    @cached_property
    def index(self) -> Tensor:
        """(N,) places of the test images, those of the runs' evaluation."""
        return data.subset(len(self.splits.test), self.num_images)

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) test images as the model sees them."""
        return self._seen("test")[self.index]

    @cached_property
    def gray(self) -> Tensor:
        """(N, *E) the same test images before binarization."""
        return data.probabilities(self.splits, "test")[self.index]

    @cached_property
    def other_gray(self) -> Tensor:
        """(M, *E) gray validation images, at most N: real images that no run was fitted to."""
        return data.probabilities(self.splits, "validation")[data.subset(len(self.splits.validation), self.num_images)]

    @cached_property
    def components(self) -> Components:
        """Principal components of the gray training images."""
        return principal_components(self.train_gray(MOST_TRAINING_IMAGES))

    @cached_property
    def shown(self) -> Tensor:
        """(10,) places among the N test images that are shown, evenly spaced: a file may be sorted by class."""
        return torch.linspace(0, len(self.index) - 1, NUM_SHOWN).long()

    def draw_prior(self, prior: Distribution) -> Tensor:
        """(N, L) draws of p(z), the same for every run with such a prior."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_PRIOR_SEED)
            return prior.expand((self.num_images,)).sample()

    def train_seen(self, most: int) -> Tensor:
        """(n, *E) training images as the model sees them, a fixed subset of at most that many."""
        return self._seen("train")[data.subset(len(self.splits.train), most)]

    def train_gray(self, most: int) -> Tensor:
        """(n, *E) the same training images before binarization."""
        return data.probabilities(self.splits, "train")[data.subset(len(self.splits.train), most)]

    def validation_seen(self) -> Tensor:
        """(M, *E) all validation images as the model sees them."""
        return self._seen("validation")

    def _seen(self, split: str) -> Tensor:
        return data.evaluation_images(self.splits, split, choose_evaluated_pixels(self.options, self.splits))


def make_study_data(options: Options, splits: data.Splits, num_images: int) -> StudyData:
    """Make the data set of such options.

    Raises:
        ValueError: The data are no images, or too few of them.
    """
    if len(splits.event_shape) != 3:
        raise ValueError(f"--datasets: expected images, got {splits.name}, whose shape is {splits.event_shape}")
    if min(len(splits.validation), len(splits.test)) < NUM_SHOWN:
        raise ValueError(f"--datasets: expected at least {NUM_SHOWN} validation and test images in {splits.name}")
    return StudyData(resolve(options, splits), splits, min(num_images, len(splits.test)))


def originals_path(word: str) -> str:
    """The picture of test images of a data set, in the study's folder."""
    return f"{PICTURES}/{word}/originals.png"


def write_strip(path: Path, images: Tensor) -> None:
    """Writes images (N, C, H, W) in [0, 1] as one PNG, ten in a row. Those that fill no row are left out."""
    rows, (C, H, W) = len(images) // NUM_SHOWN, images.shape[1:]
    table = images[: rows * NUM_SHOWN].float().reshape(rows, NUM_SHOWN, C, H, W).permute(2, 0, 3, 1, 4)
    levels = (255 * table.reshape(C, rows * H, NUM_SHOWN * W)).round().clamp(0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, levels.numpy().astype(np.uint8))


# --- How far generated images are from real ones ---


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
