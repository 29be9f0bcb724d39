"""What likelihoods of independent pixels share: features to a distribution of each pixel, and to one of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae.parts.likelihoods.features import planes


def independent_pixels(p_x: Any, because: str) -> dist.Independent:
    """p(x | z) as it is, once it is known that its pixels are independent given z.

    Raises:
        ValueError: they are not; says why they must be.
    """
    if not isinstance(p_x, dist.Independent) or p_x.base_dist.event_shape:
        raise ValueError(
            f"likelihood: expected pixels that are independent given z (Independent over the whole image), got "
            f"{type(p_x).__name__} with event shape {tuple(p_x.event_shape)}; {because}"
        )
    return p_x


class Pixels(nn.Module):
    """p(x | h) = prod_d p(x_d; h_d), abstract: pixels that are independent given h, ``features_a_pixel`` for each.

    A subclass has ``pixel``, from F features, each (..., *E), to the distribution of all pixels, batch shape (..., *E),
    and what the package's docstring names beside ``forward``.

    Args:
        event_shape: E, the shape of an image.
    """

    features_a_pixel = 1
    floats_per_pixel = 6
    pixel: Callable[..., Any]

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = self.features_a_pixel * math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., F prod(E)), the first feature of all pixels, then the second -> batch shape (...), event shape E."""
        return self.pixel(*planes(h, self.features_a_pixel, self.event_shape)).to_event(len(self.event_shape))
