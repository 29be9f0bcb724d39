"""Missing pixels, which are NaN in images of floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import MISSING

FORBID, TRAIN = MISSING


def fill_from_observed(x: Tensor, *, seed: int = 0) -> Tensor:
    """Replace each NaN of x (N, *E) by an observed value of the same pixel, drawn from the images: marginals stay.

    A pixel that no image has observed becomes the mean of all that are.
    """
    if not x.is_floating_point() or not any(part.isnan().any() for part in x.split(1000)):
        return x
    values = x.reshape(len(x), -1)
    missing = values.isnan()
    generator = torch.Generator().manual_seed(seed)
    filled = values.clone()
    for pixels in torch.arange(values.shape[1]).split(max(1, 2**22 // len(x))):
        holes, counts = missing[:, pixels], (~missing[:, pixels]).sum(0)
        # The observed images of each pixel come first, and one of them is drawn for each hole.
        u = torch.rand(2, *holes.shape, generator=generator).to(x.device)
        drawn = torch.where(holes, 2.0, u[0]).argsort(0).gather(0, (u[1] * counts).long().clamp(max=len(x) - 1))
        filled[:, pixels] = torch.where(holes, values[:, pixels].gather(0, drawn), values[:, pixels])
    return torch.where(filled.isnan(), values.nanmean().nan_to_num(0.0), filled).reshape(x.shape)


def keep_missing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a pixelwise function that has no NaN; a NaN of x, of any shape, stays."""
    missing = x.isnan()
    return torch.where(missing, torch.nan, function(x.nan_to_num(0.0))) if missing.any() else function(x)


def first_observed(array: np.ndarray) -> np.ndarray:
    """Replace each NaN of an array (N, *E) by the first observed value of the same pixel, or of any."""
    values = array.reshape(len(array), -1)
    missing = np.isnan(values)
    if not missing.any() or missing.all():
        return array
    first = np.take_along_axis(values, (~missing).argmax(0)[None], 0)
    first = np.where(np.isnan(first), values[~missing][0], first)
    return np.where(missing, first, values).reshape(array.shape)
