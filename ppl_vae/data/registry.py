"""Every word that says which data is read and how. Needs no torch. A new data set takes a reader and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Reader:
    """The function that reads a named data set from the folder where its files are.

    Args:
        target: "module:function", the module below ``ppl_vae.data``.
        help: What the data set is, in a few words.
        by_name: Whether the function reads several data sets and takes the word first.
    """

    target: str
    help: str
    by_name: bool = False

    def load(self, word: str) -> Any:
        """The function, from a folder to its splits."""
        module, name = self.target.split(":")
        function = getattr(import_module(f"ppl_vae.data.{module}"), name)
        return partial(function, word) if self.by_name else function


DATASETS = {
    "mnist": Reader("embedded:mnist", "digits, embedded in the package"),
    "static-mnist": Reader("binary_sets:static_mnist", "digits, binarized once (Larochelle and Murray 2011)"),
    "fashion-mnist": Reader("torchvision_sets:read_through_torchvision", "clothes, gray", by_name=True),
    "kmnist": Reader("torchvision_sets:read_through_torchvision", "Japanese characters, gray", by_name=True),
    "caltech-silhouettes": Reader("binary_sets:caltech_silhouettes", "outlines, binary"),
    "cifar10": Reader("torchvision_sets:read_through_torchvision", "photographs, color", by_name=True),
    "svhn": Reader("torchvision_sets:read_through_torchvision", "house numbers, color", by_name=True),
}
PROTOCOLS = ("vampprior", "iwae")
FITS = ("crop", "stretch")
COLORS = ("gray", "rgb")
BINARIZATIONS = ("dynamic", "fixed", "threshold", "none")
DEQUANTIZATIONS = ("uniform", "none")
SPLITS = ("test", "validation", "train")
