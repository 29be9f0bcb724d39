"""Checks of what ``fit`` is given, and of a training that goes on: its numbers, its ranks, its skipped steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from copy import deepcopy

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppl_vae import objectives
from ppl_vae.data import from_dataset
from ppl_vae.enumeration import enumerated_dims
from ppl_vae.objectives.importance import sites_of_model
from ppl_vae.protocols import Program
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.runtime.ranks import gather_objects, num_ranks
from ppl_vae.runtime.records import Data, Records, arguments_of, images_of
from ppl_vae.support import CHECKED_AT_ONCE, check_site, describe_type, find_image_sites, find_missing, trial_run
from ppl_vae.training.state import TrainingState
from ppl_vae.vae import NO_AUTOGUIDE
from ppl_vae.weights import check_plates, latent_sites, trace_programs

# --- Arguments of fit ---


def images_tensor(name: str, x: object) -> Data:
    """Return images as one tensor (N, *E); a NumPy array is not copied if that is possible.

    ``Records`` are returned as they are. An array of the other byte order, as FITS and IDX files have it, is converted.
    A ``Dataset`` or ``DataLoader`` is read as ``data.from_dataset`` does. Anything else raises ValueError, such as a
    list or an array with masked values.
    """
    if isinstance(x, Records):
        return x
    if isinstance(x, Dataset | DataLoader):
        x = from_dataset(x)
    check_no_mask(name, x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
        x = np.asarray(x, dtype=x.dtype.newbyteorder("="))
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if not isinstance(x, Tensor) or not x.dim():
        raise ValueError(
            f"{name}: expected one tensor, array or Dataset of images, (N, *E), got {describe_type(x)}; fit makes the "
            "batches itself (Schedule.batch_size), and torch.stack makes one tensor of a list of images"
        )
    return x


def check_no_mask(name: str, x: object) -> None:
    """Refuse a NumPy array with masked values: NumPy's conversions drop the mask, and would train on what it hides."""
    if isinstance(x, np.ma.MaskedArray) and (count := int(np.ma.getmaskarray(x).sum())):
        raise ValueError(
            f"{name}: expected an array without masked values, got {count:,} masked of {x.size:,}; leave out their "
            "rows: np.ma.compress_rows(table)"
        )


def check_program(program: Program) -> None:
    """Refuse a program that cannot be trained, with a ValueError.

    Such a program has no model and guide, or no weight that a gradient can change; or a guide or model was assigned to
    it as a submodule, where its method would be called instead; or it holds a guide from pyro.infer.autoguide.
    """
    if not isinstance(program, Program):
        raise ValueError(
            f"program: expected a torch.nn.Module with methods model(x) and guide(x), got {type(program).__name__}"
        )
    for name, part in getattr(program, "_modules", {}).items():
        if name in ("model", "guide"):
            kind = type(part).__name__
            raise ValueError(f"{name}: expected the program's own method, got {kind} assigned to it; {NO_AUTOGUIDE}")
    autoguide = _find_autoguide(program)
    if autoguide is not None:
        raise ValueError(f"guide: expected a guide with an encoder, got {type(autoguide).__name__}; {NO_AUTOGUIDE}")
    weights = list(program.parameters())
    got = ""
    if any(w.is_inference() for w in weights):
        got = "some made in torch.inference_mode; build it outside"
    elif not any(w.requires_grad for w in weights):
        got = f"{len(weights)} and none with requires_grad; requires_grad_(True) makes them so"
    if got:
        raise ValueError(f"program: expected weights that can be trained, got {got}")


def check_sites_and_parameters(
    program: Program, objective: objectives.Loss | None, transform: Callable[..., Data], x: Data
) -> objectives.Loss:
    """Refuse sites and parameters that ``fit`` cannot train, with a ValueError; return the objective, None the ELBO.

    The programs run once, on the images x, (B, *E), as stored; nothing is changed, and no random numbers are consumed.
    """
    with trial_run(x.device), evaluation_mode(program):
        p, q = trace_programs(program.model, program.guide, transform(x, None), 1)
    own = {id(w) for w in program.parameters()}
    for trace in (q, p):
        for name in trace.param_nodes:
            if id(trace.nodes[name]["value"]) not in own:
                raise ValueError(
                    f"pyro.param {name!r}: expected a parameter of the program's modules, got one of Pyro's global "
                    "store; fit trains it in PyroProgram(model, guide, x)"
                )
        for name in sites_of_model(trace):
            check_plates(name, trace.nodes[name], len(x))
    dims = enumerated_dims(p)
    if objective is None:
        return objectives.EnumeratedELBO() if dims else objectives.elbo()
    sums = (objectives.EnumeratedELBO, objectives.IWAE, TraceEnum_ELBO)
    if dims and isinstance(objective, ELBO) and not isinstance(objective, sums):
        raise ValueError(
            f"objective: expected one that sums over enumerated sites ({', '.join(loss.__name__ for loss in sums)}), "
            f"got {type(objective).__name__}"
        )
    return objective


