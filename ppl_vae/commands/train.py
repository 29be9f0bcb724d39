"""A run folder from its options to its figures, and on from wherever it stands."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import write_evaluation, write_reconstructions
from ppl_vae.commands.loggers import check_tensorboard, log_evaluation, metric_events
from ppl_vae.commands.options import Train
from ppl_vae.reports.run_figures import is_drawn, write_figures
from ppl_vae.runs.build import build_likelihood, build_vae, is_autoencoder
from ppl_vae.runs.checkpoints import Saved, mend_metrics, mend_states, mend_weights, newest_checkpoint
from ppl_vae.runs.evaluations import is_evaluated
from ppl_vae.runs.fit_arguments import (
    check_compiler,
    check_precision,
    count_steps,
    explain_eager,
    find_device,
    fit_arguments,
    initialize_output_bias,
    matmul_precision,
    validation_particles,
)
from ppl_vae.runs.load import load_starting_weights, make_config
from ppl_vae.runs.opening import Run, Say, describe_unused_draws, open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import check_support, load_splits, resolve
from ppl_vae.runs.results import to_json
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.errors import CannotCapture, Interrupted, NotFinite
from ppl_vae.runtime.numerics import mean_and_variance
from ppl_vae.runtime.process import stop_on_signals
from ppl_vae.runtime.progress import Progress, has_terminal
from ppl_vae.runtime.ranks import broadcast_decision, end_together, joined, rank_zero_first, rank_zero_only
from ppl_vae.training import Callbacks, TrainingState, TrainingStopped, exceeds_memory, fit

QUICK_EVALUATION_SEED = 0


def run(options: Train, *, say: Say) -> None:
    """The command: trains a new run, or goes on with one."""
    if options.resume is None:
        train_run(options.options, options.run_dir, say=say)
    else:
        resume_run(options.resume, **{"epochs": None, **(options.changes or {})}, say=say)


def train_run(options: Options, run_dir: str | None, *, say: Say, draw: bool = True) -> Path:
    """Trains a new run from options to figures, or to its evaluation unless ``draw``; returns its folder.

    config.json is written first, so that a run can be resumed from the moment its folder exists. Under torchrun the
    processes train one VAE; rank 0 alone writes and says.

    Raises:
        ValueError: bad options, data or folder; nothing is written.
        NotFinite: training met a NaN or an infinity; the last checkpoint is kept.
    """
    find_device(options.device)
    check_tensorboard(options)
    with joined(options.device):
        return _train_new(options, run_dir, say=rank_zero_only(say), draw=draw)


def _train_new(options: Options, run_dir: str | None, *, say: Say, draw: bool) -> Path:
    splits = rank_zero_first(lambda: load_splits(options))
    if_possible = options.compile == "auto"
    options = resolve(options, splits)
    options = replace(options, compile=distributed.broadcast(options.compile))
    if (options.warmup_epochs or 0) >= options.epochs and options.beta > 0:
        say(f"The warm-up of {options.warmup_epochs} epochs outlasts the training: beta never reaches {options.beta}.")
    check_support(options, splits)
    built = build_vae(options, splits.event_shape)  # what cannot be built, or needs too much memory, leaves no folder
    if options.start_from:
        load_starting_weights(built, options.start_from)
    with end_together():
        if distributed.is_writer():
            run_dir = str(runs.new_run_dir(run_dir, dataset=options.dataset, likelihood=options.likelihood))
    folder = Path(distributed.broadcast(run_dir))
    with ExitStack() as held:
        with end_together():
            held.enter_context(runs.locked(folder))
            if distributed.is_writer():
                runs.check_new(folder)  # once more: it may have been another's a moment ago
                runs.write_json(folder / runs.CONFIG, make_config(options, splits))
        say(f"Run folder {folder}; --resume {folder} goes on if it is interrupted.")
        reason = explain_eager(options, len(splits.train)) if if_possible else None
        if reason is not None:
            say(f"Falling back to eager training: {reason}.")
        _go_on(Run(folder, options, splits), None, say=say, compile_if_possible=if_possible, draw=draw)
    return folder


def resume_run(
    run_dir: str,
    *,
    epochs: int | None,
    say: Say,
    dataset: str | None = None,
    data_dir: str | None = None,
    compile: str | None = None,
    like: Run | None = None,
    draw: bool = True,
) -> None:
    """Goes on with a run, bit for bit; finishes its evaluation and figures; or extends it to more epochs.

    A damaged training state gives way to the one before it, damaged weights are written again from the training state,
    and damaged records of epochs are left out; each is said. A compiled run goes on eagerly where compiling fails now,
    which is said, unless ``compile`` is "on". ``like`` is a run that is open, whose data is taken where it is the same.

    Raises:
        ValueError: no run, one that another process writes to, one that is damaged beyond that, one saved from Python,
            other data than it was trained on, or fewer epochs than it was given.
        Interrupted: SIGINT or SIGTERM; what was done is kept.
    """
    with joined("cpu"), ExitStack() as held:
        with end_together():
            held.enter_context(_locked(run_dir))
        run = rank_zero_first(lambda: open_run(run_dir, dataset=dataset, data_dir=data_dir, like=like))
        distributed.join(run.options.device)
        _resume(run, epochs=epochs, say=rank_zero_only(say), compile=compile, draw=draw)


def _locked(run_dir: str) -> AbstractContextManager[None]:
    """The right to write into the run, before its data is read; what is no run is for ``open_run`` to refuse."""
    folder = Path(run_dir)
    return runs.locked(folder) if (folder / runs.CONFIG).is_file() else nullcontext()


def _resume(run: Run, *, epochs: int | None, say: Say, compile: str | None, draw: bool) -> None:
    folder, options = run.folder, run.options
    find_device(options.device)
    if run.from_python:
        raise ValueError(f"--resume: expected a run of train_svi.py, but {folder} was saved from Python, or shipped")
    check_tensorboard(options)
    if epochs is not None and epochs < options.epochs:
        raise ValueError(f"--epochs: expected at least the run's {options.epochs}, got {epochs}")
    with end_together():
        saved = newest_checkpoint(folder, say=say)
    if compile == "on":
        check_compiler(find_device(options.device))
    if epochs is not None and epochs > options.epochs:
        run = _with_option(run, "epochs", epochs)
        say(f"Extended to {epochs} epochs; the learning rate falls until then, so it rises again at first.")
    if compile is not None and compile != "auto" and compile != run.options.compile:
        run = _with_option(run, "compile", compile)
        say(f"From here on --compile {compile}: the same to rounding, and no longer bit for bit.")
    with end_together():  # before another rank reads what is damaged
        if saved is not None and distributed.is_writer():
            mend_states(folder)
            mend_weights(folder, saved, say=say)
            an_epoch = _total_steps(run) // run.options.epochs
            mend_metrics(folder, step=saved[1]["step"], steps_an_epoch=an_epoch, say=say)
    if broadcast_decision(lambda: _is_trained(run, saved) and is_evaluated(folder) and (not draw or is_drawn(run))):
        done = "evaluated and drawn" if draw else "evaluated"
        say(f"{folder} is finished: {run.options.epochs} epochs, {done}. --epochs extends it.")
        return
    _go_on(run, saved, say=say, compile_if_possible=compile != "on", draw=draw)


def _with_option(run: Run, name: str, value: Any) -> Run:
    """The run with another value of an option, in its config too."""
    path = run.folder / runs.CONFIG
    with end_together():
        if distributed.is_writer():
            config = runs.read_json(path)
            runs.write_json(path, config | {"options": config["options"] | {name: value}})
    return run._replace(options=replace(run.options, **{name: value}))


def _go_on(run: Run, saved: Saved | None, *, say: Say, compile_if_possible: bool = False, draw: bool = True) -> None:
    """Whatever is left to do, from a training state, of training, the quick evaluation and the figures."""
    folder, options, splits = run.folder, run.options, run.splits
    with end_together():
        lost = runs.record_environment(folder, options.device) if distributed.is_writer() else None
    if lost is not None:
        say(lost)
    say(splits.describe())
    for line in _what_is_modelled(run):
        say(line)
    if not broadcast_decision(lambda: _is_trained(run, saved)):
        check_precision(options)
        with matmul_precision(options.precision):
            _train(run, saved, say=say, compile_if_possible=compile_if_possible)
    if not broadcast_decision(lambda: is_evaluated(folder)):
        _evaluate(run, say=say)
    if not distributed.is_writer():
        return
    distributed.leave()  # the others are done: nothing of the figures is shared out
    if draw and not is_drawn(run):
        write_figures(run, say=say)


def _evaluate(run: Run, *, say: Say) -> None:
    """The quick evaluation on test images."""
    options = run.options
    if is_autoencoder(options):
        entry = write_reconstructions(
            run, split="test", images=options.images, device=options.device, seed=QUICK_EVALUATION_SEED, say=say
        )
        log_evaluation(run.folder, options, to_json(entry))
        return
    entry = write_evaluation(
        run,
        split="test",
        num_particles=options.evaluation_particles,
        images=options.images,
        device=options.device,
        seed=QUICK_EVALUATION_SEED,
        compile="off" if options.compile == "off" else "auto",
        say=say,
    )
    log_evaluation(run.folder, options, to_json(entry))


def _train(run: Run, saved: Saved | None, *, say: Say, compile_if_possible: bool) -> None:
    folder, options, splits = run.folder, run.options, run.splits
    device = find_device(options.device)
    stored, observe = data.training_images(splits, run.pixels)
    stream = options.stream == "on" or (options.stream == "auto" and exceeds_memory(stored, device))
    if stream:
        gib = stored.numel() * stored.element_size() / 2**30
        say(f"The training images ({gib:.2f} GiB) are not held on the device: each batch is brought there in time.")
    validation = data.evaluation_images(splits, "validation", run.pixels) if len(splits.validation) else None
    pyro.set_rng_seed(options.seed)
    vae = build_vae(options, splits.event_shape)
    step = 0 if saved is None else saved[1]["step"]
    if saved is not None:
        say(f"Going on from step {step:,}.")
    elif options.start_from:
        load_starting_weights(vae, options.start_from)
        say(f"Starting from the weights of {options.start_from}.")
    else:
        initialize_output_bias(vae, data.initialization_images(splits, run.pixels))
    vae.to(device)
    if distributed.is_writer():
        if saved is None:
            runs.mend_metrics(folder)
        runs.cut_metrics(folder, step)
    criterion, key = _criterion(options)
    speeds: list[float] = []
    kept = [step]  # what is on disk
    silent = not (distributed.is_writer() and has_terminal())  # a log has a line for each epoch instead
    started = time.monotonic()

    with (
        stop_on_signals(f"--resume {folder} goes on") as should_stop,
        metric_events(folder, options, step=step) as log,
        Progress(total=_total_steps(run), initial=step, unit="step", desc="training", disable=silent) as progress,
        quiet_about_nan(),
    ):

        def save_best(state: TrainingState) -> None:
            runs.save_tensors(folder / runs.MODEL, state.best_weights, {"step": state.best_step})

        def on_epoch(record: dict[str, Any]) -> None:
            if distributed.is_writer():
                runs.append_metrics(folder, record)
            log(record)
            speeds.append(record["train_images_per_second"])
            value = record.get(f"validation_{key}_nats_per_image")
            seen = "no validation images" if value is None else f"validation {criterion} {value:.2f} nats"
            progress.describe(f"epoch {record['epoch']}/{options.epochs}, {seen}")
            if not has_terminal():
                left = (time.monotonic() - started) * (_total_steps(run) - record["step"]) / (record["step"] - step)
                say(_epoch_line(record, options, seen, seconds_left=left))

        def on_compiled(seconds: float) -> None:
            nonlocal started
            progress.show_bar()
            started = time.monotonic()
            say(f"Compiled the training step in {seconds:.1f} s.")

        def on_checkpoint(state: TrainingState) -> None:
            if not distributed.is_writer():
                return
            # The state last: a run killed between the two goes on from the older state, and writes both again.
            if state.best_weights:
                save_best(state)
            runs.save_tensors(folder / runs.TRAINING_STATE, *state.to_tensors(), folder / runs.PREVIOUS_STATE)
            kept.append(state.step)

        callbacks = Callbacks(
            on_compiled=on_compiled,
            on_step=lambda state: progress.update(),
            on_epoch=on_epoch,
            on_checkpoint=on_checkpoint,
            checkpoint_seconds=options.checkpoint_seconds,
            should_stop=should_stop,
        )

        def trained(compile: bool) -> TrainingState:
            if compile and distributed.is_writer():
                progress.show_clock("Compiling the training step", say)
            return fit(
                vae,
                stored,
                **fit_arguments(options, validation),
                transform=observe,
                callbacks=callbacks,
                compile=compile,
                stream=stream,
                saved=saved,
            )

        try:
            try:
                state = trained(options.compile == "on")  # "auto" is of a run from before there was a choice
            except CannotCapture as error:
                progress.close()
                if not compile_if_possible:
                    raise
                rounding = "" if saved is None else "; the same to rounding, and no longer bit for bit"
                say(f"Falling back to eager training{rounding}: {error}.")
                _with_option(run, "compile", "off")
                state = trained(False)
            with end_together():  # the ranks evaluate what is in the file
                if distributed.is_writer():
                    save_best(state)  # once more: the file may have been lost since
        except TrainingStopped as error:
            raise Interrupted(f"stopped at step {error.step:,}; --resume {folder} goes on") from None
        except OSError as error:
            if error.filename is None or Path(error.filename).parent != folder:
                raise
            raise ValueError(
                f"{error.filename}: cannot be written: {error.strerror}; the run is kept as of step {kept[-1]:,} of "
                f"{progress.count:,}; once there is room, --resume {folder} goes on from there"
            ) from None
        except CannotCapture as error:
            raise ValueError(f"--compile on: {error}; --compile off does without") from None
        except ValueError as error:
            if saved is None:
                raise
            raise ValueError(f"{folder / runs.TRAINING_STATE}: {error}") from None
        except NotFinite as error:
            raise NotFinite(
                f"{error}; a new run with a smaller --learning-rate or --beta may pass it, or one with --skip-norm"
            ) from None
    of = " of the density of (level + u) / 256" if run.pixels == "dequantized" else ""
    best = f"best validation {criterion}{of} {state.best_validation:.2f} nats"
    chosen = f"{best}, at step {state.best_step:,} of {state.step:,}"
    if state.best_step == 0:
        chosen = f"{best}, that of the weights that it started from: no epoch had a better one, and they are kept"
    if options.keep == "last":
        chosen = "the last weights are kept, as --keep last asks"
    if validation is None:
        chosen = "no validation images, so the last weights are kept"
    speed = f", {statistics.median(speeds):,.0f} training images a second" if speeds else ""
    say(f"Trained {options.epochs} epochs in {state.seconds:.0f} s{speed}; {chosen}.")
    if state.skipped:
        say(
            f"{state.skipped:,} of {state.step:,} steps were left out: their gradient's norm was above --skip-norm, or "
            "not finite."
        )
    if options.beta != 1 and state.best_step < state.step and not is_autoencoder(options):
        say(
            f"The weights of step {state.best_step:,} are kept: from then on, training with beta = {options.beta} "
            "lowered the ELBO at beta = 1, by which they are chosen."
        )


def _epoch_line(record: dict[str, Any], options: Options, seen: str, *, seconds_left: float) -> str:
    """An epoch's numbers and times for a log."""
    elapsed, left = map(tqdm.format_interval, (record["seconds"], seconds_left))
    loss = record["train_loss_nats_per_image"]
    return (
        f"Epoch {record['epoch']} of {options.epochs}: {seen}, training loss {loss:.2f} nats; "
        f"{elapsed} elapsed, {left} left."
    )


