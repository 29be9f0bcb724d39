"""Published sets of gray and color images: MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and SVHN.

MNIST is part of the package. The files of the others are read from the data folder, into which they are downloaded
where they are missing. A file whose MD5 is not the published one is not opened.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import struct
import tarfile
from collections.abc import Callable, Iterable
from http.client import HTTPException
from importlib.resources import files
from os.path import isfile  # False, where pathlib would raise, in a folder that is closed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.hub import download_url_to_file

from ppl_vae.data.splits import LEVELS, Splits
from ppl_vae.runtime.process import has_terminal

_DIGITS = tuple("0123456789")

# --- MNIST ---

_IDX_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def read_mnist(data_dir: Path, *, download: bool = True) -> Splits:
    """MNIST (LeCun and Cortes), from the package itself: 50,000 / 10,000 / 10,000 images (1, 28, 28).

    Raises ValueError where its files are missing or damaged.
    """
    contents = []
    for name, sha256 in _IDX_SHA256.items():
        resource = files("ppl_vae") / "mnist" / f"{name}.xz"
        try:
            content = lzma.decompress(resource.read_bytes())
        except (OSError, lzma.LZMAError) as error:
            raise ValueError(
                f"{resource}: the embedded MNIST cannot be read ({error}); install the package again"
            ) from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{resource}: the checksum is not that of MNIST; install the package again")
        contents.append(content)
    sha256 = hashlib.sha256("".join([*_IDX_SHA256.values()][:2]).encode()).hexdigest()
    return _split_idx("mnist", contents, _DIGITS, sha256)


def _split_idx(name: str, contents: Iterable[bytes], class_names: tuple[str, ...], sha256: str | None = None) -> Splits:
    """Build the splits of the four files of MNIST's format."""
    train, test, train_labels, test_labels = map(_parse_idx, contents)
    return _split(name, (train[:, None], train_labels), (test[:, None], test_labels), 10_000, class_names, sha256)


