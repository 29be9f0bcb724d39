"""The training loop: schedules, epochs, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae import data, objectives
from ppl_vae.capture import CannotCapture
from ppl_vae.schedules import averaging, cosine, warmup
from ppl_vae.training.guard import check_images, check_skipped
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps
from ppl_vae.training.validation import validate
from ppl_vae.vae import VAE


def fit(
    vae: VAE,
    train: Tensor,
    validation: Tensor | None = None,
    *,
    epochs: int,
    objective: Callable[..., Tensor] = objectives.elbo,
    observe: Callable[[Tensor, torch.Generator | None], Tensor] = data.as_floats,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    rate: Callable[..., float] = cosine,
    beta: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float = 100.0,
    skip_norm: float | None = None,
    average_decay: float = 0.0,
    keep_last: bool = False,
    validation_particles: int = 1,
    compile: bool = False,
    seed: int = 0,
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    on_compiled: Callable[[float], None] | None = None,
    on_step: Callable[[TrainingState], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[TrainingState], None] | None = None,
    checkpoint_seconds: float = math.inf,
) -> TrainingState:
    """Trains the VAE by SVI, and leaves it in evaluation mode with the best weights by validation, the ELBO or L_S.

    With a deterministic guide (``posteriors.Delta``) and beta = 0 it trains a plain autoencoder; then there is no ELBO,
    and the best weights are those of the highest validation reconstruction log p(x | z(x)).

    Adam with a learning rate by step count; beta rises linearly from 0 over the warm-up; the gradient's global
    norm is clipped. A likelihood with a method ``refit(h, x)`` is given a batch every tenth step, for what it fits to
    the data in closed form. Values are checked against supports in the first epoch, or, with ``compile`` or
    ``skip_norm``, before it.
    Seed torch's global generator before the VAE is built (``pyro.set_rng_seed``): the weights, the noise of the sites
    and that of the data come from it.

    Args:
        vae: the VAE to train, on its device.
        train: (N, *E), as stored; it is kept on the VAE's device as one tensor.
        validation: (M, *E), as evaluated; without it the last weights are the best.
        epochs: passes through ``train``. The last batch of a pass may be smaller.
        objective: (model, guide, x, *, beta) -> loss, nats an image.
        observe: what a batch of stored images becomes at every access; (values, generator), None for torch's global
            generator.
        learning_rate: Adam's, at the start.
        rate: (step, *, learning_rate, total_steps) -> the rate of that step; see ``schedules``.
        beta: the weight of the KL, after the warm-up.
        skip_norm: a step whose gradient's norm is above it, or not finite, is left out: rare draws of z can lie where a
            flow's density is astronomically small. Adam's bias correction counts it all the same. None for no such
            step. The training ends where more than a hundred, and more than one in a hundred of all, were left out, or
            all of an epoch.
        average_decay: of an exponential moving average of the weights, which then is what is validated and kept; 0 for
            none. See ``averaging``.
        validation_particles: S of the bound L_S that chooses the best weights; 1 is the ELBO. An importance-weighted
            objective raises L_S and lowers the ELBO, which would then keep the weights of the first epoch.
        keep_last: whether the last weights are kept, whatever validation says of them.
        compile: whether the whole step, from the batch to the new weights, runs as one compiled graph. It computes the
            same to rounding, and takes some seconds to compile. What changes in Python from step to step (a counter in
            a network, ``requires_grad``) stays as it was at the first.
        seed: of the images' order.
        saved: a state by ``TrainingState.to_tensors``, from which to go on bit for bit.
        on_compiled: called with the seconds that tracing and compiling took.
        on_step: called after every step.
        on_epoch: called after every epoch with a record of named numbers.
        on_checkpoint: called after every epoch, and after any step once ``checkpoint_seconds`` have passed.

    Returns:
        The last state. Its VAE holds the best weights by now: a state to go on from is taken in ``on_checkpoint``.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; names the step and the site. The VAE keeps the weights of
            the step before. With ``skip_norm``: too many steps were left out.
        CannotCapture: a ValueError: ``compile`` is asked for and impossible; says why. Nothing was trained.
        ValueError: an argument out of its range, an image off the likelihood's support, or a saved state that does
            not fit.

    Reference: Polyak and Juditsky 1992 (averages); the rest as in ``objectives``.
    """
    _check_counts(train=len(train), epochs=epochs, batch_size=batch_size, validation_particles=validation_particles)
    _check_positive(learning_rate=learning_rate, clip_norm=clip_norm, **{"skip_norm": skip_norm} if skip_norm else {})
    norms: dict[str, Any] = {"clip_norm": clip_norm, "skip_norm": skip_norm}
    if not isinstance(compile, bool):
        raise ValueError(f"compile: expected True or False, got {compile!r}")
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay: expected a number from 0 to below 1, got {average_decay}")
    device = next(vae.parameters()).device
    state = TrainingState(vae, device=device, averaged=average_decay > 0)
    if saved is not None:
        state.restore(*saved)
    train = train.to(device)
    validation = None if validation is None else validation.to(device)
    steps_an_epoch = math.ceil(len(train) / batch_size)
    if saved is not None and "epoch_images" not in saved[1]:  # of before there were steps to leave out
        state.epoch_images = state.step % steps_an_epoch * batch_size
    total_steps, warmup_steps = epochs * steps_an_epoch, warmup_epochs * steps_an_epoch
    vae.train()
    started = last_checkpoint = time.monotonic()
    earlier = state.seconds
    first_epoch = state.step // steps_an_epoch
    refits = hasattr(getattr(vae.likelihood, "family", None), "refit")
    stepper: EagerSteps | CapturedSteps
    if (compile or skip_norm is not None) and state.step < total_steps:
        check_images(state, train, observe, batch_size=batch_size)
    if compile and state.step < total_steps:
        try:
            stepper = CapturedSteps(state, objective, train, observe, batch_size=batch_size, **norms)
        except CannotCapture:
            vae.eval()
            raise
        if on_compiled is not None:
            on_compiled(stepper.compile_seconds)
    else:
        stepper = EagerSteps(state, objective, train, observe, **norms)
    while state.step < total_steps:
        epoch, place = divmod(state.step, steps_an_epoch)
        epoch_started, images_seen = time.monotonic(), 0
        schedule = [
            (
                warmup(step, beta=beta, warmup_steps=warmup_steps),
                rate(step, learning_rate=learning_rate, total_steps=total_steps),
                averaging(step, decay=average_decay),
            )
            for step in range(state.step, (epoch + 1) * steps_an_epoch)
        ]
        batches = batches_of(len(train), batch_size, seed=seed, epoch=epoch, device=device)[place:]
        # A step that is not finite would be an error of Pyro's validation, and is to be left out.
        checked = epoch == first_epoch and skip_norm is None
        for index in stepper.epoch(batches, schedule, validate=checked):
            images_seen += len(index)
            if refits and state.step % _REFIT_STEPS == 0:
                with state.evaluated_weights():
                    _refit(vae, observe(train[index], None))
            if on_step is not None:
                on_step(state)
            if state.step % steps_an_epoch and time.monotonic() - last_checkpoint >= checkpoint_seconds:
                stepper.settle()
                state.seconds = earlier + time.monotonic() - started
                if on_checkpoint is not None:
                    on_checkpoint(state)
                last_checkpoint = time.monotonic()
        stepper.settle()
        check_skipped(state, epoch + 1)
        record = {
            "step": state.step,
            "epoch": epoch + 1,
            "train_loss_nats_per_image": state.epoch_loss / state.epoch_images,
            "beta": schedule[-1][0],
            "learning_rate": schedule[-1][1],
            "train_images_per_second": images_seen / (time.monotonic() - epoch_started),
        }
        with state.evaluated_weights():
            record |= validate(state, validation, num_particles=validation_particles, check=epoch == first_epoch)
        if keep_last:
            with state.evaluated_weights():
                state.keep_weights()
        if state.skipped:
            record["skipped_steps"] = state.skipped
        state.epoch_loss, state.epoch_images = 0.0, 0
        record["seconds"] = state.seconds = earlier + time.monotonic() - started
        if on_epoch is not None:
            on_epoch(record)
        if on_checkpoint is not None:
            on_checkpoint(state)
        last_checkpoint = time.monotonic()
    vae.load_state_dict(state.best_weights)
    vae.eval()
    return state


_REFIT_STEPS = 10


@torch.no_grad()
def _refit(vae: VAE, x: Tensor) -> None:
    """Gives the likelihood's family a batch to fit in closed form: x, and the features of z ~ q(z | x)."""
    decoder: Any = vae.likelihood
    with pyro.validation_enabled(False):  # weights that are not finite are the next step's to find
        decoder.family.refit(decoder.net(vae.posterior(x).sample()), x)


def _check_counts(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def batches_of(num_images: int, batch_size: int, *, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """The epoch's order of the images, cut into batches: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_images, generator=generator).to(device).split(batch_size)
