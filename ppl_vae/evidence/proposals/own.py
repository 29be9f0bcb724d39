"""A distribution for each of some images, and a VAE that has it in the place of its guide."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.runtime.capture import is_capturing
from ppl_vae.vae import VAE


class Proposal(dist.TorchDistribution):
    """q(z | x_n) = family(h_n), n = 1..N: a distribution for each of N images, which it knows.

    Args:
        family: features (..., F) -> a distribution with batch shape (...) and event shape (L,).
        h: features (N, F).
        x: the images (N, *E).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.real_vector

    def __init__(self, family: Any, h: Tensor, x: Tensor) -> None:
        self.family, self.h, self.x = family, h, x
        self._q = family(h)
        super().__init__(self._q.batch_shape, self._q.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """As the family has it."""
        return self._q.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """With another batch shape: the distribution alone, without its images."""
        return self._q.expand(batch_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + (N, L), without gradients."""
        with torch.no_grad():
            return self._q.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + (N, L)."""
        return self._q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """value: (..., N, L) -> (..., N) nats."""
        return self._q.log_prob(value)


class PerImageGuide(nn.Module):
    """x (B, *E) -> q(z | x), for images that are among the N that a proposal was made for.

    They are found by their pixels, so they may come in any order and in any groups.

    Args:
        q: the proposal.
        guide: the VAE's own, kept because a VampPrior uses its weights.

    Raises:
        ValueError: an image that is none of them. A compiled graph cannot raise, and gives NaN in its place.
    """

    pixels: Tensor
    direction: Tensor
    keys: Tensor
    h: Tensor

    def __init__(self, q: Proposal, guide: Any) -> None:
        super().__init__()
        self.family = q.family
        self.guide = guide
        self.event_shape = tuple(q.event_shape)
        pixels = q.x.detach().flatten(1)
        direction = torch.randn(pixels.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.double)
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("direction", direction.to(pixels.device), persistent=False)
        self.register_buffer("keys", pixels.double() @ self.direction, persistent=False)
        self.register_buffer("h", q.h.detach(), persistent=False)

    def forward(self, x: Tensor) -> Any:
        """x: (B, *E) -> batch shape (B,), event shape (L,)."""
        pixels = x.flatten(1)
        if pixels.shape[1] != self.pixels.shape[1]:
            raise ValueError(f"x: expected images of {self.pixels.shape[1]} pixels, got {pixels.shape[1]}")
        # The nearest along one direction, and then every pixel: to compare with all images is N / B times the work.
        nearest = ((pixels.double() @ self.direction)[:, None] - self.keys).abs().argmin(1)
        known = (self.pixels[nearest] == pixels).all(1)
        if not is_capturing() and not known.all():
            raise ValueError(
                f"x: expected images that the proposal was made for, got {int((~known).sum())} of {len(x)} that are "
                f"not among its {len(self.pixels)}"
            )
        return self.family(torch.where(known[:, None], self.h[nearest], math.nan))


def replace_guide(vae: Any, q: Proposal) -> VAE:
    """p(x, z) of the VAE with q in the place of its guide, for the images that q was made for.

    ``evidence.evaluate`` and ``importance`` take it as any VAE, compiled or not.

    Args:
        vae: a VAE, or a hierarchical one, whose layers' latents are then one vector and one site.
        q: of ``refined``, ``fitted`` or ``defensive``.

    Returns:
        A VAE that shares the prior and the likelihood.

    Raises:
        ValueError: a q that does not know its images. When it is used: an image that q was not made for; compiled,
            ``NotFinite`` in its place.
    """
    if not isinstance(q, Proposal):
        raise ValueError(f"q: expected a Proposal, which knows its images, got {type(q).__name__}")
    return VAE(vae.prior, vae.likelihood, PerImageGuide(q, vae.posterior)).train(vae.training)
