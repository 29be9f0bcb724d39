"""The objectives as functions (model, guide, x, *, beta) -> loss, nats per image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppl_vae import objectives
from ppl_vae.objectives import Trace_ELBO, loss_per_image


def elbo(
    model: Any, guide: Any, x: Tensor, *, beta: Any = 1.0, estimator: Any = Trace_ELBO, num_particles: int = 1
) -> Tensor:
    return loss_per_image(objectives.elbo(estimator, num_particles), model, guide, x, beta=beta)


def stl(model: Any, guide: Any, x: Tensor, *, beta: Any = 1.0, num_particles: int = 1) -> Tensor:
    return loss_per_image(objectives.STL(num_particles), model, guide, x, beta=beta)


def iwae(model: Any, guide: Any, x: Tensor, *, beta: Any = 1.0, num_particles: int) -> Tensor:
    return loss_per_image(objectives.IWAE(num_particles), model, guide, x, beta=beta)


def dreg(model: Any, guide: Any, x: Tensor, *, beta: Any = 1.0, num_particles: int) -> Tensor:
    return loss_per_image(objectives.DReG(num_particles), model, guide, x, beta=beta)


def free_bits(
    model: Any, guide: Any, x: Tensor, *, beta: Any = 1.0, free_nats: float, num_particles: int = 1
) -> Tensor:
    return loss_per_image(objectives.FreeBits(num_particles, free_nats=free_nats), model, guide, x, beta=beta)


def as_loss(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss as ``fit`` takes it, (model, guide, x) -> nats of the batch, from one of these functions or its like."""
    return lambda model, guide, x: len(x) * objective(model, guide, x, beta=1.0)
