"""How features h become the parameters of a pixel's distribution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_LARGEST_SHARE = 0.98  # of a limit, that a fit may ask for: the map's slope there is still 0.04


def planes(h: Tensor, num: int, event_shape: Sequence[int]) -> tuple[Tensor, ...]:
    """h: (..., num prod(E)) -> num tensors (..., *E): the first feature of every pixel, then the second, and so on.

    A convolutional decoder gives its planes in that order.
    """
    # Not unbind, whose gradient is a stack: compiled, it interleaves the planes, and what computes them becomes slow.
    return tuple(plane.unflatten(-1, tuple(event_shape)) for plane in h.chunk(num, dim=-1))


def unbounded(value: Tensor, limit: float) -> Tensor:
    """The h of which ``numerics.bounded`` makes that value, which beyond 0.98 of the limit is brought there first.

    Args:
        value: of any shape, which h has too.
        limit: as ``bounded`` has it.
    """
    return limit * (value / limit).clamp(-_LARGEST_SHARE, _LARGEST_SHARE).atanh()
