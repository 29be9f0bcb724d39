"""The words that say which data is read and how. Needs no torch."""

from __future__ import annotations

DATASETS = ("mnist", "static-mnist", "fashion-mnist", "kmnist", "caltech-silhouettes", "cifar10", "svhn")
PROTOCOLS = ("vampprior", "iwae")
FITS = ("crop", "stretch")
COLORS = ("gray", "rgb")
BINARIZATIONS = ("dynamic", "fixed", "threshold", "none")
DEQUANTIZATIONS = ("uniform", "none")
SPLITS = ("test", "validation", "train")
