"""Checked bytes to tensors: data sets, splits, binarization. Knows of no model.

Every split, draw and subset here comes from a constant, never from a run's seed, so that two runs are measured on the
same images.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_vae.options import BINARIZATIONS, SPLITS

BINARY, LEVELS, PROBABILITIES = "binary", "8-bit levels", "probabilities"

_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
_NUM_VALIDATION = 10_000
_PUBLISHED_SEED = 777  # the binarization of Tomczak and Welling 2018; also the splits of a user's own data

# What a user's file may call its splits.
_KEYS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Splits:
    """One data set, as it is stored: uint8 for binary data and 8-bit levels, float32 for probabilities.

    Args:
        name: what was asked for.
        kind: "binary" ({0, 1}), "8-bit levels" ({0..255}) or "probabilities" ([0, 1]).
        train, validation, test: (N, *E); images are (N, C, H, W), tables (N, D).
        sha256: of the bytes that were read.
        split: in words, how the splits came about.
    """

    name: str
    kind: str
    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str
    split: str

    @property
    def event_shape(self) -> tuple[int, ...]:
        """E, the shape of one image."""
        return tuple(self.train.shape[1:])

    def describe(self) -> str:
        """One line that says what was seen."""
        shape = "x".join(map(str, self.event_shape))
        sizes = " / ".join(f"{len(x):,}" for x in (self.train, self.validation, self.test))
        seen = ""
        if self.kind == LEVELS:
            seen = f" from {int(self.train.min())} to {int(self.train.max())}"
            if self.train.max() < 128:
                seen += " (read as level / 255, so nearly black: floats in [0, 1] have a scale of their own)"
        return f"{self.name}: {self.kind}{seen}, {shape}; train / validation / test {sizes} ({self.split})"


def load(dataset: str) -> Splits:
    """The data set of that name, or a person's own ``.npz`` or ``.npy`` file.

    Raises:
        ValueError: an unknown name, a missing or damaged file, or values that are no images.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]()
    path = Path(dataset)
    if path.suffix not in (".npz", ".npy"):
        names = ", ".join(DATASETS)
        raise ValueError(f"dataset: expected {names} or the path of an .npz or .npy file, got {dataset!r}")
    return _own(path)


# --- MNIST, embedded ---


def _mnist() -> Splits:
    train, test = _mnist_images("train-images-idx3-ubyte"), _mnist_images("t10k-images-idx3-ubyte")
    return Splits(
        name="mnist",
        kind=LEVELS,
        train=train[:-_NUM_VALIDATION],
        validation=train[-_NUM_VALIDATION:],
        test=test,
        sha256=hashlib.sha256("".join(_MNIST_SHA256.values()).encode()).hexdigest(),
        split="the last 10,000 training images are validation",
    )


