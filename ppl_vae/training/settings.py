"""The settings of a training: optimizer, schedule, validation, and the functions that are called."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.protocols import Program
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.runtime.records import Data
from ppl_vae.training.state import TrainingState
from ppl_vae.weights import is_autoencoder

# --- Functions of the step ---

NUM_STAGES = 8


def warmup(step: int, *, beta: float, warmup_steps: int) -> float:
    """beta min(1, step / warmup_steps): from 0 at the first step, linearly."""
    return beta * min(1.0, step / warmup_steps) if warmup_steps else beta


def default_warmup(epochs: int) -> int:
    """Three tenths of the epochs, at most 15, and at least one if there are several.

    Without a warm-up latents collapse early and stay collapsed: after two epochs on MNIST the plain VAE's validation
    ELBO was -121.0 nats without a warm-up and -107.9 with one epoch of it.
    """
    return 0 if epochs == 1 else max(1, min(15, 3 * epochs // 10))


def cosine(step: int, *, learning_rate: float, total_steps: int, start: float = 0.0) -> float:
    """learning_rate (1 + cos(pi t)) / 2, t = (step / total_steps - start) / (1 - start) or 0 before: flat, then to 0.

    Reference: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts; the flat part is ours.
    """
    t = max(0.0, step / total_steps - start) / (1 - start)
    return learning_rate * (1 + math.cos(math.pi * t)) / 2


def stages(step: int, *, learning_rate: float, total_steps: int) -> float:
    """learning_rate 10^(-i/7) in stage i = 0..7, which has 3^i of 3,280 parts of the steps.

    Reference: Burda et al. 2016, arXiv 1509.00519, section 5 (there a part is one epoch, learning_rate 0.001).
    """
    ends = (total_steps * (3 ** (i + 1) - 1) / (3**NUM_STAGES - 1) for i in range(NUM_STAGES))
    stage = next((i for i, end in enumerate(ends) if step < end), NUM_STAGES - 1)
    return learning_rate * 10 ** (-stage / (NUM_STAGES - 1))


def averaging(step: int, *, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early in the training the average forgets the initial weights faster."""
    return min(decay, (1 + step) / (10 + step))


# --- Settings ---

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
            what is validated and kept. See ``averaging``.

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
        _set(self, learning_rate=float(self.learning_rate), average_decay=float(self.average_decay))


@dataclass(frozen=True)
class Schedule:
    """How images come in batches, and how the learning rate and beta change from step to step.

    Args:
        batch_size: Images per step. The last batch of an epoch may be smaller.
        seed: The seed of the images' order.
        rate: (step, *, learning_rate, total_steps) -> the learning rate of that step; such as ``cosine`` or ``stages``.
        beta: The weight of the KL after the warm-up.
        warmup_epochs: The epochs over which beta rises linearly from 0.
    """

    batch_size: int = 100
    seed: int = 0
    rate: Callable[..., float] = cosine
    beta: float = 1.0
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        batch_size = check_count("batch_size", self.batch_size)
        warmup_epochs = check_count("warmup_epochs", self.warmup_epochs, least=0)
        seed, beta = operator.index(self.seed), float(self.beta)
        _set(self, batch_size=batch_size, warmup_epochs=warmup_epochs, seed=seed, beta=beta)

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
        images: (M, *E) as the model sees them, or ``Records``; None keeps the last weights.
        num_particles: S of the bound L_S that chooses the weights; 1 is the ELBO. An importance-weighted objective
            raises L_S and lowers the ELBO, by which the weights of the first epoch would be kept.
        keep_last: Whether the last weights are kept, whatever their validation.
        keep_start: Whether the initial weights take part in the choice; useful if they were trained before.
    """

    images: Data | None = None
    num_particles: int = 1
    keep_last: bool = False
    keep_start: bool = False

    def __post_init__(self) -> None:
        _set(self, num_particles=check_count("num_particles", self.num_particles))


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


def _set(settings: object, **values: object) -> None:
    """Set fields of a frozen dataclass: Python's numbers instead of NumPy's."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


# --- Validation after an epoch ---

VALIDATION_SEED = 20140501


def validate(state: TrainingState, validation: Validation, *, check: bool) -> dict[str, float]:
    """Measure the weights that are evaluated, and keep them if they are the best so far.

    The record holds the validation ELBO at beta = 1, its two terms, and L_S of several particles. For an autoencoder it
    holds the reconstruction log p(x | z(x)). Numbers are nats per image; ``check`` validates values against supports.
    """
    record: dict[str, float] = {}
    with state.evaluated_weights():
        if validation.images is not None:
            record, name, value = _measure(state.program, validation.images, validation.num_particles, check=check)
            if not math.isfinite(value):
                raise NotFinite(f"step {state.step}: the validation {name} is {value}")
        is_best = validation.images is None or value > state.best_validation
        if is_best and record:
            state.best_validation = value
        if is_best or validation.keep_last:
            state.keep_weights()
    return record


def _measure(program: Program, x: Data, S: int, *, check: bool) -> tuple[dict[str, float], str, float]:
    """The record of images x (M, *E), and the name and value of the number that chooses the weights."""
    with seeded(VALIDATION_SEED, x.device), torch.no_grad(), evaluation_mode(program):
        has_no_density = is_autoencoder(program.guide, x)
    if has_no_density:
        found = Estimate.mean_of(reconstruction(program, x, seed=VALIDATION_SEED, check=check), 1)
        return _entries("reconstruction", found), "reconstruction", found.mean
    result = evaluate(program, x, num_particles=S, seed=VALIDATION_SEED, check=check)
    elbo, bound = (Estimate.mean_of(values, S) for values in (result.elbo, result.log_evidence))
    record = _entries("elbo", elbo) | {
        "validation_reconstruction_nats_per_image": float(result.reconstruction.mean()),
        "validation_kl_nats_per_image": float(result.kl.mean()),
    }
    if S == 1:
        return record, "ELBO", elbo.mean
    return record | {"validation_particles": S} | _entries("bound", bound), f"bound L_{S}", bound.mean


def _entries(name: str, found: Estimate) -> dict[str, float]:
    return {f"validation_{name}_nats_per_image": found.mean, f"validation_{name}_stderr_nats_per_image": found.stderr}
