"""Transform stored images to the pixels that a model sees, and find values that repeat.

Pixels are binarized ("dynamic", "fixed", "threshold"), unchanged with levels as level / 255 ("none"), unchanged levels
from 0 to 255 ("levels"), or (level + u) / 256 ("dequantized").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import BINARIZATIONS, SPLITS
from ppl_vae.data.splits import (
    BINARY,
    COUNTS,
    LEVELS,
    NUM_LEVELS,
    PUBLISHED_SEED,
    REAL,
    Splits,
    abbreviate,
    fill_from_observed,
    keep_missing,
    subset,
)
from ppl_vae.data.storage import allocate
from ppl_vae.runtime.errors import pluralize

PIXELS = (*BINARIZATIONS, "levels", "dequantized")

_NEVER_BINARIZED = {BINARY: "binary data", REAL: "real values", COUNTS: "counts"}
_MOST_IMAGES, _MOST_PIXELS = 1000, 2**18  # of a part of the images, which bound the memory of a transform


def resolve_binarization(splits: Splits, binarization: str | None, *, default: str = "dynamic") -> str:
    """Resolve the word of a binarization; None is "none" for binary data, counts and real values, else ``default``.

    Another word for these kinds raises ValueError.
    """
    if splits.kind in _NEVER_BINARIZED:
        if binarization not in (None, "none"):
            what = _NEVER_BINARIZED[splits.kind]
            raise ValueError(f"binarization: expected none for {what} ({splits.name}), got {binarization}")
        return "none"
    return binarization or default


def map_images(function: Callable[[Tensor], Tensor], x: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply a pixelwise function to a few of the images (N, *E) at a time; a large result lies in a file."""
    if x.numel() <= _MOST_PIXELS:
        return function(x).to(dtype)
    result = allocate(tuple(x.shape), dtype)
    num_images = max(1, _MOST_PIXELS // x[0].numel())
    for part, part_of_result in zip(x.split(num_images), result.split(num_images), strict=True):
        part_of_result.copy_(function(part))
    return result


def convert_to_float(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Convert stored values of any shape to float32, unchanged."""
    return values.float()


def scale_to_unit_interval(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Convert 8-bit levels of any shape to level / 255."""
    return values.float() / 255


def sample_bernoulli(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample x_d ~ Bernoulli(p_d), p = level / 255 or the stored probability: (B, *E) -> (B, *E) in {0, 1}.

    Without ``generator`` the noise comes from torch's global generator.
    """
    uniform = torch.rand(values.shape, generator=generator, device=values.device)
    if values.dtype == torch.uint8:
        return (uniform.mul_(255) < values).float()
    return torch.where(values.isnan(), torch.nan, (uniform < values).float())  # a missing pixel stays NaN


# In single precision (255 + u) / 256 rounds to 1, and u to 0, a few times in each epoch of 28 x 28 images. The values
# next to these ends are 2^-32 and 1 - 2^-24.
_LEAST, _MOST = 2.0**-33, 1 - 2.0**-24


def clamp_to_unit_interval(x: Tensor) -> Tensor:
    """Clamp x strictly inside (0, 1), since rounding can bring it to an end."""
    return x.clamp(_LEAST, _MOST)


def dequantize_uniformly(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Dequantize levels: x = (level + u) / 256, u ~ Uniform(0, 1) per pixel: (B, *E) -> (B, *E) inside (0, 1).

    For a density p of x, P(level) = int_0^1 p((level + u) / 256) du / 256^D is a mass of the levels.

    Reference: Theis et al. 2016, arXiv 1511.01844, section 3.1.
    """
    levels = values if values.is_floating_point() else values.float()
    u = torch.rand(levels.shape, generator=generator, dtype=levels.dtype, device=levels.device)
    return clamp_to_unit_interval((levels + u) / NUM_LEVELS)


def training_images(splits: Splits, pixels: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """Return the stored training set (N, *E), and the transform from a stored batch to what the model sees."""
    _check_pixels(splits, pixels)
    if pixels in ("none", "levels") or splits.kind in _NEVER_BINARIZED:
        return splits.train, scale_to_unit_interval if splits.kind == LEVELS and pixels == "none" else convert_to_float
    if pixels == "dequantized":
        return splits.train, dequantize_uniformly
    if pixels == "dynamic":
        return splits.train, sample_bernoulli
    dtype = torch.uint8 if splits.kind == LEVELS else torch.float32  # a missing pixel is NaN
    return evaluation_images(splits, "train", pixels, dtype=dtype), convert_to_float


def _check_pixels(splits: Splits, pixels: str) -> None:
    if pixels not in PIXELS:
        raise ValueError(f"pixels: expected one of {', '.join(PIXELS)}, got {pixels!r}")
    if pixels in ("levels", "dequantized") and splits.kind != LEVELS:
        raise ValueError(f"pixels: expected {LEVELS} for {pixels!r}, got {splits.kind} ({splits.name})")


def expected_images(splits: Splits, pixels: str) -> Tensor:
    """Compute the images (N, *E) to which the marginals of the training set are fitted.

    For "dynamic" they are the mean of the draws of each image; for every other word the images themselves,
    "dequantized" by one draw of u. A missing pixel is an observed one of another image.
    """
    x = probabilities(splits, "train") if pixels == "dynamic" else evaluation_images(splits, "train", pixels)
    return fill_from_observed(x)


def initialization_images(splits: Splits, pixels: str) -> Tensor:
    """Compute ``expected_images`` (n, *E) of a fixed random subset of the training images, or of all if few.

    A training starts from their marginals, for which a part suffices; the fit to many large images is slow.
    """
    most = max(1000, 2**26 // math.prod(splits.event_shape))  # more pixels than MNIST has
    index = subset(len(splits.train), most)
    some = splits if len(index) == len(splits.train) else replace(splits, train=splits.train[index], labels={})
    return expected_images(some, pixels)


def evaluation_images(
    splits: Splits, split: str, pixels: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the images of a split that are evaluated: (N, *E), the same at every call.

    "dynamic" and "fixed" draw each split once, as in the protocol of Tomczak and Welling (2018, arXiv 1705.07120, and
    their code): numpy's legacy generator is seeded with 777, and draws over validation, then over test, then over
    train. "threshold" is p >= 0.5. "none" leaves the values unchanged, but levels become level / 255. "levels" are 0 to
    255. "dequantized" is one draw of (level + u) / 256, from a fixed seed for each split.
    Under the protocol of Burda et al. (2016, arXiv 1509.00519), "dynamic" draws the split anew for each ``seed``;
    nothing else depends on ``seed``. An unknown word, or a split without images, raises ValueError.
    """
    _check_pixels(splits, pixels)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if not len(getattr(splits, split)):
        raise ValueError(f"{splits.name}: has no {split} images under the {splits.protocol} protocol")
    stored, scale = getattr(splits, split), _find_scaling(splits)
    if pixels == "levels":
        return map_images(convert_to_float, stored, dtype=dtype)
    if pixels == "dequantized":
        generator = torch.Generator().manual_seed(PUBLISHED_SEED + SPLITS.index(split))
        return map_images(lambda part: dequantize_uniformly(part, generator), stored, dtype=dtype)
    if is_drawn(splits, pixels):
        is_drawn_anew = splits.protocol == "iwae" and pixels == "dynamic"
        stream = np.random.RandomState(seed if is_drawn_anew else PUBLISHED_SEED)  # the published generator
        for name in () if is_drawn_anew else ("validation", "test", "train"):  # draws of earlier splits are skipped
            if name == split:
                break
            for part in getattr(splits, name).split(max(1, _MOST_PIXELS // math.prod(splits.event_shape))):
                sample_binomial(stream, scale(part))
        return map_images(lambda part: sample_binomial(stream, scale(part)), stored, dtype=dtype)
    if pixels == "threshold":
        return map_images(lambda part: keep_missing(lambda p: (p >= 0.5).float(), scale(part)), stored, dtype=dtype)
    return probabilities(splits, split).to(dtype)


def is_drawn(splits: Splits, pixels: str) -> bool:
    """Whether the model sees a random draw of zeros and ones."""
    return pixels in ("dynamic", "fixed") and splits.kind not in _NEVER_BINARIZED


def sample_binomial(stream: np.random.RandomState, rates: Tensor) -> Tensor:
    """Sample x_d ~ Bernoulli(p_d) by numpy's legacy generator, as published: (N, *E) float32."""
    return keep_missing(lambda p: torch.from_numpy(stream.binomial(1, p.numpy())).float(), rates)


def probabilities(splits: Splits, split: str) -> Tensor:
    """Convert a split to probabilities of white: level / 255, other kinds unchanged. (N, *E) float32."""
    stored = getattr(splits, split)
    return stored if stored.dtype == torch.float32 else map_images(_find_scaling(splits), stored)


def _find_scaling(splits: Splits) -> Callable[[Tensor], Tensor]:
    """Return the transform from stored values to probabilities, or to floats."""
    return scale_to_unit_interval if splits.kind == LEVELS else convert_to_float


def binarization_entropy(splits: Splits, split: str, pixels: str) -> Tensor | None:
    """Entropy of the binarization of each image, (N,) nats, float64; None where nothing is drawn.

    H = -sum_d [p_d log p_d + (1 - p_d) log(1 - p_d)]. The mean of any model's log p(x) over the draws of one
    image is at most -H (Gibbs' inequality).
    """
    if not is_drawn(splits, pixels):
        return None
    stored = getattr(splits, split)
    scale = 255 if splits.kind == LEVELS else 1
    num_images = max(2, min(_MOST_IMAGES, _MOST_PIXELS // stored[0].numel()))
    entropy = torch.empty(len(stored), dtype=torch.double)
    for part, part_of_entropy in zip(stored.split(num_images), entropy.split(num_images), strict=True):
        p = part.double().flatten(1).nan_to_num(0.0) / scale  # nothing is drawn of a missing pixel
        part_of_entropy.copy_((torch.special.entr(p) + torch.special.entr(1 - p)).sum(1))
    return entropy


# --- Values that repeat ---

_MOST_ROWS, _MOST_VALUES, _MOST_GROUPS = 2000, 2**20, 1000
_MOST_IN_GROUP = 2**15  # in a larger group, single precision itself makes many values equal if they are far from 0
_MOST_DISTINCT = 0.75  # at least 0.99 of the values of continuous data are distinct in single precision


def describe_repeats(x: Tensor) -> str | None:
    """Warn where more than a quarter of the values repeat, in a fixed random subset of rows; None if nowhere.

    The values of a table are compared column by column. Those of images (N, *E) are compared within each channel, then
    pixel by pixel, then image by image, since each of these may have a scale of its own; most groups must repeat.
    """
    rows = x[subset(len(x), max(8, min(_MOST_ROWS, _MOST_VALUES // x[0].numel())))]
    pixels = rows.flatten(1)
    columns = _space_indices(pixels.shape[1], _MOST_GROUPS)
    if x.ndim == 2:
        counts = {column: count for column in columns.tolist() if (count := _count_distinct(rows[:, column]))}
        where = f" in columns {abbreviate(map(str, counts))}"
        return _warn_of_repeats(max(counts.values()), where) if counts else None
    by_group = rows.transpose(0, 1).flatten(1), pixels[:, columns].T, pixels[_space_indices(len(pixels), _MOST_GROUPS)]
    for groups in by_group:
        varying = [group for group in groups if group.min() < group.max()]
        found = [count for group in varying if (count := _count_distinct(group))]
        if 2 * len(found) > len(varying):
            return _warn_of_repeats(max(found), "")
    return None


def _warn_of_repeats(num_distinct: int, where: str) -> str:
    words = (
        f"Values repeat{where} (at most {num_distinct:,} are distinct), as levels and counts do on any scale: "
        "a density of values on a grid has no upper bound, and its nats compare only with densities of the same values."
    )
    if num_distinct <= NUM_LEVELS:
        words += " Saved as uint8, levels from 0 to 255 have a mass under the likelihood discretized-logistic."
    return words + " Saved as whole numbers, counts have a mass under the likelihood negative-binomial."


def describe_constant_columns(x: Tensor) -> str | None:
    """Describe the constant columns of a table (N, D), whose density has no bound; None where there are none."""
    if x.ndim != 2:
        return None
    columns = (x == x[:1]).all(0).nonzero().flatten().tolist()
    if not columns:
        return None
    return (
        f"Warning: {pluralize(len(columns), 'column')} of the training data (counted from 0: "
        f"{abbreviate(map(str, columns))}) hold one value in single precision: a density of it has no upper bound, and "
        "its nats say nothing of the other columns. Leave them out, or center values far from 0 in double precision."
    )


def _space_indices(count: int, most: int) -> Tensor:
    """Return evenly spaced indices below ``count``, at most ``most`` of them."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.double).round().long()


def _count_distinct(values: Tensor) -> int:
    """Count distinct values (n,), or return 0 where they repeat no more than continuous ones, or are constant.

    The three most frequent values are ignored: continuous values may be clipped at both ends, on a background.
    """
    values = values[~values.isnan()]
    if not len(values):
        return 0
    values = values[_space_indices(len(values), _MOST_IN_GROUP)]
    counts = values.unique(return_counts=True)[1].sort(descending=True).values
    others = counts[3:]
    few = len(counts) <= _MOST_DISTINCT * len(values) and len(others) <= _MOST_DISTINCT * others.sum()
    return len(counts) if few and len(counts) > 1 else 0
