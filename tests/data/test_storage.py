"""Data beyond memory: how much memory there is, tensors in files, and work in parts with the same numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.data import arrays, storage, transforms
from ppl_vae.parts import likelihoods
from ppl_vae.runtime import numerics
from ppl_vae.runtime.numerics import mean_and_variance, sum_over_images

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results lie in files, and images are transformed a few at a time."""
    monkeypatch.setattr(storage, "fits_in_memory", lambda num_bytes: num_bytes <= 100)
    monkeypatch.setattr(transforms, "_MOST_PIXELS", 150)
    monkeypatch.setattr(arrays, "BLOCK", 300)


# --- The same numbers in parts ---


@pytest.mark.parametrize("shape", [(2500, 700), (1000, 257), (1000, 65), (999, 3, 7, 13), (300, 129), (5, 300), (1, 1)])
@pytest.mark.parametrize("what", ["levels", "reals"])
def test_sums_over_images_are_bit_for_bit_those_of_all_columns_at_once(shape, what):
    """What the marginals, and so every training, start from."""
    rng = np.random.default_rng(2)
    array = rng.integers(0, 256, shape, np.uint8) if what == "levels" else rng.normal(3, 2, shape).astype(np.float32)
    x = torch.from_numpy(array)
    mean = x.sum(0, dtype=torch.double) / len(x)
    squares = sum((part.double() - mean).square().sum(0) for part in x.split(1000))
    assert torch.equal(sum_over_images(x), x.sum(0, dtype=torch.double))
    assert torch.equal(mean_and_variance(x)[0], mean)
    assert torch.equal(mean_and_variance(x)[1], squares / len(x))


def test_sums_over_very_many_images_are_those_of_double_precision(monkeypatch):
    monkeypatch.setattr(numerics, "_LARGE", 1000)
    array = np.random.default_rng(3).normal(100, 2, (3500, 30)).astype(np.float32)
    mean, variance = mean_and_variance(torch.from_numpy(array))
    np.testing.assert_allclose(mean, array.astype(np.longdouble).mean(0).astype(float), rtol=1e-14)
    np.testing.assert_allclose(variance, array.astype(np.longdouble).var(0).astype(float), rtol=1e-12)


FAMILIES: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {
    "laplace": lambda: (likelihoods.Laplace((70,)), torch.from_numpy(RNG.normal(size=(60, 70)).astype(np.float32))),
    "logit-normal": lambda: (likelihoods.LogitNormal((70,)), torch.from_numpy(RNG.random((60, 70)).astype(np.float32))),
    "beta": lambda: (likelihoods.Beta((70,)), torch.from_numpy(RNG.random((60, 70)).astype(np.float32))),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_marginals_of_large_data_are_those_of_small(what, request):
    family, x = FAMILIES[what]()
    small = family.fit_marginals(x)
    request.getfixturevalue("large")
    assert torch.equal(family.fit_marginals(x), small)


# --- Tensors in files ---


@pytest.mark.usefixtures("large")
def test_a_large_tensor_lies_in_a_file_that_nobody_else_sees(kept):
    rows = data.allocate((50, 3), torch.float32)
    rows.copy_(torch.arange(150.0).reshape(50, 3))
    assert data.is_mapped(rows[7:])
    assert rows[49].tolist() == [147, 148, 149]
    assert list(kept.iterdir()) == []


def test_the_memory_that_is_available_is_no_more_than_the_machine_says():
    available = storage.get_available_memory()
    said = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    assert said is not None
    assert available is not None
    assert 0 < available < 1024 * int(said[1])


GROUPS = {  # the line of /proc/self/cgroup, and the group that has a limit
    "a job's own": ("0::/slurm/job_7/step_0", "slurm/job_7/step_0"),
    "a job's": ("9:name=systemd:/\n0::/slurm/job_7/step_0", "slurm/job_7"),
    "a container's": ("0::/", "."),
    "a group of which only a part is mounted": ("0::/kubepods/pod/own", "."),
}


@pytest.mark.parametrize("what", GROUPS)
def test_the_memory_that_is_available_is_what_the_control_groups_leave(tmp_path, what, monkeypatch):
    line, limited = GROUPS[what]
    (tmp_path / "own").write_text(f"{line}\n")
    monkeypatch.setattr(storage, "_PROCESS_GROUPS", tmp_path / "own")
    monkeypatch.setattr(storage, "_ALL_GROUPS", tmp_path / "all")
    for place in {"slurm/job_7/step_0", "slurm/job_7", "slurm", "."}:
        group = tmp_path / "all" / place
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text("2000000\n" if place == limited else "max\n")
        (group / "memory.current").write_text("1500000\n")
        (group / "memory.stat").write_text("anon 1\nfile 300000\n")
    assert storage.get_available_memory() == 800_000
