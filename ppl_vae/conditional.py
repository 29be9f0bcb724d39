"""p(y | c) = family(net(c)): a network that ends in a distribution, such as a decoder or an encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.protocols import Family
from ppl_vae.runtime.errors import ShapeError


def restore_precision(h: Tensor, c: Tensor) -> Tensor:
    """Convert features h (..., F) of c (..., *C) to the type that they have without autocast.

    Under autocast a network's features may be bfloat16, and parameters of distributions may not.
    """
    if not torch.is_autocast_enabled(h.device.type):
        return h
    return h.to(c.dtype if c.is_floating_point() else torch.float32)


class Conditional(nn.Module):
    """p(y | c) = family(net(c)).

    Args:
        net: tensors (..., *C) -> features (..., F); with a label it takes c and the label.
        family: features (..., F) -> a distribution with batch shape (...); it has ``num_features`` (F) and
            ``event_shape``.

    ``forward(c)`` returns the distribution, and ``forward(c, label)`` that of a net with a label.

    Raises:
        ValueError: The network has another number of features than the family.
    """

    def __init__(self, net: nn.Module, family: Family) -> None:
        super().__init__()
        self.net = net
        self.family = family

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one y."""
        return tuple(self.family.event_shape)

    def forward(self, c: Tensor, *label: Tensor) -> Distribution:
        h, F = self.net(c, *label), self.family.num_features
        if not isinstance(h, Tensor) or h.shape[-1] != F:
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ShapeError(f"net: expected one tensor of {F} features for {type(self.family).__name__}, got {got}")
        return self.family(restore_precision(h, c))
