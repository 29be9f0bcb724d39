"""State that all threads of a process share: modules' modes, random generators, and the lock for using them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Protocol

import torch
from torch import Tensor, nn

_lock = RLock()


@contextmanager
def serialize_threads(*, gradients: bool = True) -> Iterator[None]:
    """Keep other threads out of the library's functions for the length of a block; also a decorator.

    Pyro's stack of effect handlers, torch's generators, and the mode and weights of a module are shared by all threads.
    Another thread that calls such a function waits, even for a whole training. Without ``gradients`` none are recorded.

    >>> @serialize_threads()
    ... def draw():
    ...     return torch.randn(2).shape
    >>> draw()
    torch.Size([2])
    """
    with _lock, torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
        yield


class Module(Protocol):
    """The methods of ``torch.nn.Module`` that are called here: a protocol cannot derive from that class."""

    def modules(self) -> Iterator[nn.Module]:
        """It and all its parts."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its weights by name."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Its other tensors by name."""

    def eval(self) -> object:
        """Put it into evaluation mode."""


@contextmanager
def evaluation_mode(module: Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode, and each back into its own mode afterwards."""
    with serialize_threads():
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and the device, and restore their states afterwards."""
    with serialize_threads(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(operator.index(seed), device)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and the device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
