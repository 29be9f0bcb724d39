"""What the distributions of one pixel that are written here have in common."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all


class Pixel(dist.TorchDistribution):
    """The distribution of one pixel, abstract: parameters of one shape, the batch's, and an empty event shape.

    A subclass has ``support``, ``mean``, ``mode``, ``sample`` and ``log_prob``, and names its parameters in
    ``arg_constraints``, in the order of its constructor.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, the name and type that torch asks for

    def __init__(self, *parameters: Tensor) -> None:
        for name, value in zip(self.arg_constraints, broadcast_all(*parameters), strict=True):
            setattr(self, name, value)
        super().__init__(getattr(self, next(iter(self.arg_constraints))).shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution for a larger batch shape."""
        new = type(self)(*(getattr(self, name).expand(torch.Size(batch_shape)) for name in self.arg_constraints))
        new._validate_args = self._validate_args
        return new

    def uniform(self, sample_shape: Any) -> Tensor:
        """u ~ Uniform[0, 1) for each pixel of each sample, (*sample_shape, *batch_shape), of torch's generator."""
        some = getattr(self, next(iter(self.arg_constraints)))
        return torch.rand(self.shape(torch.Size(sample_shape)), dtype=some.dtype, device=some.device)
