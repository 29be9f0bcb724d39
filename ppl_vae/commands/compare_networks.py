"""One table of networks: weights, seconds per epoch, and log p(x) after the same time of training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from ppl_vae import data, runs
from ppl_vae.commands.options import CompareNetworks
from ppl_vae.commands.run_series import check_has_density, check_runs, summarize_run, train_or_resume
from ppl_vae.reports.text.comparison import describe_network_table
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.comparison_results import NetworkRow
from ppl_vae.runs.fit_arguments import build_objective, find_device
from ppl_vae.runs.open import Say
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import check_support, choose_pixels, load_splits, resolve
from ppl_vae.runs.results import to_json
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
) -> list[NetworkRow]:
    """Trains each network for about the same time, in run folders of their own; writes and says one table.

    Epochs are planned from the measured time of a few steps, so that each training, with its validation, takes about
    that long when nothing else runs. A table that was interrupted goes on; its finished runs are taken as they are.

    Raises:
        ValueError: As ``train_run``, an autoencoder, or a folder that holds a run with other options.
    """
    check_has_density(options)
    splits = load_splits(options)
    asked = {Path(run_dir) / network: replace(options, network=network) for network in networks}
    check_runs(asked, splits, free=frozenset({"epochs", "warmup_epochs"}))
    rows = []
    for folder, own in asked.items():
        if not (folder / runs.CONFIG).exists():
            seconds = seconds_per_epoch(own)
            epochs = max(1, math.floor(60 * minutes / seconds))
            if own.compile == "auto" and resolve(replace(own, epochs=epochs), splits).compile == "on":
                seconds = seconds_per_epoch(replace(own, compile="on"))
                epochs = max(1, math.floor(60 * minutes / seconds))
            say(f"{own.network}: an epoch takes about {seconds:.2g} s, so {minutes:g} minutes are {epochs} of them.")
            own = replace(own, epochs=epochs)
        found = summarize_run(train_or_resume(folder, own, None, say=say))
        rows.append(NetworkRow(**found, network=own.network, seconds_an_epoch=found["seconds"] / found["epochs"]))
    if output is not None:
        table = {"dataset": options.dataset, "minutes": minutes, "rows": to_json(rows)}
        runs.write_json(Path(output), table | {"environment": runs.describe_environment(options.device)})
    for line in describe_network_table(rows):
        say(line)
    return rows


def seconds_per_epoch(options: Options) -> float:
    """The time of one epoch of training and validation on this machine, measured on a few steps of a new VAE.

    The step is compiled where ``--compile`` is "on".
    """
    compile = options.compile == "on"
    splits = load_splits(options)
    options = resolve(options, splits)
    check_support(options, splits)
    stored, transform = data.training_images(splits, choose_pixels(options, splits))
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
            transform=transform,
            optimizer=Optimizer(learning_rate=1e-12, average_decay=options.average_decay),
            schedule=Schedule(batch_size=options.batch_size),
            validation=Validation(validation),
            callbacks=Callbacks(on_epoch=lambda record: ended.append(time.perf_counter())),
            compile=compile,
        )
    return min(after - before for before, after in pairwise(ended)) / share
