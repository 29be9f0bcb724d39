"""Data that is large: .npy files that are mapped, results in files, the same numbers in parts, sizes in headers."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.data import array_kinds, machine, transforms
from ppl_vae.parts import likelihoods
from ppl_vae.runtime import numerics
from ppl_vae.runtime.numerics import mean_and_variance, sum_over_images

RNG = np.random.default_rng(0)
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is: files are mapped, results are in files, and both are gone through a few images at a time."""
    monkeypatch.setattr(machine, "LARGE", 100)
    monkeypatch.setattr(machine, "fits_in_memory", lambda num_bytes: num_bytes <= 100)
    monkeypatch.setattr(array_kinds, "BLOCK", 300)
    monkeypatch.setattr(transforms, "_MOST_PIXELS", 150)


# --- Files of arrays ---

FILES: dict[str, tuple[np.ndarray, str, type]] = {  # -> kind, as stored
    "levels": (RNG.integers(0, 256, (53, 5, 6, 3), np.uint8), "8-bit levels", np.uint8),
    "gray levels": (RNG.integers(0, 256, (53, 5, 6), np.uint8), "8-bit levels", np.uint8),
    "binary": (RNG.integers(0, 2, (53, 9)).astype(np.int64), "binary", np.uint8),
    "bits": (RNG.integers(0, 2, (53, 9)).astype(bool), "binary", np.uint8),
    "probabilities": (RNG.random((53, 5, 6, 1)).astype(np.float16), "probabilities", np.float32),
    "reals": (RNG.normal(size=(53, 5, 6)) * 3 + 100, "real values", np.float32),
    "reals, columns first": (np.asfortranarray(RNG.normal(size=(53, 7)).astype(np.float32)), "real values", np.float32),
    "reals, other bytes first": (RNG.normal(size=(53, 7)).astype(">f8"), "real values", np.float32),
    "counts": (RNG.integers(0, 2000, (53, 7)).astype(np.uint16), "counts", np.float32),
}


def as_stored(array: np.ndarray, dtype: type) -> dict[str, np.ndarray]:
    """By the words of README alone: channels first, split 80/10/10 by the frozen permutation."""
    array = array[..., None] if array.ndim == 3 else array
    array = (np.moveaxis(array, -1, 1) if array.ndim == 4 else array).astype(dtype)
    order = np.random.RandomState(777).permutation(len(array))
    return {"validation": array[order[-5:]], "test": array[order[-10:-5]], "train": array[order[:-10]]}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("time", ["first", "second"])
@pytest.mark.parametrize("what", FILES)
def test_a_large_file_is_what_numpy_reads_of_it(tmp_path: Path, what: str, time: str) -> None:
    array, kind, dtype = FILES[what]
    path = tmp_path / "own.npy"
    np.save(path, array)
    read = data.load(str(path))
    read = data.load(str(path)) if time == "second" else read
    assert read.kind == kind
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for split, images in as_stored(array, dtype).items():
        np.testing.assert_array_equal(getattr(read, split).numpy(), images, strict=True)
    assert data.is_mapped(read.train)


@pytest.mark.parametrize("what", FILES)
def test_a_large_file_is_described_as_a_small_one(tmp_path: Path, what: str, request: pytest.FixtureRequest) -> None:
    np.save(tmp_path / "own.npy", FILES[what][0])
    small = data.load(str(tmp_path / "own.npy"))
    request.getfixturevalue("large")
    read = data.load(str(tmp_path / "own.npy"))
    assert read.describe() == small.describe()
    assert read.spread == small.spread


@pytest.mark.usefixtures("large")
def test_a_large_file_is_read_once(tmp_path: Path) -> None:
    """A second file of the same size and time in its place goes unseen, so it was not read."""
    path = tmp_path / "own.npy"
    np.save(path, FILES["reals"][0])
    before, status = data.load(str(path)).train.clone(), path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(data.load(str(path)).train, before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="not a readable array file"):
        data.load(str(path))


