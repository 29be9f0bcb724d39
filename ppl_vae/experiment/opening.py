"""A run folder with the data that it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppl_vae import build, data, runs
from ppl_vae.options import Options

Say = Callable[[str], None]


class Run(NamedTuple):
    """A run folder, its options, and its data set."""

    folder: Path
    options: Options
    splits: data.Splits

    @property
    def binarization(self) -> str:
        """The word, as it was resolved when the run began."""
        assert self.options.binarization is not None
        return self.options.binarization


def open_run(run_dir: str) -> Run:
    """Raises ValueError where it is no run, a damaged one, or its data is not what it was trained on."""
    folder = Path(run_dir)
    options, seen = build.read_config(folder)
    splits = data.load(options.dataset)
    if splits.sha256 != seen["sha256"]:
        raise ValueError(
            f"{options.dataset}: the file has changed since {folder} was trained on it (its SHA-256 differs)"
        )
    if splits.event_shape != seen["event_shape"]:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: event_shape {seen['event_shape']}, but the data has {splits.event_shape}"
        )
    return Run(folder, options, splits)
