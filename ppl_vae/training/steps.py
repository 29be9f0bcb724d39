"""The steps of an epoch, on resident or streamed images: eager or compiled; by one process or by several ranks.

Rank r takes B_r images of a batch of B, and the gradient is sum_r (B_r / B) grad_r: one sum over the ranks per step,
which also carries the loss and the ranks' requests. Everything that follows from it is computed on every rank alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import zip_longest

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ppl_vae.data.storage import get_available_memory, is_mapped
from ppl_vae.runtime.captured_step import CapturedStep, adam_moments
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.noise import SharedNoise
from ppl_vae.runtime.ranks import BatchShare, batch_share, gather_objects, num_ranks, sum_over_ranks, use_share
from ppl_vae.runtime.records import Data, arguments_of, join_arguments
from ppl_vae.training.checks import find_gradients_not_finite, find_not_finite, find_site_not_finite
from ppl_vae.training.settings import Optimizer, StepValues
from ppl_vae.training.state import TrainingState

Requests = tuple[bool, bool]  # whether the training should end, and whether its state should be saved

_NO_REQUESTS = (False, False)
_READ_EVERY = 50  # steps between two readings of requests on a GPU, where the host would wait for the device


# --- Where the training images are ---

Places = Generator[Tensor, None, None]


class Resident:
    """All images on the device; ``stored`` is (N, *E), or ``Records``."""

    def __init__(self, train: Data, device: torch.device) -> None:
        self.stored = train.to(device)

    def images(self, index: Tensor) -> Data:
        """The images at these places of the data set, (B,) -> (B, *E) on the device."""
        return self.stored[index]

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """Yield, for each batch of places in the data set, those in ``stored``, (B,) int64: the same ones here."""
        yield from batches


class Streamed:
    """One batch on the device; a thread gathers the next one from the host's memory while a step runs.

    The images have the same values as resident ones, so that a training is the same bit for bit. If a mapped file has
    been shortened, the system ends the process (SIGBUS), which no program can catch. Any other error of the thread is
    raised where the images are used.

    Args:
        train: (N, *E) in ordinary memory, or a mapped file; or ``Records`` of such tensors.
        device: The device of ``stored``.
        batch_size: The largest number of images in a batch.

    Attributes:
        stored: (batch_size, *E), the images of the present step; or ``Records``.
    """

    def __init__(self, train: Data, device: torch.device, batch_size: int) -> None:
        if train.device.type != "cpu":
            raise ValueError(f"train: expected images in the host's memory to stream from, got {train.device}")
        self._train = arguments_of(train)
        self._stored = [torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype, device=device) for t in self._train]
        self.stored = join_arguments(self._stored)
        self._places = torch.arange(batch_size, device=device)

    def images(self, index: Tensor) -> Data:
        """As ``Resident``: (B,) -> (B, *E) on the device."""
        return join_arguments([tensor[index.cpu()].to(self.stored.device) for tensor in self._train])

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """As ``Resident``, (B,) int64; closing it ends the thread, whose errors it raises."""
        batches = [index.cpu() for index in batches]  # once per epoch, so that the thread never waits for a GPU
        with ThreadPoolExecutor(1, "streamed images") as pool:
            following = [pool.submit(self._gather, index) for index in batches[:1]]
            for index, after in zip_longest(batches, batches[1:]):
                gathered = following.pop().result()
                if after is not None:
                    following.append(pool.submit(self._gather, after))
                for stored, rows in zip(self._stored, gathered, strict=True):
                    stored[: len(index)].copy_(rows, non_blocking=True)
                yield self._places[: len(index)]

    def _gather(self, index: Tensor) -> list[Tensor]:
        """The rows train[index], without torch's threads, which the steps use; in pinned memory for a GPU."""
        gathered = []
        for train in self._train:
            images = torch.empty((len(index), *train.shape[1:]), dtype=train.dtype)
            if train.is_contiguous():
                # As bytes, since numpy lacks some of torch's types. Without mode="clip" numpy would allocate a buffer.
                rows, target = (x.reshape(len(x), -1).view(torch.uint8).numpy() for x in (train, images))
                np.take(rows, index.numpy(), axis=0, out=target, mode="clip")
            else:
                torch.index_select(train, 0, index, out=images)
            gathered.append(images.pin_memory() if self._places.is_cuda else images)
        return gathered


def exceeds_memory(train: Tensor, device: torch.device) -> bool:
    """Whether images (N, *E) take more than half of the device's free memory.

    On a CPU this concerns mapped files only, since other images are in memory already.
    """
    size = train.numel() * train.element_size()
    if device.type == "cuda":
        return bool(size > torch.cuda.mem_get_info(device)[0] / 2)
    available = get_available_memory()
    return is_mapped(train) and available is not None and size > available / 2