@pytest.mark.usefixtures("large")
def test_a_large_file_is_read_where_nothing_can_be_kept(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.write_text("a file")
    array, _, dtype = FILES["reals"]
    np.save(tmp_path / "own.npy", array)
    read = data.load(str(tmp_path / "own.npy"))
    for split, images in as_stored(array, dtype).items():
        np.testing.assert_array_equal(getattr(read, split).numpy(), images, strict=True)
    assert "own.npy: not kept in the cache folder" in capsys.readouterr().err


REFUSED: dict[str, tuple[np.ndarray, str]] = {
    "NaN": (np.where(np.arange(400).reshape(40, 10) == 333, np.nan, 0.5), "expected finite values"),
    "beyond single precision": (np.full((40, 10), 1e39), "expected finite values"),
    "words": (np.full((40, 10), "ab"), "expected numbers, got dtype <U2"),
    "negative": (np.arange(-3, 397).reshape(40, 10), "from -3 to 396 in train"),
    "one axis": (np.arange(400) / 7, "expected .* got shape .400,. in train"),
    "no pixels": (np.zeros((40, 10, 0)), "expected at least one pixel"),
    "few": (RNG.normal(size=(9, 40)), "expected at least 10 images to split, got 9"),
    "far from 0": (1e9 + RNG.normal(size=(40, 10)), "tell apart, got float64 around 1e.09 with a spread of .*train"),
    "images far from 0": (1e9 + RNG.normal(size=(40, 2, 5)), "around 1e.09 with a spread of .* in train"),
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_so_at_every_size(
    tmp_path: Path, what: str, size: str, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    array, words = REFUSED[what]
    np.save(tmp_path / "own.npy", array)
    with pytest.raises(ValueError, match=f"own.npy: .*{words}"):
        data.load(str(tmp_path / "own.npy"))


# --- Sizes in headers ---


def header_of(shape: object, dtype: str = "<f8") -> bytes:
    """An .npy header that numpy would not write."""
    words = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words


LIES = {
    "terabytes": header_of((10**9, 1000)) + bytes(80),
    "more than any address": header_of((10**20, 10**20)) + bytes(80),
    "a row too many": header_of((11, 1)) + bytes(80),
    "a row too few": header_of((9, 1)) + bytes(80),
    "below zero": header_of((-10, -1)) + bytes(80),
    "yes or no": header_of((True, 10)) + bytes(80),
    "objects": header_of((10, 1), "|O") + bytes(80),
    "no shape": header_of("None") + bytes(80),
    "no header": b"\x93NUMPY\x01\x00",
    "another version": b"\x93NUMPY\x09\x00" + header_of((10, 1))[8:] + bytes(80),
}


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("container", ["npy", "npz"])
@pytest.mark.parametrize("lie", LIES)
def test_an_array_whose_header_lies_is_refused_in_one_line(
    tmp_path: Path, lie: str, container: str, size: str, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    path = tmp_path / f"own.{container}"
    if container == "npy":
        path.write_bytes(LIES[lie])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.npy", LIES[lie])
    with pytest.raises(ValueError, match=f"own.{container}: not a readable array file: ") as refused:
        data.load(str(path))
    assert "\n" not in str(refused.value)
    assert "allow_pickle" not in str(refused.value)


def test_an_archive_that_expands_beyond_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "own.npz", np.zeros((100, 2**20), np.uint8))
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"its arrays take 104,857,728 bytes, more than 200 times the file"):
        data.load(str(tmp_path / "own.npz"))


def test_an_archive_that_expands_within_the_limit_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "own.npz", np.zeros((100, 2**17), np.uint8))
    assert data.load(str(tmp_path / "own.npz")).event_shape == (2**17,)


def test_arrays_that_exceed_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "own.npz", RNG.integers(0, 256, (100, 2**10), np.uint8))
    monkeypatch.setattr(machine, "get_available_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"its arrays take 102,528 bytes, and 100,000 are available; save it as \.npy"):
        data.load(str(tmp_path / "own.npz"))


@pytest.mark.parametrize("names", [("train", "train.npy"), ("train.npy", "train")], ids=str)
def test_two_arrays_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """Of which one would be checked, and the other one be loaded."""
    np.save(tmp_path / "one.npy", RNG.integers(0, 256, (40, 10), np.uint8))
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as archive:
        for name in names:
            archive.writestr(name, (tmp_path / "one.npy").read_bytes() if name.endswith(".npy") else b"no array")
    message = r"own\.npz: not a readable array file: expected one array of each name, got two named 'train'$"
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "own.npz"))


def test_memory_that_runs_out_is_not_taken_for_a_broken_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "own.npz", RNG.integers(0, 256, (40, 10), np.uint8))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", full)
    message = r"own\.npz: the memory ran out while it was read; save it as \.npy, which is not read into memory$"
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / "own.npz"))


def test_one_array_under_several_names_of_an_archive_counts_each_time(tmp_path: Path) -> None:
    """Members that overlap in the file, each a bomb within the limit of one."""
    np.savez_compressed(tmp_path / "one.npz", train=np.zeros((100, 2**19), np.uint8))
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        content = archive.read("train.npy")
    with zipfile.ZipFile(tmp_path / "own.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train", "valid", "test"):
            archive.writestr(f"{name}.npy", content)
    with pytest.raises(ValueError, match="its arrays take 157,286,784 bytes, more than 200 times the file"):
        data.load(str(tmp_path / "own.npz"))


