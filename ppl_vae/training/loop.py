"""The training loop: epochs of steps, validation, checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ppl_vae import data as image_data
from ppl_vae import objectives
from ppl_vae.protocols import Program
from ppl_vae.runtime.captured_step import optimizer_obstacle
from ppl_vae.runtime.errors import CannotCapture, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.noise import SharedNoise
from ppl_vae.runtime.ranks import BatchShare, agree, gather_objects, gather_rows, is_writer, num_ranks
from ppl_vae.runtime.records import Data, Records, arguments_of, join_arguments
from ppl_vae.training.checks import (
    check_batch_of_one,
    check_images,
    check_program,
    check_ranks,
    check_sites_and_parameters,
    check_skipped,
    images_tensor,
)
from ppl_vae.training.settings import Callbacks, Optimizer, Schedule, Validation, validate
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps, Requests, Resident, Streamed


class TrainingStopped(Exception):
    """The training ended early, after ``step`` steps, because it was asked to; ``on_checkpoint`` got its state."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step:,}")
        self.step = step


@serialize_threads()
@torch.inference_mode(False)
@torch.enable_grad()  # whatever block a caller is in, such as torch.no_grad()
def fit(
    program: Program,
    data: Tensor | np.ndarray | Dataset[Any] | DataLoader[Any] | Records,
    *,
    epochs: int,
    objective: objectives.Loss | None = None,
    transform: Callable[[Tensor, torch.Generator | None], Tensor] = image_data.convert_to_float,
    optimizer: Optimizer = Optimizer(),  # noqa: B008, it is frozen
    schedule: Schedule = Schedule(),  # noqa: B008
    validation: Validation = Validation(),  # noqa: B008
    callbacks: Callbacks = Callbacks(),  # noqa: B008
    compile: bool = False,
    stream: bool = False,
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> TrainingState:
    """Train a model and its guide by SVI; they end in evaluation mode with the best weights by validation.

    The best weights have the highest validation ELBO, or L_S. With a deterministic guide (``posteriors.Delta``) and
    beta = 0 this trains a plain autoencoder, and the best weights have the highest reconstruction log p(x | z(x)).

    If the likelihood's ``family`` has a method ``refit(h, x)``, every tenth step gives it a batch to fit.
    Values are checked against supports in the first epoch, or before it with ``compile``, ``skip_norm`` or several
    ranks. Seed torch's global generator (``pyro.set_rng_seed``) before the program is built: its weights and all noise
    come from there.

    Under several ranks each calls this with the same arguments. They share the images of each batch, and train as one
    process would, to rounding. Noise may then be drawn at sample sites and by ``transform`` alone.

    >>> from ppl_vae.training import Optimizer, Schedule, Validation
    >>> _ = fit(vae, x, epochs=2)  # doctest: +SKIP
    >>> _ = fit(vae, x, epochs=20, optimizer=Optimizer(torch.optim.AdamW, learning_rate=3e-4),
    ...         schedule=Schedule(batch_size=50, warmup_epochs=5), validation=Validation(y))  # doctest: +SKIP

    Args:
        program: What is trained, such as a ``VAE``, on its device.
        data: (N, *E) training images as stored: a tensor, an array, a ``Dataset``, or ``Records``, whose further
            tensors follow x in the programs' arguments. They are copied to the program's device, except with
            ``stream``. A program whose weights are all float64 sees the images as float64.
        epochs: Passes through the data.
        objective: A Pyro loss, such as ``objectives.STL()`` or ``pyro.infer.Trace_ELBO()``, or a function
            (model, guide, x) -> nats, the sum over the images x. None is ``objectives.elbo()``, or for a program with
            enumerated sites ``objectives.EnumeratedELBO()``. The programs that it gets have ``Temper`` around them, and
            its gradient is divided by the number of images.
        transform: (stored images, generator) -> images as the model sees them, at every access; the generator is None
            for torch's global one.
        optimizer, schedule, validation, callbacks: See these classes.
        compile: Whether the whole step, from the batch to the new weights, runs as one compiled graph. It computes the
            same to rounding, and takes some seconds to compile. Python that changes from step to step (a counter in a
            network, ``requires_grad``) stays as it was at the first step.
        stream: Whether the images stay where they are, such as in a mapped file, and each batch is copied to the device
            when its turn comes; a thread gathers it while the step before runs. The weights are the same bit for bit.
            See ``exceeds_memory``.
        saved: A state by ``TrainingState.to_tensors``, from which the training continues bit for bit.

    Returns:
        The last state. Its program holds the best weights by now: take a state to continue from in ``on_checkpoint``.

    Raises:
        NotFinite: A loss or gradient is NaN or infinite, and the message names the step and the site; the program keeps
            the weights of the step before. With ``skip_norm``: too many steps were skipped.
        CannotCapture: A ValueError: ``compile`` is asked for and impossible. Nothing was trained.
        ValueError: An argument is out of its range, an image is off the likelihood's support, or a saved state does not
            fit.
        TrainingStopped: ``should_stop`` returned True.
        ConnectionError: Another rank ended.

    Reference: Kingma and Welling 2014, arXiv 1312.6114; the others as in ``objectives`` and ``Optimizer``.
    """
    train = images_tensor("data", data)
    check_count("data", len(train))
    epochs = check_count("epochs", epochs)
    check_program(program)
    if isinstance(objective, type):
        raise ValueError(f"objective: expected a loss such as {objective.__name__}(), got the class")
    if not isinstance(compile, bool | np.bool_):
        raise ValueError(f"compile: expected True or False, got {compile!r}")
    some = next(program.parameters())
    if all(w.dtype == torch.double for w in program.parameters()):
        transform = _in_double_precision(transform)
    see = partial(_transform_images, transform)
    if validation.images is not None:
        validation = replace(validation, images=images_tensor("validation", validation.images).to(some))
    torch_optimizer = optimizer.factory(program.parameters(), lr=optimizer.learning_rate)
    state = TrainingState(program, torch_optimizer, averaged=optimizer.average_decay > 0)
    if saved is not None:
        state.restore(*saved)
    batch_size = min(schedule.batch_size, len(train))
    source = Streamed(train, some.device, batch_size) if stream else Resident(train, some.device)
    obstacle = optimizer_obstacle(torch_optimizer) if compile else None
    if obstacle is not None:
        warnings.warn(f"Falling back to eager training: {obstacle}", stacklevel=3)
        compile = False
    first = source.images(torch.arange(min(2, len(train)), device=some.device))
    loss = partial(objectives.loss_per_image, check_sites_and_parameters(program, objective, see, first))
    loop = _Loop(state, source, loss, see, optimizer, schedule, validation, callbacks, epochs, len(train))
    program.train()
    if len(train) % schedule.batch_size == 1 or schedule.batch_size == 1:  # the last batch is a single image
        one = source.images(torch.zeros(1, dtype=torch.long, device=some.device))
        check_batch_of_one(program, loss, see, one)
    if (compile or loop.must_skip or loop.several) and state.step < loop.total_steps:
        check_ranks(state)
        check_images(state, train, see, batch_size=schedule.batch_size)
    loop.start(compile=bool(compile), batch_size=batch_size)
    if validation.keep_start and saved is None and validation.images is not None:
        validate(state, validation, check=True)
    while state.step < loop.total_steps:
        loop.run_epoch()
    program.load_state_dict(state.best_weights)
    if compile:
        for w in program.parameters():  # the compiled step made them views of one vector
            w.data = w.detach().clone()
    program.eval()
    return state


@dataclass
class _Loop:
    """The epochs of one call of ``fit``, whose arguments it holds."""

    state: TrainingState
    source: Resident | Streamed
    objective: Callable[..., Tensor]
    transform: Callable[..., Data]
    optimizer: Optimizer
    schedule: Schedule
    validation: Validation
    callbacks: Callbacks
    epochs: int
    num_images: int

    def __post_init__(self) -> None:
        self.several, self.must_skip = num_ranks() > 1, self.optimizer.skip_norm is not None
        self.steps_per_epoch = math.ceil(self.num_images / self.schedule.batch_size)
        self.total_steps = self.epochs * self.steps_per_epoch
        self.first_epoch = self.state.step // self.steps_per_epoch
        self.started = self.last_checkpoint = time.monotonic()
        self.earlier_seconds = self.state.seconds
        family = getattr(getattr(self.state.program, "likelihood", None), "family", None)
        self.refits = hasattr(family, "refit") and isinstance(self.source.stored, Tensor)

    def start(self, *, compile: bool, batch_size: int) -> None:
        """Prepare the steps; with several ranks, all raise CannotCapture if one of them cannot compile."""
        arguments = (self.state, self.objective, self.source, self.transform)
        if not compile or self.state.step >= self.total_steps:
            self.steps: EagerSteps | CapturedSteps = EagerSteps(*arguments, optimizer=self.optimizer)
            return
        reason = None
        try:
            self.steps = captured = CapturedSteps(*arguments, optimizer=self.optimizer, batch_size=batch_size)
        except CannotCapture as error:
            self.state.program.eval()
            if not self.several:
                raise
            reason = str(error)
        for found in gather_objects(reason):  # a compiler may be missing on one machine of several
            if found is not None:
                raise CannotCapture(found)
        if self.callbacks.on_compiled is not None:
            self.callbacks.on_compiled(captured.compile_seconds)

    def run_epoch(self) -> None:
        """Take the steps that are left of this epoch, validate, and save."""
        state, began, images_seen = self.state, time.monotonic(), 0
        epoch, place = divmod(state.step, self.steps_per_epoch)
        batch_size, seed = self.schedule.batch_size, self.schedule.seed
        batches = epoch_batches(self.num_images, batch_size, seed=seed, epoch=epoch, device=state.device)[place:]
        values_of = partial(
            self.schedule.step_values, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        values = [values_of(step, self.optimizer) for step in range(state.step, (epoch + 1) * self.steps_per_epoch)]
        # Pyro's validation raises for a step that is not finite, which skip_norm asks to skip. It would also end one
        # of several ranks and leave the others waiting. In both cases all images are checked before the first step.
        is_first = epoch == self.first_epoch
        checked = is_first and not self.must_skip and not self.several
        steps = self.steps.epoch(batches, values, validate=checked, requests=self._requests)
        with closing(steps) as rows_of_steps:
            for rows, batch in zip(rows_of_steps, batches, strict=True):
                images_seen += len(batch)
                self._finish_step(rows)
        self.steps.settle()
        check_skipped(state, epoch + 1)
        check_ranks(state)
        record = {
            "step": state.step,
            "epoch": epoch + 1,
            "train_loss_nats_per_image": state.epoch_loss / state.epoch_images,
            "beta": values[-1][0],
            "learning_rate": values[-1][1],
            "train_images_per_second": images_seen / (time.monotonic() - began),
        }
        record |= validate(state, self.validation, check=is_first)
        self._finish_epoch(record)

    def _requests(self) -> Requests:
        asked, seconds = self.callbacks.should_stop, self.callbacks.checkpoint_seconds
        due = is_writer() and time.monotonic() - self.last_checkpoint >= seconds
        return asked is not None and asked(), due

    def _finish_step(self, rows: Tensor) -> None:
        """What follows a step on these rows of the stored images: a refit, callbacks, a checkpoint, an early end."""
        state = self.state
        if self.refits and state.step % _REFIT_STEPS == 0:
            with state.evaluated_weights():
                _refit(state.program, self.transform, self.source.stored[rows], self.steps.noise)
        if self.callbacks.on_step is not None:
            self.callbacks.on_step(state)
        # With several ranks the step itself has agreed on whether to stop and to save.
        ends, due = self.steps.requested if self.several else self._requests()
        if state.step % self.steps_per_epoch and (ends or due):
            self.steps.settle()
            state.seconds = self.earlier_seconds + time.monotonic() - self.started
            self._checkpoint()
            if ends:
                raise TrainingStopped(state.step)

    def _finish_epoch(self, record: dict[str, Any]) -> None:
        state = self.state
        if state.skipped:
            record["skipped_steps"] = state.skipped
        state.epoch_loss, state.epoch_images = 0.0, 0
        record["seconds"] = state.seconds = self.earlier_seconds + time.monotonic() - self.started
        if self.callbacks.on_epoch is not None:
            self.callbacks.on_epoch(record)
        self._checkpoint()
        asked = self.callbacks.should_stop
        if asked is not None and state.step < self.total_steps and agree(asked()):
            raise TrainingStopped(state.step)

    def _checkpoint(self) -> None:
        if self.callbacks.on_checkpoint is not None:
            self.callbacks.on_checkpoint(self.state)
        self.last_checkpoint = time.monotonic()


_REFIT_STEPS = 10


@torch.no_grad()
def _refit(program: Any, transform: Callable[..., Any], stored: Data, noise: SharedNoise) -> None:
    """Give the likelihood's family a batch to fit in closed form: x, and the features of z ~ q(z | x).

    Every rank gives it the whole batch.
    """
    decoder = program.likelihood
    with pyro.validation_enabled(False):  # the next step finds weights that are not finite
        with noise.along(0):  # images are dimension 0 of the pixels
            x = transform(stored, None)
        q = program.posterior(x)
        with noise.along(-(q.event_dim + 1)):  # and stand left of the event in a draw of z
            z = q.sample()
        decoder.family.refit(_gather_batch(decoder.net(z), noise.share), _gather_batch(x, noise.share))


def _gather_batch(values: Tensor, share: BatchShare | None) -> Tensor:
    """(b, ...) of this rank's images -> (B, ...) of the whole batch."""
    if share is None or num_ranks() == 1:
        return values
    own = slice(0, share.size if share.weight else 0)  # none of a rank whose only image has weight 0
    rows = torch.arange(share.start, share.stop, device=values.device)
    return gather_rows(values[own], share.num_images, rows[own])


def _transform_images(transform: Callable[..., Tensor], stored: Data, generator: torch.Generator | None) -> Data:
    """The stored images as the model sees them, with their further tensors as they are."""
    images, *further = arguments_of(stored)
    return join_arguments([transform(images, generator), *further])


def _in_double_precision(transform: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same images as float64; ``convert_to_float`` would round stored float64 values, and is left out."""
    if transform is image_data.convert_to_float:
        return lambda values, generator: values.double()
    return lambda values, generator: transform(values, generator).double()


def epoch_batches(
    num_images: int, batch_size: int, *, seed: int, epoch: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The images' order in an epoch, cut into batches: a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_images, generator=generator).to(device).split(batch_size)
