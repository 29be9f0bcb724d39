"""Training by SVI: schedules, one step, the NaN guard, validation, and a state from which a run goes on exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ppl_vae import data, objectives
from ppl_vae.capture import CannotCapture, CapturedStep, adam_moments
from ppl_vae.evidence import Estimate, NotFinite, evaluate, in_evaluation_mode, reconstruction, seeded
from ppl_vae.schedules import averaging, cosine, warmup
from ppl_vae.vae import VAE
from ppl_vae.weights import is_autoencoder, latent_sites

_VALIDATION_SEED = 20140501


class TrainingState:
    """All that the next step depends on: weights, optimizer, random numbers, the place in the epoch, the best so far.

    Adam is torch's, one optimizer over all parameters, fused. The noise of Pyro's sites and of the data comes from
    torch's global generator; the order of the images depends on (seed, epoch) alone. ``averages`` are the exponential
    moving averages of the parameters, where they are kept. ``best_validation`` is the highest validation ELBO (or
    L_S) so far, or, where the guide is deterministic, the highest validation reconstruction, nats an image.
    """

    def __init__(self, vae: VAE, *, device: torch.device, averaged: bool = False) -> None:
        self.vae = vae
        self.device = device
        self.optimizer = torch.optim.Adam(vae.parameters(), fused=True)
        self.averages = {name: w.detach().clone() for name, w in vae.named_parameters()} if averaged else {}
        self.step = 0
        self.epoch_loss = 0.0  # summed over the images of this epoch so far, nats
        self.epoch_images = 0  # how many those are: without those of the steps that were left out
        self.skipped = 0  # steps that were left out, of all
        self.seconds = 0.0  # of training and validation, over all sessions
        self.best_validation = -math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """The averages in the place of the weights, where there are averages."""
        weights = {name: w.detach().clone() for name, w in self.vae.named_parameters()} if self.averages else {}
        with torch.no_grad():
            self._put(self.averages)
            try:
                yield
            finally:
                self._put(weights)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.vae.get_parameter(name).copy_(value)

    def keep_weights(self) -> None:
        """Remembers these weights as the best."""
        self.best_step = self.step
        self.best_weights = {name: w.detach().clone() for name, w in self.vae.state_dict().items()}

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as named tensors (which share memory with this state) and a JSON object."""
        tensors = {f"weights/{name}": w for name, w in self.vae.state_dict().items()}
        tensors |= {f"best/{name}": w for name, w in self.best_weights.items()}
        names = [name for name, _ in self.vae.named_parameters()]
        moments_of = self.optimizer.state_dict()["state"]
        for index, moments in moments_of.items():
            tensors |= {f"adam/{names[index]}/{key}": value for key, value in moments.items()}
        tensors |= {f"average/{name}": w for name, w in self.averages.items()}
        tensors |= {"rng/torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        scalars = {
            "step": self.step,
            "trained": [names[index] for index in moments_of],
            "epoch_loss": self.epoch_loss,
            "epoch_images": self.epoch_images,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "best_validation": self.best_validation if math.isfinite(self.best_validation) else None,
            "best_step": self.best_step,
        }
        return tensors, scalars

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Back from ``to_tensors``, for a VAE of the same architecture.

        Raises:
            ValueError: something is missing, or does not fit the VAE.
        """
        try:
            self.vae.load_state_dict(_under("weights/", tensors))
            for name, average in self.averages.items():
                average.copy_(tensors[f"average/{name}"])
            moments = {}
            for index, (name, parameter) in enumerate(self.vae.named_parameters()):
                if name not in scalars["trained"]:  # it never had a gradient, so Adam holds nothing of it
                    continue
                moments[index] = {"step": tensors[f"adam/{name}/step"].clone()} | {
                    key: _laid_out_as(parameter, tensors[f"adam/{name}/{key}"], f"the optimizer's moments of {name}")
                    for key in ("exp_avg", "exp_avg_sq")
                }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            torch.set_rng_state(tensors["rng/torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
            self.best_weights = {name: w.to(self.device) for name, w in _under("best/", tensors).items()}
            self.step, self.epoch_loss = scalars["step"], scalars["epoch_loss"]
            self.epoch_images, self.skipped = scalars.get("epoch_images", 0), scalars.get("skipped", 0)
            self.seconds, self.best_step = scalars["seconds"], scalars["best_step"]
            best = scalars["best_elbo" if "best_elbo" in scalars else "best_validation"]  # the first is of old files
            self.best_validation = -math.inf if best is None else best
        except KeyError as error:
            raise ValueError(f"damaged: no {error} in it") from None
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"damaged: {str(error).splitlines()[-1].strip()}") from None


def _laid_out_as(parameter: Tensor, tensor: Tensor, words: str) -> Tensor:
    """A copy with the parameter's strides: fused Adam takes its moments place by place, whatever their layout says."""
    if tensor.shape != parameter.shape:
        raise ValueError(f"damaged: {words} have the wrong shape")
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
        _check_images(state, train, observe, batch_size=batch_size)
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
        batches = _batches(len(train), batch_size, seed=seed, epoch=epoch, device=device)[place:]
        # A step that is not finite would be an error of Pyro's validation, and is to be left out.
        validate = epoch == first_epoch and skip_norm is None
        for index in stepper.epoch(batches, schedule, validate=validate):
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
        _check_skipped(state, epoch + 1)
        record = {
            "step": state.step,
            "epoch": epoch + 1,
            "train_loss_nats_per_image": state.epoch_loss / state.epoch_images,
            "beta": schedule[-1][0],
            "learning_rate": schedule[-1][1],
            "train_images_per_second": images_seen / (time.monotonic() - epoch_started),
        }
        with state.evaluated_weights():
            record |= _validate(state, validation, num_particles=validation_particles, check=epoch == first_epoch)
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


