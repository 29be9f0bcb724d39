"""What a caller gives ``fit``: images as one tensor, and networks that can train on every batch of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from ppl_vae.runtime.global_state import seeded
from ppl_vae.support import describe_type
from ppl_vae.vae import NO_AUTOGUIDE, VAE


def as_images(name: str, x: Any) -> Tensor:
    """Images as one tensor (N, *E): a tensor as it is, a NumPy array without a copy where that is possible.

    An array of the other byte order, as FITS and IDX files have it, is converted.

    Raises:
        ValueError: neither of these, such as a list or a ``DataLoader``; or an array with masked values.
    """
    check_no_mask(name, x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
        x = np.asarray(x, dtype=x.dtype.newbyteorder("="))
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if not isinstance(x, Tensor) or not x.dim():
        raise ValueError(
            f"{name}: expected one tensor or NumPy array of images, (N, *E), got {describe_type(x)}; fit makes the "
            "batches itself (batch_size), and torch.stack makes one tensor of a list of images"
        )
    return x


def check_no_mask(name: str, x: Any) -> None:
    """Refuse a NumPy array with masked values: NumPy's conversions drop the mask, and what it hides would be data.

    Raises:
        ValueError: a value is masked.
    """
    if isinstance(x, np.ma.MaskedArray) and (count := int(np.ma.getmaskarray(x).sum())):
        raise ValueError(
            f"{name}: expected an array without masked values, got {count:,} masked of {x.size:,}; leave out their "
            "rows: np.ma.compress_rows(table)"
        )


def check_weights(vae: VAE) -> None:
    """Refuse a VAE whose weights cannot be trained: all are frozen, or were made in ``torch.inference_mode``.

    Raises:
        ValueError: there is no weight that a gradient can change.
    """
    weights = list(vae.parameters())
    if any(each.is_inference() for each in weights):
        raise ValueError(
            "vae: expected weights that can be trained, got some made in torch.inference_mode; build it outside"
        )
    if not any(each.requires_grad for each in weights):
        raise ValueError(
            f"vae: expected weights that can be trained, got {len(weights)} and none with requires_grad; "
            "vae.requires_grad_(True) makes them so"
        )


def check_programs(vae: VAE) -> None:
    """Refuses a guide or a model that was assigned to the VAE as a module: torch keeps it, and the method is called.

    Raises:
        ValueError: there is one.
    """
    for name in ("model", "guide"):
        if name in vae._modules:
            kind = type(vae._modules[name]).__name__
            raise ValueError(f"{name}: expected the VAE's own method, got {kind} assigned to it; {NO_AUTOGUIDE}")


def check_batch_of_one(vae: VAE, objective: Callable[..., Tensor], observe: Callable[..., Tensor], x: Tensor) -> None:
    """Refuses a batch of one image where batch normalization has no variance over it.

    Nothing is changed, nor are random numbers used up.

    Args:
        vae: in training mode.
        objective, observe: as ``fit`` takes them.
        x: (1, *E), as stored, on the VAE's device.

    Raises:
        ValueError: a layer of batch normalization cannot train on it.
    """
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in vae.modules()):
        return
    copy = deepcopy(vae)  # its running averages move
    try:
        with seeded(0, x.device), torch.no_grad(), pyro.validation_enabled(False):
            objective(copy.model, copy.guide, observe(x, None), beta=1.0)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batch_size: expected at least two images in the last batch of an epoch, over which batch normalization "
            "takes a variance, got one; choose another batch_size, or leave one image out"
        ) from None
