"""The steps of an epoch: one operation at a time, or each as one compiled graph; by one process or by several ranks.

Of a batch of B images rank r takes B_r, and the gradient is sum_r (B_r / B) grad_r: one sum over the ranks a step, in
which the loss and the ranks' wants ride along. All that follows from it is computed on every rank, in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ppl_vae.runtime.capture import CapturedStep, adam_moments
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.noise import SharedNoise
from ppl_vae.runtime.ranks import BatchShare, batch_share, gather_objects, num_ranks, sum_over_ranks, use_share
from ppl_vae.training.guard import find_not_finite, gradients_that_are_not_finite, site_that_is_not_finite
from ppl_vae.training.state import TrainingState
from ppl_vae.training.streaming import Resident, Streamed
from ppl_vae.vae import VAE

Schedule = list[tuple[float, float, float]]  # beta, learning rate and the averages' decay of each step
Wants = Callable[[], tuple[bool, bool]]  # whether this rank wants the training to end, and its state to be saved

_READ_AT = 50  # on a GPU, where the host would wait for the device, wants are read every so many steps


def nothing_wanted() -> tuple[bool, bool]:
    """Neither an end nor a checkpoint."""
    return False, False


def of_share(
    noise: SharedNoise, observe: Callable[..., Tensor], objective: Callable[..., Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The same two functions for a rank's part of the batch, with the noise that one process would draw for it."""

    def observe_part(values: Tensor, generator: torch.Generator | None) -> Tensor:
        with noise.along(0):
            return observe(values, generator)

    def objective_of_part(*arguments: Any, **options: Any) -> Tensor:
        assert noise.share is not None
        with use_share(noise.share), noise.draw_at_sites():
            return objective(*arguments, **options)

    return observe_part, objective_of_part


class EagerSteps:
    """Steps by Pyro's own loss and torch's own optimizer, one operation at a time."""

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        source: Resident | Streamed,
        observe: Callable[..., Tensor],
        *,
        clip_norm: float,
        skip_norm: float | None,
    ) -> None:
        self.noise, self._several = SharedNoise(), num_ranks() > 1
        if self._several:
            observe, objective = of_share(self.noise, observe, objective)
        self._state, self._objective, self._source, self._observe = state, objective, source, observe
        self._norms: dict[str, Any] = {"clip_norm": clip_norm, "skip_norm": skip_norm}
        self.wanted = nothing_wanted()

    def epoch(
        self, batches: tuple[Tensor, ...], schedule: Schedule, *, validate: bool, wants: Wants = nothing_wanted
    ) -> Generator[Tensor, None, None]:
        """Yields each batch's places in the source's ``stored`` after its step, or of several ranks this one's.

        Of several ranks, ``wanted`` is then what any of them wanted.
        """
        state = self._state
        shares = [batch_share(len(batch)) for batch in batches]
        with closing(self._source.epoch(_own(batches, shares))) as rows:
            for (_, place), share, (beta, rate, decay) in zip(rows, shares, schedule, strict=True):
                self.noise.share = share
                exchange = _Exchange(share, wants()) if self._several else None
                x = self._observe(self._source.stored[place], None)
                loss = _step(
                    state,
                    self._objective,
                    x,
                    beta=beta,
                    learning_rate=rate,
                    validate=validate,
                    exchange=exchange,
                    **self._norms,
                )
                if exchange is not None:
                    self.wanted = exchange.wanted
                state.step += 1
                if loss is None:
                    state.skipped += 1
                else:
                    with torch.no_grad():
                        for name, average in state.averages.items():
                            average.lerp_(state.vae.get_parameter(name), 1 - decay)
                    state.epoch_loss += loss * share.num_images
                    state.epoch_images += share.num_images
                yield place

    def settle(self) -> None:
        """Brings the state up to date."""


def _own(batches: Sequence[Tensor], shares: Sequence[BatchShare]) -> tuple[Tensor, ...]:
    """This rank's images of each batch."""
    return tuple(batch[share.start : share.stop] for batch, share in zip(batches, shares, strict=True))


