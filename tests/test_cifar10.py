"""CIFAR-10's published files, made up: both versions give the same images, and what a pickle asks for is never done."""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.data import cifar10

COUNT = 1100  # of a batch: the labels of so many are pickled in two groups
NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (COUNT, 3072), np.uint8)


def labels(batch: int) -> np.ndarray:
    return np.random.default_rng(100 + batch).integers(0, 10, COUNT, np.uint8)


def pickled(batch: int) -> bytes:
    """As Python 2 wrote a batch, opcode by opcode: {"batch_label": ..., "labels": [...], "data": array, ...}."""

    def word(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    numbers = labels(batch).tolist()
    groups = [numbers[first : first + 1000] for first in range(0, COUNT, 1000)]
    of_labels = b"]q\x04" + b"".join(b"(" + b"".join(b"K" + bytes([n]) for n in group) + b"e" for group in groups)
    raw = pixels(batch).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87R(K\x01M\x4c\x04M\x00\x0c"
        b"\x86cnumpy\ndtype\nq\x07U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    names = b"](" + b"".join(word(f"image_{i}.png") for i in range(COUNT)) + b"e"
    return (
        b"\x80\x02}q\x01("
        + (word("batch_label") + b"q\x02" + word("training batch 1 of 5") + b"q\x03")
        + (word("labels") + of_labels + word("data") + array + word("filenames") + names)
        + b"u."
    )


def in_binary(batch: int) -> bytes:
    return np.concatenate([labels(batch)[:, None], pixels(batch)], axis=1).tobytes()


def archive(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch, **replaced: bytes) -> None:
    """One of the four forms, whose checksums are taken for the published ones."""
    monkeypatch.setattr(cifar10, "_NUM_IMAGES", COUNT)
    inside, end, make = {
        "python": (cifar10.PYTHON_FOLDER, "", pickled),
        "binary": (cifar10.BINARY_FOLDER, ".bin", in_binary),
    }[version.split()[0]]
    contents = {name: make(batch) for batch, name in enumerate(NAMES)} | replaced
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    for published in ("_PYTHON_MD5", "_BINARY_BATCHES_MD5"):
        monkeypatch.setattr(cifar10, published, sums)
    if version.endswith("folder"):
        (folder / inside).mkdir()
        for name, content in contents.items():
            (folder / inside / f"{name}{end}").write_bytes(content)
        return
    path = folder / {"python": cifar10.PYTHON_ARCHIVE, "binary": cifar10.BINARY_ARCHIVE}[version.split()[0]]
    others = {"../outside": b"no", f"{inside}/readme.html": b"words"}
    archive(path, others | {f"{inside}/{name}{end}": content for name, content in contents.items()})
    monkeypatch.setattr(cifar10, "BINARY_MD5", hashlib.md5(path.read_bytes()).hexdigest())


FORMS = ("python folder", "python archive", "binary folder", "binary archive")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_images_and_their_labels(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, form, monkeypatch)
    read = data.load("cifar10", data_dir=str(tmp_path))
    expected = torch.from_numpy(np.concatenate([pixels(batch) for batch in range(5)]).reshape(-1, 3, 32, 32))
    numbers = torch.from_numpy(np.concatenate([labels(batch) for batch in range(5)]).astype(np.int64))
    assert torch.equal(torch.cat([read.train, read.validation]), expected)
    assert torch.equal(torch.cat([read.labels["train"], read.labels["validation"]]), numbers)
    assert torch.equal(read.test.flatten(1), torch.from_numpy(pixels(5)))
    assert read.labels["test"].tolist() == labels(5).tolist()


def test_the_made_up_pickles_are_what_pickle_would_read() -> None:
    """By pickle's own table of instructions, none of which is carried out."""
    content = pickled(3)
    pickletools.dis(content, io.StringIO())  # refuses a stack or a memo that does not come out
    words = [(op.name, value) for op, value, _ in pickletools.genops(content)]
    raw = [value for name, value in words if name == "BINSTRING"]
    first, last = (words.index(("SHORT_BINSTRING", key)) for key in ("labels", "data"))
    assert [value.encode("latin-1") for value in raw] == [pixels(3).tobytes()]
    assert [value for name, value in words[first:last] if name == "BININT1"] == labels(3).tolist()


def test_nothing_but_the_archive_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "python archive", monkeypatch)
    data.load("cifar10", data_dir=str(folder))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "data",
        f"data/{cifar10.PYTHON_ARCHIVE}",
    ]


def test_a_pickle_that_calls_a_function_calls_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its checksum is right: the call stands before the images."""
    harm = tmp_path / "harm"
    call = b"cos\nmkdir\n(U" + bytes([len(os.fspath(harm))]) + os.fspath(harm).encode() + b"tR0"
    honest = pickled(0)
    write(tmp_path, "python folder", monkeypatch, data_batch_1=honest[:2] + call + honest[2:])
    data.load("cifar10", data_dir=str(tmp_path))
    assert not harm.exists()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("python folder", f"{cifar10.PYTHON_FOLDER}/data_batch_2"),
        ("binary folder", f"{cifar10.BINARY_FOLDER}/data_batch_2.bin"),
    ],
)
def test_a_batch_with_another_checksum_is_refused(
    form: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, form, monkeypatch)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_2: its checksum is not the published one"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "binary archive", monkeypatch)
    monkeypatch.setattr(cifar10, "BINARY_MD5", "0" * 32)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz: its checksum is not the published one"):
        data.load("cifar10", data_dir=str(tmp_path))


@pytest.mark.parametrize("form", ["python archive", "binary folder", "python folder"])
def test_a_file_larger_than_a_batch_is_not_read_whole(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "_MOST_OVERHEAD", 100_000)
    write(tmp_path, form, monkeypatch, data_batch_1=bytes(10_000_000))
    with pytest.raises(ValueError, match=r"data_batch_1(\.bin)?: expected at most [\d,]+ bytes, got more"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_a_missing_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "binary folder", monkeypatch)
    (tmp_path / cifar10.BINARY_FOLDER / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match="got no data_batch_4"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_labels_beyond_nine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(in_binary(0))
    content[3073] = 10
    write(tmp_path, "binary folder", monkeypatch, data_batch_1=bytes(content))
    with pytest.raises(ValueError, match="data_batch_1: expected a label from 0 to 9"):
        data.load("cifar10", data_dir=str(tmp_path))
