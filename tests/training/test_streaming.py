"""Streaming: one batch after the other gives the training that resident images give, and its thread ends with it."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from fitting import fit
from torch import Tensor

from ppl_vae import VAE, Conditional, data
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import Streamed, exceeds_memory, steps

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamed images")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def mapped(path: Path, images: Tensor) -> Tensor:
    """The images in a file, read-only and not in memory."""
    np.save(path / "images.npy", images.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file may not be written
        return torch.from_numpy(np.load(path / "images.npy", mmap_mode="r"))


def numbered(num_images: int, *shape: int) -> Tensor:
    """Images that are all different: each holds its own number."""
    return torch.arange(num_images, dtype=torch.float32).view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous()


# --- The batches ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_every_batch_is_there_when_its_turn_comes(dtype):
    train = numbered(103, 2, 3).to(dtype)
    source = Streamed(train, CPU, 10)
    batches = torch.randperm(103, generator=torch.Generator().manual_seed(1)).split(10)
    for index, place in zip(batches, source.epoch(batches), strict=True):
        assert torch.equal(source.stored[place].float(), index.to(dtype).float()[:, None, None].expand(-1, 2, 3))


# --- Its thread ---


def test_what_goes_wrong_in_the_thread_is_raised_in_the_training(monkeypatch):
    calls = []

    def fail(source: Streamed, index: Tensor) -> list[Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return [source.images(index)]

    monkeypatch.setattr(Streamed, "_gather", fail)
    rows = Streamed(numbered(100, 2), CPU, 10).epoch(torch.arange(100).split(10))
    next(rows), next(rows)
    with pytest.raises(OSError, match="Input/output error"):
        next(rows)


# --- Training ---


def small_vae() -> VAE:
    pyro.set_rng_seed(3)
    return VAE(
        StandardNormal(2),
        Conditional(MLP(2, 64, hidden=(8,)), Bernoulli((64,))),
        Conditional(MLP(64, 4, hidden=(8,)), DiagonalNormal(2)),
    )


def levels(num_images: int = 75) -> Tensor:
    return torch.randint(256, (num_images, 64), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def trained(train: Tensor, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a training of two epochs ends with: weights, moments, averages, random numbers."""
    states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def remember(state: Any) -> None:
        tensors, scalars = state.to_tensors()
        states.append(({name: tensor.clone() for name, tensor in tensors.items()}, scalars))

    given: dict[str, Any] = {"epochs": 2, "batch_size": 10, "transform": data.sample_bernoulli, "average_decay": 0.9}
    fit(small_vae(), train, (levels(10) > 127).float(), on_checkpoint=remember, **given | options)
    return states[-1]


COMPILED = pytest.param({"compile": True}, marks=pytest.mark.thorough)


@pytest.mark.parametrize("options", [{}, {"skip_norm": 1e6}, {"batch_size": 200}, COMPILED], ids=str)
def test_streamed_images_train_the_same_weights_bit_for_bit(tmp_path, options):
    resident, scalars = trained(levels(), **options)
    streamed, others = trained(mapped(tmp_path, levels()), stream=True, **options)
    assert [name for name in resident if not torch.equal(resident[name], streamed[name])] == []
    assert resident.keys() == streamed.keys()
    assert scalars | {"seconds": 0} == others | {"seconds": 0}


def test_an_interrupted_streamed_training_goes_on_bit_for_bit(tmp_path):
    train = mapped(tmp_path, levels())
    whole, _ = trained(train, stream=True)
    states = []

    def stop(state: Any) -> None:
        if state.step == 11:
            tensors, scalars = state.to_tensors()
            states.append(({name: tensor.clone() for name, tensor in tensors.items()}, scalars))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        trained(train, stream=True, on_step=stop)
    assert threads() == []  # at once, though the error still holds on to what the training was doing
    del raised
    parts, _ = trained(train, stream=True, saved=states[0])
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_failure_is_told_with_its_own_images(compile):
    train = torch.rand(40, 64).round()
    bad = 23

    def transform(values: Tensor, generator: Any) -> Tensor:
        return values

    def poison(state: Any) -> None:
        train[bad] = math.nan  # after the check of all images

    with pytest.raises(NotFinite, match=r"site 'x'"):
        fit(
            small_vae(),
            train,
            epochs=3,
            batch_size=4,
            transform=transform,
            compile=compile,
            stream=True,
            on_step=poison,
        )


# --- Where it streams ---


@pytest.mark.parametrize(("available", "expected"), [(2 * 75 * 64 + 1, False), (2 * 75 * 64 - 1, True)])
def test_a_mapped_file_larger_than_half_the_memory_streams(monkeypatch, available, expected):
    monkeypatch.setattr(steps, "is_mapped", lambda tensor: True)
    monkeypatch.setattr(steps, "get_available_memory", lambda: available)
    assert exceeds_memory(levels(), CPU) is expected


# --- On a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_batch_is_there_when_its_turn_comes():
    train = numbered(2003, 100)
    source = Streamed(train, torch.device("cuda"), 10)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    batches = torch.randperm(2003).split(10)
    for index, place in zip(batches, source.epoch(batches), strict=True):
        torch.cuda._sleep(100_000)  # the device lags behind: a batch that is overwritten too early is seen
        wrong += (source.stored[place][:, 0] != index.to("cuda").float()).sum()
    assert int(wrong) == 0
