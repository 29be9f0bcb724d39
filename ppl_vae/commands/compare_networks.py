"""One table of networks: weights, seconds an epoch, and log p(x) after the same time of training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ppl_vae import data, runs
from ppl_vae.commands.options import CompareNetworks
from ppl_vae.commands.train import resume_run, train_run
from ppl_vae.runs.asked_run import check_comparable, check_same
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.evaluations import is_evaluated
from ppl_vae.runs.fit_arguments import build_objective, find_device
from ppl_vae.runs.opening import Say
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import check_support, choose_pixels, load_splits, resolve
from ppl_vae.training import Callbacks, Optimizer, Schedule, Validation, fit

_CALIBRATION_STEPS = 40


def run(options: CompareNetworks, *, say: Say) -> None:
    """The command: trains and evaluates the runs of the table, and prints it."""
    run_dir = options.run_dir or f"runs/networks-{Path(options.dataset).stem}"
    compare_networks(
        options.networks,
        options.make_run_options(),
        minutes=options.minutes,
        run_dir=run_dir,
        output=options.output,
        say=say,
    )
    if len(options.networks) > 1:
        folders = " ".join(f"{run_dir}/{network}" for network in options.networks)
        say(f"Paired differences: python scripts/compare_runs.py {folders}")


def compare_networks(
    networks: Sequence[str], options: Options, *, minutes: float, run_dir: str, output: str | None, say: Say
) -> list[dict[str, Any]]:
    """Trains each network for about the same time, in run folders of their own; writes and says one table.

    Epochs are planned from the measured time of a few steps, so that each training, with its validation, takes about
    that long when nothing else runs. A table that was interrupted goes on; its finished runs are taken as they are.

    Args:
        networks: words of ``--network``.
        options: all others; their network and epochs do not count.
        minutes: of training, for each.
        run_dir: the folder of the run folders.
        output: a JSON file for the table, or None.

    Returns:
        The table's rows.

    Raises:
        ValueError: as ``train``, an autoencoder, or a folder that holds a run with other options.
    """
    check_comparable(options)
    splits = load_splits(options)
    for network in networks:  # what cannot be built is found before hours of training
        with torch.device("meta"):
            build_vae(replace(options, network=network), splits.event_shape)
    rows = []
    for network in networks:
        asked = replace(options, network=network)
        folder = Path(run_dir) / network
        if (folder / runs.CONFIG).exists():
            check_same(folder, asked, splits, free=frozenset({"epochs", "warmup_epochs"}))
            resume_run(str(folder), epochs=None, say=say)
        else:
            seconds = seconds_an_epoch(asked)
            epochs = max(1, math.floor(60 * minutes / seconds))
            if asked.compile == "auto" and _compiles(replace(asked, epochs=epochs)):
                seconds = seconds_an_epoch(replace(asked, compile="on"))
                epochs = max(1, math.floor(60 * minutes / seconds))
            say(f"{network}: an epoch takes about {seconds:.2g} s, so {minutes:g} minutes are {epochs} of them.")
            train_run(replace(asked, epochs=epochs), str(folder), say=say)
        rows.append(row(folder, network))
    if output is not None:
        table = {"dataset": options.dataset, "minutes": minutes, "rows": rows}
        runs.write_json(Path(output), table | {"environment": runs.describe_environment(options.device)})
    for line in describe(rows):
        say(line)
    return rows


def _compiles(options: Options) -> bool:
    return resolve(options, load_splits(options)).compile == "on"


def seconds_an_epoch(options: Options) -> float:
    """What an epoch of training and validation takes here, from a few steps of a throw-away VAE; compiled if "on"."""
    compile = options.compile == "on"
    splits = load_splits(options)
    options = resolve(options, splits)
    check_support(options, splits)
    stored, observe = data.training_images(splits, choose_pixels(options, splits))
    some = stored[: _CALIBRATION_STEPS * options.batch_size]
    share = len(some) / len(stored)
    validation = None
    if len(splits.validation):
        validation = data.evaluation_images(splits, "validation", choose_pixels(options, splits))
        validation = validation[: max(1, round(share * len(validation)))]
    with torch.random.fork_rng(devices=[]):
        vae = build_vae(options, splits.event_shape).to(find_device(options.device))
        ended: list[float] = []
        fit(
            vae,
            some,
            epochs=3,  # the first runs with Pyro's validation on, and warms up
            objective=build_objective(options),
            transform=observe,
            optimizer=Optimizer(learning_rate=1e-12, average_decay=options.average_decay),
            schedule=Schedule(batch_size=options.batch_size),
            validation=Validation(validation),
            callbacks=Callbacks(on_epoch=lambda record: ended.append(time.perf_counter())),
            compile=compile,
        )
    return min(after - before for before, after in pairwise(ended)) / share


def row(folder: Path, network: str) -> dict[str, Any]:
    """A trained run's line of the table, from its files."""
    assert is_evaluated(folder)
    entry, metrics = runs.read_evaluations(folder)["test"], runs.read_metrics(folder)
    weights, _ = runs.load_tensors(folder / runs.MODEL)
    elbo = "validation_elbo_nats_per_image"
    keys = ("split", "binarization", "num_images", "num_particles", "log_likelihood", "elbo", "kl", "rise", "floor")
    return {
        "network": network,
        "weights": sum(w.numel() for w in weights.values()),
        "epochs": metrics[-1]["epoch"],
        "best_epoch": max(metrics, key=lambda record: record.get(elbo, record["step"]))["epoch"],
        "seconds": metrics[-1]["seconds"],
        "seconds_an_epoch": metrics[-1]["seconds"] / metrics[-1]["epoch"],
        **{key: entry[key] for key in keys},
    }


def describe(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table in words, a line a network."""
    S = ", ".join(sorted({f"S = {row['num_particles']:,}" for row in rows}))
    lines = [
        f"{'network':15} {'weights':>10} {'s/epoch':>8} {'epochs':>6} {'best':>5} {'log p(x), ' + S:>20} {'ELBO':>8}"
    ]
    for found in rows:
        nats = f"{found['log_likelihood']['mean']:.2f} ± {found['log_likelihood']['stderr']:.2f}"
        lines.append(
            f"{found['network']:15} {found['weights']:>10,} {found['seconds_an_epoch']:>8.1f} {found['epochs']:>6} "
            f"{found['best_epoch']:>5} {nats:>20} {found['elbo']['mean']:>8.2f}"
        )
    return lines