def _parse_idx(content: bytes) -> np.ndarray:
    """Parse the IDX format: two zeros, the type (8: bytes), the number of axes, their lengths, and the bytes."""
    num_axes = content[3]
    shape = struct.unpack(f">{num_axes}I", content[4 : 4 + 4 * num_axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape).copy()


def _split(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_validation: int,
    class_names: tuple[str, ...],
    sha256: str | None = None,
) -> Splits:
    """Build the splits of images (N, C, H, W) and labels (N,); the last training images are validation.

    ``sha256`` is that of the data set; None: of the checksums of the two sets of pixels.
    """
    if sha256 is None:
        checksums = (hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest() for pixels, _ in (train, test))
        sha256 = hashlib.sha256("".join(checksums).encode()).hexdigest()
    images, test_images = torch.from_numpy(train[0]), torch.from_numpy(test[0])
    labels, test_labels = (torch.from_numpy(part[1].astype(np.int64)) for part in (train, test))
    return Splits(
        name,
        LEVELS,
        images[:-num_validation],
        images[-num_validation:],
        test_images,
        sha256=sha256,
        split=f"the last {num_validation:,} training images are validation",
        labels={"train": labels[:-num_validation], "validation": labels[-num_validation:], "test": test_labels},
        class_names=class_names,
    )


# --- Files that are downloaded ---


class PublishedFile(NamedTuple):
    """A file of a data set: its path in the data folder, its address and its MD5."""

    path: str
    url: str
    md5: str


def get_published_file(name: str, data_dir: Path, file: PublishedFile, *, download: bool) -> Path:
    """Return the path of a published file, which is downloaded if it is missing and ``download`` allows it.

    Raises ValueError, which names the data set, where the file is missing, or is another one than the published file.
    """
    path = data_dir / file.path
    if not isfile(path):
        advice = f"fetch {file.url} by other means, and save it as {path}"
        if not download:
            raise ValueError(
                f"dataset: {name}: {path} is missing, and is downloaded only into a folder that --data-dir names; "
                + advice
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(file.url, str(path), progress=has_terminal())
        except (OSError, HTTPException, ValueError) as error:  # no answer, a cut one, a full disk, another file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"dataset: {name}: {file.url} cannot be downloaded ({reason}); {advice}") from None
    try:
        with path.open("rb") as content:
            md5 = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise ValueError(f"dataset: {name}: {path} cannot be read: {error.strerror}") from None
    if md5 != file.md5:
        raise ValueError(
            f"dataset: {name}: the checksum of {path} is not that of the published file; "
            f"delete it, and fetch {file.url} again"
        )
    return path


def import_loadmat(name: str) -> Callable[..., dict[str, np.ndarray]]:
    """Import ``scipy.io.loadmat``, which reads MATLAB's files. Raises ValueError where scipy is not installed."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            f"dataset: {name} is a MATLAB file, and scipy, which reads it, is not installed; "
            "pip install 'ppl_vae[datasets]'"
        ) from None
    return loadmat


def _idx_files(folder: str, url: str, *md5s: str) -> tuple[PublishedFile, ...]:
    names = (f"{name}.gz" for name in _IDX_SHA256)
    return tuple(PublishedFile(f"{folder}/raw/{name}", url + name, md5) for name, md5 in zip(names, md5s, strict=True))


_FASHION_MNIST = _idx_files(
    "FashionMNIST",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    *("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "bef4ecab320f06d8554ea6380940ec79"),
    *("25c81989df183df01b3e8a0aad5dffbe", "bb300cfdad3c16e7a12a480ee83cd310"),
)
_KMNIST = _idx_files(
    "KMNIST",
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    *("bdb82020997e1d708af4cf47b453dcf7", "5c965bf0a639b31b8f53240b1b52f4d7"),
    *("e144d726b3acfaa3e44228e80efcd344", "7320c461ea6c1c855c0b718fb2a4b134"),
)
_CIFAR10 = PublishedFile(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
)
_SVHN = tuple(
    PublishedFile(f"{split}_32x32.mat", f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat", md5)
    for split, md5 in (("train", "e26dedcc434d2e4c54c9b2d4a06d8373"), ("test", "eb5a983be6a315427106f1b164d9cef3"))
)


def read_fashion_mnist(data_dir: Path, *, download: bool = True) -> Splits:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 50,000 / 10,000 / 10,000 images (1, 28, 28)."""
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    return _read_idx_set("fashion-mnist", data_dir, _FASHION_MNIST, class_names, download=download)


def read_kmnist(data_dir: Path, *, download: bool = True) -> Splits:
    """KMNIST (Clanuwat et al. 2018, arXiv 1812.01718): 50,000 / 10,000 / 10,000 images (1, 28, 28)."""
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    return _read_idx_set("kmnist", data_dir, _KMNIST, class_names, download=download)


def _read_idx_set(
    name: str, data_dir: Path, published: tuple[PublishedFile, ...], class_names: tuple[str, ...], *, download: bool
) -> Splits:
    """Read the four files of a data set in the format of MNIST."""
    paths = [get_published_file(name, data_dir, file, download=download) for file in published]
    return _split_idx(name, (gzip.decompress(path.read_bytes()) for path in paths), class_names)


def read_cifar10(data_dir: Path, *, download: bool = True) -> Splits:
    """CIFAR-10 (Krizhevsky 2009): 45,000 / 5,000 / 10,000 images (3, 32, 32).

    Read from the published binary version, without unpacking it on disk. The version for Python is a pickle, and is
    not read. Each image is a byte with its label, and then its pixels.
    """
    path = get_published_file("cifar10", data_dir, _CIFAR10, download=download)
    batches = []
    with tarfile.open(path, "r:gz") as archive:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            member = archive.extractfile(f"cifar-10-batches-bin/{name}.bin")
            assert member is not None, f"{name} is a file of the published archive"
            batches.append(np.frombuffer(member.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    *train, test = batches
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    parts = [(np.array(rows[:, 1:]).reshape(-1, 3, 32, 32), rows[:, 0]) for rows in (np.concatenate(train), test)]
    return _split("cifar10", parts[0], parts[1], 5_000, class_names)


def read_svhn(data_dir: Path, *, download: bool = True) -> Splits:
    """SVHN (Netzer et al. 2011): 65,932 / 7,325 / 26,032 images (3, 32, 32)."""
    loadmat = import_loadmat("svhn")
    parts = []
    for file in _SVHN:
        stored = loadmat(get_published_file("svhn", data_dir, file, download=download))
        labels = stored["y"].reshape(-1) % 10  # the digit 0 is stored as 10
        parts.append((np.ascontiguousarray(stored["X"].transpose(3, 2, 0, 1)), labels))
    return _split("svhn", parts[0], parts[1], 7_325, _DIGITS)
