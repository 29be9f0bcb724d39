"""Data sets as tensors: readers, splits, labels, and the pixels that a model sees. No model is imported here.

Every split, draw and subset comes from a constant, never from a run's seed, so that two runs are measured on the same
images. Only the iwae protocol draws its test images from the seed of an evaluation.

Every name is imported when it is first used, so that ``ppl_vae.data.registry`` needs no torch.
"""
# ruff: noqa: F401 (the imports are for type checkers)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae.data.array_files import is_array_file
    from ppl_vae.data.cache import compute_sha256
    from ppl_vae.data.machine import allocate, is_mapped
    from ppl_vae.data.registry import DATASETS
    from ppl_vae.data.sources import UserImages, load, load_images
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
    from ppl_vae.data.transforms import (
        PIXELS,
        binarization_entropy,
        clamp_to_unit_interval,
        convert_to_float,
        dequantize_uniformly,
        describe_constant_columns,
        evaluation_images,
        expected_images,
        find_repeats,
        initialization_images,
        map_images,
        probabilities,
        resolve_binarization,
        sample_bernoulli,
        scale_to_unit_interval,
        training_images,
    )

_NAMES = {
    "array_files": "is_array_file",
    "cache": "compute_sha256",
    "machine": "allocate is_mapped",
    "registry": "DATASETS",
    "sources": "UserImages load load_images",
    "splits": "BINARY COUNTS KINDS LEVELS NUM_LEVELS PROBABILITIES REAL UNIT_INTERVAL Splits subset",
    "transforms": "PIXELS binarization_entropy clamp_to_unit_interval convert_to_float dequantize_uniformly "
    "describe_constant_columns evaluation_images expected_images find_repeats initialization_images map_images "
    "probabilities resolve_binarization sample_bernoulli scale_to_unit_interval training_images",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"ppl_vae.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.data' has no attribute {name!r}")
