"""A run of a table: the one that is asked for, or refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ppl_vae import data
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.load import read_config
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import resolve


def check_comparable(options: Options) -> None:
    """Raises ValueError for an autoencoder: it has no log p(x), by which a table is ranked."""
    if is_autoencoder(options):
        raise ValueError(
            f"--posterior {options.posterior}: expected a density q(z | x) for a table of log p(x), got an autoencoder"
        )


def check_same(folder: Path, asked: Options, splits: data.Splits, *, free: frozenset[str] = frozenset()) -> None:
    """A run that is taken as it is must be what is asked for, in every option but those that are free.

    Where the data lies is always free, since its SHA-256 decides, and so is what changes no number: whether images were
    streamed, events logged. So is whether it was compiled, where that was left to the program.

    Raises:
        ValueError: a folder that is no run, or one with other options.
    """
    stored, _ = read_config(folder)
    resolved = resolve(asked, splits)
    free |= {"data_dir", "stream", "tensorboard"} | ({"compile"} if asked.compile == "auto" else set())
    differ = sorted(name for name in asdict(stored).keys() - free if getattr(stored, name) != getattr(resolved, name))
    if differ:
        raise ValueError(
            f"{folder}: expected a run with the options that are asked for, got others in {', '.join(differ)}; "
            "name another --run-dir"
        )
