"""What ends a training: numbers that are not finite, images off their support, too many steps left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.ranks import gather_objects, num_ranks
from ppl_vae.support import check_site, observed_sites
from ppl_vae.training.state import TrainingState
from ppl_vae.vae import VAE
from ppl_vae.weights import latent_sites

_MOST_SKIPPED = 0.01  # of all steps
_FEW_SKIPPED = 100  # a start from fresh weights has some


def check_skipped(state: TrainingState, epoch: int) -> None:
    """Raises NotFinite where too many steps were left out for what is left to be a training."""
    if not state.epoch_images:
        raise NotFinite(
            f"step {state.step}: every step of epoch {epoch} had a gradient above skip_norm, or none that is finite"
        )
    if state.skipped > max(_FEW_SKIPPED, _MOST_SKIPPED * state.step):
        raise NotFinite(
            f"step {state.step}: {state.skipped} steps so far had a gradient above skip_norm, or none that is finite"
        )


class RanksDiffer(ArithmeticError):
    """Ranks that compute the same have not the same weights or random numbers."""


def check_ranks(state: TrainingState) -> None:
    """Raises RanksDiffer, on all ranks, where the weights, averages or random numbers are not the same on all."""
    if num_ranks() == 1:
        return
    tensors = [*state.vae.state_dict().values(), *state.averages.values()]
    found = gather_objects([_sha256(tensors), _sha256([torch.get_rng_state()])])
    for which, words in enumerate(("weights", "random numbers")):
        others = [str(rank) for rank, digests in enumerate(found) if digests[which] != found[0][which]]
        if others:
            raise RanksDiffer(
                f"step {state.step}: expected the same {words} on all ranks, got others than rank 0 on "
                f"{', '.join(others)}: the machines or their libraries do not compute alike"
            )


def _sha256(tensors: Iterable[Tensor]) -> str:
    """Of the bits: in a sum of them, differences of two weights could cancel."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_CHECKED_AT_ONCE = 1000  # images


def check_images(state: TrainingState, train: Tensor, observe: Callable[..., Tensor], *, batch_size: int) -> None:
    """What Pyro's validation would say of the training images, without their way through the networks.

    The programs run once, with validation; then every image is compared with the support of the sites that observe it.

    Raises:
        NotFinite: the weights or images hold values that are not finite.
        ValueError: a value off its support, a wrong shape.
    """
    vae = state.vae
    with seeded(0, state.device), torch.no_grad():
        x = observe(train[:batch_size].to(state.device), None)
        vae.eval()  # statistics of a batch, where networks take some, are not to move
        try:
            with pyro.validation_enabled(True):
                q = poutine.trace(vae.guide).get_trace(x)
                p = poutine.trace(poutine.replay(vae.model, trace=q)).get_trace(x)
                q.compute_log_prob()
                p.compute_log_prob()
        except ValueError:
            site = site_that_is_not_finite(vae, x)
            if site is None:
                raise
            raise NotFinite(f"step {state.step}: {site}") from None
        finally:
            vae.train()
        sites = observed_sites(p, x)
        for part in train.split(_CHECKED_AT_ONCE):
            x = observe(part.to(state.device), None)
            if sites and not x.isfinite().all():
                raise NotFinite(f"step {state.step}: site 'x': the training images hold values that are not finite")
            for observed in sites:
                check_site(observed, x)


def find_not_finite(state: TrainingState, objective: Callable[..., Tensor], x: Tensor, beta: float) -> str:
    """Takes the step that failed once more, with other noise and without its update, and says what is not finite.

    Args:
        state: of the training.
        objective: as ``fit`` takes it.
        x: the batch (B, *E).
        beta: of that step.
    """
    vae = state.vae
    vae.zero_grad()
    with pyro.validation_enabled(False):
        loss = objective(vae.model, vae.guide, x, beta=beta)
    site = site_that_is_not_finite(vae, x)
    if not loss.isfinite():
        return f"step {state.step}: the loss is {loss.item()}: {site or 'every site is finite when z is drawn again'}"
    if site is not None:
        return f"step {state.step}: {site}"
    loss.backward()
    bad = gradients_that_are_not_finite(vae)
    if bad:
        return f"step {state.step}: the gradient is not finite, in {', '.join(bad)}"
    return f"step {state.step}: the loss or its gradient is not finite; both are when z is drawn again"


def gradients_that_are_not_finite(vae: VAE) -> list[str]:
    """The names of the parameters whose gradient has a NaN or an infinity."""
    return [name for name, w in vae.named_parameters() if w.grad is not None and not w.grad.isfinite().all()]


def site_that_is_not_finite(vae: VAE, x: Tensor) -> str | None:
    """Runs the two programs again on x (B, *E), and names the first site with a number that is not finite."""
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
