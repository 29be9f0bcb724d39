"""State that all threads of a process share, and the lock under which the library uses it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

_lock = RLock()


@contextmanager
def serialize_threads() -> Iterator[None]:
    """Keeps other threads out of the library's functions until the block ends; also a decorator.

    Pyro's stack of effect handlers, torch's generators, and the mode and weights of a module are shared by all threads.
    A function that runs a program, draws, or seeds a generator does so alone; another thread that calls one waits, also
    for the whole of a training. Threads that draw from torch's generators by themselves are not kept out.

    >>> @serialize_threads()
    ... def draw():
    ...     return torch.randn(2).shape
    >>> draw()
    torch.Size([2])
    """
    with _lock:
        yield


@contextmanager
def evaluation_mode(vae: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each as it was."""
    with serialize_threads():
        modes = [(module, module.training) for module in vae.modules()]
        vae.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of the CPU and of that device start from the seed, and are put back afterwards."""
    with serialize_threads(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(operator.index(seed), device)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators of the CPU and of that device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
