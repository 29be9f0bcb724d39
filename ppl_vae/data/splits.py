"""A data set that has been read: its splits, their kind, labels and missing pixels, and fixed subsets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ppl_vae.runtime.errors import pluralize
from ppl_vae.runtime.numerics import location_and_spread

BINARY, LEVELS, PROBABILITIES, REAL, COUNTS = "binary", "8-bit levels", "probabilities", "real values", "counts"
KINDS = (BINARY, LEVELS, PROBABILITIES, REAL, COUNTS)
SPLIT_ORDER = ("train", "validation", "test")
NUM_LEVELS = 256
UNIT_INTERVAL = "values between 0 and 1"  # not a kind of data, but a likelihood may require it

PUBLISHED_SEED = 777  # the binarization of Tomczak and Welling 2018; also the splits of a user's own data

_MOST_NAMES = 5
_MOST_SEARCHED = 2**30  # bytes of a split


@dataclass(frozen=True)
class Splits:
    """Splits of a data set, as they are stored: uint8 for binary data and 8-bit levels, else float32.

    Args:
        name: the word or the name of the file or folder.
        kind: "binary" ({0, 1}), "8-bit levels" ({0..255}), "counts" ({0, 1, ...}), "probabilities" ([0, 1]) or "real
            values".
        train, validation, test: (N, *E); images are (N, C, H, W), tables (N, D).
        sha256: of the bytes that were read.
        split: how the images were split, in words.
        labels: (N,) int64 of each split that has any.
        names: of the file of each image, by split; empty for arrays.
        class_names: the name of each label; empty where labels have no names.
        unreadable: names of the files that could not be read and are left out.
        notes: sentences for the user about how the data was read, such as a shape that can be read in two ways.
        protocol: "vampprior", or "iwae" (no validation images; test drawn anew at each evaluation).
    """

    name: str
    kind: str
    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str
    split: str
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    protocol: str = "vampprior"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape E of one image."""
        return tuple(self.train.shape[1:])

    @cached_property
    def spread(self) -> float:
        """sqrt(mean_nd (x_nd - mean_n x_nd)^2) of the training pixels, 8-bit levels as level / 255."""
        unit = 255 if self.kind == LEVELS else 1
        return float(location_and_spread(fill_from_observed(self.train))[1]) / unit

    def find(self, x: Tensor) -> tuple[str, ...]:
        """Find the split that holds each image of x (n, *E), which is stored as the splits are; "" where none does.

        Splits of more than 1 GiB are not searched.
        """
        images = [image.tobytes() for image in x.numpy()]
        missing, found = set(images), dict.fromkeys(images, "")
        for split in SPLIT_ORDER:
            stored = getattr(self, split)
            for image in stored.numpy() if stored.nbytes <= _MOST_SEARCHED else ():
                if not missing:
                    break
                if (pixels := image.tobytes()) in missing:
                    found[pixels] = split
                    missing.remove(pixels)
        return tuple(found[image] for image in images)

    def describe(self) -> str:
        """Describe the data in one line, then unreadable files in one, then each note in one."""
        shape = "x".join(map(str, self.event_shape))
        sizes = " / ".join(f"{len(x):,}" for x in (self.train, self.validation, self.test))
        seen = f"{self.name}: {self.kind}{self._range()}, {shape}; train / validation / test {sizes} ({self.split})"
        if self.class_names:
            seen += f"; {len(self.class_names)} classes: {abbreviate(self.class_names)}"
        elif self.labels:
            num_classes = len(torch.cat([*self.labels.values()]).unique())
            seen += f"; {num_classes:,} class" + "es" * (num_classes != 1)
        if self.unreadable:
            files = pluralize(len(self.unreadable), "file")
            seen += f"\n{self.name}: {files} could not be read and were left out: {abbreviate(self.unreadable)}"
        return "\n".join([seen, *(f"{self.name}: {note}" for note in self.notes)])

    def _range(self) -> str:
        if self.kind not in (LEVELS, REAL, COUNTS):
            return ""
        train = fill_from_observed(self.train)
        digits = ".4g" if self.kind == REAL else ".0f"
        return f" from {float(train.min()):{digits}} to {float(train.max()):{digits}}"


def abbreviate(names: Iterable[str]) -> str:
    """Join the first five names, and say how many more there are."""
    names = list(names)
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def complete_splits(
    where: str, given: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Take missing validation and test splits from train: a tenth each, by a fixed permutation.

    Args:
        where: the file or folder, for an error.
        given: images (N, *E) of each split that exists, train among them.
        labels: (N,) of each split that has any; they follow their images.

    Returns:
        All three splits, their labels, and how the images were split, in words. Too few images raise ValueError.
    """
    images, numbers = dict(given), dict(labels)
    missing = [split for split in ("validation", "test") if split not in given]
    if not missing:
        return images, numbers, "as given"
    train = given["train"]
    tenth = len(train) // 10
    if tenth == 0:
        raise ValueError(f"{where}: expected at least 10 images to split, got {len(train)}")
    order = torch.from_numpy(np.random.RandomState(PUBLISHED_SEED).permutation(len(train)))  # a frozen stream
    parts = {}
    for split in missing:
        parts[split], order = order[-tenth:], order[:-tenth]
    parts["train"] = order
    images |= {split: train[index] for split, index in parts.items()}
    if "train" in labels:
        numbers |= {split: labels["train"][index] for split, index in parts.items()}
    each = " each" * (len(missing) > 1)
    return images, numbers, f"{' and '.join(missing)}: a tenth of the training images{each}, by a fixed permutation"


def subset(num_images: int, most: int | None) -> Tensor:
    """Choose indices (n,) of a random subset, ascending and the same at every call; all of them if few.

    A subset is never the first images, since files are often sorted by class.
    """
    if most is None or most >= num_images:
        return torch.arange(num_images)
    order = np.random.RandomState(PUBLISHED_SEED).permutation(num_images)  # a frozen stream
    return torch.from_numpy(np.sort(order[:most]))


# --- Missing pixels, which are NaN in images of floats ---


def fill_from_observed(x: Tensor) -> Tensor:
    """Replace each NaN of x (N, *E) by an observed value of the same pixel, drawn from the images: marginals stay.

    A pixel that no image has observed becomes the mean of all that are.
    """
    if not x.is_floating_point() or not any(part.isnan().any() for part in x.split(1000)):
        return x
    values = x.reshape(len(x), -1)
    missing = values.isnan()
    generator = torch.Generator().manual_seed(0)
    filled = values.clone()
    for pixels in torch.arange(values.shape[1]).split(max(1, 2**22 // len(x))):
        holes, counts = missing[:, pixels], (~missing[:, pixels]).sum(0)
        # The observed images of each pixel come first, and one of them is drawn for each hole.
        u = torch.rand(2, *holes.shape, generator=generator).to(x.device)
        drawn = torch.where(holes, 2.0, u[0]).argsort(0).gather(0, (u[1] * counts).long().clamp(max=len(x) - 1))
        filled[:, pixels] = torch.where(holes, values[:, pixels].gather(0, drawn), values[:, pixels])
    return torch.where(filled.isnan(), values.nanmean().nan_to_num(0.0), filled).reshape(x.shape)


def keep_missing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) for a pixelwise function that has no NaN; a NaN of x, of any shape, stays."""
    missing = x.isnan()
    return torch.where(missing, torch.nan, function(x.nan_to_num(0.0))) if missing.any() else function(x)