_MOST_SKIPPED = 0.01  # of all steps
_FEW_SKIPPED = 100  # a start from fresh weights has some


def _check_skipped(state: TrainingState, epoch: int) -> None:
    """Raises NotFinite where too many steps were left out for what is left to be a training."""
    if not state.epoch_images:
        raise NotFinite(
            f"step {state.step}: every step of epoch {epoch} had a gradient above skip_norm, or none that is finite"
        )
    if state.skipped > max(_FEW_SKIPPED, _MOST_SKIPPED * state.step):
        raise NotFinite(
            f"step {state.step}: {state.skipped} steps so far had a gradient above skip_norm, or none that is finite"
        )


_REFIT_STEPS = 10


@torch.no_grad()
def _refit(vae: VAE, x: Tensor) -> None:
    """Gives the likelihood's family a batch to fit in closed form: x, and the features of z ~ q(z | x)."""
    decoder: Any = vae.likelihood
    with pyro.validation_enabled(False):  # weights that are not finite are the next step's to find
        decoder.family.refit(decoder.net(vae.posterior(x).sample()), x)


Schedule = list[tuple[float, float, float]]  # beta, learning rate and the averages' decay of each step


class EagerSteps:
    """Steps by Pyro's own loss and torch's own optimizer, one operation at a time."""

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        train: Tensor,
        observe: Callable[..., Tensor],
        *,
        clip_norm: float,
        skip_norm: float | None,
    ) -> None:
        self._state, self._objective, self._train, self._observe = state, objective, train, observe
        self._norms: dict[str, Any] = {"clip_norm": clip_norm, "skip_norm": skip_norm}

    def epoch(self, batches: tuple[Tensor, ...], schedule: Schedule, *, validate: bool) -> Iterator[Tensor]:
        """Yields each batch's index after its step."""
        state = self._state
        for index, (beta, rate, decay) in zip(batches, schedule, strict=True):
            x = self._observe(self._train[index], None)
            loss = _step(
                state,
                self._objective,
                x,
                beta=beta,
                learning_rate=rate,
                validate=validate,
                **self._norms,
            )
            state.step += 1
            if loss is None:
                state.skipped += 1
            else:
                with torch.no_grad():
                    for name, average in state.averages.items():
                        average.lerp_(state.vae.get_parameter(name), 1 - decay)
                state.epoch_loss += loss * len(x)
                state.epoch_images += len(x)
            yield index

    def settle(self) -> None:
        """Brings the state up to date."""


