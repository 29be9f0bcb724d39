"""A run folder with the data that it was trained on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.evidence.dequantization import dequantized
from ppl_vae.runs.build import build_likelihood, is_autoencoder
from ppl_vae.runs.load import is_from_python, load, read_config
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
from ppl_vae.runs.shipped import copy_pretrained
from ppl_vae.runtime.ranks import Say
from ppl_vae.vae import VAE


class Run(NamedTuple):
    """A run folder, its options, its data set, and whether its weights were saved from Python."""

    folder: Path
    options: Options
    splits: data.Splits
    from_python: bool = False

    @property
    def binarization(self) -> str:
        """The word, as it was resolved when the run began."""
        assert self.options.binarization is not None
        return self.options.binarization

    @property
    def pixels(self) -> str:
        """How training saw pixels, a word of ``data.PIXELS``."""
        return choose_pixels(self.options, self.splits)

    @property
    def evaluated_pixels(self) -> str:
        """How ``evaluated_vae`` sees pixels, a word of ``data.PIXELS``."""
        return choose_evaluated_pixels(self.options, self.splits)

    @property
    def scale(self) -> str:
        """What its nats are of, in words."""
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

    @property
    def trained_scale(self) -> str:
        """What the nats of its training are of: where levels are dequantized, their density and not their mass."""
        return "density of (level + u) / 256" if self.pixels == "dequantized" else self.scale


def evaluated_vae(run: Run) -> VAE:
    """The trained VAE as it is evaluated and shown, on the CPU, in evaluation mode.

    A density that was trained on dequantized levels is evaluated as the mass that it gives to levels
    (``dequantization.dequantized``), which is exact for every density that ``--likelihood`` names.
    """
    vae = load(run.folder)
    return dequantized(vae) if run.pixels == "dequantized" else vae


def check_density(run: Run, what: str) -> None:
    """Refuses an autoencoder where something takes a density q(z | x).

    Args:
        what: that something, in words.

    Raises:
        ValueError: the run's guide is deterministic.
    """
    if is_autoencoder(run.options):
        stored = "its reconstructions are in evaluation.json"
        there = "test" in runs.read_evaluations(run.folder)
        raise ValueError(
            f"{run.folder}: expected a run with a density q(z | x), got an autoencoder (--posterior "
            f"{run.options.posterior}), which has no {what}" + f"; {stored}" * there
        )


def describe_unused_draws(run: Run, num_draws: int | None) -> list[str]:
    """The line that --dequantization-draws changes nothing, where it was given and pixels are dequantized."""
    if num_draws is None or run.pixels != "dequantized":
        return []
    return [
        f"--dequantization-draws {num_draws} has no effect: under --likelihood {run.options.likelihood} the masses of "
        "levels are exact, and nothing is drawn."
    ]


def open_run(
    run_dir: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    like: Run | None = None,
    say: Say = tqdm.write,
) -> Run:
    """A run with its data.

    Args:
        run_dir: the run's folder, or the name of a pretrained run, of which runs/NAME is made and opened.
        dataset: where the run's own data file or folder is now, should it have moved.
        data_dir: where the folder of the named data sets is now, should it have moved.
        like: a run that is open already, whose data is taken where both ask for the same.
        say: is told of a pretrained run's new folder.

    Raises:
        ValueError: no run, a damaged one, or other data than it was trained on.
    """
    folder = copy_pretrained(run_dir, say)
    options, seen = read_config(folder)
    stored = _stored_data_dir(options)
    options = replace(options, dataset=dataset or options.dataset, data_dir=data_dir or stored)
    download = data_dir is not None or stored is None  # into a folder of the user's choice, and of nobody else's
    if options.dataset not in data.DATASETS and not os.path.exists(options.dataset):
        raise ValueError(f"{folder}: its data, {options.dataset}, is not there; --dataset says where it is now")
    same = like is not None and data_options(like.options) == data_options(options)
    splits = like.splits if like is not None and same else load_splits(options, download=download)
    if splits.sha256 != seen["sha256"]:
        raise ValueError(
            f"{options.dataset}: expected the data that {folder} was trained on, got other bytes (its SHA-256 differs)"
        )
    if splits.event_shape != seen["event_shape"]:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: event_shape {seen['event_shape']}, but the data has {splits.event_shape}"
        )
    check_support(options, splits)
    return Run(folder, options, splits, from_python=is_from_python(folder))


def _stored_data_dir(options: Options) -> str | None:
    """The folder of named data sets that a config tells of, where it is there: what a config names is never made."""
    return options.data_dir if options.data_dir is not None and os.path.isdir(options.data_dir) else None
