"""Load a data set by its name or path, further images for a trained model, and a torch dataset's images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ppl_vae.data import COLORS, DATASETS, FITS, MISSING, PROTOCOLS
from ppl_vae.data.array_files import find_roles, is_array_file, read_arrays, read_labels
from ppl_vae.data.arrays import load_arrays, move_channels_first, summarize
from ppl_vae.data.folder import count_outer_folders, describe_others, find_images, label_by_folder, load_image_folder
from ppl_vae.data.image_files import ImageOptions, list_reasons, read_image_files
from ppl_vae.data.splits import BINARY, COUNTS, LEVELS, PROBABILITIES, REAL, Splits, abbreviate, keep_missing
from ppl_vae.data.transforms import is_drawn, sample_binomial

_IWAE_DATASETS = ("mnist", "fashion-mnist", "kmnist")


def load(
    dataset: str,
    *,
    data_dir: str | None = None,
    protocol: str = "vampprior",
    image_size: Sequence[int] | None = None,
    fit: str = "crop",
    color: str | None = None,
    missing: str = "forbid",
    download: bool = True,
) -> Splits:
    """Load a named data set, a user's .npz or .npy file, or a folder of images.

    Args:
        dataset: a name in ``DATASETS``, or a path.
        data_dir: the folder of the named data sets; None: the environment variable PPL_VAE_DATA_DIR, else "data".
        protocol: "vampprior" (Tomczak and Welling 2018, arXiv 1705.07120), or for the gray named sets "iwae" (Burda et
            al. 2016, arXiv 1509.00519): all 60,000 images train, none validate, test is drawn anew at each evaluation.
        image_size, fit, color: of a folder of images, as in ``folder.load_image_folder``.
        missing: "forbid", or "train": a NaN in a file of arrays is a missing value.
        download: whether the files of a named data set are downloaded if they are missing.

    Raises ValueError for an unknown name, missing or damaged files, or values that are no images.
    """
    choices = {"protocol": PROTOCOLS, "fit": FITS, "color": (*COLORS, None), "missing": MISSING}
    for argument, word in {"protocol": protocol, "fit": fit, "color": color, "missing": missing}.items():
        if word not in choices[argument]:
            raise ValueError(f"{argument}: expected one of {', '.join(filter(None, choices[argument]))}, got {word!r}")
    if protocol == "iwae" and dataset not in _IWAE_DATASETS:
        raise ValueError(
            f"protocol: expected vampprior for {dataset} (iwae is for {', '.join(_IWAE_DATASETS)}), got iwae"
        )
    path, is_named = Path(dataset), dataset in DATASETS
    is_array = not is_named and is_array_file(path)
    if not is_named and not is_array and os.path.isdir(dataset):
        return load_image_folder(path, image_size=image_size, fit=fit, color=color)
    for argument, value in (("image_size", image_size), ("color", color)):
        if value is not None and (is_named or is_array):
            raise ValueError(f"{argument}: expected none for {dataset} (it is for a folder of images), got {value}")
    if is_array:
        return load_arrays(path, missing=missing)
    if is_named:
        folder = Path(data_dir or os.environ.get("PPL_VAE_DATA_DIR") or "data").expanduser()
        splits = DATASETS[dataset].import_reader()(folder, download=download)
        return splits if protocol == "vampprior" else _return_validation_images(splits)
    if os.path.exists(dataset):
        hint = (
            "; numpy.save('own.npy', numpy.loadtxt('own.csv', delimiter=',', skiprows=1)) makes one of a table of "
            "numbers below a header"
        )
    else:
        near = get_close_matches(dataset, DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ", which is none of these"
    raise ValueError(
        f"dataset: expected {', '.join(DATASETS)}, or the path of an .npz or .npy file or of a folder of images, "
        f"got {dataset!r}{hint}"
    )


def _return_validation_images(splits: Splits) -> Splits:
    """Under the iwae protocol the validation images train, from which they were taken."""
    labels = {name: splits.labels[name] for name in ("train", "validation", "test")}
    labels |= {"train": torch.cat([labels["train"], labels["validation"]]), "validation": labels["validation"][:0]}
    return replace(
        splits,
        train=torch.cat([splits.train, splits.validation]),
        validation=splits.validation[:0],
        split="iwae protocol: all training images train, and test is drawn anew at each evaluation",
        labels=labels,
        protocol="iwae",
    )


# --- Further images ---

_OTHER_IMAGES = ("images", "x")
_LEVEL_ROUNDING = 1e-3  # of 255 times level / 255 in single precision, and of files with four decimals


class UserImages(NamedTuple):
    """Further images for a trained model.

    Args:
        x: (N, *E) float32, NaN where a pixel is missing.
        labels: (N,) int64, or None.
        names: of the files, or the indices of the images in an array.
        notes: sentences for the user about how the images were read.
        splits: the split of the training data that holds the same image, or ""; empty where the data is not there.
    """

    x: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


def load_images(path: str, splits: Splits, pixels: str, *, seed: int = 0, fit: str = "crop") -> UserImages:
    """Load images as a model that was trained on ``splits`` sees them: (N, *E) float32.

    An .npz or .npy file holds (N, *E), (N, H, W) or (N, H, W, C): {0, 1} for binary training data, floats for real
    values, floats in [0, 1] for probabilities. For 8-bit levels, uint8 is levels (unless all are 0 or 1: then black and
    white), and floats in [0, 1] are probabilities, level / 255. A NaN is a missing pixel and stays NaN. Image files are
    resized to E and become gray or rgb as E is; labels by folder are given where all are class names of ``splits``.
    "dynamic" and "fixed" draw gray images once, from numpy's RandomState(seed); "levels" expects uint8 or level / 255.

    Args:
        path: an .npz file with one array, or one named test, x_test, test_images, images or x (labels: labels, y,
            test_labels or y_test); an .npy file; an image; a folder of images.
        fit: of image files, as in ``load``.

    Raises ValueError for files that cannot be read, or images of another shape or scale.
    """
    file = Path(path)
    if is_array_file(file):
        images = _load_images_from_arrays(file, splits)
    elif os.path.exists(file):
        images = _load_images_from_files(file, splits, fit)
    else:
        raise ValueError(f"images: expected an .npz or .npy file, an image or a folder, got {path!r}: no such file")
    x = images.x
    if len(splits.train):
        stored = ((255 * x).round() if splits.kind == LEVELS else x).to(splits.train.dtype)
        holes = (x.isnan() & (not stored.is_floating_point())).flatten(1).any(1)  # which whole numbers cannot hold
        found = zip(splits.find(stored), holes.tolist(), strict=True)
        images = images._replace(splits=tuple("" if hole else split for split, hole in found))
    if pixels == "levels":  # a missing pixel stays NaN
        x = (255 * images.x).round()
        distance = (255 * images.x - x).abs().nan_to_num(0.0)
        if distance.max() > 255 * _LEVEL_ROUNDING / 2:
            raise ValueError(
                f"{path}: expected uint8 levels, or level / 255, got fractions between the levels (such as "
                f"{float(images.x.flatten()[distance.argmax()]):.4g})"
            )
    elif pixels == "threshold":
        x = keep_missing(lambda seen: (seen >= 0.5).float(), x)
    elif is_drawn(splits, pixels):
        x = sample_binomial(np.random.RandomState(seed), x)
    return images._replace(x=x)


def _load_images_from_arrays(file: Path, splits: Splits) -> UserImages:
    if not os.path.isfile(file):
        raise ValueError(f"images: {file}: no such file")

    def choose(names: list[str]) -> dict[str, str]:
        """Keep the images of test and their labels, or those of the only split."""
        roles = find_roles(names, "test", _OTHER_IMAGES)
        found = [role for role in roles if not role.endswith("labels")]
        kept = "test" if "test" in found or len(found) != 1 else found[0]
        return {role.replace(kept, "images"): name for role, name in roles.items() if role in (kept, f"{kept} labels")}

    arrays, others = read_arrays(file, choose)
    if "images" not in arrays:
        words = ", ".join(("test", *_OTHER_IMAGES))
        raise ValueError(f"{file}: expected one array, or one named {words}, got {others or 'none'}")
    array = arrays["images"]
    images = array if array.shape[1:] == splits.event_shape else move_channels_first(file, "images", array)
    if images.shape[1:] != splits.event_shape or not len(images):
        raise ValueError(
            f"{file}: expected images of event shape {splits.event_shape}, got an array of shape {array.shape}"
        )
    given = {"images": arrays["images labels"]} if "images labels" in arrays else {}
    labels = read_labels(str(file), given, {"images": len(images)}, splits.class_names)
    ignored = (f"other arrays ignored: {', '.join(others)}",) if others else ()
    x = torch.from_numpy(_match_scale(file, images, splits.kind))
    return UserImages(x, labels.numbers.get("images"), tuple(map(str, range(len(x)))), ignored + labels.notes)


# What an array for a model of each kind of data may hold, and its kinds.
_ACCEPTED = {
    BINARY: ("zeros and ones", (BINARY,)),
    LEVELS: ("uint8 levels, or floats in [0, 1]", (BINARY, LEVELS, PROBABILITIES)),
    PROBABILITIES: ("floats in [0, 1]", (BINARY, PROBABILITIES)),
    COUNTS: ("whole numbers from 0", (COUNTS,)),
    REAL: ("finite floats", (REAL,)),
}


def _match_scale(file: Path, array: np.ndarray, kind: str) -> np.ndarray:
    """Convert an array to float32 on the scale of the training data, and refuse another kind."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"{file}: expected numbers, got dtype {array.dtype}")
    summary = summarize(array, skip_missing=True)
    words, kinds = _ACCEPTED[kind]
    if not any(map(summary.has_kind, kinds)) and not np.isnan(array).all():
        has_levels = kind in (LEVELS, PROBABILITIES) and bool(summary.low >= 0 and 1 < summary.high <= 255)
        raise ValueError(
            f"{file}: expected {words} (the model was trained on {kind}), got {array.dtype} from {summary.low} to "
            f"{summary.high}" + "; if these are levels from 0 to 255, divide by 255" * has_levels
        )
    is_scaled = array.dtype == np.uint8 and kind in (LEVELS, PROBABILITIES) and not summary.is_binary
    scale = 255 if is_scaled else 1
    return np.ascontiguousarray(array, dtype=np.float32) / np.float32(scale)