def _find_autoguide(program: Program) -> AutoGuide | None:
    """Find a guide from pyro.infer.autoguide that is the program's guide, or that one of its modules holds.

    A module holds its submodules, its other attributes, and what is in a list, tuple or dictionary among them.
    """
    held: list[object] = [program.guide, getattr(program.guide, "__self__", None)]
    for module in [program, *program.modules()]:
        for value in [*vars(type(module)).values(), *vars(module).values()]:
            items = value.values() if isinstance(value, dict) else value
            held += items if isinstance(value, list | tuple | dict) else [value]
    return next((part for part in held if isinstance(part, AutoGuide)), None)


def check_batch_of_one(
    program: Program, objective: Callable[..., Tensor], transform: Callable[..., Data], x: Data
) -> None:
    """Refuse a batch of one image if batch normalization needs a variance over the batch.

    Nothing is changed, and no random numbers are consumed. The program is in training mode, objective and transform are
    those of ``fit``, and x is (1, *E), as stored, on the program's device.
    """
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in program.modules()):
        return
    copy = deepcopy(program)  # its running averages change
    try:
        with trial_run(x.device):  # in training mode
            objective(copy.model, copy.guide, transform(x, None), beta=1.0)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batch_size: expected at least two images in the last batch of an epoch, over which batch normalization "
            "takes a variance, got one; choose another batch_size, or leave one image out"
        ) from None


# --- A training that goes on ---

_MAX_SKIPPED = 0.01  # of all steps
_FEW_SKIPPED = 100  # a start from fresh weights skips some


def check_skipped(state: TrainingState, epoch: int) -> None:
    """Raise NotFinite if so many steps were skipped that the rest is no training."""
    if state.epoch_images and state.skipped <= max(_FEW_SKIPPED, _MAX_SKIPPED * state.step):
        return
    which = f"{state.skipped} steps so far" if state.epoch_images else f"every step of epoch {epoch}"
    raise NotFinite(f"step {state.step}: {which} had a gradient above skip_norm, or none that is finite")


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


def check_images(state: TrainingState, train: Data, transform: Callable[..., Data], *, batch_size: int) -> None:
    """Check the training images (N, *E) as Pyro's validation would, without running the networks on all of them.

    The program runs once, with validation; then every image is compared with the support of the sites that observe it.
    Values that are not finite raise NotFinite; those off their support and wrong shapes raise ValueError.
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
        if (probe := find_missing(images_of(train))) is not None:  # which a program may replace, or not
            x = transform(train[torch.tensor([probe, probe])].to(state.device), None)
            _, p = _trace(program, x)
        sites = find_image_sites(p, images_of(x))
        replaces = any(site.replaces_missing for site in sites)
        for part in train.split(CHECKED_AT_ONCE):
            x = images_of(transform(part.to(state.device), None))
            if sites and not (x.isfinite() | (x.isnan() & replaces)).all():
                raise NotFinite(
                    f"step {state.step}: site 'x': the training images hold values that are not finite{_advise(x)}"
                )
            for observed in sites:
                check_site(observed, x)


def _advise(x: Tensor) -> str:
    """What to do about NaN in the images x, to end a message with; nothing without any."""
    advice = "; missing values (NaN) leave the likelihood of an IncompleteVAE, or with --missing train"
    return advice if x.isnan().any() else ""


def find_not_finite(state: TrainingState, objective: Callable[..., Tensor], x: Data, beta: float) -> str:
    """Repeat a failed step on x (B, *E), with other noise and without its update, and say what is not finite."""
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


def find_site_not_finite(program: Program, x: Data) -> str | None:
    """Run model and guide on x (B, *E) again, and describe the first site with a number that is not finite."""
    images = images_of(x)
    with torch.no_grad(), pyro.validation_enabled(False):
        q, p = _trace(program, x)
        replaced = images.isnan() & any(site.replaces_missing for site in find_image_sites(p, images))
        if not (images.isfinite() | replaced).all():
            return f"site 'x': the images of this batch hold values that are not finite{_advise(images)}"
        for kind, trace in (("guide", q), ("model", p)):
            for name in [*latent_sites(trace), *trace.observation_nodes]:
                site = trace.nodes[name]
                if not torch.as_tensor(site["value"]).isfinite().all():
                    return f"site {name!r} of the {kind} has a value that is not finite"
                if not site["fn"].log_prob(site["value"]).isfinite().all():
                    return f"site {name!r} of the {kind} has a log-probability that is not finite"
    return None


def _trace(program: Program, x: Data) -> tuple[poutine.Trace, poutine.Trace]:
    """The guide's trace on x (B, *E), and the model's on the same draws."""
    q = poutine.trace(program.guide).get_trace(*arguments_of(x))
    return q, poutine.trace(poutine.replay(program.model, trace=q)).get_trace(*arguments_of(x))
