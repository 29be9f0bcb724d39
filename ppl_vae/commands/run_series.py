"""Several runs that one command trains: checked first, then trained one by one; tables of likelihoods and networks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import calibrate_run
from ppl_vae.commands.options import CompareLikelihoods, CompareNetworks
from ppl_vae.commands.train import resume_run, train_run
from ppl_vae.evidence.estimate import bound_difference
from ppl_vae.parts.registry import DENSE_NETWORKS, LIKELIHOODS
from ppl_vae.reports.run_figures import write_likelihood_figure
from ppl_vae.reports.text.comparison import describe_likelihood_table, describe_network_table
from ppl_vae.runs.build import build_likelihood, build_meta_vae, build_vae, count_weights
from ppl_vae.runs.command_results import LikelihoodRow, NetworkRow, PairedRow
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.load import read_config
from ppl_vae.runs.open import Run, Say, open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import is_empty, make_parent
from ppl_vae.runs.resolve import choose_pixels, describe_scale, find_device, fit_arguments, load_splits, resolve
from ppl_vae.runs.results import PerImage, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import Callbacks, fit


def check_runs(asked: Mapping[Path, Options], splits: data.Splits, *, free: frozenset[str] = frozenset()) -> None:
    """Raises ValueError before the first training for what would end a later one.

    Args:
        asked: The options of the run in each folder.
        splits: The data of all runs.
        free: The options in which a run that is already there may differ.
    """
    for folder, options in asked.items():
        resolved = resolve(options, splits)
        build_meta_vae(resolved, splits.event_shape)
        if (folder / runs.CONFIG).exists():
            check_same_options(folder, options, resolved, free)
        elif folder.exists() and not is_empty(folder):
            raise ValueError(f"{folder}: expected a run, a new or an empty folder, got another; name another --run-dir")


def check_same_options(folder: Path, asked: Options, resolved: Options, free: frozenset[str]) -> None:
    """Raises ValueError unless the run in a folder has the options that are asked for.

    The place of the data is free, since its SHA-256 decides, and so is whether images are streamed and events logged.
    Whether the run was compiled is free where ``--compile auto`` leaves it to the program.
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
        resume_run(str(folder), say=say, data_dir=options.data_dir, like=like, draw=draw)
    else:
        train_run(options, str(folder), say=say, draw=draw)
    return open_run(str(folder), data_dir=options.data_dir, like=like)


def summarize_run(run: Run) -> JsonObject:
    """The fields of a ``TrainedRow`` for a run that is trained and evaluated."""
    found, metrics = read_evaluation(run.folder), runs.read_metrics(run.folder)
    elbo = "validation_elbo_nats_per_image"
    shared = "split binarization num_images num_particles log_likelihood elbo kl rise floor"
    return {
        **{name: getattr(found, name) for name in shared.split()},
        "weights": count_weights(run.options, run.splits.event_shape),
        "epochs": metrics[-1]["epoch"],
        "best_epoch": max(metrics, key=lambda record: record[elbo if elbo in record else "step"])["epoch"],
        "seconds": metrics[-1]["seconds"],
    }


# The scale on which likelihoods are compared where none are named, by the kind of data; worded as ``describe_scale``.
_SCALES = {
    data.BINARY: "mass of binary pixels",
    data.LEVELS: "mass of 8-bit levels",
    data.COUNTS: "mass of counts",
    data.PROBABILITIES: "density of probabilities",
    data.REAL: "density of real values",
}


def run_likelihoods(options: CompareLikelihoods, *, say: Say) -> None:
    """The command: trains and evaluates the runs of the table, and prints it."""
    run_dir = options.run_dir or f"runs/likelihoods-{Path(options.dataset).stem}"
    asked = options.make_run_options()
    compare_likelihoods(options.likelihoods, asked, run_dir=run_dir, output=options.output, say=say)


def _write_table(output: str | None, device: str, table: JsonObject) -> None:
    """Writes a table with what it was made with, where it was asked for."""
    if output is not None:
        environment = runs.describe_environment(str(find_device(device)))
        runs.write_json(Path(output), table | {"environment": environment})


