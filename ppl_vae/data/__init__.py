"""Checked bytes to tensors: data sets, splits, labels, what a model sees of pixels. Knows of no model.

Every split, draw and subset here comes from a constant, never from a run's seed, so that two runs are measured on the
same images; the iwae protocol alone draws its test images from the seed of an evaluation.
"""

from ppl_vae.data.array_files import is_array_file
from ppl_vae.data.cache import is_mapped, room, sha256_of
from ppl_vae.data.further_images import OwnImages, own_images
from ppl_vae.data.loading import DATASETS, load
from ppl_vae.data.pixels import (
    PIXELS,
    as_floats,
    as_fractions,
    bernoulli_draw,
    binarization_entropy,
    evaluation_images,
    expected_images,
    images_to_start_from,
    inside_unit_interval,
    over_images,
    probabilities,
    resolve_binarization,
    training_images,
    uniform_dequantization,
)
from ppl_vae.data.repeats import find_repeats
from ppl_vae.data.splits import (
    BINARY,
    COUNTS,
    KINDS,
    LEVELS,
    NUM_LEVELS,
    PROBABILITIES,
    REAL,
    UNIT_INTERVAL,
    Splits,
    subset,
)

__all__ = [
    "BINARY",
    "COUNTS",
    "DATASETS",
    "KINDS",
    "LEVELS",
    "NUM_LEVELS",
    "PIXELS",
    "PROBABILITIES",
    "REAL",
    "UNIT_INTERVAL",
    "OwnImages",
    "Splits",
    "as_floats",
    "as_fractions",
    "bernoulli_draw",
    "binarization_entropy",
    "evaluation_images",
    "expected_images",
    "find_repeats",
    "images_to_start_from",
    "inside_unit_interval",
    "is_array_file",
    "is_mapped",
    "load",
    "over_images",
    "own_images",
    "probabilities",
    "resolve_binarization",
    "room",
    "sha256_of",
    "subset",
    "training_images",
    "uniform_dequantization",
]
