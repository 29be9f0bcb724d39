"""Several runs that one command trains: checked before the first training, then trained or resumed one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ppl_vae import data, runs
from ppl_vae.commands.train import resume_run, train_run
from ppl_vae.runs.build import build_meta_vae, count_weights, is_autoencoder
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.load import read_config
from ppl_vae.runs.open import Run, Say, open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import check_support, resolve
from ppl_vae.runs.results import read_evaluation


def check_has_density(options: Options) -> None:
    """Raises ValueError for an autoencoder: it has no log p(x), by which a table is ranked."""
    if is_autoencoder(options):
        raise ValueError(
            f"--posterior {options.posterior}: expected a density q(z | x) for a table of log p(x), got an autoencoder"
        )


def check_runs(asked: Mapping[Path, Options], splits: data.Splits, *, free: frozenset[str] = frozenset()) -> None:
    """Finds before the first training what would end a later one.

    Args:
        asked: The options of the run in each folder.
        splits: The data of all runs.
        free: The options in which a run that is already there may differ.

    Raises:
        ValueError: An autoencoder, options that do not fit the data, a VAE that cannot be built, or a folder that holds
            something else than such a run.
    """
    for folder, options in asked.items():
        check_has_density(options)
        resolved = resolve(options, splits)
        check_support(resolved, splits)
        build_meta_vae(resolved, splits.event_shape)
        if (folder / runs.CONFIG).exists():
            check_same_options(folder, options, resolved, free)
        elif folder.exists() and not runs.is_empty(folder):
            raise ValueError(f"{folder}: expected a run, a new or an empty folder, got another; name another --run-dir")


def check_same_options(folder: Path, asked: Options, resolved: Options, free: frozenset[str]) -> None:
    """Checks that the run in a folder has the options that are asked for.

    The place of the data is free, since its SHA-256 decides, and so is whether images are streamed and events logged.
    Whether the run was compiled is free where ``--compile auto`` leaves it to the program.

    Raises:
        ValueError: The folder is no run, or the run has other options.
    """
    stored, _ = read_config(folder)
    free |= {"data_dir", "stream", "tensorboard"} | ({"compile"} if asked.compile == "auto" else set())
    differ = sorted(name for name in asdict(stored).keys() - free if getattr(stored, name) != getattr(resolved, name))
    if differ:
        raise ValueError(
            f"{folder}: expected a run with the options that are asked for, got others in {', '.join(differ)}; "
            "name another --run-dir"
        )


def train_or_resume(folder: Path, options: Options, like: Run | None, *, say: Say, draw: bool = True) -> Run:
    """Trains the run in a folder to its end, from wherever it stands, and opens it.

    ``like`` is a run that is open already, whose data is taken where it is the same.
    """
    if (folder / runs.CONFIG).exists():
        resume_run(str(folder), epochs=None, say=say, data_dir=options.data_dir, like=like, draw=draw)
    else:
        train_run(options, str(folder), say=say, draw=draw)
    return open_run(str(folder), data_dir=options.data_dir, like=like)


def summarize_run(run: Run) -> JsonObject:
    """The fields of a ``TrainedRow`` for a run that is trained and evaluated."""
    found, metrics = read_evaluation(run.folder), runs.read_metrics(run.folder)
    elbo = "validation_elbo_nats_per_image"
    shared = (
        *("split", "binarization", "num_images", "num_particles"),
        *("log_likelihood", "elbo", "kl", "rise", "floor"),
    )
    return {
        **{name: getattr(found, name) for name in shared},
        "weights": count_weights(run.options, run.splits.event_shape),
        "epochs": metrics[-1]["epoch"],
        "best_epoch": max(metrics, key=lambda record: record[elbo if elbo in record else "step"])["epoch"],
        "seconds": metrics[-1]["seconds"],
    }
