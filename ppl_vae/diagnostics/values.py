"""A number and its standard error: what every diagnostic returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# Draws that the error of a share adds, half of either kind: the square of a 95% interval's 1.96, rounded.
_ADDED = 4


class CannotMeasure(ValueError):
    """The images do not allow this measure; the message says why."""


@dataclass(frozen=True)
class Value:
    """A mean over images and its standard error.

    Args:
        mean: in the unit of whoever returns it.
        stderr: how far another sample of images would move it; NaN for one image.
    """

    mean: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor) -> Value:
        """(1/N) sum_n v_n, with the standard deviation of the v_n over sqrt(N). values: (N,), one an image."""
        each = PerLatent.of(values[:, None])
        return cls(float(each.mean), float(each.stderr))

    @classmethod
    def of_share(cls, flags: Tensor) -> Value:
        """k / N, with the error sqrt(q (1 - q) / (N + 4)), q = (k + 2) / (N + 4): not 0 where the share is 0 or 1.

        There sqrt(p (1 - p) / N) is 0, as if N draws could show that a rarer one does not happen. Two of these errors
        are 2.8 / N at k = 0, near the 3 / N of the exact 95% bound.

        Args:
            flags: (N,) bool, one a draw.

        Raises:
            ValueError: no draw.

        Reference: Agresti and Coull 1998, The American Statistician 52(2), 119-126.
        """
        N, k = len(flags), int(flags.sum())
        if N == 0:
            raise ValueError("flags: expected at least one, got none")
        q = (k + _ADDED / 2) / (N + _ADDED)
        return cls(k / N, math.sqrt(q * (1 - q) / (N + _ADDED)))

    def to_json(self) -> dict[str, float]:
        """As reports hold it."""
        return {"mean": self.mean, "stderr": self.stderr}


@dataclass(frozen=True)
class PerLatent:
    """A mean over images and its standard error for each latent.

    Args:
        mean: (L,) float64, on the CPU.
        stderr: (L,) float64, likewise; NaN for one image.
    """

    mean: Tensor
    stderr: Tensor

    @classmethod
    def of(cls, values: Tensor) -> PerLatent:
        """From one number an image and latent, (N, L)."""
        values = values.double().cpu()
        N = len(values)
        stderr = values.std(0) / math.sqrt(N) if N > 1 else values.new_full(values.shape[1:], math.nan)
        return cls(values.mean(0), stderr)

    def to_json(self) -> dict[str, list[float]]:
        """As reports hold it."""
        return {"mean": self.mean.tolist(), "stderr": self.stderr.tolist()}


def plus_minus(value: Mapping[str, float | None], digits: int | None = None, *, sign: int = 1) -> str:
    """A value of ``to_json`` as mean ± stderr; the mean alone where no error is known, "unknown" without a mean.

    Args:
        value: "mean" and "stderr", each a number, NaN or None.
        digits: after the point; None goes to the second digit of the error, or to the third without one.
        sign: -1 for what falls as the mean rises.
    """
    mean, stderr = (math.nan if value[name] is None else float(value[name] or 0.0) for name in ("mean", "stderr"))
    if math.isnan(mean):
        return "unknown"
    if digits is None:
        digits = max(0, 1 - math.floor(math.log10(stderr))) if stderr > 0 else 3
    words = f"{round(sign * mean, digits) + 0.0:.{digits}f}"
    return words if math.isnan(stderr) else f"{words} ± {stderr:.{digits}f}"


def ratio_of_means(numerator: Tensor, denominator: Tensor) -> Value:
    """r = mean_n a_n / mean_n b_n, with the delta method's error: the a_n - r b_n, over mean_n b_n, have its spread.

    Args:
        numerator: (N,) the a_n.
        denominator: (N,) the b_n, of the same images.
    """
    a, b = numerator.double().cpu(), denominator.double().cpu()
    r = a.mean() / b.mean()
    return Value(float(r), Value.of((a - r * b) / b.mean()).stderr)