class CapturedSteps:
    """Steps as one compiled graph; see ``CapturedStep``. On a GPU the host waits for it only in ``settle``."""

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        train: Tensor,
        observe: Callable[..., Tensor],
        *,
        batch_size: int,
        clip_norm: float,
        skip_norm: float | None,
    ) -> None:
        self._state, self._objective, self._train, self._observe = state, objective, train, observe
        vae = state.vae
        self._step = CapturedStep(
            lambda x, beta: objective(vae.model, vae.guide, x, beta=beta),
            vae,
            state.optimizer,
            train,
            lambda values: observe(values, None),
            batch_size=min(batch_size, len(train)),
            clip_norm=clip_norm,
            skip_norm=skip_norm,
            averages=state.averages,
        )
        self.compile_seconds = self._step.compile_seconds
        self._started = self._settled = state.step  # what ``taken`` counts from, and what ``_recent`` begins with
        self._recent: list[tuple[Tensor, float]] = []

    def epoch(self, batches: tuple[Tensor, ...], schedule: Schedule, *, validate: bool) -> Iterator[Tensor]:
        """Yields each batch's index after its step, which on a GPU has only begun by then."""
        state, step = self._state, self._step
        step.total.fill_(state.epoch_loss)
        step.counted.fill_(state.epoch_images)
        step.skipped.fill_(state.skipped)
        rows = step.schedule([(state.step + i, *values) for i, values in enumerate(schedule)])
        on_host = state.device.type == "cpu"
        for index, row, (beta, _, _) in zip(batches, rows.unbind(), schedule, strict=True):
            step(index, row)
            self._recent.append((index, beta))
            state.step += 1
            if on_host:
                self._check()
            yield index

    def settle(self) -> None:
        """Waits for the device, and brings the state up to date."""
        self._check()
        self._state.epoch_loss, self._state.epoch_images = float(self._step.total), int(self._step.counted)
        self._state.skipped = int(self._step.skipped)
        self._step.count(self._state.step)

    def _check(self) -> None:
        """Raises where a step was not finite; the graph changed nothing from there on."""
        if not self._step.is_finite:
            self._state.step = self._started + int(self._step.taken)
            index, beta = self._recent[self._state.step - self._settled]
            raise NotFinite(
                _what_is_not_finite(self._state, self._objective, self._observe(self._train[index], None), beta)
            )
        self._settled += len(self._recent)
        self._recent.clear()


def _what_is_not_finite(state: TrainingState, objective: Callable[..., Tensor], x: Tensor, beta: float) -> str:
    """Takes the step that failed once more, with other noise and without its update, and says what is not finite."""
    vae = state.vae
    vae.zero_grad()
    with pyro.validation_enabled(False):
        loss = objective(vae.model, vae.guide, x, beta=beta)
    site = _site_that_is_not_finite(vae, x)
    if not loss.isfinite():
        return f"step {state.step}: the loss is {loss.item()}: {site or 'every site is finite when z is drawn again'}"
    if site is not None:
        return f"step {state.step}: {site}"
    loss.backward()
    bad = _gradients_that_are_not_finite(vae)
    if bad:
        return f"step {state.step}: the gradient is not finite, in {', '.join(bad)}"
    return f"step {state.step}: the loss or its gradient is not finite; both are when z is drawn again"


_CHECKED_AT_ONCE = 1000  # images


def _check_images(state: TrainingState, train: Tensor, observe: Callable[..., Tensor], *, batch_size: int) -> None:
    """What Pyro's validation would say of the training images, without their way through the networks.

    The programs run once, with validation; then every image is compared with the support of the sites that observe it.

    Raises:
        NotFinite: the weights or images hold values that are not finite.
        ValueError: a value off its support, a wrong shape.
    """
    vae = state.vae
    with seeded(0, train.device), torch.no_grad():
        x = observe(train[:batch_size], None)
        vae.eval()  # statistics of a batch, where networks take some, are not to move
        try:
            with pyro.validation_enabled(True):
                q = poutine.trace(vae.guide).get_trace(x)
                p = poutine.trace(poutine.replay(vae.model, trace=q)).get_trace(x)
                q.compute_log_prob()
                p.compute_log_prob()
        except ValueError:
            site = _site_that_is_not_finite(vae, x)
            if site is None:
                raise
            raise NotFinite(f"step {state.step}: {site}") from None
        finally:
            vae.train()
        supports = {
            name: site["fn"].support
            for name, site in p.nodes.items()
            if name in p.observation_nodes and site["value"] is x
        }
        # A support that depends on parameters is this batch's own: it was checked with it, and says nothing of others.
        supports = {name: support for name, support in supports.items() if len(support.check(x[:1])) == 1}
        for part in train.split(_CHECKED_AT_ONCE):
            x = observe(part, None)
            if supports and not x.isfinite().all():
                raise NotFinite(f"step {state.step}: site 'x': the training images hold values that are not finite")
            for name, support in supports.items():
                if not support.check(x).all():
                    raise ValueError(f"site {name!r}: expected images within the support {support}, got others")


