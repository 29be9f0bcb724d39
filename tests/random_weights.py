"""Modules whose every weight is away from where it starts."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def at_random(module: Module, *, size: float = 0.4, seed: int = 0) -> Module:
    """In float64, every parameter moved by a random number of this size, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return module