def _criterion(options: Options) -> tuple[str, str]:
    """What the best weights are chosen by, in words, and in the names of metrics.jsonl."""
    if is_autoencoder(options):
        return "reconstruction", "reconstruction"
    S = validation_particles(options)
    return ("ELBO", "elbo") if S == 1 else (f"bound L_{S}", "bound")


def _latents(options: Options) -> str:
    """How many latents there are, layer by layer, and the families of prior and guide."""
    counts = [str(options.latent_dim), *map(str, options.upper_latents or ())]
    guide = options.inference if options.upper_latents else options.posterior
    return f"latents {' + '.join(counts)}, prior {options.prior}, posterior {guide}"


_ONE_SCALE = ("normal", "normal-fixed", "normal-optimal", "laplace", "student-t")  # for all pixels or columns
_UNEVEN = 10  # times as wide as the narrowest column is the widest, beyond which one scale fits neither


def _describe_uneven_columns(options: Options, splits: data.Splits) -> list[str]:
    """A warning where the columns of a table differ in spread, and the likelihood has one scale for all of them."""
    if len(splits.event_shape) != 1 or options.likelihood not in _ONE_SCALE or options.transform != "none":
        return []
    spread = mean_and_variance(splits.train)[1].sqrt()
    columns = spread.nonzero().flatten()
    if not len(columns):
        return []
    narrow, wide = (columns[extreme(spread[columns])] for extreme in (torch.argmin, torch.argmax))
    factor = float(spread[wide] / spread[narrow])
    if not factor > _UNEVEN:
        return []
    return [
        f"Warning: the columns differ in spread by a factor of {factor:,.0f} ({spread[narrow]:.3g} in column "
        f"{int(narrow)}, counted from 0, {spread[wide]:.3g} in column {int(wide)}), and {options.likelihood} has one "
        "scale for all. Standardize the columns, or use --likelihood normal-per-pixel."
    ]


