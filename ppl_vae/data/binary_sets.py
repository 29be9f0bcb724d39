"""Published sets of binary images in the data folder: static MNIST and Caltech-101 Silhouettes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os.path import isfile  # False, where pathlib would raise, in a folder that is closed
from pathlib import Path

import numpy as np
import torch

from ppl_vae.data.array_files import read_arrays
from ppl_vae.data.image_sets import PublishedFile, get_published_file, import_loadmat
from ppl_vae.data.splits import BINARY, SPLIT_ORDER, Splits

_NUM_PIXELS = 28 * 28

# SHA-256 of each split's pixels, one byte each, row by row.
_STATIC_MNIST_SHA256 = {
    "train": "43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a",
    "validation": "069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e",
    "test": "ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86",
}
_CALTECH_SHA256 = {
    "train": "4e667900732526e6c757b385151c31812ec071b1e833dcad1f10cbe9c12e9a96",
    "validation": "d31899cd9a8421bad5500bdfa166ea93b6490c6f67abbd09826603751801628d",
    "test": "caf9bfb9732aced2ed6d7cfb7bf678eb933622574c87a3ce159a3c76dcb2b722",
}
_CALTECH_URL = "https://people.cs.umass.edu/~marlin/data/caltech101_silhouettes_28_split1.mat"
_CALTECH_MAT_MD5 = "4483e9c14b188fd09937f9ea6f9ea777"  # as in NEVIS'22 (github.com/google-deepmind/dm_nevis)

_STATIC_NPZ = "static_mnist.npz"
_CALTECH_NPZ, _CALTECH_MAT = "caltech101_silhouettes.npz", "caltech101_silhouettes_28_split1.mat"
_WORDS = {"train": "train", "validation": "valid", "test": "test"}
_STATIC_AMAT = {split: f"binarized_mnist_{word}.amat" for split, word in _WORDS.items()}


def read_static_mnist(data_dir: Path, *, download: bool = True) -> Splits:
    """MNIST binarized once (Larochelle and Murray 2011): 50,000 / 10,000 / 10,000 images (1, 28, 28) in {0, 1}.

    It is read from static_mnist.npz (np.packbits of each split) or from the published files
    binarized_mnist_{train,valid,test}.amat, in ``data_dir`` or in its subfolder static_mnist. Nothing is downloaded.
    There are no labels, and the test set is sorted by class.
    """
    folders = (data_dir, data_dir / "static_mnist")
    for folder in folders:
        if isfile(path := folder / _STATIC_NPZ):
            packed, _ = read_arrays(path, lambda _: _WORDS)
            pixels = {split: np.unpackbits(bits.astype(np.uint8), axis=-1) for split, bits in packed.items()}
            return _build("static-mnist", path, pixels, _STATIC_MNIST_SHA256)
        if all(isfile(folder / name) for name in _STATIC_AMAT.values()):
            pixels = {split: _read_amat(folder / name) for split, name in _STATIC_AMAT.items()}
            return _build("static-mnist", folder, pixels, _STATIC_MNIST_SHA256)
    raise _missing_file("static-mnist", folders, f"{_STATIC_NPZ} or {', '.join(_STATIC_AMAT.values())}")


def read_caltech_silhouettes(data_dir: Path, *, download: bool = True) -> Splits:
    """Caltech-101 Silhouettes, split 1 (Marlin et al. 2010): 4,100 / 2,264 / 2,307 images (1, 28, 28) in {0, 1}.

    They are read from caltech101_silhouettes.npz or from the published file caltech101_silhouettes_28_split1.mat, in
    ``data_dir`` or in its subfolder caltech101_silhouettes. Nothing is downloaded. The images are upright; the object
    is 0 and the background is 1, as published.
    """
    folders = (data_dir, data_dir / "caltech101_silhouettes")
    for folder in folders:
        if isfile(path := folder / _CALTECH_NPZ):
            names = {split: f"{word}_images" for split, word in _WORDS.items()}
            names |= {f"{split} labels": f"{word}_labels" for split, word in _WORDS.items()}
            arrays, _ = read_arrays(path, lambda _: names | {"class names": "classnames"})  # noqa: B023
        elif isfile(path := folder / _CALTECH_MAT):
            arrays = _read_mat(path)
        else:
            continue
        pixels = {split: arrays[split] for split in _WORDS}
        labels = {split: arrays[f"{split} labels"].reshape(-1).astype(np.int64) - 1 for split in _WORDS}  # from 1 on
        class_names = tuple(map(str, arrays["class names"]))
        return _build("caltech-silhouettes", path, pixels, _CALTECH_SHA256, labels, class_names)
    raise _missing_file("caltech-silhouettes", folders, f"{_CALTECH_NPZ} or {_CALTECH_MAT}")


def _build(
    name: str,
    where: Path,
    pixels: Mapping[str, np.ndarray],
    checksums: Mapping[str, str],
    labels: Mapping[str, np.ndarray] | None = None,
    class_names: tuple[str, ...] = (),
) -> Splits:
    """Build the splits. Raises ValueError where the pixels are not the published ones."""
    for split, array in pixels.items():
        if hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() != checksums[split]:
            raise ValueError(f"{where}: the checksum of {split} is not that of {name}; fetch the file again")
    train, validation, test = (torch.from_numpy(pixels[split].reshape(-1, 1, 28, 28)) for split in SPLIT_ORDER)
    return Splits(
        name,
        BINARY,
        train,
        validation,
        test,
        sha256=hashlib.sha256("".join(checksums.values()).encode()).hexdigest(),
        split="as published",
        labels={split: torch.from_numpy(numbers) for split, numbers in (labels or {}).items()},
        class_names=class_names,
    )


def _missing_file(name: str, folders: tuple[Path, ...], expected: str) -> ValueError:
    """The error that says which files are expected where."""
    return ValueError(
        f"dataset: {name}: expected {expected} in {' or '.join(map(str, folders))}, got no such file; "
        "--data-dir or the environment variable PPL_VAE_DATA_DIR says where the data is"
    )


def _read_amat(path: Path) -> np.ndarray:
    """Read pixels (N, 784) from a text file with one image per line, as zeros and ones between spaces."""
    try:
        digits = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), np.uint8) - ord("0")
        return digits.reshape(-1, _NUM_PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected lines of {_NUM_PIXELS} zeros and ones: {error}") from None


def _read_mat(path: Path) -> dict[str, np.ndarray]:
    """Read {role: array} from the published MATLAB file, and reorder its pixels from columns to rows.

    scipy opens no other file than the published one, so that no damaged header can announce more than there is.
    """
    file = PublishedFile(path.name, _CALTECH_URL, _CALTECH_MAT_MD5)
    get_published_file("caltech-silhouettes", path.parent, file, download=False)
    stored = import_loadmat("caltech-silhouettes")(path)
    arrays = {"class names": np.array([name.item() for name in stored["classnames"].reshape(-1)])}
    for split, word in (_WORDS | {"validation": "val"}).items():
        arrays[f"{split} labels"] = stored[f"{word}_labels"]
        columns = stored[f"{word}_data"].astype(np.uint8).reshape(-1, 28, 28)
        arrays[split] = columns.transpose(0, 2, 1).reshape(-1, _NUM_PIXELS)
    return arrays