def _check_counts(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def _batches(num_images: int, batch_size: int, *, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
    """The epoch's order of the images, cut into batches: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_images, generator=generator).to(device).split(batch_size)


def _step(
    state: TrainingState,
    objective: Callable[..., Tensor],
    x: Tensor,
    *,
    beta: float,
    learning_rate: float,
    clip_norm: float,
    skip_norm: float | None,
    validate: bool,
) -> float | None:
    """One step of SVI; returns the loss before it, nats an image, or None where the step was left out."""
    vae, optimizer = state.vae, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with pyro.validation_enabled(validate):
        try:
            loss = objective(vae.model, vae.guide, x, beta=beta)
        except ValueError:
            site = _site_that_is_not_finite(vae, x)
            if site is None:
                raise
            raise NotFinite(f"step {state.step}: {site}") from None
    value = loss.item()
    if not math.isfinite(value):
        if skip_norm is not None:
            return None
        site = _site_that_is_not_finite(vae, x) or "every site is finite when z is drawn again"
        raise NotFinite(f"step {state.step}: the loss is {value}: {site}")
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(vae.parameters(), clip_norm)
    if skip_norm is not None and not norm <= skip_norm:
        return None
    if not norm.isfinite():
        bad = _gradients_that_are_not_finite(vae)
        raise NotFinite(f"step {state.step}: the gradient is not finite, in {', '.join(bad) or 'its norm'}")
    if state.skipped:
        _count_skipped(state)
    optimizer.step()
    return value


def _count_skipped(state: TrainingState) -> None:
    """Adam's bias correction counts the steps that were left out too, as the captured step does."""
    for w in state.vae.parameters():
        if w.grad is not None:
            adam_moments(state.optimizer, w)  # there are none before the first step that is taken
            state.optimizer.state[w]["step"].fill_(state.step)


def _gradients_that_are_not_finite(vae: VAE) -> list[str]:
    return [name for name, w in vae.named_parameters() if w.grad is not None and not w.grad.isfinite().all()]


def _site_that_is_not_finite(vae: VAE, x: Tensor) -> str | None:
    """Runs the two programs again, and names the first site with a number that is not finite."""
    if not x.isfinite().all():
        return "site 'x': the images of this batch hold values that are not finite"
    with torch.no_grad(), pyro.validation_enabled(False):
        q = poutine.trace(vae.guide).get_trace(x)
        p = poutine.trace(poutine.replay(vae.model, trace=q)).get_trace(x)
        for program, trace in (("guide", q), ("model", p)):
            for name in [*latent_sites(trace), *trace.observation_nodes]:
                site = trace.nodes[name]
                if not torch.as_tensor(site["value"]).isfinite().all():
                    return f"site {name!r} of the {program} has a value that is not finite"
                if not site["fn"].log_prob(site["value"]).isfinite().all():
                    return f"site {name!r} of the {program} has a log-probability that is not finite"
    return None


def _validate(state: TrainingState, validation: Tensor | None, *, num_particles: int, check: bool) -> dict[str, float]:
    """Validation ELBO at beta = 1, its two terms, and L_S of several particles; or an autoencoder's reconstruction.

    Keeps the best weights, by L_S.
    """
    if validation is None:
        state.keep_weights()
        return {}
    if _is_autoencoder(state.vae, validation):
        log_p_x_given_z = reconstruction(state.vae, validation, seed=_VALIDATION_SEED, check=check)
        found = Estimate.of(log_p_x_given_z, 1)
        _keep_if_best(state, found.mean, "reconstruction")
        return {
            "validation_reconstruction_nats_per_image": found.mean,
            "validation_reconstruction_stderr_nats_per_image": found.stderr,
        }
    result = evaluate(state.vae, validation, num_particles=num_particles, seed=_VALIDATION_SEED, check=check)
    elbo = Estimate.of(result.elbo, num_particles)
    record = {
        "validation_elbo_nats_per_image": elbo.mean,
        "validation_elbo_stderr_nats_per_image": elbo.stderr,
        "validation_reconstruction_nats_per_image": float(result.reconstruction.mean()),
        "validation_kl_nats_per_image": float(result.kl.mean()),
    }
    if num_particles == 1:
        _keep_if_best(state, elbo.mean, "ELBO")
        return record
    bound = Estimate.of(result.log_evidence, num_particles)
    _keep_if_best(state, bound.mean, f"bound L_{num_particles}")
    return record | {
        "validation_particles": num_particles,
        "validation_bound_nats_per_image": bound.mean,
        "validation_bound_stderr_nats_per_image": bound.stderr,
    }


def _is_autoencoder(vae: VAE, x: Tensor) -> bool:
    with seeded(_VALIDATION_SEED, x.device), torch.no_grad(), in_evaluation_mode(vae):
        return is_autoencoder(vae.guide, x)


def _keep_if_best(state: TrainingState, value: float, word: str) -> None:
    """value: nats an image, higher is better; word: what it is of the validation images."""
    if not math.isfinite(value):
        raise NotFinite(f"step {state.step}: the validation {word} is {value}")
    if value > state.best_validation:
        state.best_validation = value
        state.keep_weights()