def compare_likelihoods(
    likelihoods: Sequence[str] | None, options: Options, *, run_dir: str, output: str | None, say: Say
) -> list[LikelihoodRow]:
    """Trains the options' VAE under each likelihood, in run folders RUN_DIR/LIKELIHOOD; writes and says one table.

    All runs see the same images for the same epochs, and are evaluated on the same test images. Masses of 8-bit levels
    and the exact masses that densities give to them are on one scale; scales are never mixed. Differences from the best
    row are paired and Bonferroni-corrected: with 95% the row of the highest expected bound is among the first and those
    that are not distinguishable from it (Hsu 1984). A table that was interrupted goes on; its finished runs are taken
    as they are. A likelihood whose training meets a NaN is left out, with a message.

    Raises ValueError before any training, for likelihoods on two scales and as ``check_runs``.
    """
    splits = load_splits(options)
    words = fitting_likelihoods(options, splits) if likelihoods is None else list(likelihoods)
    asked = {Path(run_dir) / word: replace(options, likelihood=word) for word in words}
    scale = _check_likelihoods(list(asked.values()), splits)
    check_runs(asked, splits)
    if output is not None:
        make_parent(Path(output))
    say(f"{len(words)} likelihoods, compared by the {scale}: {', '.join(words)}")
    opened: list[Run] = []
    rows, failed = [], {}
    for folder, own in asked.items():
        say(f"{own.likelihood}: {folder}")
        try:
            run = train_or_resume(folder, own, opened[0] if opened else None, say=say)
            broken = int((~_per_image(run).result.log_evidence.isfinite()).sum())
            if broken:  # then there is no mean, and nothing to rank
                raise NotFinite(f"expected a finite bound for every test image, got {broken:,} that are not")
        except NotFinite as error:
            failed[own.likelihood] = str(error)
            say(f"{own.likelihood} is left out: {error}")
        else:
            rows.append(make_row(run))
            opened.append(run)
    if not opened:
        raise NotFinite(f"none of {', '.join(words)} was trained: {failed[words[0]]}")
    rows = rank_rows(rows, opened)
    table = {"dataset": options.dataset, "scale": scale, "rows": to_json(rows), "failed": failed}
    _write_table(output, options.device, table)
    for line in describe_likelihood_table(rows):
        say(line)
    write_likelihood_figure(Path(run_dir) / runs.FIGURES, splits.name, rows, say)
    return rows


def fitting_likelihoods(options: Options, splits: data.Splits) -> list[str]:
    """Every likelihood that the data fits, and whose numbers are on the scale of that kind of data.

    Zeros and ones fit the Bernoulli alone: likelihoods of counts would take them, and nobody means that.
    """
    fitting = []
    for word in LIKELIHOODS:
        asked = replace(options, likelihood=word)
        if splits.kind == data.BINARY and build_likelihood(asked, splits.event_shape).data_kind != data.BINARY:
            continue
        with suppress(ValueError):
            if describe_scale(resolve(asked, splits), splits) == _SCALES[splits.kind]:
                fitting.append(word)
    return fitting


def _check_likelihoods(asked: Sequence[Options], splits: data.Splits) -> str:
    """The one scale of all likelihoods. Raises ValueError as ``compare_likelihoods``."""
    if not asked:
        raise ValueError(f"--likelihoods: expected one that fits {splits.kind} ({splits.name}), got none")
    num_images = min(asked[0].images, len(splits.test))
    if num_images < 2:
        raise ValueError(f"--images: expected at least 2 test images, for a standard error, got {num_images}")
    scales: dict[str, list[str]] = {}
    for own in asked:
        scales.setdefault(describe_scale(resolve(own, splits), splits), []).append(own.likelihood)
    if len(scales) > 1:
        each = "; ".join(f"{scale} for {', '.join(words)}" for scale, words in scales.items())
        raise ValueError(
            f"--likelihoods: expected one scale for all, since numbers on two are never ranked, got {each}"
        )
    return next(iter(scales))


def _per_image(run: Run) -> PerImage:
    found = read_per_image(run.folder, "test")
    if found is None:
        raise ValueError(f"{run.folder}: expected the numbers of each test image beside evaluation.json, got none")
    return found


def make_row(run: Run) -> LikelihoodRow:
    """The row of a run that is trained and evaluated, without its rank."""
    found = read_evaluation(run.folder)
    assert found is not None
    assert found.floor is not None
    return LikelihoodRow(
        **summarize_run(run),
        likelihood=run.options.likelihood,
        kind="exact" if run.pixels == "dequantized" else found.measure,
        scale=found.scale,
        bits_per_dim=found.bits_per_dim,
        reconstruction=found.reconstruction,
        floor_bits_per_dim=None if found.bits_per_dim is None else found.floor.mean / _nats_per_bit(run),
        calibration=calibrate_run(run),
    )


