"""Training by SVI: schedules, one step, the NaN guard, validation, and a state from which a run goes on exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ppl_vae import data, objectives
from ppl_vae.evidence import Estimate, NotFinite, evaluate
from ppl_vae.vae import VAE
from ppl_vae.weights import latent_sites

_VALIDATION_SEED = 20140501


def warmup(step: int, *, beta: float, warmup_steps: int) -> float:
    """beta min(1, step / warmup_steps): from 0 at the first step, linearly."""
    return beta * min(1.0, step / warmup_steps) if warmup_steps else beta


def cosine(step: int, *, learning_rate: float, total_steps: int) -> float:
    """learning_rate (1 + cos(pi step / total_steps)) / 2, from the whole rate at step 0 to nothing at the end."""
    return learning_rate * (1 + math.cos(math.pi * step / total_steps)) / 2


class TrainingState:
    """All that the next step depends on: weights, optimizer, random numbers, the place in the epoch, the best so far.

    Adam is torch's, one optimizer over all parameters, fused. The noise of Pyro's sites comes from torch's global
    generator; the data has a generator of its own, and the order of the images depends on (seed, epoch) alone.
    """

    def __init__(self, vae: VAE, *, device: torch.device, seed: int) -> None:
        self.vae = vae
        self.device = device
        self.optimizer = torch.optim.Adam(vae.parameters(), fused=True)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.step = 0
        self.epoch_loss = 0.0  # summed over the images of this epoch so far, nats
        self.seconds = 0.0  # of training and validation, over all sessions
        self.best_elbo = -math.inf
        self.best_step = 0
        self.best_weights: dict[str, Tensor] = {}

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
        tensors |= {"rng/torch": torch.get_rng_state(), "rng/data": self.generator.get_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        scalars = {
            "step": self.step,
            "trained": [names[index] for index in moments_of],
            "epoch_loss": self.epoch_loss,
            "seconds": self.seconds,
            "best_elbo": self.best_elbo if math.isfinite(self.best_elbo) else None,
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
            moments = {}
            for index, (name, parameter) in enumerate(self.vae.named_parameters()):
                if name not in scalars["trained"]:  # it never had a gradient, so Adam holds nothing of it
                    continue
                moments[index] = {"step": tensors[f"adam/{name}/step"]} | {
                    key: _laid_out_as(parameter, tensors[f"adam/{name}/{key}"], f"the optimizer's moments of {name}")
                    for key in ("exp_avg", "exp_avg_sq")
                }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            torch.set_rng_state(tensors["rng/torch"])
            self.generator.set_state(tensors["rng/data"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
            self.best_weights = {name: w.to(self.device) for name, w in _under("best/", tensors).items()}
            self.step, self.epoch_loss = scalars["step"], scalars["epoch_loss"]
            self.seconds, self.best_step = scalars["seconds"], scalars["best_step"]
            self.best_elbo = -math.inf if scalars["best_elbo"] is None else scalars["best_elbo"]
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
    observe: Callable[[Tensor, torch.Generator], Tensor] = data.as_floats,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    beta: float = 1.0,
    warmup_epochs: int = 0,
    clip_norm: float = 100.0,
    seed: int = 0,
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    on_step: Callable[[TrainingState], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_checkpoint: Callable[[TrainingState], None] | None = None,
    checkpoint_seconds: float = math.inf,
) -> TrainingState:
    """Trains the VAE by SVI, and leaves it in evaluation mode with the best weights by the validation ELBO (beta = 1).

    Adam with a cosine learning rate by step count; beta rises linearly from 0 over the warm-up; the gradient's global
    norm is clipped. The first epoch runs with Pyro's validation on, the others without. Seed torch's global generator
    before the VAE is built (``pyro.set_rng_seed``): the weights and the noise of the sites come from it.

    Args:
        vae: the VAE to train, on its device.
        train: (N, *E), as stored; it is kept on the VAE's device as one tensor.
        validation: (M, *E), as evaluated; without it the last weights are the best.
        epochs: passes through ``train``. The last batch of a pass may be smaller.
        objective: (model, guide, x, *, beta) -> loss, nats an image.
        observe: what a batch of stored images becomes at every access, with the data's own generator.
        beta: the weight of the KL, after the warm-up.
        seed: of the images' order and of ``observe``.
        saved: a state by ``TrainingState.to_tensors``, from which to go on bit for bit.
        on_step: called after every step.
        on_epoch: called after every epoch with a record of named numbers.
        on_checkpoint: called after every epoch, and after any step once ``checkpoint_seconds`` have passed.

    Returns:
        The last state. Its VAE holds the best weights by now: a state to go on from is taken in ``on_checkpoint``.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; names the step and the site. The VAE keeps the weights of
            the step before.
        ValueError: an argument out of its range, an image off the likelihood's support, or a saved state that does
            not fit.
    """
    _check_counts(train=len(train), epochs=epochs, batch_size=batch_size)
    _check_positive(learning_rate=learning_rate, clip_norm=clip_norm)
    device = next(vae.parameters()).device
    state = TrainingState(vae, device=device, seed=seed)
    if saved is not None:
        state.restore(*saved)
    train = train.to(device)
    validation = None if validation is None else validation.to(device)
    steps_an_epoch = math.ceil(len(train) / batch_size)
    total_steps, warmup_steps = epochs * steps_an_epoch, warmup_epochs * steps_an_epoch
    vae.train()
    started = last_checkpoint = time.monotonic()
    earlier = state.seconds
    first_epoch = state.step // steps_an_epoch
    while state.step < total_steps:
        epoch, place = divmod(state.step, steps_an_epoch)
        epoch_started, images_seen = time.monotonic(), 0
        for index in _batches(len(train), batch_size, seed=seed, epoch=epoch, device=device)[place:]:
            x = observe(train[index], state.generator)
            at_beta = warmup(state.step, beta=beta, warmup_steps=warmup_steps)
            rate = cosine(state.step, learning_rate=learning_rate, total_steps=total_steps)
            validate = epoch == first_epoch
            loss = _step(state, objective, x, beta=at_beta, learning_rate=rate, clip_norm=clip_norm, validate=validate)
            state.step += 1
            state.epoch_loss += loss * len(x)
            images_seen += len(x)
            if on_step is not None:
                on_step(state)
            if state.step % steps_an_epoch and time.monotonic() - last_checkpoint >= checkpoint_seconds:
                state.seconds = earlier + time.monotonic() - started
                if on_checkpoint is not None:
                    on_checkpoint(state)
                last_checkpoint = time.monotonic()
        record = {
            "step": state.step,
            "epoch": epoch + 1,
            "train_loss_nats_per_image": state.epoch_loss / len(train),
            "beta": at_beta,
            "learning_rate": rate,
            "train_images_per_second": images_seen / (time.monotonic() - epoch_started),
        }
        record |= _validate(state, validation, check=epoch == first_epoch)
        state.epoch_loss = 0.0
        record["seconds"] = state.seconds = earlier + time.monotonic() - started
        if on_epoch is not None:
            on_epoch(record)
        if on_checkpoint is not None:
            on_checkpoint(state)
        last_checkpoint = time.monotonic()
    vae.load_state_dict(state.best_weights)
    vae.eval()
    return state


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
    validate: bool,
) -> float:
    """One step of SVI; returns the loss before it, nats an image."""
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
        site = _site_that_is_not_finite(vae, x) or "every site is finite when z is drawn again"
        raise NotFinite(f"step {state.step}: the loss is {value}: {site}")
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(vae.parameters(), clip_norm)
    if not norm.isfinite():
        bad = [name for name, w in vae.named_parameters() if w.grad is not None and not w.grad.isfinite().all()]
        raise NotFinite(f"step {state.step}: the gradient is not finite, in {', '.join(bad) or 'its norm'}")
    optimizer.step()
    return value


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


def _validate(state: TrainingState, validation: Tensor | None, *, check: bool) -> dict[str, float]:
    """Validation ELBO at beta = 1, and its two terms; keeps the best weights."""
    if validation is None:
        state.keep_weights()
        return {}
    result = evaluate(state.vae, validation, num_particles=1, seed=_VALIDATION_SEED, check=check)
    elbo = Estimate.of(result.elbo, 1)
    if not math.isfinite(elbo.mean):
        raise NotFinite(f"step {state.step}: the validation ELBO is {elbo.mean}")
    if elbo.mean > state.best_elbo:
        state.best_elbo = elbo.mean
        state.keep_weights()
    return {
        "validation_elbo_nats_per_image": elbo.mean,
        "validation_elbo_stderr_nats_per_image": elbo.stderr,
        "validation_reconstruction_nats_per_image": float(result.reconstruction.mean()),
        "validation_kl_nats_per_image": float(result.kl.mean()),
    }