def _what_is_modelled(run: Run) -> list[str]:
    """The network, the binarization and the likelihood, and on what scale its numbers will be."""
    options, splits = run.options, run.splits
    likelihood = build_likelihood(options, splits.event_shape)
    with torch.device("meta"):  # shapes without numbers
        num_weights = sum(w.numel() for w in build_vae(options, splits.event_shape).parameters())
    lines = [
        f"network {options.network} ({num_weights:,} weights), {_latents(options)}, objective {options.objective}, "
        f"binarization {options.binarization}, likelihood {options.likelihood}"
        f"{', transform logit' * (options.transform == 'logit')} (a {likelihood.measure})"
    ]
    if len(splits.event_shape) == 3 and splits.event_shape[0] == 3 and run.binarization != "none":
        lines.append(
            "Each color channel becomes 0 or 1 here, which is not how photos look; --likelihood "
            "discretized-logistic-mixture takes colors as they are."
        )
    lines += _describe_uneven_columns(options, splits)
    if likelihood.measure == "density" and (warning := data.describe_constant_columns(splits.train)):
        lines.append(warning)
    if is_autoencoder(options):
        lines.append(
            "A plain autoencoder: the guide is deterministic and has no density, so that every number is a "
            "reconstruction, log p(x | z(x)), and none a log-likelihood."
        )
    if run.pixels == "dequantized" and is_autoencoder(options):
        lines.append("Pixels are (level + u) / 256, u uniform and drawn anew; its reconstructions are of that density.")
    elif run.pixels == "dequantized":
        constant = math.prod(splits.event_shape) * math.log(256)
        lines.append(
            "Pixels are (level + u) / 256, u uniform and drawn anew at every access. Training and validation are of "
            f"that density; {constant:,.1f} nats (D log 256) less, and it bounds the levels' mass, which is evaluated."
        )
        if options.dequantization_draws != Options().dequantization_draws:
            lines += describe_unused_draws(run, options.dequantization_draws)
    elif likelihood.measure == "density" and splits.kind in (data.LEVELS, data.BINARY, data.COUNTS):
        pixels = {data.LEVELS: "levels / 255", data.BINARY: "zeros and ones", data.COUNTS: "counts"}[splits.kind]
        lines.append(
            f"Pixels are {pixels} here: a density of values on a grid has no upper bound, and its nats compare only "
            "with densities of the same pixels."
            + " Counts have a mass under --likelihood negative-binomial."
            * (splits.kind == data.COUNTS)
        )
    elif likelihood.measure == "density" and (repeats := data.find_repeats(splits.train)):
        lines.append(repeats.describe())
    return lines


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Without Pyro's own warning: the error that follows says the same, with the step and the site."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        yield


def _total_steps(run: Run) -> int:
    return count_steps(run.options, len(run.splits.train))


def _is_trained(run: Run, saved: Saved | None) -> bool:
    return saved is not None and saved[1]["step"] >= _total_steps(run) and (run.folder / runs.MODEL).exists()
