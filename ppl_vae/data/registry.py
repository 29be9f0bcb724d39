"""Every word that says which data is read and how. Needs no torch.

A new data set takes a reader, a function ``(data_dir, *, download) -> Splits``, and a line in ``DATASETS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae.data.splits import Splits


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
BINARIZATIONS = ("dynamic", "fixed", "threshold", "none")
DEQUANTIZATIONS = ("uniform", "none")
SPLITS = ("test", "validation", "train")
