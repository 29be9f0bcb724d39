"""The images on which runs are measured, and densities of their codes."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    TransformedDistribution,
)

from ppl_vae import data, diagnostics
from ppl_vae.diagnostics.pictures import PrincipalDirections, find_principal_directions
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import write_picture
from ppl_vae.runs.resolve import check_support, choose_evaluated_pixels, load_splits, resolve
from ppl_vae.study.plan import dataset_word
from ppl_vae.study.results import Quality

PICTURES = "pictures"  # a folder in the study's
NUM_SHOWN = 10  # images in a row of a picture
MOST_TRAINING_IMAGES = 20_000  # for principal components and for eigenvalues

_NUM_COMPONENTS = 50
_LEAST_SCALE = 1e-6  # of a component in which no training image varies


@dataclass(frozen=True)
class StudyData:
    """A data set as the study's runs see it.

    Args:
        options: The resolved options of any run on it.
        splits: The data.
        num_images: N, the number of test images that are measured.
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

    def load_images(self, split: str, most: int | None = None, *, gray: bool = False) -> Tensor:
        """(n, *E) a fixed subset of at most that many images, as the model sees them, or gray before binarization."""
        if gray:
            images = data.probabilities(self.splits, split)
        else:
            images = data.evaluation_images(self.splits, split, choose_evaluated_pixels(self.options, self.splits))
        return images[data.subset(len(images), most)]

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) test images as the model sees them, those of the runs' evaluation."""
        return self.load_images("test", self.num_images)

    @cached_property
    def gray(self) -> Tensor:
        """(N, *E) the same test images before binarization."""
        return self.load_images("test", self.num_images, gray=True)

    @cached_property
    def components(self) -> PrincipalDirections:
        """The first min(50, D) principal components of the gray training images."""
        images = self.load_images("train", MOST_TRAINING_IMAGES, gray=True)
        return find_principal_directions(images.flatten(1).double(), _NUM_COMPONENTS)

    @cached_property
    def shown(self) -> Tensor:
        """(10,) places among the N test images that are shown, evenly spaced: a file may be sorted by class."""
        return torch.linspace(0, self.num_images - 1, NUM_SHOWN).long()

    @property
    def originals(self) -> str:
        """The picture of the test images that are shown, in the study's folder."""
        return f"{PICTURES}/{self.word}/originals.png"

    def measure_quality(self, images: Tensor) -> Quality:
        """Compare images (M, C, H, W) with the gray test images: the first min(M, N) of both.

        "sharpness" is 1 where they have as much fine detail; "classifier" is 2 accuracy - 1 of a classifier between the
        two in the first principal components of the training images, each divided by its scale: 0 where they are alike,
        1 where they are always told apart. The first says nothing about what is shown, the second nothing beyond those
        components. Network features are usual, but those networks were trained on photos.

        Source: See ``diagnostics.sharpness`` and ``diagnostics.classifier_test``; the choice is ours.
        """
        count = min(len(images), len(self.gray))
        images, real = images[:count], self.gray[:count]
        scale = self.components.scale.clamp(min=_LEAST_SCALE)
        points = (self.components.project(each.flatten(1).double()) / scale for each in (images, real))
        found = diagnostics.classifier_test(*(each.float() for each in points))
        return Quality(diagnostics.sharpness(images, real), found.effect)


def load_study_data(options: Options, num_images: int) -> StudyData:
    """The data set of such options.

    Raises:
        ValueError: The data cannot be read, do not fit the options, or are no images, or too few of them.
    """
    splits = load_splits(options)
    if len(splits.event_shape) != 3:
        raise ValueError(f"expected images, got {splits.name}, whose shape is {splits.event_shape}")
    if min(len(splits.validation), len(splits.test)) < NUM_SHOWN:
        raise ValueError(f"expected at least {NUM_SHOWN} validation and test images in {splits.name}")
    options = resolve(options, splits)
    check_support(options, splits)
    return StudyData(options, splits, min(num_images, len(splits.test)))


def write_strip(path: Path, images: Tensor) -> None:
    """Writes images (N, C, H, W) in [0, 1] as one PNG, ten in a row. Those that fill no row are left out."""
    rows, (C, H, W) = len(images) // NUM_SHOWN, images.shape[1:]
    table = images[: rows * NUM_SHOWN].float().reshape(rows, NUM_SHOWN, C, H, W).permute(2, 0, 3, 1, 4)
    levels = (255 * table.reshape(C, rows * H, NUM_SHOWN * W)).round().clamp(0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, levels.numpy().astype(np.uint8))


# --- Densities of codes ---

COMPONENTS = (10, 30, 100)  # candidates for a mixture
_CODES_PER_COMPONENT = 20  # at least
_RIDGE = 1e-6  # added to variances of standardized codes: a latent may be constant
_SEED = 0  # of the mixture's start


def fit_densities(train: Tensor, validation: Tensor) -> dict[str, Distribution]:
    """A "normal" and a "mixture" of normals with full covariances, each fitted to codes by maximum likelihood.

    A plain autoencoder is not trained with a prior, so its decoder can be judged fairly only with codes that are drawn
    from such a density. Codes are standardized first. The mixture is fitted by expectation-maximization, with as many
    components as give validation codes the highest density; there is none without scikit-learn or with fewer than 200
    codes.

    Args:
        train: (N, L) codes of training images, which are fitted to.
        validation: (M, L) codes that choose the mixture's number of components.

    Returns:
        Distributions of event (L,), by name.

    Reference: Dempster, Laird and Rubin 1977; Ghosh et al. 2020, arXiv 1903.12436 (a mixture fitted to an autoencoder's
    codes); Dai and Wipf 2019, arXiv 1903.05789 (a second model of a VAE's codes).
    """
    L, loc, scale = train.shape[1], train.mean(0), train.std(0).clamp(min=_RIDGE)
    u, u_validation = (train - loc) / scale, (validation - loc) / scale
    covariance = torch.cov(u.T).reshape(L, L) + _RIDGE * torch.eye(L)
    found: dict[str, Distribution] = {"normal": MultivariateNormal(u.mean(0), covariance)}
    with suppress(ImportError), warnings.catch_warnings():  # without the extra "sklearn" there is no mixture
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        warnings.simplefilter("ignore", ConvergenceWarning)  # validation codes judge a candidate, converged or not
        candidates = [
            GaussianMixture(K, reg_covar=_RIDGE, tol=1e-2, max_iter=50, random_state=_SEED).fit(u.numpy())
            for K in COMPONENTS
            if len(u) >= K * _CODES_PER_COMPONENT
        ]
        if candidates:
            best = max(candidates, key=lambda candidate: candidate.score(u_validation.numpy()))
            parameters = (best.weights_, best.means_, best.covariances_)
            weights, means, covariances = (torch.as_tensor(each).to(u) for each in parameters)
            found["mixture"] = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    to_codes = AffineTransform(loc, scale, event_dim=1)
    return {name: TransformedDistribution(density, [to_codes]) for name, density in found.items()}
