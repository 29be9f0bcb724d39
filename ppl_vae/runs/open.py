"""A run with its data: opened, and the images that it is asked about."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.data import SPLITS
from ppl_vae.evidence.dequantization import dequantized
from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.runs.build import build_likelihood, is_autoencoder
from ppl_vae.runs.load import copy_pretrained, is_export, load, read_config
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import (
    check_support,
    choose_evaluated_pixels,
    choose_pixels,
    data_options,
    describe_scale,
    load_splits,
)
from ppl_vae.runs.results import Provenance
from ppl_vae.runtime.ranks import Say
from ppl_vae.runtime.records import UNKNOWN, Data, Records
from ppl_vae.vae import VAE


class Run(NamedTuple):
    """A run folder, its options, its data set, and whether its training can be resumed."""

    folder: Path
    options: Options
    splits: data.Splits
    can_resume: bool = True

    @property
    def binarization(self) -> str:
        """The resolved word of ``--binarization``."""
        assert self.options.binarization is not None
        return self.options.binarization

    @property
    def pixels(self) -> str:
        """How training saw pixels, a word of ``data.PIXELS``."""
        return choose_pixels(self.options, self.splits)

    @property
    def evaluated_pixels(self) -> str:
        """How ``load_evaluated_vae`` sees pixels, a word of ``data.PIXELS``."""
        return choose_evaluated_pixels(self.options, self.splits)

    def add_labels(self, split: str, x: Tensor) -> Data:
        """All images x (N, *E) of a split as the model takes them: with their labels, if it takes labels.

        With ``--labels`` no label is known but those that were kept for training.
        """
        if self.options.condition == "none":
            return x
        return Records(x, self.known_labels(split))

    def known_labels(self, split: str) -> Tensor:
        """The labels (N,) of a split that the model may see, -1 where it may not."""
        labels, number = self.splits.labels[split], self.options.labels
        if number is None:
            return labels
        if split == "train":
            return data.keep_labels(labels, number, seed=self.options.seed)
        return torch.full_like(labels, UNKNOWN)

    @property
    def scale(self) -> str:
        """What the run's nats measure, such as "mass of binary pixels"."""
        return describe_scale(self.options, self.splits)

    @property
    def provenance(self) -> Provenance:
        """What the run's numbers depend on besides the model."""
        return Provenance(
            dataset=self.splits.name,
            protocol=self.splits.protocol,
            binarization=self.binarization,
            likelihood=self.options.likelihood,
            transform=self.options.transform,
            measure=build_likelihood(self.options, self.splits.event_shape).measure,
            pixels=self.pixels,
            scale=self.scale,
        )

    def name_files(self, split: str, index: Tensor) -> dict[str, list[str]]:
        """The file names of images, (n,) indices in a split, under "names"; empty where they have no files."""
        names = self.splits.names.get(split)
        return {"names": [names[i] for i in index.tolist()]} if names else {}

    @property
    def trained_scale(self) -> str:
        """What the nats of its training measure: for dequantized levels their density, not their mass."""
        return "density of (level + u) / 256" if self.pixels == "dequantized" else self.scale


def load_evaluated_vae(run: Run) -> VAE:
    """The trained VAE that is evaluated and shown, on the CPU, in evaluation mode.

    A density that was trained on dequantized levels is evaluated as the mass that it gives to levels
    (``dequantization.dequantized``), which is exact for every density that ``--likelihood`` names. A semi-supervised
    one is evaluated given each label, as a conditional one is.
    """
    vae = load(run.folder)
    if isinstance(vae, SemiSupervisedVAE):
        vae = cast(VAE, vae.given_labels())
    return dequantized(vae) if run.pixels == "dequantized" else vae


def check_density(run: Run, what: str) -> None:
    """Raises ValueError for an autoencoder, which lacks what needs a density q(z | x)."""
    if is_autoencoder(run.options):
        stored = "its reconstructions are in evaluation.json"
        there = "test" in runs.read_evaluations(run.folder)
        raise ValueError(
            f"{run.folder}: expected a run with a density q(z | x), got an autoencoder (--posterior "
            f"{run.options.posterior}), which has no {what}" + f"; {stored}" * there
        )


def check_no_labels(run: Run, what: str) -> None:
    """Raises ValueError for a model that takes labels."""
    if run.options.condition != "none":
        raise ValueError(
            f"{run.folder}: expected a model of images alone, got --condition {run.options.condition}, for which there "
            f"is no {what}; evaluate, compare, sample, report and export take it"
        )