# --- The same numbers in parts ---


@pytest.fixture
def gray() -> data.Splits:
    levels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (90, 1, 5, 6), np.uint8))
    return data.Splits("gray", data.LEVELS, levels[:50], levels[50:70], levels[70:], sha256="", split="")


def seen_whole(splits: data.Splits, split: str, word: str) -> np.ndarray:
    """Each protocol in one call of the published generators, by numpy and torch."""
    stored = {name: getattr(splits, name).numpy() for name in SPLITS}
    rate = {name: levels.astype(np.float32) / np.float32(255) for name, levels in stored.items()}
    if word in ("dynamic", "fixed"):
        stream = np.random.RandomState(777)
        drawn = {name: stream.binomial(1, rate[name]) for name in ("validation", "test", "train")}
        return drawn[split].astype(np.float32)
    if word == "dequantized":
        generator = torch.Generator().manual_seed(777 + ("test", "validation", "train").index(split))
        u = torch.rand(stored[split].shape, generator=generator).numpy()
        return (stored[split].astype(np.float32) + u) / np.float32(256)
    values = {"threshold": rate[split] >= 0.5, "none": rate[split], "levels": stored[split]}
    return values[word].astype(np.float32)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("word", data.PIXELS)
def test_images_are_the_same_whole_and_in_parts(
    gray: data.Splits, word: str, split: str, size: str, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    x = data.evaluation_images(gray, split, word)
    np.testing.assert_array_equal(x.numpy(), seen_whole(gray, split, word), strict=True)
    assert data.is_mapped(x) == (size == "large")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("word", ["fixed", "threshold"])
def test_a_stored_draw_is_the_same_in_parts_and_takes_a_byte_a_pixel(gray: data.Splits, word: str) -> None:
    stored, observe = data.training_images(gray, word)
    assert stored.dtype == torch.uint8
    assert data.is_mapped(stored)
    np.testing.assert_array_equal(observe(stored).numpy(), seen_whole(gray, "train", word))


@pytest.mark.usefixtures("large")
def test_a_draw_of_the_evaluations_own_seed_is_the_same_in_parts(gray: data.Splits) -> None:
    x = data.evaluation_images(replace(gray, protocol="iwae"), "test", "dynamic", seed=5)
    rate = gray.test.numpy().astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(x.numpy(), np.random.RandomState(5).binomial(1, rate))


@pytest.mark.parametrize("shape", [(2500, 700), (1000, 257), (1000, 65), (999, 3, 7, 13), (300, 129), (5, 300), (1, 1)])
@pytest.mark.parametrize("what", ["levels", "reals"])
def test_sums_over_images_are_bit_for_bit_those_of_all_columns_at_once(shape: tuple[int, ...], what: str) -> None:
    """What the marginals, and so every training, start from."""
    rng = np.random.default_rng(2)
    array = rng.integers(0, 256, shape, np.uint8) if what == "levels" else rng.normal(3, 2, shape).astype(np.float32)
    x = torch.from_numpy(array)
    mean = x.sum(0, dtype=torch.double) / len(x)
    squares = sum((part.double() - mean).square().sum(0) for part in x.split(1000))
    assert torch.equal(sum_over_images(x), x.sum(0, dtype=torch.double))
    assert torch.equal(mean_and_variance(x)[0], mean)
    assert torch.equal(mean_and_variance(x)[1], squares / len(x))


def test_sums_over_very_many_images_are_those_of_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_marginals_of_large_data_are_those_of_small(what: str, request: pytest.FixtureRequest) -> None:
    family, x = FAMILIES[what]()
    small = family.fit_marginals(x)
    request.getfixturevalue("large")
    assert torch.equal(family.fit_marginals(x), small)


def test_a_median_leaves_the_images_alone() -> None:
    x = torch.randn(40, 1)
    before = x.clone()
    likelihoods.Laplace((1,)).fit_marginals(x)
    assert torch.equal(x, before)


# --- Room ---


@pytest.mark.usefixtures("large")
def test_room_for_much_is_a_file_that_nobody_else_sees(kept: Path) -> None:
    rows = data.allocate((50, 3), torch.float32)
    rows.copy_(torch.arange(150.0).reshape(50, 3))
    assert data.is_mapped(rows[7:])
    assert rows[49].tolist() == [147, 148, 149]
    assert list(kept.iterdir()) == []


def test_room_for_little_is_memory(kept: Path) -> None:
    assert not data.is_mapped(data.allocate((50, 3), torch.float32))
    assert not kept.exists()


@pytest.mark.usefixtures("large")
def test_room_on_a_full_disk_is_memory_after_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "_reserve", full)
    rows = data.allocate((50, 3), torch.float32)
    rows.zero_()
    assert not data.is_mapped(rows)
    expected = f"{kept}: no space for 600 bytes, which go into memory: No space left on device\n"
    assert capsys.readouterr().err == expected