def _load_images_from_files(path: Path, splits: Splits, fit: str) -> UserImages:
    if len(splits.event_shape) != 3 or splits.event_shape[0] not in (1, 3) or splits.kind in (REAL, COUNTS):
        trained_on = f"{splits.kind} of shape {splits.event_shape}"
        raise ValueError(f"{path}: expected an .npz or .npy file, since the model was trained on {trained_on}")
    channels, height, width = splits.event_shape
    own_color = {1: "gray", 3: "rgb"}[channels]
    names, others = find_images(path) if path.is_dir() else ((path.name,), Counter[str]())
    if not names:
        raise ValueError(f"{path}: expected images, got {describe_others(others)}")
    options = ImageOptions((height, width), fit, own_color)
    files = read_image_files(path if path.is_dir() else path.parent, names, options)
    if files.unreadable:  # refused: the user asked for an answer for each image
        got = f"{len(files.unreadable):,} that cannot be read: {abbreviate(files.unreadable)}"
        raise ValueError("; ".join([f"{path}: expected images, got {got}", *list_reasons(files.unreadable)]))
    x = torch.from_numpy(files.images.astype(np.float32)) / 255
    if splits.kind == BINARY and not ((x == 0) | (x == 1)).all():
        raise ValueError(f"{path}: expected black and white alone (the model was trained on {splits.kind} data)")
    numbers, classes = label_by_folder(files.names, count_outer_folders(files.names))
    are_known = bool(classes) and set(classes) <= set(splits.class_names)
    labels = torch.tensor([splits.class_names.index(name) for name in classes])[numbers] if are_known else None
    notes = [*files.notes, *([f"{describe_others(others)} ignored"] if others else [])]
    if classes and not are_known and splits.class_names:
        notes.append(
            f"labels left out: expected folders of the classes of the training data, got {abbreviate(classes)}"
        )
    return UserImages(x, labels, files.names, tuple(notes))