# --- Steps ---


class _Steps(ABC):
    """What both kinds of steps hold, and a rank's part of the batch with the noise that one process would draw for it.

    Args:
        state: The state of the training.
        objective, transform: As ``fit`` takes them.
        source: The training images.
        optimizer: The limits on the gradient.

    Attributes:
        noise: The random numbers of this rank's part of a batch.
        requested: After a step of several ranks, what any of them requested.
    """

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        source: Resident | Streamed,
        transform: Callable[..., Data],
        *,
        optimizer: Optimizer,
    ) -> None:
        self._state, self._objective, self._source, self._transform = state, objective, source, transform
        self._limits, self._several = optimizer, num_ranks() > 1
        self.noise, self.requested = SharedNoise(), _NO_REQUESTS

    @abstractmethod
    def _begin(self, schedule: Sequence[StepValues]) -> None: ...

    @abstractmethod
    def _take(self, place: Tensor, batch: Tensor, share: BatchShare, values: StepValues, *, validate: bool) -> None: ...

    def _transform_part(self, values: Data) -> Data:
        with self.noise.along(0):
            return self._transform(values, None)

    def _loss_of_part(self, x: Data, beta: float | Tensor) -> Tensor:
        program = self._state.program
        if not self._several:
            return self._objective(program.model, program.guide, x, beta=beta)
        assert self.noise.share is not None
        with use_share(self.noise.share), self.noise.along(None):
            return self._objective(program.model, program.guide, x, beta=beta)

    def epoch(
        self,
        batches: Sequence[Tensor],
        schedule: Sequence[StepValues],
        *,
        validate: bool,
        requests: Callable[[], Requests] = lambda: _NO_REQUESTS,
    ) -> Generator[Tensor, None, None]:
        """Yield, after each step, the places of its images in the source's ``stored``; with several ranks, this rank's.

        Args:
            batches: For each step the images' places in the data set, (B,).
            schedule: For each step beta, the learning rate and the averages' decay.
            validate: Whether Pyro checks values and shapes; a compiled step never does.
            requests: What this rank requests, asked at every step.
        """
        self._begin(schedule)
        shares = [batch_share(len(batch)) for batch in batches]
        own = tuple(batch[share.start : share.stop] for batch, share in zip(batches, shares, strict=True))
        with closing(self._source.epoch(own)) as places:
            for place, batch, share, values in zip(places, batches, shares, schedule, strict=True):
                self.noise.share = share
                if self._several:
                    self.requested = requests()
                self._take(place, batch, share, values, validate=validate)
                yield place


class EagerSteps(_Steps):
    """Steps by Pyro's own loss and the torch optimizer, one operation at a time. Arguments as ``_Steps``."""

    def _begin(self, schedule: Sequence[StepValues]) -> None:
        """Nothing has to be prepared."""

    def _take(self, place: Tensor, batch: Tensor, share: BatchShare, values: StepValues, *, validate: bool) -> None:
        state, (beta, rate, decay) = self._state, values
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = self._step(self._transform_part(self._source.stored[place]), beta, share, validate=validate)
        state.step += 1
        if loss is None:
            state.skipped += 1
            return
        with torch.no_grad():
            for name, average in state.averages.items():
                average.lerp_(state.program.get_parameter(name), 1 - decay)
        state.epoch_loss += loss * share.num_images
        state.epoch_images += share.num_images

    def _step(self, x: Data, beta: float, share: BatchShare, *, validate: bool) -> float | None:
        """One step; return the loss before it, nats per image, or None if the step was skipped."""
        state, program, optimizer = self._state, self._state.program, self._state.optimizer
        with pyro.validation_enabled(validate):
            try:
                loss = self._loss_of_part(x, beta)
            except ValueError:
                fault = find_site_not_finite(program, x)
                if fault is None:
                    raise
                raise NotFinite(f"step {state.step}: {fault}") from None
        optimizer.zero_grad()
        loss.backward()
        value = self._sum_gradients(loss, share) if self._several else loss.item()
        if not math.isfinite(value):
            if self._limits.skip_norm is not None:
                return None
            faults = gather_objects(find_site_not_finite(program, x))  # the images at fault may be one rank's alone
            fault = next((found for found in faults if found), "every site is finite when z is drawn again")
            raise NotFinite(f"step {state.step}: the loss is {value}: {fault}")
        norm = clip_grad_norm_(program.parameters(), self._limits.clip_norm)
        if self._limits.skip_norm is not None and not norm <= self._limits.skip_norm:
            return None
        if not norm.isfinite():
            bad = find_gradients_not_finite(program)
            raise NotFinite(f"step {state.step}: the gradient is not finite, in {', '.join(bad) or 'its norm'}")
        if state.skipped:
            _count_skipped(state)
        optimizer.step()
        return value

    def _sum_gradients(self, loss: Tensor, share: BatchShare) -> float:
        """Replace each gradient by that of the whole batch, and requests by any rank's; return the batch's loss."""
        gradients = [w.grad for w in self._state.program.parameters() if w.grad is not None]
        flat = torch.cat([*(g.reshape(-1).to(loss.dtype) for g in gradients), loss.detach().reshape(1)])
        flat = torch.cat([flat * share.weight, flat.new_tensor(self.requested)])
        sum_over_ranks(flat)
        *parts, tail = flat.split([*(g.numel() for g in gradients), 3])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        value, ends, saves = tail.tolist()
        self.requested = ends > 0, saves > 0
        return float(value)

    def settle(self) -> None:
        """Bring the state up to date, which it always is here."""