def test_the_memory_that_is_available_is_no_more_than_the_machine_says() -> None:
    available = machine.get_available_memory()
    said = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
    assert said is not None
    assert available is not None
    assert 0 < available < 1024 * int(said[1])


GROUPS = {  # version, the line of /proc/self/cgroup, and the group whose limit is the lowest
    "a job's own, version 2": (2, "0::/slurm/job_7/step_0", "slurm/job_7/step_0"),
    "a job's, version 2": (2, "0::/slurm/job_7/step_0", "slurm/job_7"),
    "a container's, version 2": (2, "0::/", "."),
    "a group of which only a part is mounted, version 2": (2, "0::/kubepods/pod/own", "."),
    "a job's own, version 1": (1, "9:name=systemd:/\n4:cpu,memory:/slurm/job_7\n0::/", "memory/slurm/job_7"),
    "a job's, version 1": (1, "4:memory:/slurm/job_7/step_0", "memory/slurm"),
    "a container's, version 1": (1, "4:memory:/docker/0123", "memory"),
}
FILES_OF_GROUPS = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "file"),
}


@pytest.mark.parametrize("what", GROUPS)
def test_the_memory_that_is_available_is_what_the_control_groups_leave(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, line, lowest = GROUPS[what]
    (tmp_path / "own").write_text(f"{line}\n")
    monkeypatch.setattr(machine, "_PROCESS_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_ALL_GROUPS", tmp_path / "all")
    places = {"slurm/job_7/step_0", "slurm/job_7", "slurm", "."} if version == 2 else {"memory/slurm/job_7", "memory"}
    for place in {*places, lowest}:
        group = tmp_path / "all" / place
        group.mkdir(parents=True, exist_ok=True)
        limit = 2_000_000 if place == lowest else 9_000_000 if version == 1 else "max"
        for name, value in zip(FILES_OF_GROUPS[version][:2], (limit, 1_500_000), strict=True):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 1\n{FILES_OF_GROUPS[version][2]} 300000\n")
    assert machine.get_available_memory() == 800_000


# --- Under a limit ---

LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ppl_vae import data, likelihoods
from ppl_vae.data import machine, sources, transforms
path, pixels, family, large = sys.argv[1], sys.argv[2], getattr(likelihoods, sys.argv[3]), int(sys.argv[4])
torch.ones(64, 64) @ torch.ones(64, 64)
machine.LARGE = large
used = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + 64 * 2**20,) * 2)
splits = data.load(path)
splits.describe(), splits.spread
x = data.expected_images(splits, pixels)
h = family(splits.event_shape).fit_marginals(x)
for split in ("validation", "test"):
    x = data.evaluation_images(splits, split, pixels)
    data.binarization_entropy(splits, split, pixels)
stored, observe = data.training_images(splits, "fixed" if pixels == "dynamic" else pixels)
print(len(h), data.is_mapped(stored), len(x))
"""


def limited(path: Path, kept: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PPL_VAE_CACHE_DIR": str(kept), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(path), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "pixels", "family"), [("float32", "none", "NormalPerPixel"), ("uint8", "dynamic", "Bernoulli")]
)
def test_a_file_that_is_larger_than_memory_is_prepared_for_training(
    tmp_path: Path, kept: Path, dtype: str, pixels: str, family: str
) -> None:
    """96 MiB in single precision under a limit of 64: that file, or one of levels that become as much."""
    stored = np.lib.format.open_memmap(tmp_path / "own.npy", "w+", dtype, (24 * 256, 4096))
    for rows in np.split(stored, 24):
        rows[:] = RNG.integers(0, 256, rows.shape)
        rows[:] = rows / np.float32(3) if dtype == "float32" else rows
    done = limited(tmp_path / "own.npy", kept, pixels, family, 2**24)
    num_features = 4096 * (2 if dtype == "float32" else 1)
    assert (done.returncode, done.stdout) == (0, f"{num_features} True 614\n"), done.stderr
    if dtype == "float32":  # read whole, it does not fit
        assert "unable to allocate" in limited(tmp_path / "own.npy", kept, pixels, family, 2**40).stderr.lower()