def _mnist_images(name: str) -> Tensor:
    """(N, 1, 28, 28) uint8, from an IDX file whose bytes are the published ones."""
    resource = files("ppl_vae") / "mnist" / f"{name}.xz"
    try:
        raw = lzma.decompress(resource.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(
            f"{resource}: the embedded MNIST cannot be read ({error}); install the package again"
        ) from None
    if hashlib.sha256(raw).hexdigest() != _MNIST_SHA256[name]:
        raise ValueError(f"{resource}: the checksum is not that of MNIST; install the package again")
    _, num_images, height, width = struct.unpack(">4I", raw[:16])
    pixels = np.frombuffer(raw, dtype=np.uint8, offset=16).reshape(num_images, 1, height, width)
    return torch.from_numpy(pixels.copy())


DATASETS: dict[str, Callable[[], Splits]] = {"mnist": _mnist}


# --- A person's own file ---


def _own(path: Path) -> Splits:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    arrays, ignored = _read_arrays(path)
    if any(array.ndim > 0 and len(array) == 0 for array in arrays.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = _kind(path, arrays["train"])
    tensors = {split: _images(path, split, array, kind) for split, array in arrays.items()}
    shapes = {tuple(x.shape[1:]) for x in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    tensors, words = _complete_splits(path, tensors)
    if ignored:
        words += f"; other arrays ignored: {', '.join(ignored)}"
    return Splits(name=path.name, kind=kind, sha256=hashlib.sha256(raw).hexdigest(), split=words, **tensors)


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The file's splits, and the names of the arrays that are none. Nothing is ever unpickled."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"train": loaded}, []
        with loaded:
            names = list(loaded.files)
            found = {split: [key for key in keys if key in names] for split, keys in _KEYS.items()}
            taken = {split: keys[0] for split, keys in found.items() if keys}
            if not taken and len(names) == 1:
                taken = {"train": names[0]}
            arrays = {split: loaded[key] for split, key in taken.items()} if "train" in taken else {}
    except Exception as error:  # beside ValueError and OSError, a damaged zip raises zlib.error, struct.error and more
        # numpy's own words for whatever is no array speak of allow_pickle, which nobody should be told to switch on.
        why: object = error
        if "Object arrays" in str(error):
            why = "object arrays are not read"
        elif "allow_pickle" in str(error):
            why = "it is neither an .npy nor an .npz file"
        raise ValueError(f"{path}: not a readable array file: {why}") from None
    if not arrays:
        raise ValueError(f"{path}: expected one array, or arrays named train, valid and test, got {names or 'none'}")
    return arrays, [name for name in names if name not in taken.values()]


def _kind(path: Path, train: np.ndarray) -> str:
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    if train.dtype.kind == "f" and not np.isfinite(train).all():
        raise ValueError(f"{path}: expected finite values, got NaN or infinity in train")
    if ((train == 0) | (train == 1)).all():
        return BINARY
    if train.dtype == np.uint8:
        return LEVELS
    if train.dtype.kind == "f" and train.min() >= 0 and train.max() <= 1:
        return PROBABILITIES
    raise ValueError(
        f"{path}: expected zeros and ones, uint8 levels, or floats in [0, 1], "
        f"got {train.dtype} from {train.min()} to {train.max()} in train"
    )


def _images(path: Path, split: str, array: np.ndarray, kind: str) -> Tensor:
    """One split as (N, D) or (N, C, H, W), its values checked against the kind of the training split."""
    on_kind = {
        BINARY: lambda: array.dtype.kind in "buif" and bool(((array == 0) | (array == 1)).all()),
        LEVELS: lambda: array.dtype == np.uint8,
        PROBABILITIES: lambda: array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1)).all()),
    }
    if not on_kind[kind]():
        raise ValueError(f"{path}: expected {kind} in {split} as in train, got other values (dtype {array.dtype})")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 2:
        raise ValueError(
            f"{path}: expected (N, D), (N, H, W) or (N, H, W, C) with 1 or 3 channels (last), "
            f"got shape {array.shape} in {split}"
        )
    if 0 in array.shape:
        raise ValueError(f"{path}: expected at least one pixel, got shape {array.shape} in {split}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32 if kind == PROBABILITIES else np.uint8))


def _complete_splits(path: Path, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Whatever of validation and test the file lacks is taken from train: a tenth each, by a fixed permutation."""
    missing = [split for split in ("validation", "test") if split not in given]
    if not missing:
        return given, "as the file gives them"
    train = given["train"]
    tenth = len(train) // 10
    if tenth == 0:
        raise ValueError(f"{path}: expected at least 10 images to split, got {len(train)}")
    order = torch.from_numpy(np.random.RandomState(_PUBLISHED_SEED).permutation(len(train)))  # a frozen stream
    completed = dict(given)
    for split in missing:
        completed[split], order = train[order[-tenth:]], order[:-tenth]
    completed["train"] = train[order]
    return completed, f"{' and '.join(missing)}: a tenth of the images each, by a fixed permutation"


# --- What a model sees ---


def resolve_binarization(splits: Splits, binarization: str | None) -> str:
    """The binarization by its word; None is "none" for binary data, which is taken as it is, and else "dynamic"."""
    if splits.kind == BINARY:
        if binarization not in (None, "none"):
            raise ValueError(f"binarization: expected none for binary data ({splits.name}), got {binarization}")
        return "none"
    return binarization or "dynamic"


def as_floats(values: Tensor, generator: torch.Generator) -> Tensor:
    """The stored values themselves."""
    return values.float()


def as_fractions(values: Tensor, generator: torch.Generator) -> Tensor:
    """8-bit levels / 255."""
    return values.float() / 255


def bernoulli_draw(values: Tensor, generator: torch.Generator) -> Tensor:
    """x_d ~ Bernoulli(p_d), p = level / 255 or the stored probability: (B, *E) -> (B, *E) in {0, 1}, drawn anew."""
    uniform = torch.rand(values.shape, generator=generator, device=values.device)
    return (uniform.mul_(255) < values if values.dtype == torch.uint8 else uniform < values).float()


def training_images(splits: Splits, binarization: str) -> tuple[Tensor, Callable[[Tensor, torch.Generator], Tensor]]:
    """The stored training set (N, *E), and how a batch of it becomes what the model sees, at every access."""
    if binarization == "dynamic" and splits.kind != BINARY:
        return splits.train, bernoulli_draw
    if binarization == "none" and splits.kind == LEVELS:
        return splits.train, as_fractions
    if binarization == "none" or splits.kind == BINARY:
        return splits.train, as_floats
    return evaluation_images(splits, "train", binarization).to(torch.uint8), as_floats


def expected_images(splits: Splits, binarization: str) -> Tensor:
    """(N, *E) the mean, over all that training draws, of what the model sees of each training image."""
    return (
        probabilities(splits, "train")
        if binarization == "dynamic"
        else evaluation_images(splits, "train", binarization)
    )


def evaluation_images(splits: Splits, split: str, binarization: str) -> Tensor:
    """A split as it is evaluated: (N, *E) float32, the same at every call.

    "dynamic" and "fixed" draw it once, as in the protocol of Tomczak and Welling (2018, arXiv 1705.07120; their code):
    after seeding numpy's legacy generator with 777, one binomial draw over the validation images, then one over test;
    a draw over train follows. "threshold" is p >= 0.5. "none" takes the values as they are: levels become x / 255.
    """
    for argument, words, word in (("binarization", BINARIZATIONS, binarization), ("split", SPLITS, split)):
        if word not in words:
            raise ValueError(f"{argument}: expected one of {', '.join(words)}, got {word!r}")
    if binarization in ("dynamic", "fixed") and splits.kind != BINARY:
        stream = np.random.RandomState(_PUBLISHED_SEED)  # the published generator
        for name in ("validation", "test", "train"):
            drawn = stream.binomial(1, probabilities(splits, name).numpy())
            if name == split:
                return torch.from_numpy(drawn).float()
    values = probabilities(splits, split)
    return (values >= 0.5).float() if binarization == "threshold" else values


def probabilities(splits: Splits, split: str) -> Tensor:
    """A split as the probability that a pixel is white: levels / 255, the others as they are. (N, *E) float32."""
    values = getattr(splits, split).float()
    return values / 255 if splits.kind == LEVELS else values


def subset(num_images: int, most: int | None) -> Tensor:
    """Indices of a random subset, the same at every call and in ascending order; all of them where there are no more.

    Never the first N: files are often sorted by class.
    """
    if most is None or most >= num_images:
        return torch.arange(num_images)
    order = np.random.RandomState(_PUBLISHED_SEED).permutation(num_images)  # a frozen stream
    return torch.from_numpy(np.sort(order[:most]))