class _Exchange:
    """The one sum over the ranks of a step: of the gradient, the loss, and what the ranks want.

    Attributes:
        wanted: after the exchange, what any rank wanted.
    """

    def __init__(self, share: BatchShare, wants: tuple[bool, bool]) -> None:
        self._share = share
        self.wanted = wants

    def __call__(self, vae: VAE, loss: Tensor) -> float:
        """Makes of each parameter's gradient that of the whole batch; returns the whole batch's loss."""
        gradients = [w.grad for w in vae.parameters() if w.grad is not None]
        flat = torch.cat([*(g.reshape(-1).to(loss.dtype) for g in gradients), loss.detach().reshape(1)])
        flat = torch.cat([flat * self._share.weight, flat.new_tensor(self.wanted)])
        sum_over_ranks(flat)
        *parts, tail = flat.split([*(g.numel() for g in gradients), 3])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        value, ends, saves = tail.tolist()
        self.wanted = ends > 0, saves > 0
        return float(value)


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
    exchange: _Exchange | None,
) -> float | None:
    """One step of SVI; returns the loss before it, nats an image, or None where the step was left out."""
    vae, optimizer = state.vae, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with pyro.validation_enabled(validate):
        try:
            loss = objective(vae.model, vae.guide, x, beta=beta)
        except ValueError:
            site = site_that_is_not_finite(vae, x)
            if site is None:
                raise
            raise NotFinite(f"step {state.step}: {site}") from None
    if exchange is None:
        value = loss.item()
    else:
        optimizer.zero_grad()
        loss.backward()
        value = exchange(vae, loss)
    if not math.isfinite(value):
        if skip_norm is not None:
            return None
        site = _first_of_ranks(site_that_is_not_finite(vae, x)) or "every site is finite when z is drawn again"
        raise NotFinite(f"step {state.step}: the loss is {value}: {site}")
    if exchange is None:
        optimizer.zero_grad()
        loss.backward()
    norm = clip_grad_norm_(vae.parameters(), clip_norm)
    if skip_norm is not None and not norm <= skip_norm:
        return None
    if not norm.isfinite():
        bad = gradients_that_are_not_finite(vae)
        raise NotFinite(f"step {state.step}: the gradient is not finite, in {', '.join(bad) or 'its norm'}")
    if state.skipped:
        _count_skipped(state)
    optimizer.step()
    return value


def _first_of_ranks(words: str | None) -> str | None:
    """What the first rank that has words for it says, on every rank: its images may be the only ones at fault."""
    return next((found for found in gather_objects(words) if found), None)


def _count_skipped(state: TrainingState) -> None:
    """Adam's bias correction counts the steps that were left out too, as the captured step does."""
    for w in state.vae.parameters():
        if w.grad is not None:
            adam_moments(state.optimizer, w)  # there are none before the first step that is taken
            state.optimizer.state[w]["step"].fill_(state.step)


class CapturedSteps:
    """Steps as one compiled graph; see ``CapturedStep``. On a GPU the host waits for it only in ``settle``."""

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        source: Resident | Streamed,
        observe: Callable[..., Tensor],
        *,
        batch_size: int,
        clip_norm: float,
        skip_norm: float | None,
    ) -> None:
        self._state, self._objective, self._source, self._observe = state, objective, source, observe
        self.noise, self._several = SharedNoise(), num_ranks() > 1
        if self._several:
            observe, objective = of_share(self.noise, observe, objective)
        vae = state.vae
        self._compiled_for = self.noise.share = batch_share(batch_size)
        self._step = CapturedStep(
            lambda x, beta: objective(vae.model, vae.guide, x, beta=beta),
            vae,
            state.optimizer,
            source.stored,
            lambda values: observe(values, None),
            batch_size=self._compiled_for.stop - self._compiled_for.start,
            clip_norm=clip_norm,
            skip_norm=skip_norm,
            averages=state.averages,
            exchange=sum_over_ranks if self._several else None,
            num_votes=2 if self._several else 0,
        )
        self.wanted = nothing_wanted()
        self.compile_seconds = self._step.compile_seconds
        self._started = self._settled = state.step  # what ``taken`` counts from, and what ``_recent`` begins with
        self._recent: list[tuple[Tensor, float]] = []

    def epoch(
        self, batches: tuple[Tensor, ...], schedule: Schedule, *, validate: bool, wants: Wants = nothing_wanted
    ) -> Generator[Tensor, None, None]:
        """As ``EagerSteps.epoch``; on a GPU the step has only begun by then, and wants are seen every 50 steps."""
        state, step = self._state, self._step
        step.total.fill_(state.epoch_loss)
        step.counted.fill_(state.epoch_images)
        step.skipped.fill_(state.skipped)
        rows = step.schedule([(state.step + i, *values) for i, values in enumerate(schedule)])
        on_host = state.device.type == "cpu"
        shares = [batch_share(len(batch)) for batch in batches]
        with closing(self._source.epoch(_own(batches, shares))) as places:
            numbered = zip(places, batches, shares, rows.unbind(), schedule, strict=True)
            for (_, place), batch, share, row, (beta, _, _) in numbered:
                if self._several:
                    self._step_of_ranks(place, row, share, wants)
                else:
                    step(place, row)
                self._recent.append((batch, beta))
                state.step += 1
                if on_host:
                    self._check()
                yield place

    def _step_of_ranks(self, place: Tensor, row: Tensor, share: BatchShare, wants: Wants) -> None:
        self.noise.share = share
        self._step.step_on_part(
            place,
            row,
            share=share.weight,
            whole=share.num_images,
            votes=torch.tensor(wants()),
            as_compiled=share == self._compiled_for,
        )
        if self._state.device.type == "cpu" or (self._state.step + 1) % _READ_AT == 0:
            ends, saves = self._step.votes.tolist()
            self.wanted = ends > 0, saves > 0
        else:
            self.wanted = nothing_wanted()

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
                find_not_finite(self._state, self._objective, self._observe(self._source.images(index), None), beta)
            )
        self._settled += len(self._recent)
        self._recent.clear()
