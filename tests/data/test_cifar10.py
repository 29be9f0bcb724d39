"""CIFAR-10's published files, made up: the archive and its folder give the same images."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_vae import data
from ppl_vae.data import cifar10

COUNT = 1100  # images of a batch
NAMES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
FORMS = ("folder", "archive")


def pixels(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (COUNT, 3072), np.uint8)


def labels(batch: int) -> np.ndarray:
    return np.random.default_rng(100 + batch).integers(0, 10, COUNT, np.uint8)


def binary(batch: int) -> bytes:
    return np.concatenate([labels(batch)[:, None], pixels(batch)], axis=1).tobytes()


def write(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, bytes] | None = None) -> None:
    """Writes made-up batches, whose checksums are taken for the published ones."""
    contents = {name: binary(batch) for batch, name in enumerate(NAMES)} | (replaced or {})
    monkeypatch.setattr(cifar10, "_NUM_IMAGES", COUNT)
    checksums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(cifar10, "_BATCHES_MD5", checksums)
    if form == "folder":
        (folder / "cifar-10-batches-bin").mkdir()
        for name, content in contents.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(content)
        return
    path = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        others = {"../outside": b"no", "cifar-10-batches-bin/readme.html": b"words"}
        for name, content in (others | {f"cifar-10-batches-bin/{name}": contents[name] for name in NAMES}).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())


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


def test_nothing_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "archive", monkeypatch)
    data.load("cifar10", data_dir=str(folder))
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "cifar-10-binary.tar.gz"]


def test_the_version_for_python_is_not_read(tmp_path: Path) -> None:
    """It is a pickle; the message says which file to fetch instead, and where to put it."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*place there cifar-10-binary.tar.gz of https://") as refused:
        data.load("cifar10", data_dir=str(tmp_path), download=False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_with_another_checksum_is_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, form, monkeypatch)
    monkeypatch.setitem(cifar10._BATCHES_MD5, "data_batch_2.bin", "0" * 32)
    with pytest.raises(ValueError, match=r"data_batch_2.*checksum"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "archive", monkeypatch)
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", "0" * 32)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz.*checksum"):
        data.load("cifar10", data_dir=str(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_no_more_than_a_batch_is_read_of_a_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, form, monkeypatch, {"data_batch_1.bin": bytes(30_000_000)})
    contents = dict(cifar10._read_batches(tmp_path))
    assert len(contents["data_batch_1.bin"]) == len(binary(0)) + 1
    with pytest.raises(ValueError, match=r"data_batch_1.*expected 3,380,300 bytes"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_a_missing_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "folder", monkeypatch)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"got no data_batch_4"):
        data.load("cifar10", data_dir=str(tmp_path))


def test_labels_beyond_nine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(binary(0))
    content[3073] = 10
    write(tmp_path, "folder", monkeypatch, {"data_batch_1.bin": bytes(content)})
    with pytest.raises(ValueError, match=r"data_batch_1.*expected labels from 0 to 9, got 10"):
        data.load("cifar10", data_dir=str(tmp_path))
