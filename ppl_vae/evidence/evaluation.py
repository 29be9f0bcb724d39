"""Evaluate a VAE with seeded groups of images: on one process or several, compiled or not, within the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor

from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance, Terms, measure_group
from ppl_vae.protocols import Program, StochasticFunction
from ppl_vae.runtime.batching import (
    BatchSize,
    block_seed,
    compute_blocks,
    evaluation_batch_size,
    even_divisor,
    images_per_group,
    images_per_pass,
    keep_freed_memory,
)
from ppl_vae.runtime.capture import compile_function, detach_tensors, replace_tensors
from ppl_vae.runtime.errors import CannotCapture, NotFinite, check_count
from ppl_vae.runtime.global_state import evaluation_mode, seed_generators, seeded, serialize_threads
from ppl_vae.runtime.ranks import agree
from ppl_vae.runtime.records import Data, arguments_of, join_arguments
from ppl_vae.support import check_support
from ppl_vae.weights import count_branches, log_reconstruction, log_weight_terms


class CapturedTerms:
    """``log_weight_terms`` of one VAE as a compiled graph, for batches of one size; other batches run uncompiled.

    Args:
        vae: In evaluation mode. Its weights may change later, its structure may not.
        x: A batch (B, *E) of the size that the graph is for.
        num_particles: S per batch.
    """

    def __init__(self, vae: Program, x: Data, num_particles: int) -> None:
        self._shape = (tuple(x.shape), num_particles)
        values = detach_tensors(vae)  # shared memory, so changes in place are seen
        names, self._tensors = list(values), list(values.values())

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            with replace_tensors(vae, dict(zip(names, tensors, strict=False))):
                return log_weight_terms(vae.model, vae.guide, join_arguments(tensors[len(names) :]), num_particles)

        self._run = compile_function(function, self._inputs(x))

    def _inputs(self, x: Data) -> list[Tensor]:
        return [*self._tensors, *(tensor.contiguous() for tensor in arguments_of(x))]

    def __call__(
        self, model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int
    ) -> tuple[Tensor, Tensor]:
        if (tuple(x.shape), num_particles) != self._shape:
            return log_weight_terms(model, guide, x, num_particles)
        log_p_x_given_z, log_p_z_over_q_z = self._run(self._inputs(x))
        return log_p_x_given_z, log_p_z_over_q_z


@serialize_threads()
def evaluate(
    vae: Program,
    x: Data,
    *,
    num_particles: int,
    seed: int,
    check: bool = False,
    compile: bool = False,
    on_compiled: Callable[[float], None] | None = None,
    progress: Callable[[int], None] | None = None,
    done: Mapping[int, Tensor] | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> Importance:
    """``importance`` of a VAE in evaluation mode, with its own seed, on one process or several.

    Images are computed in groups of ``images_per_group``, with noise seeded by (seed, index of the group's first
    image). An image's numbers therefore do not depend on the number of ranks or on interruptions. Each rank calls this
    and receives all results. The VAE and the global generators are left as they were. Where memory runs out, half as
    many particles are computed at once (``batching.BatchSize``); from there on the bound is another draw.

    Args:
        vae: On the device of the images.
        x: Images (N, *E), or ``Records``, the same on every rank.
        num_particles: S.
        seed: The seed of the draws.
        check: Whether Pyro validates values, with ``compile`` those of the first image alone.
        compile: Whether the log-weights of a pass are one compiled graph, which agrees up to rounding.
        on_compiled: Called with the seconds that compiling took.
        progress, done, on_block, should_stop: As in ``batching.compute_blocks``, with the columns of ``Importance``,
            (n, 9).
        say: Called with a message where memory runs out.

    Raises:
        CannotCapture: A ValueError: ``compile`` is asked for and impossible.
        ValueError, DeterministicGuide, NotFinite: As in ``importance``.
        Stopped, ConnectionError: As in ``compute_blocks``.
    """
    num_particles = check_count("num_particles", num_particles)
    check_support(vae.model, x)
    if x.device.type == "cpu":
        keep_freed_memory()
    with seeded(seed, x.device), pyro.validation_enabled(check), evaluation_mode(vae), torch.no_grad():
        size = images_per_group(x, num_particles)
        # The same with and without compiling, so that the noise is the same.
        particles, images = evaluation_batch_size(vae, x, num_particles)
        branches = count_branches(vae.model, vae.guide, x)
        batch = BatchSize(even_divisor(particles, max(1, particles // branches)), images, device=x.device, say=say)
        terms: Terms = log_weight_terms
        if compile:
            terms = _captured(vae, x, batch, seed=seed, on_compiled=on_compiled)

        def compute(group: slice) -> Tensor:
            def attempt(particles: int, images: int) -> Tensor:
                seed_generators(block_seed(seed, group.start), x.device)
                parts = x[group].split(images)
                found = [measure_group(vae.model, vae.guide, part, num_particles, particles, terms) for part in parts]
                return torch.cat([torch.stack(fields, dim=1) for fields in found])

            return batch.run(attempt)

        table = compute_blocks(
            compute,
            len(x),
            size,
            num_columns=len(IMPORTANCE_NAMES),
            device=x.device,
            progress=progress,
            done=done,
            on_block=on_block,
            should_stop=should_stop,
        )
    return Importance(*table.T.contiguous(), num_particles=num_particles)


def _captured(
    vae: Program, x: Data, batch: BatchSize, *, seed: int, on_compiled: Callable[[float], None] | None
) -> CapturedTerms:
    """The log-weights of a full pass as a compiled graph, on every rank or on none."""
    started, error = time.monotonic(), None
    with seeded(seed, x.device):
        log_weight_terms(vae.model, vae.guide, x[:1], 1)  # raises the errors of the uncompiled programs
        try:
            terms = CapturedTerms(vae, x[: batch.images], batch.particles)
        except CannotCapture as caught:
            error = str(caught)
    if agree(error is not None):
        raise CannotCapture(error or "another rank cannot compile it")
    if on_compiled is not None:
        on_compiled(time.monotonic() - started)
    return terms


@serialize_threads(gradients=False)
def reconstruction(
    vae: Program,
    x: Data,
    *,
    seed: int,
    check: bool = False,
    progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """log p(x | z) for one z ~ q(z | x) per image: the measure of an autoencoder, whose z is a function of x.

    It is neither a log-likelihood nor a bound on one: it ignores how probable z is and how many z would do. The guide
    may have no density. Arguments, groups, ranks and errors are as in ``evaluate``. -> (N,) nats, float64.
    """
    check_support(vae.model, x)
    size = images_per_group(x, 1)
    most = images_per_pass(x, getattr(vae, "likelihood", None))
    batch = BatchSize(1, even_divisor(size, most), device=x.device, say=say)

    def compute(group: slice) -> Tensor:
        def attempt(_: int, images: int) -> Tensor:
            seed_generators(block_seed(seed, group.start), x.device)
            parts = [log_reconstruction(vae.model, vae.guide, part) for part in x[group].split(images)]
            return torch.cat(parts).double()[:, None]

        rows = batch.run(attempt)
        if rows.isnan().any() or rows.isposinf().any():
            raise NotFinite("log p(x | z): expected numbers, got NaN or +infinity")
        return rows

    with seeded(seed, x.device), pyro.validation_enabled(check), evaluation_mode(vae):
        table = compute_blocks(
            compute, len(x), size, num_columns=1, device=x.device, progress=progress, should_stop=should_stop
        )
    return table[:, 0]
