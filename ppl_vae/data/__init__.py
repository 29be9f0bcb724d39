"""Data sets as tensors: readers, splits, labels, and the pixels that a model sees. No model is imported here.

Every split, draw and subset comes from a constant, never from a run's seed, so that two runs are measured on the same
images. Only the iwae protocol draws its test images from the seed of an evaluation.

This file holds the words that choose a data set and how it is read. Other names are imported when they are first used,
so that these words need no torch. A new data set needs a reader, a function ``(data_dir, *, download) -> Splits``, and
a line in ``DATASETS``.
"""
# ruff: noqa: F403, F405 (the imports are for type checkers)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae.data.array_files import *
    from ppl_vae.data.labels import *
    from ppl_vae.data.sources import *
    from ppl_vae.data.splits import *
    from ppl_vae.data.storage import *
    from ppl_vae.data.transforms import *


@dataclass(frozen=True)
class NamedSet:
    """A data set that has a name.

    Args:
        reader: "module:function", the module below ``ppl_vae.data``.
        help: What the data set is, in a few words.
    """

    reader: str
    help: str

    def import_reader(self) -> Callable[..., Splits]:
        """Import the function that reads the data set: ``(data_dir, *, download) -> Splits``."""
        module, name = self.reader.split(":")
        reader: Callable[..., Splits] = getattr(import_module(f"ppl_vae.data.{module}"), name)
        return reader


DATASETS = {
    "mnist": NamedSet("image_sets:read_mnist", "digits, embedded in the package"),
    "static-mnist": NamedSet("binary_sets:read_static_mnist", "digits, binarized once (Larochelle and Murray 2011)"),
    "fashion-mnist": NamedSet("image_sets:read_fashion_mnist", "clothes, gray"),
    "kmnist": NamedSet("image_sets:read_kmnist", "Japanese characters, gray"),
    "caltech-silhouettes": NamedSet("binary_sets:read_caltech_silhouettes", "outlines, binary"),
    "cifar10": NamedSet("image_sets:read_cifar10", "photographs, color"),
    "svhn": NamedSet("image_sets:read_svhn", "house numbers, color"),
}
PROTOCOLS = ("vampprior", "iwae")
FITS = ("crop", "stretch")
COLORS = ("gray", "rgb")
MISSING = ("forbid", "train")  # what a NaN in a file of arrays is: an error, or a missing value
BINARIZATIONS = ("dynamic", "fixed", "threshold", "none")
DEQUANTIZATIONS = ("uniform", "none")
SPLITS = ("test", "validation", "train")

_NAMES = {
    "array_files": "is_array_file",
    "labels": "add_labelled_images keep_labels",
    "sources": "UserImages from_dataset load load_images",
    "splits": "BINARY COUNTS KINDS LEVELS NUM_LEVELS PROBABILITIES REAL UNIT_INTERVAL Splits fill_from_observed subset",
    "storage": "allocate compute_sha256 is_mapped",
    "transforms": "PIXELS binarization_entropy clamp_to_unit_interval convert_to_float dequantize_uniformly "
    "describe_constant_columns describe_repeats evaluation_images expected_images initialization_images map_images "
    "probabilities resolve_binarization sample_bernoulli scale_to_unit_interval training_images",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"ppl_vae.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.data' has no attribute {name!r}")
