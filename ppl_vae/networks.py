"""Networks: tensors to tensors, with any leading dimensions (particles, batch) before the event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def _flatten_event(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """(..., *E) -> (..., prod(E)); raises where the trailing dimensions are not E."""
    leading = x.dim() - len(event_shape)
    if leading < 0 or tuple(x.shape[leading:]) != event_shape:
        raise ValueError(
            f"network input: expected shape (..., {', '.join(map(str, event_shape))}), got {tuple(x.shape)}"
        )
    return x.reshape(*x.shape[:leading], math.prod(event_shape))


class MLP(nn.Module):
    """h = W_n a(... a(W_1 x + b_1)) + b_n: a multilayer perceptron over the flattened event.

    Args:
        event_shape: the input's event shape E; a number stands for a vector of that length.
        num_features: the length of the output.
        hidden: the widths of the hidden layers; empty for an affine map.
        activation: a, applied after every hidden layer.

    ``forward`` takes (..., *E) and returns (..., num_features). The last layer is ``output``.

    Raises:
        ValueError: where the input's trailing shape is not E.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_features: int,
        *,
        hidden: Sequence[int],
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        widths = [math.prod(self.event_shape), *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), activation()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(_flatten_event(x, self.event_shape)))


class GatedMLP(nn.Module):
    """A multilayer perceptron whose hidden layers are (W x + b) * sigmoid(V x + c).

    The sigmoid is a gate: it lets a unit be switched off by the input while the other factor stays linear, so that
    gradients pass. Both factors are one matrix product. Arguments and shapes as ``MLP``.

    Reference: Dauphin et al. 2017, arXiv 1612.08083, equation 1; used for VAEs by Tomczak and Welling 2018, 1705.07120.
    """

    def __init__(self, event_shape: int | Sequence[int], num_features: int, *, hidden: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        widths = [math.prod(self.event_shape), *hidden]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, 2 * width_out), nn.GLU(dim=-1)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(_flatten_event(x, self.event_shape)))
