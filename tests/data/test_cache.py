"""Data: images that were read once, kept in the cache folder; what is damaged, stale, full or killed there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppl_vae import data
from ppl_vae.data import image_files

SHAPE = (5, 6)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """31 gray and color images of two classes, and one that is broken."""
    rng = np.random.default_rng(0)
    for i in range(31):
        shape = SHAPE if i % 3 else (*SHAPE, 3)
        write(tmp_path / "own" / ("cat", "dog")[i % 2] / f"{i:02}.png", rng.integers(0, 256, shape, np.uint8))
    (tmp_path / "own" / "cat" / "broken.png").write_bytes(b"no image")
    return tmp_path / "own"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was decoded, file by file."""
    seen: list[bytes] = []
    decode = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda raw: seen.append(raw) or decode(raw))
    return seen


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """The splits by the words of the manual alone: each file by Pillow, in the order of the names, split 80/10/10."""
    files = sorted(folder.rglob("[0-9]*.png"), key=lambda path: path.relative_to(folder).as_posix())
    images = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in files])
    labels = np.array([["cat", "dog"].index(path.parent.name) for path in files])
    order = np.random.RandomState(777).permutation(len(files))
    tenth = len(files) // 10
    parts = {"validation": order[-tenth:], "test": order[-2 * tenth : -tenth], "train": order[: -2 * tenth]}
    content = {split: torch.from_numpy(images[part]) for split, part in parts.items()}
    return content | {f"{split} labels": torch.from_numpy(labels[part]) for split, part in parts.items()}


def assert_right(read: data.Splits, folder: Path) -> None:
    right = expected(folder)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(read, split), right[split])
        assert torch.equal(read.labels[split], right[f"{split} labels"])


def entries(kept: Path) -> list[Path]:
    return sorted(path.parent for path in kept.glob("[!.]*/splits.json"))


# --- What is kept ---


def test_a_folder_is_what_pillow_reads_of_it_decoded_once(own, decoded):
    first, second = data.load(str(own)), data.load(str(own))
    assert len(decoded) == 32
    for read in (first, second):
        assert_right(read, own)
    assert second.describe() == first.describe()
    assert (second.sha256, second.unreadable, second.class_names) == (first.sha256, first.unreadable, ("cat", "dog"))
    assert second.spread == first.spread
    addresses = {getattr(second, split).untyped_storage().data_ptr() for split in ("train", "validation", "test")}
    assert len(addresses) == 1  # all splits are one mapped file
    assert data.is_mapped(second.train)
    assert not data.is_mapped(second.train.clone())


# --- What is stale ---


CHANGES = {
    "touched": lambda own: os.utime(own / "cat" / "00.png", (1, 1)),
    "changed": lambda own: write(own / "cat" / "00.png", np.zeros((*SHAPE, 3), np.uint8)),
    "added": lambda own: write(own / "cat" / "31.png", np.zeros(SHAPE, np.uint8)),
    "removed": lambda own: (own / "dog" / "01.png").unlink(),
    "moved": lambda own: (own / "dog" / "01.png").rename(own / "cat" / "01.png"),
    "changed, with its time put back": lambda own: write_as_of_before(own / "cat" / "00.png"),
}


def write_as_of_before(path: Path) -> None:
    """Another content of the same size, whose time of change says nothing of it."""
    status = path.stat()
    time.sleep(0.02)  # the system's clock for files has ticks
    content = bytearray(path.read_bytes())
    content[content.index(b"IEND") - 5] ^= 1  # within the checksum of the pixels, which Pillow does not look at there
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_which_a_file_changed_is_read_again(own, kept, decoded, change):
    data.load(str(own))
    decoded.clear()
    CHANGES[change](own)
    assert_right(data.load(str(own)), own)
    assert len(decoded) >= 31
    assert len(entries(kept)) == 1


# --- What is damaged ---


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, empty, halve])
@pytest.mark.parametrize("name", ["images.npy", "splits.json"])
def test_an_entry_with_a_broken_file_is_made_again(own, kept, decoded, name, damage):
    data.load(str(own))
    damage(entries(kept)[0] / name)
    for _ in range(2):
        assert_right(data.load(str(own)), own)
    assert len(decoded) == 64


# --- Where nothing can be kept ---


def run(code: str, kept: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PPL_VAE_CACHE_DIR": str(kept), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


FULL = """
import resource, sys
from ppl_vae import data
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
print(data.load(sys.argv[1]).train.sum().item())
"""


@pytest.mark.thorough
@pytest.mark.parametrize("most", [100, 1000])
def test_a_disk_that_is_full_stops_nothing_and_leaves_nothing(own, kept, most):
    """No file may be longer than 100 bytes (the images as they are read), or 1,000 (these fit, and the entry not)."""
    for path in own.rglob("*.png"):
        if not path.stem.isdigit() or int(path.stem) >= 12:
            path.unlink()
    done = run(FULL, kept, own, most)
    assert (done.returncode, int(done.stdout)) == (0, int(expected(own)["train"].sum()))
    assert [line for line in done.stderr.splitlines() if "not kept in the cache folder" in line] != []
    assert [path.name for path in kept.iterdir() if path.suffix != ".lock"] == []


# --- Processes ---


KILLED = """
import os, signal, sys
from ppl_vae import data
from ppl_vae.data import image_files, storage
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
where = sys.argv[2]
if where == "reading":
    decode, seen = image_files.decode, []
    image_files.decode = lambda raw: kill() if len(seen) > 20 else seen.append(0) or decode(raw)
elif where == "writing":
    storage._write_rest = kill
else:
    os.rename = kill
data.load(sys.argv[1])
"""


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["reading", "writing", "renaming"])
def test_a_process_that_is_killed_leaves_no_wrong_entry(own, kept, where):
    assert run(KILLED, kept, own, where).returncode == -signal.SIGKILL
    assert entries(kept) == []
    assert_right(data.load(str(own)), own)
    assert len(entries(kept)) == 1
    assert list(kept.glob(".*")) == []


def test_two_at_once_read_a_folder_once(own, decoded):
    read: list[data.Splits] = []
    both = [threading.Thread(target=lambda: read.append(data.load(str(own)))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert len(decoded) == 32
    for one in read:
        assert_right(one, own)
