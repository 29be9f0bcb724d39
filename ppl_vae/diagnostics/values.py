"""Means and standard errors for each latent, numbers as text, and the error of a measure that is impossible."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ppl_vae.evidence.estimate import Estimate


class CannotMeasure(ValueError):
    """The images do not allow this measure; the message says why."""


@dataclass(frozen=True)
class PerLatent:
    """A mean over images and its standard error for each latent.

    Args:
        mean: (L,) float64, on the CPU.
        stderr: (L,) float64, on the CPU; NaN for one image.
    """

    mean: Tensor
    stderr: Tensor

    @classmethod
    def from_values(cls, values: Tensor) -> PerLatent:
        """From one number for each image and latent, (N, L)."""
        values = values.double().cpu()
        N = len(values)
        stderr = values.std(0) / math.sqrt(N) if N > 1 else values.new_full(values.shape[1:], math.nan)
        return cls(values.mean(0), stderr)


def plus_minus(value: Estimate, digits: int | None = None, *, sign: int = 1) -> str:
    """An estimate as "mean ± stderr"; without "± stderr" if the error is unknown, "unknown" if the mean is.

    Args:
        value: the estimate; unknown numbers are NaN.
        digits: after the point. By default the error has two significant digits; without an error there are three.
        sign: -1 to write the estimate of the negative.

    >>> plus_minus(Estimate(-81.234, 0.215))
    '-81.23 ± 0.21'
    """
    if math.isnan(value.mean):
        return "unknown"
    if digits is None:
        digits = max(0, 1 - math.floor(math.log10(value.stderr))) if value.stderr > 0 else 3
    words = f"{round(sign * value.mean, digits) + 0.0:.{digits}f}"
    return words if math.isnan(value.stderr) else f"{words} ± {value.stderr:.{digits}f}"
