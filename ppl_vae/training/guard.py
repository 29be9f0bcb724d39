"""What ends a training: numbers that are not finite, images off their support, ranks that differ, skipped steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.protocols import Program
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.ranks import gather_objects, num_ranks
from ppl_vae.support import check_site, observed_sites
from ppl_vae.training.state import TrainingState
from ppl_vae.weights import latent_sites

_MAX_SKIPPED = 0.01  # of all steps
_FEW_SKIPPED = 100  # a start from fresh weights skips some


def check_skipped(state: TrainingState, epoch: int) -> None:
    """Raise NotFinite if so many steps were skipped that the rest is no training."""
    if not state.epoch_images:
        raise NotFinite(
            f"step {state.step}: every step of epoch {epoch} had a gradient above skip_norm, or none that is finite"
        )
    if state.skipped > max(_FEW_SKIPPED, _MAX_SKIPPED * state.step):
        raise NotFinite(
            f"step {state.step}: {state.skipped} steps so far had a gradient above skip_norm, or none that is finite"
        )


class RanksDiffer(ArithmeticError):
    """Ranks that compute the same do not have the same weights or random numbers."""


def check_ranks(state: TrainingState) -> None:
    """Raise RanksDiffer, on all ranks, unless the weights, averages and random numbers are the same on all."""
    if num_ranks() == 1:
        return
    tensors = [*state.program.state_dict().values(), *state.averages.values()]
    found = gather_objects([_sha256(tensors), _sha256([torch.get_rng_state()])])
    for which, name in enumerate(("weights", "random numbers")):
        others = [str(rank) for rank, digests in enumerate(found) if digests[which] != found[0][which]]
        if others:
            raise RanksDiffer(
                f"step {state.step}: expected the same {name} on all ranks, got others than rank 0 on "
                f"{', '.join(others)}: the machines or their libraries do not compute alike"
            )


def _sha256(tensors: Iterable[Tensor]) -> str:
    """A digest of the bits: in a sum, differences of two weights could cancel."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_CHECKED_AT_ONCE = 1000  # images


def check_images(state: TrainingState, train: Tensor, transform: Callable[..., Tensor], *, batch_size: int) -> None:
    """Check the training images as Pyro's validation would, without running the networks on all of them.

    The program runs once, with validation; then every image is compared with the support of the sites that observe it.

    Raises:
        NotFinite: The weights or images hold values that are not finite.
        ValueError: A value is off its support, or a shape is wrong.
    """
    program = state.program
    with seeded(0, state.device), torch.no_grad():
        x = transform(train[:batch_size].to(state.device), None)
        program.eval()  # statistics over a batch must not change
        try:
            with pyro.validation_enabled(True):
                q, p = _trace(program, x)
                q.compute_log_prob()
                p.compute_log_prob()
        except ValueError:
            fault = find_site_not_finite(program, x)
            if fault is None:
                raise
            raise NotFinite(f"step {state.step}: {fault}") from None
        finally:
            program.train()
        sites = observed_sites(p, x)
        for part in train.split(_CHECKED_AT_ONCE):
            x = transform(part.to(state.device), None)
            if sites and not x.isfinite().all():
                raise NotFinite(f"step {state.step}: site 'x': the training images hold values that are not finite")
            for observed in sites:
                check_site(observed, x)


def find_not_finite(state: TrainingState, objective: Callable[..., Tensor], x: Tensor, beta: float) -> str:
    """Repeat the step that failed, with other noise and without its update, and say what is not finite.

    Args:
        state: Of the training.
        objective: As ``fit`` takes it.
        x: The batch (B, *E).
        beta: Of that step.
    """
    program = state.program
    program.zero_grad()
    with pyro.validation_enabled(False):
        loss = objective(program.model, program.guide, x, beta=beta)
    fault = find_site_not_finite(program, x)
    if not loss.isfinite():
        return f"step {state.step}: the loss is {loss.item()}: {fault or 'every site is finite when z is drawn again'}"
    if fault is not None:
        return f"step {state.step}: {fault}"
    loss.backward()
    bad = find_gradients_not_finite(program)
    if bad:
        return f"step {state.step}: the gradient is not finite, in {', '.join(bad)}"
    return f"step {state.step}: the loss or its gradient is not finite; both are when z is drawn again"


def find_gradients_not_finite(program: Program) -> list[str]:
    """The names of the parameters whose gradient has a NaN or an infinity."""
    return [name for name, w in program.named_parameters() if w.grad is not None and not w.grad.isfinite().all()]


def find_site_not_finite(program: Program, x: Tensor) -> str | None:
    """Run model and guide on x (B, *E) again, and describe the first site with a number that is not finite."""
    if not x.isfinite().all():
        return "site 'x': the images of this batch hold values that are not finite"
    with torch.no_grad(), pyro.validation_enabled(False):
        q, p = _trace(program, x)
        for kind, trace in (("guide", q), ("model", p)):
            for name in [*latent_sites(trace), *trace.observation_nodes]:
                site = trace.nodes[name]
                if not torch.as_tensor(site["value"]).isfinite().all():
                    return f"site {name!r} of the {kind} has a value that is not finite"
                if not site["fn"].log_prob(site["value"]).isfinite().all():
                    return f"site {name!r} of the {kind} has a log-probability that is not finite"
    return None


def _trace(program: Program, x: Tensor) -> tuple[poutine.Trace, poutine.Trace]:
    """The guide's trace on x (B, *E), and the model's on the same draws."""
    q = poutine.trace(program.guide).get_trace(x)
    return q, poutine.trace(poutine.replay(program.model, trace=q)).get_trace(x)
