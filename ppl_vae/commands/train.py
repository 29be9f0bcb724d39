"""Trains a run from its options to its figures, or resumes one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import write_evaluation
from ppl_vae.commands.options import Evaluate, Train
from ppl_vae.labels import ConditionalVAE
from ppl_vae.reports.run_figures import is_drawn, write_figures
from ppl_vae.reports.text.run import describe_epoch, describe_model, describe_training, describe_validation
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.checkpoints import Saved, find_newest_checkpoint, is_whole, mend_states
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.load import load_starting_weights, make_config
from ppl_vae.runs.open import Run, Say, open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import (
    Log,
    add_pictures_to_events,
    check_new,
    check_tensorboard,
    open_events,
    record_environment,
)
from ppl_vae.runs.resolve import (
    check_compiler,
    check_precision,
    count_steps,
    explain_eager,
    find_device,
    fit_arguments,
    initialize_output_bias,
    load_splits,
    matmul_precision,
    resolve,
    set_class_probs,
)
from ppl_vae.runs.results import is_evaluated, to_json
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.errors import CannotCapture, Interrupted, NotFinite
from ppl_vae.runtime.process import has_terminal, progress_bar, stop_on_signals
from ppl_vae.runtime.ranks import broadcast_decision, end_together, joined, rank_zero_first, rank_zero_only
from ppl_vae.training import Callbacks, TrainingState, TrainingStopped, exceeds_memory, fit
from ppl_vae.vae import VAE

_QUICK_EVALUATION_SEED = 0


def run(options: Train, *, say: Say) -> None:
    """The command: trains a new run, or resumes one."""
    if options.resume is None:
        train_run(options.options, options.run_dir, say=say)
    else:
        resume_run(options.resume, **options.changes, say=say)


def train_run(options: Options, run_dir: str | None, *, say: Say, draw: bool = True) -> Path:
    """Trains, evaluates and draws a new run, and returns its folder.

    config.json is written first, so that a run can be resumed from the moment its folder exists. Under torchrun the
    processes train one VAE; rank 0 alone writes and says.
    """
    options = replace(options, device=str(find_device(options.device)))
    check_tensorboard(options)
    with joined(options.device), ExitStack() as held:
        _check_dropout(options)
        say = rank_zero_only(say)
        splits = rank_zero_first(lambda: load_splits(options))
        if_possible = options.compile == "auto"
        options = resolve(options, splits)
        options = replace(options, compile=distributed.broadcast(options.compile))
        warmup = options.warmup_epochs or 0
        if warmup >= options.epochs and options.beta > 0:
            say(f"The warm-up of {warmup} epochs outlasts the training: beta never reaches {options.beta}.")
        built = build_vae(options, splits.event_shape)  # what cannot be built, or has no memory, leaves no folder
        if options.start_from:
            load_starting_weights(built, options.start_from)
        with end_together():
            if distributed.is_writer():
                run_dir = str(runs.make_run_dir(run_dir, dataset=options.dataset, likelihood=options.likelihood))
        folder = Path(str(distributed.broadcast(run_dir)))
        with end_together():
            held.enter_context(runs.lock_folder(folder))
            if distributed.is_writer():
                check_new(folder)  # once more: it may have been another's a moment ago
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
    say: Say,
    epochs: int | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
    compile: str | None = None,
    like: Run | None = None,
    draw: bool = True,
) -> None:
    """Resumes a run bit for bit, finishes its evaluation and figures, or extends it to more epochs.

    A damaged training state gives way to the one before it, damaged weights are written again from the training state,
    and damaged records of epochs are left out. A compiled run goes on eagerly where compiling fails now, unless
    ``compile`` is "on". ``like`` is a run that is open, whose data is taken where it is the same. What is damaged
    beyond that, and a run saved from Python, is refused.
    """
    with joined("cpu"), ExitStack() as held:
        with end_together():
            if (Path(run_dir) / runs.CONFIG).is_file():  # ``open_run`` refuses other folders
                held.enter_context(runs.lock_folder(Path(run_dir)))
        run = rank_zero_first(lambda: open_run(run_dir, dataset=dataset, data_dir=data_dir, like=like))
        distributed.join(run.options.device)
        _resume(run, epochs=epochs, say=rank_zero_only(say), compile=compile, draw=draw)


def _resume(run: Run, *, epochs: int | None, say: Say, compile: str | None, draw: bool) -> None:
    folder, options = run.folder, run.options
    find_device(options.device)
    _check_dropout(options)
    if not run.can_resume:
        raise ValueError(f"--resume: expected a run of ppl-vae train, but {folder} was saved from Python, or shipped")
    check_tensorboard(options)
    if epochs is not None and epochs < options.epochs:
        raise ValueError(f"--epochs: expected at least the run's {options.epochs}, got {epochs}")
    with end_together():
        saved = find_newest_checkpoint(folder, say=say)
    if compile == "on":
        check_compiler(find_device(options.device))
    if epochs is not None and epochs > options.epochs:
        run = _change_option(run, "epochs", epochs)
        say(f"Extended to {epochs} epochs; the learning rate falls until then, so it rises again at first.")
    if compile is not None and compile != "auto" and compile != run.options.compile:
        run = _change_option(run, "compile", compile)
        say(f"From here on --compile {compile}: the same to rounding, and no longer bit for bit.")
    with end_together():  # before another rank reads what is damaged
        if saved is not None and distributed.is_writer():
            mend_states(folder)
            damaged = runs.mend_metrics(folder, saved[1]["step"])
            if damaged:
                say(f"{folder / runs.METRICS}: damaged: left out line {', '.join(map(str, damaged))}.")
    if broadcast_decision(lambda: _is_trained(run, saved) and is_evaluated(folder) and (not draw or is_drawn(run))):
        done = "evaluated and drawn" if draw else "evaluated"
        say(f"{folder} is finished: {run.options.epochs} epochs, {done}. --epochs extends it.")
        return
    _go_on(run, saved, say=say, compile_if_possible=compile != "on", draw=draw)


def _check_dropout(options: Options) -> None:
    """Raises ValueError under several processes, among which the noise of dropout cannot be divided."""
    if options.dropout and distributed.num_ranks() > 1:
        raise ValueError(f"--dropout: expected one process, got {distributed.num_ranks()}; start it without torchrun")


def _change_option(run: Run, name: str, value: Any) -> Run:
    """Changes an option of the run, in its config too."""
    path = run.folder / runs.CONFIG
    with end_together():
        if distributed.is_writer():
            config = runs.read_json(path)
            runs.write_json(path, config | {"options": config["options"] | {name: value}})
    return run._replace(options=replace(run.options, **{name: value}))


def _go_on(run: Run, saved: Saved | None, *, say: Say, compile_if_possible: bool, draw: bool) -> None:
    """Does what is left of training, the quick evaluation and the figures, from a training state."""
    folder, options, splits = run.folder, run.options, run.splits
    with end_together():
        if distributed.is_writer():
            record_environment(folder, options.device)
    say(splits.describe())
    for line in describe_model(run):
        say(line)
    if not broadcast_decision(lambda: _is_trained(run, saved)):
        check_precision(options)
        with matmul_precision(options.precision):
            _train(run, saved, say=say, compile_if_possible=compile_if_possible)
    if not broadcast_decision(lambda: is_evaluated(folder)):
        evaluate_trained_run(run, say=say)
    if not distributed.is_writer():
        return
    distributed.leave()  # the others are done: nothing of the figures is shared out
    if draw and not is_drawn(run):
        write_figures(run, say=say)
        add_pictures_to_events(folder, options, step=runs.load_step(folder / runs.MODEL))


def evaluate_trained_run(run: Run, *, say: Say) -> None:
    """Evaluates some test images, as many as the run's options say."""
    options = run.options
    asked = Evaluate(
        str(run.folder),
        num_particles=options.evaluation_particles,
        images=options.images,
        device=options.device,
        seed=_QUICK_EVALUATION_SEED,
        compile="off" if options.compile == "off" else "auto",
    )
    found = write_evaluation(run, asked, say=say)
    with open_events(run.folder, options, prefix=f"{found.split}/") as log:
        log(to_json(found))


