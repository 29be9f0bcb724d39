"""Means over images with their standard errors, and paired differences between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ppl_vae.evidence.importance import Importance

# Samples that the error of a share adds, half of either kind: the square of a 95% interval's 1.96, rounded.
_ADDED = 4


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, in nats per image where nothing else is said.

    Args:
        mean: The mean over the images.
        stderr: The standard deviation over the images / sqrt(n), which leaves out the Monte Carlo error of each image.
            NaN for one image.
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
        """The share k / N of flags (N,) that are set, and the error sqrt(q (1 - q) / (N + 4)), q = (k + 2) / (N + 4).

        Unlike sqrt(p (1 - p) / N), this error is not 0 at k = 0. Twice the error is 2.8 / N there, near the 3 / N of
        the exact 95% bound. Raises ValueError for no flag.

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
    """An ``Estimate`` whose JSON object also holds the number of images."""

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
    """The standard error of a mean of N independent numbers, sqrt(sum_n s_n^2) / N, s (N,); NaN for none."""
    return float(stderrs.square().sum().sqrt()) / len(stderrs) if len(stderrs) else math.nan


def ratio_of_means(numerator: Tensor, denominator: Tensor) -> Estimate:
    """r = mean_n a_n / mean_n b_n, with the error of the mean of (a_n - r b_n) / mean_n b_n (delta method).

    Args:
        numerator, denominator: (N,) the a_n and the b_n of the same images. The ratio to zeros alone is NaN.
    """
    a, b = numerator.double().cpu(), denominator.double().cpu()
    r = a.mean() / b.mean() if b.any() else a.new_tensor(math.nan)
    return Estimate(float(r), Estimate.mean_of((a - r * b) / b.mean()).stderr)


# --- Paired differences ---

CONFIDENCE = 0.95
BETTER, WORSE, INDISTINCT = "better", "worse", "not distinguishable"

# Two trainings that differ in their seed alone end this many nats per image apart (Norouzi et al. 2020,
# arXiv 2004.04795, whose tables give deviations of 0.05 to 0.28 nats over trainings on MNIST).
SEED_NATS = (0.05, 0.3)


