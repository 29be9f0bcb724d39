"""Transform stored images to the pixels that a model sees: binarized, levels, dequantized, or unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import cache
from ppl_vae.data.registry import BINARIZATIONS, SPLITS
from ppl_vae.data.splits import BINARY, COUNTS, LEVELS, NUM_LEVELS, PUBLISHED_SEED, REAL, Splits, subset

# How pixels are seen: binarized by one of these words; as they are, levels as level / 255 ("none"); as levels from 0 to
# 255; or as (level + u) / 256.
PIXELS = (*BINARIZATIONS, "levels", "dequantized")

_TAKEN_AS_THEY_ARE = {BINARY: "binary data", REAL: "real values", COUNTS: "counts"}
_CHUNK = 1000  # images at most whose entropy is taken at once, for their memory in float64
_AT_ONCE = 2**18  # pixels


def resolve_binarization(splits: Splits, binarization: str | None, *, default: str = "dynamic") -> str:
    """Resolve the word of a binarization; None is "none" for binary data and real values, else ``default``.

    Raises:
        ValueError: a binarization of binary data or of real values, which are taken as they are.
    """
    if splits.kind in _TAKEN_AS_THEY_ARE:
        if binarization not in (None, "none"):
            what = _TAKEN_AS_THEY_ARE[splits.kind]
            raise ValueError(f"binarization: expected none for {what} ({splits.name}), got {binarization}")
        return "none"
    return binarization or default


def map_images(function: Callable[[Tensor], Tensor], x: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply a pixelwise function to a few images at a time; a large result is in a file.

    Args:
        x: (N, *E).
        dtype: of the result, (N, *E).
    """
    if x.numel() <= _AT_ONCE:
        return function(x).to(dtype)
    result = cache.allocate(tuple(x.shape), dtype)
    num_images = max(1, _AT_ONCE // x[0].numel())
    for part, step_on_part in zip(x.split(num_images), result.split(num_images), strict=True):
        step_on_part.copy_(function(part))
    return result


def to_float(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Convert stored values of any shape to float32, unchanged."""
    return values.float()


def to_unit_interval(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Convert 8-bit levels of any shape to level / 255."""
    return values.float() / 255


def sample_bernoulli(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample x_d ~ Bernoulli(p_d), p = level / 255 or the stored probability: (B, *E) -> (B, *E) in {0, 1}.

    Without a generator of its own the noise is torch's global one's.
    """
    uniform = torch.rand(values.shape, generator=generator, device=values.device)
    return (uniform.mul_(255) < values if values.dtype == torch.uint8 else uniform < values).float()


# In single precision (255 + u) / 256 rounds to 1, and u to 0, a few times an epoch of 28 x 28 images. What comes of the
# generator next to them is 2^-32 and 1 - 2^-24.
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
    """Return the stored training set (N, *E), and the transform from a stored batch to what the model sees.

    Args:
        pixels: a word of ``PIXELS``.
    """
    _check_pixels(splits, pixels)
    if pixels in ("none", "levels") or splits.kind in _TAKEN_AS_THEY_ARE:
        return splits.train, to_unit_interval if splits.kind == LEVELS and pixels == "none" else to_float
    if pixels == "dequantized":
        return splits.train, dequantize_uniformly
    if pixels == "dynamic":
        return splits.train, sample_bernoulli
    return _evaluated(splits, "train", pixels, seed=0, dtype=torch.uint8), to_float


def _check_pixels(splits: Splits, pixels: str) -> None:
    if pixels not in PIXELS:
        raise ValueError(f"pixels: expected one of {', '.join(PIXELS)}, got {pixels!r}")
    if pixels in ("levels", "dequantized") and splits.kind != LEVELS:
        raise ValueError(f"pixels: expected {LEVELS} for {pixels!r}, got {splits.kind} ({splits.name})")


def expected_images(splits: Splits, pixels: str) -> Tensor:
    """Compute the images (N, *E) to which the marginals of the training set are fitted.

    The mean over what "dynamic" draws of each image; for every other word the images themselves, "dequantized" by one
    draw of u.
    """
    return probabilities(splits, "train") if pixels == "dynamic" else evaluation_images(splits, "train", pixels)


_PIXELS_TO_START_FROM = 2**26  # all of MNIST's


def initialization_images(splits: Splits, pixels: str) -> Tensor:
    """Compute ``expected_images`` (n, *E) of a fixed random subset of the training images, or of all if few.

    Marginals that a training starts from need no more, and the fit of an image's many pixels to many images is slow.

    Args:
        pixels: a word of ``PIXELS``.
    """
    most = max(1000, _PIXELS_TO_START_FROM // math.prod(splits.event_shape))
    index = subset(len(splits.train), most)
    some = splits if len(index) == len(splits.train) else replace(splits, train=splits.train[index], labels={})
    return expected_images(some, pixels)


def evaluation_images(splits: Splits, split: str, pixels: str, *, seed: int = 0) -> Tensor:
    """Compute the images of a split that are evaluated: (N, *E) float32, the same at every call.

    "dynamic" and "fixed" draw it once, as in the protocol of Tomczak and Welling (2018, arXiv 1705.07120; their code):
    after seeding numpy's legacy generator with 777, one binomial draw over the validation images, then one over test;
    a draw over train follows. "threshold" is p >= 0.5. "none" takes the values as they are: levels become level / 255.
    "levels" are 0 to 255; "dequantized" is one draw of (level + u) / 256, u a constant's for each split.
    Under the protocol of Burda et al. (2016, arXiv 1509.00519), "dynamic" draws the split anew for each ``seed``,
    which nothing else depends on.

    Raises:
        ValueError: an unknown word, or a split without images.
    """
    return _evaluated(splits, split, pixels, seed=seed, dtype=torch.float32)


def _evaluated(splits: Splits, split: str, pixels: str, *, seed: int, dtype: torch.dtype) -> Tensor:
    _check_pixels(splits, pixels)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if not len(getattr(splits, split)):
        raise ValueError(f"{splits.name}: has no {split} images under the {splits.protocol} protocol")
    stored, unit = getattr(splits, split), _unit(splits)
    if pixels == "levels":
        return map_images(to_float, stored, dtype=dtype)
    if pixels == "dequantized":
        generator = torch.Generator().manual_seed(PUBLISHED_SEED + SPLITS.index(split))
        return map_images(lambda part: dequantize_uniformly(part, generator), stored, dtype=dtype)
    if is_drawn(splits, pixels):
        every_time = splits.protocol == "iwae" and pixels == "dynamic"
        stream = np.random.RandomState(seed if every_time else PUBLISHED_SEED)  # the published generator
        for name in () if every_time else ("validation", "test", "train"):
            if name == split:
                break
            for part in getattr(splits, name).split(max(1, _AT_ONCE // math.prod(splits.event_shape))):
                sample_binomial(stream, unit(part))
        return map_images(lambda part: sample_binomial(stream, unit(part)), stored, dtype=dtype)
    if pixels == "threshold":
        return map_images(lambda part: (unit(part) >= 0.5).float(), stored, dtype=dtype)
    return probabilities(splits, split).to(dtype)


def is_drawn(splits: Splits, pixels: str) -> bool:
    """Whether what the model sees is a random draw of zeros and ones."""
    return pixels in ("dynamic", "fixed") and splits.kind not in _TAKEN_AS_THEY_ARE


def sample_binomial(stream: np.random.RandomState, rates: Tensor) -> Tensor:
    """Sample x_d ~ Bernoulli(p_d) by numpy's legacy generator, as published: (N, *E) float32."""
    return torch.from_numpy(stream.binomial(1, rates.numpy())).float()


def probabilities(splits: Splits, split: str) -> Tensor:
    """Convert a split to probabilities of white: level / 255, other kinds unchanged. (N, *E) float32."""
    stored = getattr(splits, split)
    return stored if stored.dtype == torch.float32 else map_images(_unit(splits), stored)


def _unit(splits: Splits) -> Callable[[Tensor], Tensor]:
    """Transform from stored values to probabilities, or to floats."""
    return to_unit_interval if splits.kind == LEVELS else to_float


def binarization_entropy(splits: Splits, split: str, pixels: str) -> Tensor | None:
    """Entropy of the binarization of each image, (N,) nats, float64; None where nothing is drawn.

    H = -sum_d [p_d log p_d + (1 - p_d) log(1 - p_d)]. The mean of any model's log p(x) over the draws of one
    image is at most -H (Gibbs' inequality).
    """
    if not is_drawn(splits, pixels):
        return None
    stored = getattr(splits, split)
    scale = 255 if splits.kind == LEVELS else 1
    num_images = max(2, min(_CHUNK, _AT_ONCE // stored[0].numel()))
    entropy = torch.empty(len(stored), dtype=torch.double)
    for part, step_on_part in zip(stored.split(num_images), entropy.split(num_images), strict=True):
        p = part.double().flatten(1) / scale
        step_on_part.copy_((torch.special.entr(p) + torch.special.entr(1 - p)).sum(1))
    return entropy
