"""The density of a draw, remembered with it: where z was made of noise, there is no map to invert."""

from __future__ import annotations

import torch
from torch import Tensor


class CachedLogProb:
    """A draw z of a distribution and log q(z), which it knows from the noise that z was made of.

    It lives with the distribution, one call of the guide, and not with the module: nothing passes from one call to
    another. As a function of the parameters log q(z) is the whole one, along z too; whoever wants the slope in z alone
    asks for the density at ``z.detach()``.

    Args:
        z: (..., L).
        log_q: (...) nats.
    """

    def __init__(self, z: Tensor, log_q: Tensor) -> None:
        self._z = z
        self._log_q = log_q
        self._had_gradients = torch.is_grad_enabled()
        self._marks = _marks(z)

    def log_density(self, z: Tensor) -> Tensor | None:
        """log q(z), (...) nats, where z is this very draw; else None.

        None, too, where the draw has changed since, or where a gradient is wanted that it was made without.
        """
        knows = z is self._z and self._marks == _marks(z)
        return self._log_q if knows and (self._had_gradients or not torch.is_grad_enabled()) else None


def _marks(z: Tensor) -> tuple[bool, int | None]:
    """What is no longer the same once z was written to, or made an input of a gradient."""
    return z.requires_grad, None if z.is_inference() else z._version
