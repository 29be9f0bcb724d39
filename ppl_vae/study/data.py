"""The data set on which runs are measured: the same test images, prior draws and components for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ppl_vae import data
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import write_picture
from ppl_vae.runs.resolve import choose_evaluated_pixels, resolve
from ppl_vae.study.plan import dataset_word

PICTURES = "pictures"  # a folder in the study's
NUM_SHOWN = 10  # images in a row of a picture
MOST_TRAINING_IMAGES = 20_000  # for principal components and for eigenvalues

_NUM_COMPONENTS = 50
_PRIOR_SEED = 20_140_501


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
