"""An objective computed in a narrower type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vae.protocols import StochasticFunction


def autocast(objective: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The objective with matrix products and convolutions in a narrower type: its gradients are rounded, too.

    Distributions stay in the type of the data (see ``Conditional``). Only training sees it.
    """

    def narrowed(model: StochasticFunction, guide: StochasticFunction, x: Tensor, *, beta: float | Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return objective(model, guide, x, beta=beta)

    return narrowed
