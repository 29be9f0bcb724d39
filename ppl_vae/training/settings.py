"""The settings of a training: optimizer, schedule, validation, and the functions that it calls."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl_vae.runtime.errors import check_count
from ppl_vae.training.schedules import averaging, cosine, warmup
from ppl_vae.training.state import TrainingState

StepValues = tuple[float, float, float]  # beta, learning rate and the averages' decay of one step

FusedAdam = partial(torch.optim.Adam, fused=True)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, and the limits on the gradients that it is given.

    Args:
        factory: (parameters, lr=...) -> a torch optimizer, such as ``torch.optim.AdamW`` or a ``partial`` of it. Adam
            and AdamW can be part of a compiled step; with any other optimizer the steps run eagerly.
        learning_rate: The rate from which ``Schedule.rate`` starts.
        clip_norm: The largest global norm of the gradient; a larger gradient is scaled down to it.
        skip_norm: A step whose gradient has a larger norm, or a norm that is not finite, is skipped, since rare draws
            of z can lie where a flow's density is astronomically small. None skips no step. Adam's bias correction
            counts skipped steps. The training ends if more than a hundred steps and more than one in a hundred were
            skipped, or all of one epoch.
        average_decay: The decay of an exponential moving average of the weights. If it is above 0, the averages are
            what is validated and kept. See ``schedules.averaging``.

    Reference: Kingma and Ba 2015, arXiv 1412.6980; Polyak and Juditsky 1992 (averages).
    """

    factory: Callable[..., torch.optim.Optimizer] = FusedAdam
    learning_rate: float = 1e-3
    clip_norm: float = 100.0
    skip_norm: float | None = None
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "skip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay: expected a number from 0 to below 1, got {self.average_decay}")
        _convert(self, float, "learning_rate", "average_decay")


@dataclass(frozen=True)
class Schedule:
    """How images come in batches, and how the learning rate and beta change from step to step.

    Args:
        batch_size: Images per step. The last batch of an epoch may be smaller.
        seed: The seed of the images' order.
        rate: (step, *, learning_rate, total_steps) -> the learning rate of that step; see ``schedules``.
        beta: The weight of the KL after the warm-up.
        warmup_epochs: The epochs over which beta rises linearly from 0.
    """

    batch_size: int = 100
    seed: int = 0
    rate: Callable[..., float] = cosine
    beta: float = 1.0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("warmup_epochs", self.warmup_epochs, least=0)
        _convert(self, operator.index, "batch_size", "warmup_epochs", "seed")
        _convert(self, float, "beta")

    def step_values(self, step: int, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> StepValues:
        """beta, the learning rate and the averages' decay of a step."""
        return (
            warmup(step, beta=self.beta, warmup_steps=self.warmup_epochs * steps_per_epoch),
            self.rate(step, learning_rate=optimizer.learning_rate, total_steps=total_steps),
            averaging(step, decay=optimizer.average_decay),
        )


@dataclass(frozen=True)
class Validation:
    """How the weights that are kept are chosen, after each epoch.

    Args:
        images: (M, *E) as the model sees them; None keeps the last weights.
        num_particles: S of the bound L_S that chooses the weights; 1 is the ELBO. An importance-weighted objective
            raises L_S and lowers the ELBO, by which the weights of the first epoch would be kept.
        keep_last: Whether the last weights are kept, whatever their validation.
        keep_start: Whether the initial weights take part in the choice; useful if they were trained before.
    """

    images: Tensor | None = None
    num_particles: int = 1
    keep_last: bool = False
    keep_start: bool = False

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        _convert(self, operator.index, "num_particles")


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training calls, on every rank.

    Args:
        on_compiled: Called with the seconds that tracing and compiling took.
        on_step: Called after every step.
        on_epoch: Called after every epoch with a record of named numbers.
        on_checkpoint: Called after every epoch, and after any step once ``checkpoint_seconds`` have passed.
        checkpoint_seconds: The longest time between two checkpoints.
        should_stop: Asked after every step whether the training should end early.
    """

    on_compiled: Callable[[float], None] | None = None
    on_step: Callable[[TrainingState], None] | None = None
    on_epoch: Callable[[dict[str, Any]], None] | None = None
    on_checkpoint: Callable[[TrainingState], None] | None = None
    checkpoint_seconds: float = math.inf
    should_stop: Callable[[], bool] | None = None


def _convert(settings: Any, kind: Callable[[Any], Any], *names: str) -> None:
    """Make Python's numbers of NumPy's, in a frozen dataclass."""
    for name in names:
        object.__setattr__(settings, name, kind(getattr(settings, name)))
