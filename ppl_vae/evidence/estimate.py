"""A mean over images and its standard error: what every measurement returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Samples that the error of a share adds, half of either kind: the square of a 95% interval's 1.96, rounded.
_ADDED = 4


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, in nats per image unless the function that returns it says otherwise.

    Args:
        mean: The mean over the images.
        stderr: The standard deviation over the images / sqrt(n): how far another sample of images would move the mean.
            The Monte Carlo error of each image is kept apart. NaN for one image.
        n: The number of images, where it is known.
        num_particles: S, the particles behind each image's number, where there are any.
    """

    mean: float
    stderr: float
    n: int | None = None
    num_particles: int | None = None

    @classmethod
    def mean_of(cls, values: Tensor, num_particles: int | None = None) -> Estimate:
        """The mean of one number per image, (N,), and its standard error.

        >>> import torch
        >>> Estimate.mean_of(torch.tensor([1.0, 2.0, 3.0])).mean
        2.0
        """
        values = values.double().cpu()
        stderr = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(values.mean()), stderr, len(values), num_particles)

    @classmethod
    def share_of(cls, flags: Tensor) -> Estimate:
        """The share k / N of flags that are set, with a standard error that is not 0 where the share is 0 or 1.

        The error is sqrt(q (1 - q) / (N + 4)), q = (k + 2) / (N + 4). There sqrt(p (1 - p) / N) is 0, as if N samples
        could show that a rarer one does not happen. Two of these errors are 2.8 / N at k = 0, near the 3 / N of the
        exact 95% bound.

        Args:
            flags: (N,) bool, one per sample.

        Raises:
            ValueError: no sample.

        Reference: Agresti and Coull 1998, The American Statistician 52(2), 119-126.
        """
        N, k = len(flags), int(flags.sum())
        if N == 0:
            raise ValueError("flags: expected at least one, got none")
        q = (k + _ADDED / 2) / (N + _ADDED)
        return cls(k / N, math.sqrt(q * (1 - q) / (N + _ADDED)), N)

    def to_json(self) -> dict[str, float]:
        """The mean and its standard error, as JSON files hold them; n and S stand next to them there."""
        return {"mean": self.mean, "stderr": self.stderr}


@dataclass(frozen=True)
class ImagesMean:
    """The mean over images of a number per image in nats, its standard error, and the number of images."""

    mean: float
    stderr: float
    num_images: int

    @classmethod
    def mean_of(cls, values: Tensor) -> ImagesMean:
        """The mean of (n,) numbers."""
        found = Estimate.mean_of(values)
        return cls(found.mean, found.stderr, len(values))

    @property
    def estimate(self) -> Estimate:
        """The mean and its standard error."""
        return Estimate(self.mean, self.stderr)


def combine_stderrs(stderrs: Tensor) -> float:
    """The standard error of a mean of N independent numbers: sqrt(sum_n s_n^2) / N. NaN for none.

    Args:
        stderrs: (N,) the s_n, the standard error of each number.
    """
    return float(stderrs.square().sum().sqrt()) / len(stderrs) if len(stderrs) else math.nan


def ratio_of_means(numerator: Tensor, denominator: Tensor) -> Estimate:
    """r = mean_n a_n / mean_n b_n, with the error of the mean of (a_n - r b_n) / mean_n b_n (delta method).

    Args:
        numerator: (N,) the a_n.
        denominator: (N,) the b_n, of the same images.
    """
    a, b = numerator.double().cpu(), denominator.double().cpu()
    r = a.mean() / b.mean()
    return Estimate(float(r), Estimate.mean_of((a - r * b) / b.mean()).stderr)
