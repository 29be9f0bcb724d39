"""Stirling's formula and what it leaves: log-gamma functions whose differences lose nothing in single precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vae.runtime.numerics import polynomial

HALF_LOG_TWO_PI = math.log(2 * math.pi) / 2

_SERIES_FROM = 8.0
# B_2n / (2 n (2 n - 1)), n = 1, 2, ...; from z = 8 on the first that is left out is below 1e-16.
_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)


def stirling_remainder(z: Tensor) -> Tensor:
    """s(z) = log Gamma(z) - (z - 1/2) log z + z - (1/2) log 2 pi, for z > 0.

    log Gamma(1,000) is 5,905, of which single precision knows 0.0005; s(1,000) is 1 / 12,000. Where log-gamma functions
    are subtracted from each other, as in a Beta's density, their large parts cancel on paper and s is what is left. By
    its series from z = 8 on, and below from log Gamma(z + 8) = log Gamma(z) + sum_k log(z + k), k = 0, ..., 7, as

        s(z) = s(z + 8) - (z + 1/2) log [z / (z + 8)] - log prod_{k = 1}^{7} [(z + k) / (z + 8)] - 8,

    no term of which is large: two logarithms, where log Gamma and its derivative take many times as long.

    Reference: Abramowitz and Stegun 1964, 6.1.40 (the series) and 6.1.15 (the recurrence).
    """
    small = z < _SERIES_FROM
    inverse = 1 / torch.where(small, z + _SERIES_FROM, z)
    square = inverse.square()
    near = torch.where(small, z, _SERIES_FROM)  # both branches have gradients everywhere
    unit = 1 / (near + 8)
    middle, step = ((near + 4) * unit).square(), unit.square()  # (z + 1) (z + 7) = (z + 4)^2 - 9, and so on
    product = (near + 4) * unit * (middle - step) * (middle - 4 * step) * (middle - 9 * step)
    shift = (near + 0.5) * (near * unit).log() + product.log() + 8
    return inverse * polynomial(_SERIES, square) - torch.where(small, shift, 0.0)
