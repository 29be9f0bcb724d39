"""p(y | c) = family(net(c)): a network that ends in a distribution. The decoder is one, and so is the encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae.runtime.errors import ShapeError

NUMBERS_A_PIXEL = 6  # that a likelihood holds at once, unless it says otherwise: features, values, log-probabilities


def floats_per_pixel(likelihood: Any) -> int:
    """How many numbers a pixel p(x | z) holds at once, by its own or its family's word, or else six."""
    family = getattr(likelihood, "family", None)
    return getattr(likelihood, "floats_per_pixel", getattr(family, "floats_per_pixel", NUMBERS_A_PIXEL))


_NUMBERS_A_SPLINE = 24  # features of a latent that a flow's layer maps, of a spline of eight bins


def floats_per_latent(distribution: Any) -> int:
    """How many numbers a distribution over vectors holds of one z in its largest tensor, as log p(z) is taken.

    L; of a flow, its features of each latent; of a mixture, K times those of a component. Parts of a distribution are
    known by the names that Pyro and this package give them.
    """
    parts = [getattr(distribution, name, None) for name in ("base_dist", "first", "prior", "proposal")]
    most = max([distribution.event_shape.numel(), *(floats_per_latent(part) for part in parts if _is_of_vectors(part))])
    if hasattr(distribution, "flow") or hasattr(distribution, "layers"):
        most *= _NUMBERS_A_SPLINE
    components = getattr(distribution, "component_distribution", None)
    return most if components is None else components.batch_shape[-1] * max(most, floats_per_latent(components))


def _is_of_vectors(part: Any) -> bool:
    return bool(getattr(part, "event_shape", ()))


class Conditional(nn.Module):
    """p(y | c) = family(net(c)).

    Args:
        net: tensors (..., *C) -> features (..., F).
        family: features (..., F) -> a distribution with batch shape (...); it has ``num_features`` (F) and
            ``event_shape``.

    ``forward(c)`` returns the distribution.

    Raises:
        ValueError: where the network's features are not as many as the family asks for.
    """

    def __init__(self, net: nn.Module, family: Any) -> None:
        super().__init__()
        self.net = net
        self.family = family

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one y."""
        return tuple(self.family.event_shape)

    def forward(self, c: Tensor) -> Any:
        h = self.net(c)
        if not isinstance(h, Tensor):
            raise ShapeError(
                f"net: expected one tensor of features, (..., {self.family.num_features}), got {type(h).__name__}; "
                "torch.cat(parts, dim=-1) makes one of several"
            )
        if torch.is_autocast_enabled(h.device.type):  # it comes narrower then; a distribution's parameters are not
            h = h.to(c.dtype if c.is_floating_point() else torch.float32)
        if h.shape[-1] != self.family.num_features:
            F, name = self.family.num_features, type(self.family).__name__
            dims = len(self.event_shape)
            is_image = 1 < dims < h.dim() and h.shape[-dims:].numel() == F
            cure = f"; .flatten(-{dims}) makes one dimension of an image-shaped output" if is_image else ""
            raise ShapeError(f"net: expected {F} features for {name}, got {h.shape[-1]}, shape {tuple(h.shape)}{cure}")
        return self.family(h)
