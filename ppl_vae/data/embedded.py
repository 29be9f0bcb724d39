"""MNIST, which is part of the package, in its IDX format."""

from __future__ import annotations

import hashlib
import lzma
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.splits import LEVELS, Splits

_IMAGES_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
_LABELS_SHA256 = {
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_NUM_VALIDATION = 10_000
_MOST_BYTES = 16 + 60_000 * 28 * 28


def mnist(data_dir: Path) -> Splits:
    """MNIST (LeCun and Cortes), from the package itself: 50,000 / 10,000 / 10,000 images (1, 28, 28), uint8."""
    train_labels, test_labels = _array("train-labels-idx1-ubyte").long(), _array("t10k-labels-idx1-ubyte").long()
    train, test = _array("train-images-idx3-ubyte")[:, None], _array("t10k-images-idx3-ubyte")[:, None]
    return Splits(
        name="mnist",
        kind=LEVELS,
        train=train[:-_NUM_VALIDATION],
        validation=train[-_NUM_VALIDATION:],
        test=test,
        sha256=hashlib.sha256("".join(_IMAGES_SHA256.values()).encode()).hexdigest(),
        split="the last 10,000 training images are validation",
        labels={
            "train": train_labels[:-_NUM_VALIDATION],
            "validation": train_labels[-_NUM_VALIDATION:],
            "test": test_labels,
        },
        class_names=tuple("0123456789"),
    )


def _array(name: str) -> Tensor:
    """Read (N, 28, 28) or (N,) uint8 from an embedded file, whose checksum is verified."""
    resource = files("ppl_vae") / "mnist" / f"{name}.xz"
    try:
        raw = lzma.LZMADecompressor().decompress(resource.read_bytes(), max_length=_MOST_BYTES)
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(
            f"{resource}: the embedded MNIST cannot be read ({error}); install the package again"
        ) from None
    if hashlib.sha256(raw).hexdigest() != (_IMAGES_SHA256 | _LABELS_SHA256)[name]:
        raise ValueError(f"{resource}: the checksum is not that of MNIST; install the package again")
    dims = raw[3]  # the header: two zeros, the type (8: bytes), the number of dimensions, then each of them
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