@cache
def student_t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence for Student's T with nu degrees of freedom, by bisection.

    With theta = arctan(t / sqrt(nu)), P(|T| <= t) is, for even nu, sin(theta) times the sum, and for odd nu,
    (2 / pi) (theta + sin(theta) times the sum) of the finite series

        nu even:  1 + (1/2) cos^2 + (1 3 / 2 4) cos^4 + ... up to cos^(nu - 2)
        nu odd:   cos + (2/3) cos^3 + (2 4 / 3 5) cos^5 + ... up to cos^(nu - 2)

    Reference: Abramowitz and Stegun 1964, Handbook of Mathematical Functions, equations 26.7.3 and 26.7.4.
    """
    odd = degrees % 2
    k = torch.arange(1, max(1, (degrees - odd) // 2), dtype=torch.double)
    ratios = (2 * k - 1 + odd) / (2 * k + odd)  # of each term to the one before, but for cos^2

    def probability(theta: float) -> float:
        cosine = math.cos(theta)
        first = (cosine if odd else 1.0) if degrees > 1 else 0.0
        total = math.sin(theta) * first * (1 + float((ratios * cosine**2).cumprod(0).sum()))
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


@dataclass(frozen=True)
class PairedDifference:
    """The mean of d_n = b_n - a_n over the same images n, and the interval mean -+ t stderr, stderr = sd(d) / sqrt(N).

    What makes an image hard for both models cancels: stderr^2 = (var a + var b - 2 cov(a, b)) / N. The error includes
    the Monte Carlo noise of each image.

    Args:
        mean: nats per image; above 0 where b is higher.
        stderr: nats.
        unpaired_stderr: sqrt((var a + var b) / N), nats: the error if the images were different ones.
        lower, upper: the two-sided 95% t interval for the mean over all such images. With m comparisons each interval
            has confidence 1 - 0.05 / m, and all of them hold at once with 95% (Bonferroni).
        n: N, the number of images.
        confidence: 1 - 0.05 / m.
    """

    mean: float
    stderr: float
    unpaired_stderr: float
    lower: float
    upper: float
    n: int
    confidence: float

    @property
    def word(self) -> str:
        """Whether b is "better" or "worse", if the interval excludes 0; else "not distinguishable"."""
        return BETTER if self.lower > 0 else WORSE if self.upper < 0 else INDISTINCT


def paired_difference(a: Tensor, b: Tensor, *, comparisons: int = 1) -> PairedDifference:
    """The mean of b - a over the same images, with its standard error and interval.

    The interval assumes that the mean of the differences is normal, which is rough for a few images.

    Args:
        a, b: (N,) nats per image, in the same order.
        comparisons: m, the number of such differences that are judged together.

    Raises ValueError for fewer than two images, and for values that are not finite.

    Reference: Student 1908, The probable error of a mean; Dunn 1961, Multiple comparisons among means.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"b: expected one number for each image of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    if len(a) < 2:
        raise ValueError(f"a: expected at least 2 images, for a standard error, got {len(a)}")
    for name, values in (("a", a), ("b", b)):
        if not values.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got {int((~values.isfinite()).sum())} that are not")
    a, b = a.double(), b.double()
    difference, root_n = b - a, math.sqrt(len(a))
    mean, stderr = float(difference.mean()), float(difference.std()) / root_n
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    half = student_t_quantile(confidence, len(a) - 1) * stderr
    unpaired = math.sqrt(float(a.var() + b.var())) / root_n
    return PairedDifference(mean, stderr, unpaired, mean - half, mean + half, len(a), confidence)


@dataclass(frozen=True)
class BoundDifference:
    """L_S of a second model minus L_S of a first, and whether the difference also ranks log p(x).

    log p(x) = E[L_S] + gap with gap >= 0, so the model with the lower bound may have the higher log p(x). A gap that
    falls like S^-a is gain / (10^a - 1) for the tenfold gain: a ninth of it at a = 1, all of it at a = 0.3, about the
    rate of a trained VAE on MNIST. log p(x) is therefore ranked only where the whole interval of the difference lies
    beyond the larger gain of the two. This is a rule of thumb (ours): with a guide of 0.35 times the posterior's
    scales, a bound lacked 1.06 nats at S = 20 with a gain of 0.55.

    Args:
        bounds: the paired difference of the bounds.
        tenfold_gain: the larger mean gain from S / 10 to S of the two, nats per image, not below 0; NaN where S < 10.
        monte_carlo_stderr: the error of the mean over other draws of the particles on the same images, nats,
            sqrt(sum_n (m_an^2 + m_bn^2)) / N, with the delta method's m of each image, for noise that is independent
            between the models; matched noise makes it smaller. NaN at S = 1.
    """

    bounds: PairedDifference
    tenfold_gain: float
    monte_carlo_stderr: float

    @property
    def ranks_log_evidence(self) -> bool:
        """Whether the whole interval lies beyond the tenfold gain, so that log p(x) ranks as the bounds do."""
        return max(self.bounds.lower, -self.bounds.upper, 0.0) > self.tenfold_gain


def bound_difference(first: Importance, second: Importance, *, comparisons: int = 1) -> BoundDifference:
    """The second's L_S minus the first's, of the same N images. Arguments and errors as ``paired_difference``."""
    gains = [float(result.tenfold_gain.mean()) for result in (first, second)]
    return BoundDifference(
        paired_difference(first.log_evidence, second.log_evidence, comparisons=comparisons),
        math.nan if any(map(math.isnan, gains)) else max(0.0, *gains),
        combine_stderrs(torch.hypot(first.monte_carlo_stderr, second.monte_carlo_stderr)),
    )