def _nats_per_bit(run: Run) -> float:
    """-D log 2: nats per image divided by it are bits per dimension."""
    return -math.prod(run.splits.event_shape) * math.log(2)


def rank_rows(rows: Sequence[LikelihoodRow], opened: Sequence[Run]) -> list[LikelihoodRow]:
    """The rows by their bound, the best first, each with its paired difference from the best, in nats and in bits.

    Raises ValueError where the runs, in the order of the rows, were evaluated on other images or another scale.
    """
    results = [_per_image(run) for run in opened]
    first = results[0]
    for run, result in zip(opened, results, strict=True):
        identity, expected = ((each.num_particles, each.seed) for each in (result, first))
        if (identity, run.scale) != (expected, opened[0].scale) or not torch.equal(result.index, first.index):
            raise ValueError(
                f"{run.folder}: expected an evaluation of the same images, particles, seed and scale as "
                f"{opened[0].folder}, got another; ppl-vae evaluate makes it again"
            )
    best, *others = sorted(range(len(rows)), key=lambda i: -rows[i].log_likelihood.mean)
    ranked = [rows[best]]
    for rank, i in enumerate(others, start=2):
        difference = bound_difference(results[best].result, results[i].result, comparisons=len(others))
        bounds, bit = difference.bounds, _nats_per_bit(opened[i])
        bits = PairedRow(bounds.mean / bit, -bounds.stderr / bit, (bounds.upper / bit, bounds.lower / bit))
        ranked.append(
            replace(
                rows[i],
                rank=rank,
                difference_nats=PairedRow(bounds.mean, bounds.stderr, (bounds.lower, bounds.upper)),
                difference_bits_per_dim=None if rows[i].bits_per_dim is None else bits,
                verdict=bounds.word,
                ranks_log_likelihood=difference.ranks_log_evidence,
            )
        )
    return ranked


_CALIBRATION_STEPS = 40


def run_networks(options: CompareNetworks, *, say: Say) -> None:
    """The command: trains and evaluates the runs of the table, and prints it."""
    run_dir = options.run_dir or f"runs/networks-{Path(options.dataset).stem}"
    asked, minutes = options.make_run_options(), options.minutes
    rows = compare_networks(options.networks, asked, minutes=minutes, run_dir=run_dir, output=options.output, say=say)
    if len(rows) > 1:
        folders = " ".join(f"{run_dir}/{row.network}" for row in rows)
        say(f"Paired differences: ppl-vae compare {folders}")


def compare_networks(
    networks: Sequence[str], options: Options, *, minutes: float, run_dir: str, output: str | None, say: Say
) -> list[NetworkRow]:
    """Trains each network for about the same time, in run folders of their own; writes and says one table.

    Epochs are planned from the measured time of a few steps, so that each training, with its validation, takes about
    that long when nothing else runs. A table that was interrupted goes on; its finished runs are taken as they are.

    Raises ValueError before any training, for convolutional networks alone on a table and as ``check_runs``.
    """
    splits = load_splits(options)
    if len(splits.event_shape) == 1 and set(networks) - set(DENSE_NETWORKS):
        say("The data is a table: convolutional networks are left out.")
        networks = [network for network in networks if network in DENSE_NETWORKS]
        if not networks:
            raise ValueError(f"--networks: expected one of {', '.join(DENSE_NETWORKS)} for a table, got none of them")
    asked = {Path(run_dir) / network: replace(options, network=network) for network in networks}
    check_runs(asked, splits, free=frozenset({"epochs", "warmup_epochs"}))
    if output is not None:
        make_parent(Path(output))
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
    _write_table(output, options.device, {"dataset": options.dataset, "minutes": minutes, "rows": to_json(rows)})
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
            **fit_arguments(replace(options, epochs=3), validation),  # the first runs with Pyro's validation on
            transform=transform,
            callbacks=Callbacks(on_epoch=lambda record: ended.append(time.perf_counter())),
            compile=compile,
        )
    return min(after - before for before, after in pairwise(ended)) / share