def _count_skipped(state: TrainingState) -> None:
    """Let Adam's bias correction count skipped steps too, as the captured step does."""
    if not isinstance(state.optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for w in state.program.parameters():
        if w.grad is not None:
            adam_moments(state.optimizer, w)  # there are none before the first step that is not skipped
            state.optimizer.state[w]["step"].fill_(state.step)


class CapturedSteps(_Steps):
    """Steps as one compiled graph; see ``CapturedStep``. On a GPU the host waits for it only in ``settle``.

    Args:
        state, objective, source, transform, optimizer: As ``_Steps``; the state's optimizer is Adam or AdamW.
        batch_size: Images of a whole batch.

    Attributes:
        compile_seconds: What tracing and compiling took.
    """

    def __init__(
        self,
        state: TrainingState,
        objective: Callable[..., Tensor],
        source: Resident | Streamed,
        transform: Callable[..., Data],
        *,
        optimizer: Optimizer,
        batch_size: int,
    ) -> None:
        super().__init__(state, objective, source, transform, optimizer=optimizer)
        self.noise.share = batch_share(batch_size)
        self._step = CapturedStep(
            self._loss_of_part,
            state.program,
            state.optimizer,
            source.stored,
            self._transform_part,
            batch_size=batch_size,
            clip_norm=optimizer.clip_norm,
            skip_norm=optimizer.skip_norm,
            averages=state.averages,
        )
        self.compile_seconds = self._step.compile_seconds
        self._started = state.step  # where ``taken`` starts to count
        self._recent: list[tuple[Tensor, float]] = []

    def _begin(self, schedule: Sequence[StepValues]) -> None:
        state, step = self._state, self._step
        step.total.fill_(state.epoch_loss)
        step.counted.fill_(state.epoch_images)
        step.skipped.fill_(state.skipped)
        self._rows = iter(step.schedule([(state.step + i, *values) for i, values in enumerate(schedule)]).unbind())

    def _take(self, place: Tensor, batch: Tensor, share: BatchShare, values: StepValues, *, validate: bool) -> None:
        """Take a step, which a GPU has only started by then; there requests are read every 50 steps."""
        step, on_host = self._step, self._state.device.type == "cpu"
        if self._several:
            step.step_on_part(place, next(self._rows), share, torch.tensor(self.requested))
            self.requested = _NO_REQUESTS
            if on_host or (self._state.step + 1) % _READ_EVERY == 0:
                ends, saves = step.votes.tolist()
                self.requested = ends > 0, saves > 0
        else:
            step(place, next(self._rows))
        self._recent.append((batch, values[0]))
        self._state.step += 1
        if on_host:
            self._check()

    def settle(self) -> None:
        """Wait for the device, and bring the state up to date."""
        self._check()
        self._state.epoch_loss, self._state.epoch_images = float(self._step.total), int(self._step.counted)
        self._state.skipped = int(self._step.skipped)
        self._step.count(self._state.step)

    def _check(self) -> None:
        """Raise NotFinite if a step was not finite; from that step on the graph changed nothing."""
        if not self._step.is_finite:
            first = self._state.step - len(self._recent)  # the step of the first batch in ``_recent``
            self._state.step = self._started + int(self._step.taken)
            index, beta = self._recent[self._state.step - first]
            x = self._transform(self._source.images(index), None)
            raise NotFinite(find_not_finite(self._state, self._objective, x, beta))
        self._recent.clear()
