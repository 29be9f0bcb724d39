"""Fashion-MNIST, KMNIST, CIFAR-10 and SVHN, downloaded by torchvision, which is imported only then.

It reads them too, each file after its checksum, but for CIFAR-10, which it would unpickle.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ppl_vae.data import cifar10
from ppl_vae.data.array_files import MissingPackageError, import_loadmat
from ppl_vae.data.splits import LEVELS, Splits

_DIGITS = tuple("0123456789")


class _Source(NamedTuple):
    """Reader of a data set, its files in the data folder, and its published properties."""

    read: Callable[
        ..., tuple[Any, Any]
    ]  # (name, folder, *, download) -> training and test sets, as torchvision has them
    files: tuple[str, ...]
    expected: str
    event_shape: tuple[int, ...]
    num_validation: int
    class_names: tuple[str, ...]


_NOWHERE = "file:///dev/null/"  # a mirror from which nothing comes


def _by_train(own_name: str, name: str, root: str, *, download: bool) -> tuple[Any, Any]:
    make = getattr(_torchvision_datasets(name), own_name)
    if not download:
        if not (Path(root) / own_name / "raw").is_dir():
            raise ValueError(f"no folder {own_name}/raw in it")
        # By download torchvision also means unpacking what is there, which is to go on.
        make = type(own_name, (make,), {"mirrors": [_NOWHERE]})
    if (Path(root) / own_name / "processed").exists():  # torchvision would unpickle what old versions of it left there
        raise ValueError(f"expected no folder {own_name}/processed, which old versions of torchvision wrote; remove it")
    return make(root, train=True, download=True), make(root, train=False, download=True)


def _svhn(name: str, root: str, *, download: bool) -> tuple[Any, Any]:
    import_loadmat(name)
    make = _torchvision_datasets(name).SVHN
    return make(root, split="train", download=download), make(root, split="test", download=download)


def _cifar10(name: str, root: str, *, download: bool) -> tuple[Any, Any]:
    if not cifar10.is_present(Path(root)):
        if not download:
            raise ValueError(f"no {cifar10.ARCHIVE} in it")
        utils = _torchvision_datasets(name).utils
        utils.download_url(cifar10.URL, root, cifar10.ARCHIVE, cifar10.ARCHIVE_MD5)
    return cifar10.read(Path(root))


_SOURCES = {
    "fashion-mnist": _Source(
        read=partial(_by_train, "FashionMNIST"),
        files=("FashionMNIST",),
        expected="FashionMNIST/raw/ with the four .gz files of github.com/zalandoresearch/fashion-mnist",
        event_shape=(1, 28, 28),
        num_validation=10_000,
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "kmnist": _Source(
        read=partial(_by_train, "KMNIST"),
        files=("KMNIST",),
        expected="KMNIST/raw/ with the four .gz files of codh.rois.ac.jp/kmnist",
        event_shape=(1, 28, 28),
        num_validation=10_000,
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
    "cifar10": _Source(
        read=_cifar10,
        files=(),  # read where they are: nothing is unpacked
        expected=f"{cifar10.ARCHIVE} of {cifar10.URL}",
        event_shape=(3, 32, 32),
        num_validation=5_000,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "svhn": _Source(
        read=_svhn,
        files=("train_32x32.mat", "test_32x32.mat"),
        expected="train_32x32.mat and test_32x32.mat of ufldl.stanford.edu/housenumbers",
        event_shape=(3, 32, 32),
        num_validation=7_325,  # a tenth of the 73,257
        class_names=_DIGITS,
    ),
}

DOWNLOADED = tuple(_SOURCES)

# SHA-256 of the pixels, row by row: torchvision checks the archives, but not what was once unpacked from them.
_PIXELS_SHA256 = {
    "fashion-mnist": (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    ),
}


def read_through_torchvision(name: str, data_dir: Path, *, download: bool = True) -> Splits:
    """Read one of the data sets above, uint8 (N, C, H, W), with labels; it is downloaded into ``data_dir`` if missing.

    Without ``download`` nothing is fetched, and no folder is made.

    The last training images are validation: 10,000 of 60,000 of Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) and
    KMNIST (Clanuwat et al. 2018, arXiv 1812.01718), 5,000 of 50,000 of CIFAR-10 (Krizhevsky 2009), 7,325 of 73,257 of
    SVHN (Netzer et al. 2011). A folder that cannot be written is left as it is: its archives are unpacked elsewhere.

    Raises:
        ValueError: torchvision cannot be imported, or the data can be neither read nor downloaded.
    """
    source = _SOURCES[name]
    try:
        with _writable(data_dir, source.files) as root:
            train, test = source.read(name, str(root), download=download)
            pixels = [_channels_first(part.data) for part in (train, test)]
            labels = [_labels(part) for part in (train, test)]
    except MissingPackageError:
        raise
    except Exception as error:  # no network, no space, damaged archives: torchvision raises nearly every type
        tried = f"can be neither read from {data_dir} nor downloaded into it"
        if not download:
            tried = f"cannot be read from {data_dir}, into which nothing is downloaded unless --data-dir names it"
        raise ValueError(f"dataset: {name} {tried} ({_one_line(error)}); place there {source.expected}") from None
    checksums = tuple(hashlib.sha256(part.tobytes()).hexdigest() for part in pixels)
    shapes = [part.shape[1:] for part in pixels]
    if shapes != [source.event_shape] * 2 or checksums != _PIXELS_SHA256.get(name, checksums):
        raise ValueError(f"dataset: {data_dir} holds no {name}, or it is damaged; place there {source.expected}")
    images, numbers, last = torch.from_numpy(pixels[0]), torch.from_numpy(labels[0]), source.num_validation
    return Splits(
        name=name,
        kind=LEVELS,
        train=images[:-last],
        validation=images[-last:],
        test=torch.from_numpy(pixels[1]),
        sha256=hashlib.sha256("".join(checksums).encode()).hexdigest(),
        split=f"the last {last:,} training images are validation",
        labels={"train": numbers[:-last], "validation": numbers[-last:], "test": torch.from_numpy(labels[1])},
        class_names=source.class_names,
    )


def _torchvision_datasets(name: str) -> ModuleType:
    try:
        from torchvision import datasets
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # missing, or made for another torch
        raise MissingPackageError(
            f"dataset: {name} needs torchvision, which cannot be imported ({_one_line(error)}); "
            f"pip install the torchvision that was made for torch {torch.__version__}"
        ) from None
    return datasets


@contextmanager
def _writable(data_dir: Path, files: tuple[str, ...]) -> Iterator[Path]:
    """Yield ``data_dir``, or a temporary copy of its files where it is read-only."""
    present = [path for name in files if (path := data_dir / name).exists()]
    folders = [data_dir, *(folder for path in present for folder in (path, *path.rglob("*")) if folder.is_dir())]
    if not present or all(_may_write(folder) for folder in folders):
        yield data_dir
        return
    with TemporaryDirectory() as temporary:
        for path in present:
            copy = Path(temporary) / path.name
            if path.is_dir():
                _copy_folder(path, copy)
            else:
                shutil.copyfile(path, copy)
        yield Path(temporary)


def _copy_folder(source: Path, copy: Path) -> None:
    """Copy a folder's files without their modes: a copy of a read-only folder would be read-only as well."""
    copy.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy_folder(path, copy / path.name)
        else:
            shutil.copyfile(path, copy / path.name)


def _may_write(folder: Path) -> bool:
    """Whether a folder is writable, also by its mode: root should not write into one marked read-only."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _channels_first(stored: Any) -> np.ndarray:
    """Convert torchvision's (N, H, W), (N, H, W, 3) or (N, 3, H, W) to (N, C, H, W) uint8."""
    array = np.asarray(stored)
    if array.dtype != np.uint8:
        raise ValueError(f"expected bytes, got {array.dtype}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] == 3:
        array = array.transpose(0, 3, 1, 2)
    return np.array(array, order="C")  # a copy of its own: what torchvision gives may be read-only


def _labels(part: Any) -> np.ndarray:
    labels = np.asarray(part.labels if hasattr(part, "labels") else part.targets, dtype=np.int64)
    if labels.shape != (len(part.data),):
        raise ValueError(f"expected a label for each of {len(part.data):,} images, got shape {labels.shape}")
    return labels


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