def open_run(
    run_dir: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    like: Run | None = None,
    say: Say = tqdm.write,
) -> Run:
    """Opens a run with its data. Raises ValueError for a damaged one, or other data than it was trained on.

    Args:
        run_dir: The run's folder, or a pretrained run by its name or its address on the Hub, which is copied below
            runs and opened there.
        dataset: The place of the run's own data, if it has moved.
        data_dir: The folder of the named data sets, if it has moved.
        like: A run that is open already, whose data is shared if it is the same.
        say: Takes a line about a pretrained run's new folder.
    """
    folder = copy_pretrained(run_dir, say)
    options, config = read_config(folder)
    # A folder that a config names is never made.
    stored = options.data_dir if options.data_dir is not None and os.path.isdir(options.data_dir) else None
    options = replace(options, dataset=dataset or options.dataset, data_dir=data_dir or stored)
    download = data_dir is not None or stored is None  # into a folder of the user's choice, and of nobody else's
    if options.dataset not in data.DATASETS and not os.path.exists(options.dataset):
        raise ValueError(f"{folder}: its data, {options.dataset}, is not there; --dataset says where it is now")
    same = like is not None and data_options(like.options) == data_options(options)
    splits = like.splits if like is not None and same else load_splits(options, download=download)
    if splits.sha256 != config["sha256"]:
        raise ValueError(
            f"{options.dataset}: expected the data that {folder} was trained on, got other bytes (its SHA-256 differs)"
        )
    if splits.event_shape != config["event_shape"]:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: event_shape {config['event_shape']}, but the data has "
            f"{splits.event_shape}"
        )
    check_support(options, splits)
    return Run(folder, options, splits, can_resume=config["can_resume"])


def open_run_or_export(run_dir: str, *, dataset: str | None, data_dir: str | None, say: Say) -> Run:
    """Opens a run with its data, or an export without data unless its place is given."""
    folder = copy_pretrained(run_dir, say)
    told = dataset is not None or data_dir is not None
    if told or not (folder / runs.CONFIG).is_file() or not is_export(runs.read_json(folder / runs.CONFIG)):
        return open_run(str(folder), dataset=dataset, data_dir=data_dir, say=say)
    return open_without_data(folder)


def open_without_data(folder: Path) -> Run:
    """Opens a run or an export without images: its splits have only their kind and shape.

    Raises ValueError for a damaged one.
    """
    options, config = read_config(folder)
    kind = config["kind"]
    if kind not in data.KINDS:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: expected a kind of data ({', '.join(data.KINDS)}), got {kind!r}"
        )
    dtype = torch.uint8 if kind in (data.BINARY, data.LEVELS) else torch.float32
    none = torch.empty((0, *config["event_shape"]), dtype=dtype)
    splits = data.Splits(
        name=Path(options.dataset).name,
        kind=kind,
        train=none,
        validation=none,
        test=none,
        sha256=config["sha256"],
        split="none is here",
        protocol=options.protocol,
    )
    return Run(folder, options, splits, can_resume=config["can_resume"])


def check_images(run: Run, source: str, x: Tensor) -> None:
    """Raises ValueError for pixels off the likelihood's support. x: (n, *E), NaN where a pixel is missing."""
    family, seen = build_likelihood(run.options, run.splits.event_shape), x[~x.isnan()]
    if run.pixels != "dequantized" and not family.support.check(seen).all():
        raise ValueError(
            f"{source}: expected pixels that are {family.support_words}, got values from {float(seen.min()):.4g} to "
            f"{float(seen.max()):.4g}"
        )


class Images(NamedTuple):
    """Some of the N images of a split or a path."""

    source: str  # the split's name, or the absolute path
    x: Tensor  # (n, *E) as the model sees them, with NaN for missing pixels
    labels: Tensor | None  # (n,) int64
    names: tuple[str, ...]  # of files, or indices among the N
    places: Tensor  # (n,) int64, the indices among the N, ascending
    num_found: int  # N
    notes: tuple[str, ...] = ()  # sentences for the user about how the images were read
    splits: tuple[str, ...] = ()  # of the run's data that hold the same image, or "", where images are from a path


def load_given_images(run: Run, images_path: str, *, most: int | None, seed: int) -> Images:
    """Loads a split by its name, or a file or folder of images, resized as the run's own data was.

    They are a fixed random subset of at most ``most`` images. The seed is that of a binarization that draws anew.
    """
    notes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    if images_path in SPLITS:
        source, labels = images_path, run.splits.labels.get(images_path)
        x = data.evaluation_images(run.splits, images_path, run.evaluated_pixels, seed=seed)
        names = run.splits.names.get(images_path) or tuple(str(i) for i in range(len(x)))
    else:
        source = str(Path(images_path).resolve())
        x, labels, names, notes, splits = data.load_images(
            images_path, run.splits, run.evaluated_pixels, seed=seed, fit=run.options.fit
        )
        check_images(run, source, x)
    places = data.subset(len(x), most)
    kept = tuple(names[i] for i in places.tolist())
    splits = tuple(splits[i] for i in places.tolist()) if splits else ()
    known = [split for split in splits if split in ("train", "validation")]
    if known:
        seen = ", ".join(f"{known.count(split):,} in {split}" for split in sorted(set(known)))
        notes += (
            f"{len(known):,} of {len(kept):,} images are also in the run's data, pixel by pixel ({seen}): their "
            "numbers are not those of new images",
        )
    return Images(source, x[places], None if labels is None else labels[places], kept, places, len(x), notes, splits)