class _TrainingRecord:
    """What a training leaves in its run folder while it goes, and the lines and the bar that show it."""

    def __init__(self, run: Run, step: int, *, bar: tqdm, log: Log, say: Say) -> None:
        self.speeds: list[float] = []  # training images per second of each epoch
        self.step = self.kept = step  # the last one, and that of the newest checkpoint on disk
        self._run, self._bar, self._log, self._say = run, bar, log, say

    def callbacks(self, should_stop: Callable[[], bool]) -> Callbacks:
        """The functions that ``fit`` calls."""
        return Callbacks(
            on_compiled=self._on_compiled,
            on_step=self._on_step,
            on_epoch=self._on_epoch,
            on_checkpoint=self._on_checkpoint,
            checkpoint_seconds=self._run.options.checkpoint_seconds,
            should_stop=should_stop,
        )

    def save_weights(self, state: TrainingState) -> None:
        """Writes the weights that are evaluated."""
        runs.save_tensors(self._run.folder / runs.MODEL, state.best_weights, {"step": state.best_step})

    def _on_step(self, state: TrainingState) -> None:
        self.step = state.step
        self._bar.update()

    def _on_epoch(self, record: JsonObject) -> None:
        if distributed.is_writer():
            runs.append_metrics(self._run.folder, record)
        self._log(record)
        self.speeds.append(record["train_images_per_second"])
        validated = describe_validation(self._run.options, record)
        if has_terminal():
            self._bar.set_postfix_str(f"epoch {record['epoch']}/{self._run.options.epochs}, {validated}")
        else:
            self._say(describe_epoch(self._run.options, record, validated))

    def _on_compiled(self, seconds: float) -> None:
        self._bar.unpause()  # its estimate leaves out the time to compile
        self._say(f"Compiled the training step in {seconds:.1f} s.")

    def _on_checkpoint(self, state: TrainingState) -> None:
        if not distributed.is_writer():
            return
        # The state last: a run killed between the two goes on from the older state, and writes both again.
        if state.best_weights:
            self.save_weights(state)
        folder = self._run.folder
        runs.save_tensors(folder / runs.TRAINING_STATE, *state.to_tensors(), folder / runs.PREVIOUS_STATE)
        self.kept = state.step


