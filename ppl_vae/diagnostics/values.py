"""Means and standard errors for each latent, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


class CannotMeasure(ValueError):
    """The images do not allow this measure; the message says why."""


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
    def from_values(cls, values: Tensor) -> PerLatent:
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
