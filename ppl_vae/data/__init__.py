"""Data sets as tensors: readers, splits, labels, and the pixels that a model sees. No model is imported here.

Every split, draw and subset here comes from a constant, never from a run's seed, so that two runs are measured on the
same images; the iwae protocol alone draws its test images from the seed of an evaluation.

Every name is imported when it is first used, so that ``ppl_vae.data.registry`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_vae.data.array_files import is_array_file
    from ppl_vae.data.cache import allocate, compute_sha256, is_mapped
    from ppl_vae.data.pixels import (
        PIXELS,
        binarization_entropy,
        clamp_to_unit_interval,
        dequantize_uniformly,
        evaluation_images,
        expected_images,
        initialization_images,
        map_images,
        probabilities,
        resolve_binarization,
        sample_bernoulli,
        to_float,
        to_unit_interval,
        training_images,
    )
    from ppl_vae.data.repeats import describe_constant_columns, find_repeats
    from ppl_vae.data.sources import DATASETS, UserImages, load, load_images
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

_HOME = {
    "BINARY": "splits",
    "COUNTS": "splits",
    "DATASETS": "sources",
    "KINDS": "splits",
    "LEVELS": "splits",
    "NUM_LEVELS": "splits",
    "PIXELS": "pixels",
    "PROBABILITIES": "splits",
    "REAL": "splits",
    "Splits": "splits",
    "UNIT_INTERVAL": "splits",
    "UserImages": "sources",
    "allocate": "cache",
    "binarization_entropy": "pixels",
    "clamp_to_unit_interval": "pixels",
    "compute_sha256": "cache",
    "dequantize_uniformly": "pixels",
    "describe_constant_columns": "repeats",
    "evaluation_images": "pixels",
    "expected_images": "pixels",
    "find_repeats": "repeats",
    "initialization_images": "pixels",
    "is_array_file": "array_files",
    "is_mapped": "cache",
    "load": "sources",
    "load_images": "sources",
    "map_images": "pixels",
    "probabilities": "pixels",
    "resolve_binarization": "pixels",
    "sample_bernoulli": "pixels",
    "subset": "splits",
    "to_float": "pixels",
    "to_unit_interval": "pixels",
    "training_images": "pixels",
}

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
    "Splits",
    "UserImages",
    "allocate",
    "binarization_entropy",
    "clamp_to_unit_interval",
    "compute_sha256",
    "dequantize_uniformly",
    "describe_constant_columns",
    "evaluation_images",
    "expected_images",
    "find_repeats",
    "initialization_images",
    "is_array_file",
    "is_mapped",
    "load",
    "load_images",
    "map_images",
    "probabilities",
    "resolve_binarization",
    "sample_bernoulli",
    "subset",
    "to_float",
    "to_unit_interval",
    "training_images",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.data' has no attribute {name!r}")
