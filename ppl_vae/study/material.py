"""What every run of a data set is measured on: the same test images, the same prior draws, the same components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae import data
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import choose_evaluated_pixels, resolve
from ppl_vae.study.plan import dataset_word

NUM_SHOWN = 10  # images in a row of a picture
NUM_SAMPLES_SHOWN = 20
NUM_PAIRS = 4  # that are interpolated between
NUM_COMPONENTS = 50  # in which images are compared as points

_PRIOR_SEED = 20_140_501
_MOST_FOR_COMPONENTS = 20_000  # training images


class Components(NamedTuple):
    """y = (x - mean) V: images as points in the directions in which the training images vary most.

    Args:
        mean: (D,).
        directions: (D, K), orthonormal, the greatest variance first.
        scale: (K,) the training images' standard deviations along them.
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor

    def of(self, images: Tensor) -> Tensor:
        """(N, *E) -> (N, K) float64, in the unit of pixels."""
        return (images.flatten(1).double() - self.mean) @ self.directions


def components(images: Tensor, *, most: int = NUM_COMPONENTS) -> Components:
    """The first K principal components of images (N, *E).

    Args:
        images: of which.
        most: K is this, or D where that is less.

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
        options: of any run on it, resolved.
        splits: the data.
        num_images: test images that are measured on.
    """

    options: Options
    splits: data.Splits
    num_images: int

    @property
    def word(self) -> str:
        """What it is called."""
        return dataset_word(self.options.dataset)

    @property
    def num_pixels(self) -> int:
        """D."""
        return math.prod(self.splits.event_shape)

    @cached_property
    def index(self) -> Tensor:
        """(N,) the test images' places: those of the runs' evaluation."""
        return data.subset(len(self.splits.test), self.num_images)

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) the test images as the model sees them."""
        return self._seen("test")[self.index]

    @cached_property
    def gray(self) -> Tensor:
        """(N, *E) the same before they were binarized."""
        return data.probabilities(self.splits, "test")[self.index]

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) their classes, where they have any."""
        found = self.splits.labels.get("test")
        return None if found is None else found[self.index]

    @cached_property
    def other_gray(self) -> Tensor:
        """(M, *E) validation images before they were binarized, at most N: real ones that no run was fitted to."""
        return data.probabilities(self.splits, "validation")[data.subset(len(self.splits.validation), self.num_images)]

    @cached_property
    def components(self) -> Components:
        """Of the gray training images."""
        return components(self.train_gray(_MOST_FOR_COMPONENTS))

    @cached_property
    def shown(self) -> Tensor:
        """(10,) places among the N of the images that are shown: the first of each class, then the first that are left.

        Without classes the first ten.
        """
        first: list[int] = []
        if self.labels is not None:
            first = [int((self.labels == label).nonzero()[0, 0]) for label in self.labels.unique()][:NUM_SHOWN]
        rest = [i for i in range(len(self.index)) if i not in first]
        return torch.tensor([*first, *rest][:NUM_SHOWN])

    def prior_draws(self, prior: Any) -> Tensor:
        """(N, L) draws of p(z), the same for every run with such a prior."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_PRIOR_SEED)
            return prior.expand((self.num_images,)).sample()

    def train_as_seen(self, most: int) -> Tensor:
        """(n, *E) training images as the model sees them, a fixed subset."""
        return self._seen("train")[data.subset(len(self.splits.train), most)]

    def train_gray(self, most: int) -> Tensor:
        """(n, *E) the same before they were binarized."""
        return data.probabilities(self.splits, "train")[data.subset(len(self.splits.train), most)]

    def _seen(self, split: str) -> Tensor:
        return data.evaluation_images(self.splits, split, choose_evaluated_pixels(self.options, self.splits))

    def describe(self) -> dict[str, Any]:
        """What the report says of the data."""
        splits = self.splits
        return {
            "image_shape": list(splits.event_shape),
            "num_pixels": self.num_pixels,
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "description": splits.describe(),
            "classes": list(splits.class_names),
        }


def material(options: Options, splits: data.Splits, num_images: int) -> StudyData:
    """The data set of such options.

    Raises:
        ValueError: data that is no images, or has too few of them to be measured on.
    """
    if len(splits.event_shape) != 3:
        raise ValueError(f"--datasets: expected images, got {splits.name}, whose shape is {splits.event_shape}")
    if min(len(splits.validation), len(splits.test)) < NUM_SHOWN:
        raise ValueError(f"--datasets: expected at least {NUM_SHOWN} validation and test images in {splits.name}")
    return StudyData(resolve(options, splits), splits, min(num_images, len(splits.test)))
