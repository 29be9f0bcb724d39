"""The training loop: schedules, epochs, validation, checkpoints."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ppl_vae import data, objectives
from ppl_vae.runtime.batching import describe_memory_error, find_fitting_batch
from ppl_vae.runtime.errors import CannotCapture, check_count, is_out_of_memory
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.noise import SharedNoise
from ppl_vae.runtime.ranks import BatchShare, agree, gather_objects, gather_rows, is_writer, num_ranks
from ppl_vae.training.guard import check_images, check_ranks, check_skipped
from ppl_vae.training.inputs import as_images, check_batch_of_one, check_programs, check_weights
from ppl_vae.training.schedules import averaging, cosine, warmup
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps
from ppl_vae.training.streaming import Resident, Streamed
from ppl_vae.training.validation import validate
from ppl_vae.vae import VAE


class Stopped(Exception):
    """The training ended early because it was asked to; its state was given to ``on_checkpoint``.

    Attributes:
        step: how many steps were taken.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step:,}")
        self.step = step


@serialize_threads()
@torch.inference_mode(False)
@torch.enable_grad()  # wherever it is called, such as within a caller's torch.no_grad()
def fit(
    vae: VAE,
    train: Tensor,
    validation: Tensor | None = None,
    *,
    epochs: int,
    objective: Callable[..., Tensor] = objectives.elbo,
    observe: Callable[[Tensor, torch.Generator | None], Tensor] = data.to_float,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    rate: Callable[..., float] = cosine,
    beta: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float = 100.0,
    skip_norm: float | None = None,
    average_decay: float = 0.0,
    keep_last: bool = False,
    keep_start: bool = False,
    validation_particles: int = 1,
    compile: bool = False,
    stream: bool = False,
    seed: int = 0,
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    on_compiled: Callable[[float], None] | None = None,
    on_step: Callable[[TrainingState], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[TrainingState], None] | None = None,
    checkpoint_seconds: float = math.inf,
    should_stop: Callable[[], bool] | None = None,
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

    Under several ranks (``distributed``) each calls this with the same arguments; a batch's images are shared out, and
    the training is that of one process, to rounding, whatever the number of ranks. Noise is drawn at sample sites and
    by ``observe``; elsewhere it is refused.

    Args:
        vae: the VAE to train, on its device.
        train: (N, *E), as stored; it is kept on the VAE's device as one tensor, but for ``stream``. A VAE of float64
            weights sees the images as float64, others as ``observe`` gives them.
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
        keep_start: whether the weights at the start are validated too, and kept where no epoch has better ones: they
            are worth keeping where they were trained before.
        compile: whether the whole step, from the batch to the new weights, runs as one compiled graph. It computes the
            same to rounding, and takes some seconds to compile. What changes in Python from step to step (a counter in
            a network, ``requires_grad``) stays as it was at the first.
        stream: whether the images stay where they are, such as in a mapped file, and a thread brings batch after batch
            to the device; the weights are the same bit for bit. See ``does_not_fit``.
        seed: of the images' order.
        saved: a state by ``TrainingState.to_tensors``, from which to go on bit for bit.
        on_compiled: called with the seconds that tracing and compiling took.
        on_step: called after every step.
        on_epoch: called after every epoch with a record of named numbers.
        on_checkpoint: called after every epoch, and after any step once ``checkpoint_seconds`` have passed. Like the
            others, it is called on every rank.
        should_stop: asked after every step whether to end early.

    Returns:
        The last state. Its VAE holds the best weights by now: a state to go on from is taken in ``on_checkpoint``.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; names the step and the site. The VAE keeps the weights of
            the step before. With ``skip_norm``: too many steps were left out.
        CannotCapture: a ValueError: ``compile`` is asked for and impossible; says why. Nothing was trained.
        ValueError: an argument out of its range, an image off the likelihood's support, a saved state that does not
            fit, or a batch that does not fit into memory.
        Stopped: ``should_stop`` said so.
        ConnectionError: another rank ended.

    Reference: Polyak and Juditsky 1992 (averages); the rest as in ``objectives``.
    """
    train = as_images("train", train)
    check_count("train", len(train))
    epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
    warmup_epochs = check_count("warmup_epochs", warmup_epochs, least=0)
    validation_particles, seed = check_count("validation_particles", validation_particles), operator.index(seed)
    learning_rate, beta, average_decay = float(learning_rate), float(beta), float(average_decay)
    check_programs(vae)
    check_weights(vae)
    _check_positive(learning_rate=learning_rate, clip_norm=clip_norm, **{"skip_norm": skip_norm} if skip_norm else {})
    norms: dict[str, Any] = {"clip_norm": clip_norm, "skip_norm": skip_norm}
    if not isinstance(compile, bool | np.bool_):
        raise ValueError(f"compile: expected True or False, got {compile!r}")
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay: expected a number from 0 to below 1, got {average_decay}")
    device = next(vae.parameters()).device
    if all(w.dtype == torch.double for w in vae.parameters()):
        observe = _in_double_precision(observe)
    state = TrainingState(vae, device=device, averaged=average_decay > 0)
    if saved is not None:
        state.restore(*saved)
    most = min(batch_size, len(train))
    source = Streamed(train, device, most) if stream else Resident(train, device)
    validation = None if validation is None else as_images("validation", validation).to(next(vae.parameters()))
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
    several = num_ranks() > 1
    if (len(train) - 1) % batch_size == 0:
        check_batch_of_one(vae, objective, observe, source.images(torch.zeros(1, dtype=torch.long, device=device)))
    if (compile or skip_norm is not None or several) and state.step < total_steps:
        check_ranks(state)
        check_images(state, train, observe, batch_size=batch_size)
    if compile and state.step < total_steps:
        reason = None
        try:
            stepper = captured = CapturedSteps(state, objective, source, observe, batch_size=most, **norms)
        except CannotCapture as error:
            vae.eval()
            if not several:
                raise
            reason = str(error)
        for found in gather_objects(reason):  # a compiler may be missing on one machine of several
            if found is not None:
                raise CannotCapture(found)
        if on_compiled is not None:
            on_compiled(captured.compile_seconds)
    else:
        stepper = EagerSteps(state, objective, source, observe, **norms)

    if keep_start and saved is None and validation is not None:
        with state.evaluated_weights():
            validate(state, validation, num_particles=validation_particles, check=True)

    def wants() -> tuple[bool, bool]:
        due = is_writer() and time.monotonic() - last_checkpoint >= checkpoint_seconds
        return should_stop is not None and should_stop(), due

    def try_step(num_images: int) -> None:
        _dry_step(vae, objective, observe, source.images(torch.arange(num_images, device=device)))

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
        # Of several ranks it would end one and leave the others waiting. Both look at all images beforehand.
        checked = epoch == first_epoch and skip_norm is None and not several
        steps = stepper.epoch(batches, schedule, validate=checked, wants=wants)
        with closing(_within_memory(steps, try_step, batch_size=most, device=device)) as rows_of_steps:
            for rows, batch in zip(rows_of_steps, batches, strict=True):
                images_seen += len(batch)
                if refits and state.step % _REFIT_STEPS == 0:
                    with state.evaluated_weights():
                        _refit(vae, observe, source.stored[rows], stepper.noise)
                if on_step is not None:
                    on_step(state)
                ends, due = stepper.wanted if several else wants()
                if state.step % steps_an_epoch and (ends or due):
                    stepper.settle()
                    state.seconds = earlier + time.monotonic() - started
                    if on_checkpoint is not None:
                        on_checkpoint(state)
                    last_checkpoint = time.monotonic()
                    if ends:
                        raise Stopped(state.step)
        stepper.settle()
        check_skipped(state, epoch + 1)
        check_ranks(state)
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
        if should_stop is not None and state.step < total_steps and agree(should_stop()):
            raise Stopped(state.step)
    vae.load_state_dict(state.best_weights)
    vae.eval()
    return state


_REFIT_STEPS = 10


@torch.no_grad()
def _refit(vae: VAE, observe: Callable[..., Tensor], stored: Tensor, noise: SharedNoise) -> None:
    """Gives the likelihood's family a batch to fit in closed form: x, and the features of z ~ q(z | x).

    Every rank is given the whole batch.
    """
    decoder: Any = vae.likelihood
    with pyro.validation_enabled(False):  # weights that are not finite are the next step's to find
        with noise.along(0):
            x = observe(stored, None)
        q = vae.posterior(x)
        with noise.along(-(q.event_dim + 1)):
            z = q.sample()
        decoder.family.refit(_of_batch(decoder.net(z), noise.share), _of_batch(x, noise.share))


def _of_batch(values: Tensor, share: BatchShare | None) -> Tensor:
    """(b, ...) of this rank's images -> (B, ...) of the whole batch."""
    if share is None or num_ranks() == 1:
        return values
    own = slice(0, share.stop - share.start if share.weight else 0)
    rows = torch.arange(share.start, share.stop, device=values.device)
    return gather_rows(values[own], share.num_images, rows[own])


def _within_memory(
    steps: Generator[Tensor, None, None], try_step: Callable[[int], None], *, batch_size: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """The steps; where memory ends in one, a ValueError that says of how many images a step would fit."""
    with closing(steps):
        try:
            yield from steps
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    # Only now, when the error's frames hold no tensors any more. Each rank has its part of the batch.
    fits = find_fitting_batch(try_step, -(-batch_size // num_ranks()), device)
    raise ValueError(describe_memory_error(batch_size, fits and fits * num_ranks()))


def _dry_step(vae: VAE, objective: Callable[..., Tensor], observe: Callable[..., Tensor], stored: Tensor) -> None:
    """Loss and gradient, as a step takes them; nothing is changed, nor are random numbers used up."""
    try:
        with seeded(0, stored.device), pyro.validation_enabled(False):
            objective(vae.model, vae.guide, observe(stored, None), beta=1.0).backward()
    finally:
        vae.zero_grad()


def _in_double_precision(observe: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same images as float64, for a VAE whose weights are; stored values that are observed as they are keep it."""
    if observe is data.to_float:
        return lambda values, generator: values.double()
    return lambda values, generator: observe(values, generator).double()


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def batches_of(num_images: int, batch_size: int, *, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """The epoch's order of the images, cut into batches: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_images, generator=generator).to(device).split(batch_size)