# --- A torch.utils.data.Dataset ---


def from_dataset(dataset: Dataset[Any] | DataLoader[Any]) -> Tensor:
    """The images of a map-style dataset, (N, *E), in its order.

    An item is an image or a tuple that begins with one, such as (image, label): a tensor, an array or a PIL image. A
    PIL image becomes (C, H, W), in gray or color if it is black and white or has a palette. Each item is read once, so
    a random transform of the dataset is drawn once; the argument ``transform`` of ``fit`` draws anew at every step. The
    batch size, order and workers of a ``DataLoader`` are ignored.

    >>> from_dataset(TensorDataset(torch.zeros(3, 1, 2, 2), torch.arange(3))).shape
    torch.Size([3, 1, 2, 2])

    Raises:
        ValueError: The dataset has no length or no items, or its images differ in shape.
    """
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    if count == 0:
        raise ValueError(f"dataset: expected a length and at least one item, got none in {type(dataset).__name__}")
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[0]
    images = [_to_tensor(dataset[i]) for i in range(count)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"dataset: expected images of one shape, got {', '.join(map(str, sorted(shapes)))}")
    return torch.stack(images)


def _to_tensor(item: Any) -> Tensor:
    """The image of one item."""
    image = item[0] if isinstance(item, tuple | list) else item
    if hasattr(image, "getbands"):  # a PIL image
        mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
        levels = torch.from_numpy(np.array(image.convert(mode)))
        return levels[None] if levels.dim() == 2 else levels.permute(2, 0, 1)
    return torch.as_tensor(image)
