"""Load a data set by its name, or a user's data by its path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ppl_vae.data.array_files import is_array_file
from ppl_vae.data.image_folder import load_image_folder
from ppl_vae.data.own import load_arrays
from ppl_vae.data.registry import COLORS, DATASETS, FITS, PROTOCOLS
from ppl_vae.data.splits import Splits
from ppl_vae.data.torchvision_sets import DOWNLOADED, read_through_torchvision

_IWAE_DATASETS = ("mnist", "fashion-mnist", "kmnist")


def load(
    dataset: str,
    *,
    data_dir: str | None = None,
    protocol: str = "vampprior",
    image_size: Sequence[int] | None = None,
    fit: str = "crop",
    color: str | None = None,
    download: bool = True,
) -> Splits:
    """Load a named data set, a user's ``.npz`` or ``.npy`` file, or a folder of images.

    Args:
        data_dir: where the named data sets are, or are downloaded to; None: the environment variable PPL_VAE_DATA_DIR,
            else the folder data.
        protocol: "vampprior" (Tomczak and Welling 2018, arXiv 1705.07120), or for the gray named sets "iwae" (Burda et
            al. 2016, arXiv 1509.00519): all 60,000 images train, none validate, test is drawn anew at each evaluation.
        image_size, fit, color: of a folder of images: see ``image_folder``.
        download: whether a named data set that is not there may be fetched.

    Raises:
        ValueError: an unknown name, missing or damaged files, or values that are no images.
    """
    for argument, words, word in (("protocol", PROTOCOLS, protocol), ("fit", FITS, fit), ("color", COLORS, color)):
        if word not in words and word is not None:
            raise ValueError(f"{argument}: expected one of {', '.join(words)}, got {word!r}")
    if protocol == "iwae" and dataset not in _IWAE_DATASETS:
        raise ValueError(
            f"protocol: expected vampprior for {dataset} (iwae is for {', '.join(_IWAE_DATASETS)}), got iwae"
        )
    path, named = Path(dataset), dataset in DATASETS
    arrays = not named and is_array_file(path)
    if not named and not arrays and os.path.isdir(dataset):
        return load_image_folder(path, image_size=image_size, fit=fit, color=color)
    for argument, value in (("image_size", image_size), ("color", color)):
        if value is not None and (named or arrays):
            raise ValueError(f"{argument}: expected none for {dataset} (it is for a folder of images), got {value}")
    if arrays:
        return load_arrays(path)
    if not named:
        names = ", ".join(DATASETS)
        raise ValueError(
            f"dataset: expected {names}, or the path of an .npz or .npy file or of a folder of images, got {dataset!r}"
        )
    folder = Path(data_dir or os.environ.get("PPL_VAE_DATA_DIR") or "data")
    if dataset in DOWNLOADED and not download:
        splits = read_through_torchvision(dataset, folder, download=False)
    else:
        splits = DATASETS[dataset].load(dataset)(folder)
    return _under_iwae(splits) if protocol == "iwae" else splits


def _under_iwae(splits: Splits) -> Splits:
    """Move the validation images back to train, from which they were taken."""
    labels = {
        "train": torch.cat([splits.labels["train"], splits.labels["validation"]]),
        "validation": splits.labels["validation"][:0],
        "test": splits.labels["test"],
    }
    return replace(
        splits,
        train=torch.cat([splits.train, splits.validation]),
        validation=splits.validation[:0],
        split="iwae protocol: all training images train, and test is drawn anew at each evaluation",
        labels=labels,
        protocol="iwae",
    )
