"""The steps of an epoch: one operation at a time, or each as one compiled graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ppl_vae.capture import CapturedStep, adam_moments
from ppl_vae.evidence import NotFinite
from ppl_vae.training.guard import gradients_that_are_not_finite, site_that_is_not_finite, what_is_not_finite
from ppl_vae.training.state import TrainingState

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
            site = site_that_is_not_finite(vae, x)
            if site is None:
                raise
            raise NotFinite(f"step {state.step}: {site}") from None
    value = loss.item()
    if not math.isfinite(value):
        if skip_norm is not None:
            return None
        site = site_that_is_not_finite(vae, x) or "every site is finite when z is drawn again"
        raise NotFinite(f"step {state.step}: the loss is {value}: {site}")
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
                what_is_not_finite(self._state, self._objective, self._observe(self._train[index], None), beta)
            )
        self._settled += len(self._recent)
        self._recent.clear()
