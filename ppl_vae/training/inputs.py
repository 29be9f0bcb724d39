"""Checks of what a caller gives ``fit``: the images, the program, and the size of the last batch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from ppl_vae.protocols import Program
from ppl_vae.runtime.global_state import seeded
from ppl_vae.support import describe_type
from ppl_vae.vae import NO_AUTOGUIDE


def images_tensor(name: str, x: Any) -> Tensor:
    """Return images as one tensor (N, *E); a NumPy array is not copied if that is possible.

    An array of the other byte order, as FITS and IDX files have it, is converted.

    Raises:
        ValueError: x is neither of these, but for example a list or a ``DataLoader``; or an array with masked values.
    """
    check_no_mask(name, x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
        x = np.asarray(x, dtype=x.dtype.newbyteorder("="))
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if not isinstance(x, Tensor) or not x.dim():
        raise ValueError(
            f"{name}: expected one tensor or NumPy array of images, (N, *E), got {describe_type(x)}; fit makes the "
            "batches itself (Schedule.batch_size), and torch.stack makes one tensor of a list of images"
        )
    return x


def check_no_mask(name: str, x: Any) -> None:
    """Refuse a NumPy array with masked values: NumPy's conversions drop the mask, and would train on what it hides.

    Raises:
        ValueError: A value is masked.
    """
    if isinstance(x, np.ma.MaskedArray) and (count := int(np.ma.getmaskarray(x).sum())):
        raise ValueError(
            f"{name}: expected an array without masked values, got {count:,} masked of {x.size:,}; leave out their "
            "rows: np.ma.compress_rows(table)"
        )


def check_program(program: Program) -> None:
    """Refuse a program that cannot be trained.

    Raises:
        ValueError: It has no model and guide, or no weight that a gradient can change; or a guide or model was assigned
            to it as a submodule, where its method would be called instead; or it holds a guide from
            pyro.infer.autoguide.
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
    if any(w.is_inference() for w in weights):
        raise ValueError(
            "program: expected weights that can be trained, got some made in torch.inference_mode; build it outside"
        )
    if not any(w.requires_grad for w in weights):
        raise ValueError(
            f"program: expected weights that can be trained, got {len(weights)} and none with requires_grad; "
            "requires_grad_(True) makes them so"
        )


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
    program: Program, objective: Callable[..., Tensor], transform: Callable[..., Tensor], x: Tensor
) -> None:
    """Refuse a batch of one image if batch normalization needs a variance over the batch.

    Nothing is changed, and no random numbers are consumed.

    Args:
        program: In training mode.
        objective, transform: As ``fit`` takes them.
        x: (1, *E), as stored, on the program's device.

    Raises:
        ValueError: A layer of batch normalization cannot train on it.
    """
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in program.modules()):
        return
    copy = deepcopy(program)  # its running averages change
    try:
        with seeded(0, x.device), torch.no_grad(), pyro.validation_enabled(False):
            objective(copy.model, copy.guide, transform(x, None), beta=1.0)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batch_size: expected at least two images in the last batch of an epoch, over which batch normalization "
            "takes a variance, got one; choose another batch_size, or leave one image out"
        ) from None