def _train(run: Run, saved: Saved | None, *, say: Say, compile_if_possible: bool) -> None:
    """Trains a run from its start or from a checkpoint, and writes its weights, states and metrics."""
    folder, options, splits = run.folder, run.options, run.splits
    stored, transform = data.training_images(splits, run.pixels)
    is_large = options.stream == "auto" and exceeds_memory(stored, find_device(options.device))
    stream = options.stream == "on" or is_large
    if stream:
        gib = stored.numel() * stored.element_size() / 2**30
        say(f"The training images ({gib:.2f} GiB) are not held on the device: each batch is brought there in time.")
    if options.labels is None:
        images = run.add_labels("train", stored)
    else:
        images = data.add_labelled_images(stored, run.known_labels("train"), transform, seed=options.seed)
    validation = None
    if len(splits.validation):
        validation = run.add_labels("validation", data.evaluation_images(splits, "validation", run.pixels))
    vae = _prepare_vae(run, saved, say)
    step, total = 0 if saved is None else saved[1]["step"], count_steps(options, len(splits.train))
    if distributed.is_writer():
        runs.mend_metrics(folder, step)
    silent = not distributed.is_writer()
    with (
        stop_on_signals(f"--resume {folder} goes on") as should_stop,
        open_events(folder, options, step=step) as log,
        progress_bar(total=total, initial=step, unit="step", desc="training", disable=silent) as bar,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Encountered NaN")  # the error that follows names the step and the site
        record = _TrainingRecord(run, step, bar=bar, log=log, say=say)

        def train(compile: bool) -> TrainingState:
            if compile:
                say("Compiling the training step ...")
            return fit(
                vae,
                images,
                **fit_arguments(options, validation),
                transform=transform,
                callbacks=record.callbacks(should_stop),
                compile=compile,
                stream=stream,
                saved=saved,
            )

        with _explain_errors(run, record, is_resumed=saved is not None):
            try:
                state = train(options.compile == "on")
            except CannotCapture as error:
                if not compile_if_possible:
                    raise
                rounding = "" if saved is None else "; the same to rounding, and no longer bit for bit"
                say(f"Falling back to eager training{rounding}: {error}.")
                _change_option(run, "compile", "off")
                state = train(False)
            with end_together():  # the ranks evaluate what is in the file
                if distributed.is_writer():
                    record.save_weights(state)  # once more: the file may have been lost since
    for line in describe_training(run, state, record.speeds):
        say(line)


def _prepare_vae(run: Run, saved: Saved | None, say: Say) -> VAE:
    """The VAE with its initial weights, on the run's device. A checkpoint replaces them when training starts."""
    options = run.options
    pyro.set_rng_seed(options.seed)
    vae = build_vae(options, run.splits.event_shape)
    if saved is not None:
        say(f"Going on from step {saved[1]['step']:,}.")
    elif options.start_from:
        load_starting_weights(vae, options.start_from)
        say(f"Starting from the weights of {options.start_from}.")
    else:
        initialize_output_bias(vae, data.initialization_images(run.splits, run.pixels))
        if isinstance(vae, ConditionalVAE):
            set_class_probs(vae, run.known_labels("train"))
    return vae.to(find_device(options.device))


@contextmanager
def _explain_errors(run: Run, record: _TrainingRecord, *, is_resumed: bool) -> Iterator[None]:
    """Adds to the errors of a training what is kept of it, and what can be done."""
    folder = run.folder
    try:
        yield
    except TrainingStopped as error:
        raise Interrupted(f"stopped at step {error.step:,}; --resume {folder} goes on") from None
    except OSError as error:
        if error.filename is None or Path(error.filename).parent != folder:
            raise
        raise ValueError(
            f"{error.filename}: cannot be written: {error.strerror}; the run is kept as of step {record.kept:,} of "
            f"{record.step:,}; once there is room, --resume {folder} goes on from there"
        ) from None
    except CannotCapture as error:
        raise ValueError(f"--compile on: {error}; --compile off does without") from None
    except ValueError as error:
        if not is_resumed:
            raise
        raise ValueError(f"{folder / runs.TRAINING_STATE}: {error}") from None
    except NotFinite as error:
        raise NotFinite(
            f"{error}; a new run with a smaller --learning-rate or --beta may pass it, or one with --skip-norm"
        ) from None


def _is_trained(run: Run, saved: Saved | None) -> bool:
    total = count_steps(run.options, len(run.splits.train))
    return saved is not None and saved[1]["step"] >= total and is_whole(run.folder / runs.MODEL)
