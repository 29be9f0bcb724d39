"""A run folder from its options to its figures, and on from wherever it stands."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import build, data, runs
from ppl_vae.capture import CannotCapture
from ppl_vae.evidence import NotFinite
from ppl_vae.experiment.evaluation import is_evaluated, write_evaluation, write_reconstructions
from ppl_vae.experiment.figures import is_drawn, write_figures
from ppl_vae.experiment.opening import Run, Say, open_run
from ppl_vae.options import Options
from ppl_vae.training import TrainingState, fit

QUICK_EVALUATION_SEED = 0


def train(options: Options, run_dir: str | None, *, say: Say, draw: bool = True) -> Path:
    """Trains a new run from options to figures, or to its evaluation unless ``draw``; returns its folder.

    config.json is written first, so that a run can be resumed from the moment its folder exists.

    Raises:
        ValueError: bad options, data or folder; nothing is written.
        NotFinite: training met a NaN or an infinity; the last checkpoint is kept.
    """
    build.device(options.device)
    splits = build.splits(options)
    if_possible = options.compile == "auto"
    options = build.resolve(options, splits)
    if (options.warmup_epochs or 0) >= options.epochs and options.beta > 0:
        say(f"The warm-up of {options.warmup_epochs} epochs outlasts the training: beta never reaches {options.beta}.")
    build.check_support(options, splits)
    built = build.vae(options, splits.event_shape)  # what cannot be built, or needs too much memory, leaves no folder
    if options.start_from:
        build.start_from_run(built, options.start_from)
    folder = runs.new_run_dir(run_dir, dataset=options.dataset, likelihood=options.likelihood)
    runs.write_json(folder / runs.CONFIG, build.config(options, splits))
    say(f"Run folder {folder}; --resume {folder} goes on if it is interrupted.")
    reason = build.why_not_compiled(options, len(splits.train)) if if_possible else None
    if reason is not None:
        say(f"Not compiled, training goes step by step: {reason}.")
    _go_on(Run(folder, options, splits), say=say, compile_if_possible=if_possible, draw=draw)
    return folder


def resume(
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

    ``like`` is a run that is open, whose data is taken where it is the same.

    Raises:
        ValueError: no run, a damaged one, one saved from Python, other data than it was trained on, or fewer epochs
            than it was given.
    """
    run = open_run(run_dir, dataset=dataset, data_dir=data_dir, like=like)
    folder, options = run.folder, run.options
    build.device(options.device)
    if run.from_python:
        raise ValueError(f"--resume: expected a run of train_svi.py, but {folder} was saved from Python, or shipped")
    if epochs is not None and epochs < options.epochs:
        raise ValueError(f"--epochs: expected at least the run's {options.epochs}, got {epochs}")
    extended = epochs is not None and epochs > options.epochs
    if compile == "on" or (extended and compile != "off" and options.compile == "on"):
        build.check_compiler(build.device(options.device))
    if epochs is not None and epochs > options.epochs:
        run = _with_option(run, "epochs", epochs)
        say(f"Extended to {epochs} epochs; the learning rate falls until then, so it rises again at first.")
    if compile is not None and compile != "auto" and compile != run.options.compile:
        run = _with_option(run, "compile", compile)
        say(f"From here on --compile {compile}: the same to rounding, and no longer bit for bit.")
    if _is_trained(run) and is_evaluated(folder) and (not draw or is_drawn(run)):
        done = "evaluated and drawn" if draw else "evaluated"
        say(f"{folder} is finished: {run.options.epochs} epochs, {done}. --epochs extends it.")
        return
    _go_on(run, say=say, draw=draw)


def _with_option(run: Run, name: str, value: Any) -> Run:
    """The run with another value of an option, in its config too."""
    path = run.folder / runs.CONFIG
    config = runs.read_json(path)
    runs.write_json(path, config | {"options": config["options"] | {name: value}})
    return run._replace(options=replace(run.options, **{name: value}))


def _go_on(run: Run, *, say: Say, compile_if_possible: bool = False, draw: bool = True) -> None:
    """Whatever is left to do of training, the quick evaluation and the figures."""
    folder, options, splits = run.folder, run.options, run.splits
    runs.record_environment(folder, options.device)
    say(splits.describe())
    for line in _what_is_modelled(run):
        say(line)
    if not _is_trained(run):
        build.check_precision(options)
        with build.products_in(options.precision):
            _train(run, say=say, compile_if_possible=compile_if_possible)
    if not is_evaluated(folder):
        _evaluate(run, say=say)
    if draw and not is_drawn(run):
        write_figures(run, say=say)


def _evaluate(run: Run, *, say: Say) -> None:
    """The quick evaluation on test images."""
    options = run.options
    if build.is_autoencoder(options):
        write_reconstructions(
            run, split="test", images=options.images, device=options.device, seed=QUICK_EVALUATION_SEED, say=say
        )
        return
    write_evaluation(
        run,
        split="test",
        num_particles=options.evaluation_particles,
        images=options.images,
        device=options.device,
        seed=QUICK_EVALUATION_SEED,
        compile="off" if options.compile == "off" else "auto",
        say=say,
    )


def _train(run: Run, *, say: Say, compile_if_possible: bool) -> None:
    folder, options, splits = run.folder, run.options, run.splits
    device = build.device(options.device)
    stored, observe = data.training_images(splits, run.pixels)
    validation = data.evaluation_images(splits, "validation", run.pixels) if len(splits.validation) else None
    pyro.set_rng_seed(options.seed)
    vae = build.vae(options, splits.event_shape)
    saved, step = None, _saved_step(run)
    if (folder / runs.TRAINING_STATE).exists():
        saved = runs.load_tensors(folder / runs.TRAINING_STATE)
        say(f"Going on from step {step:,}.")
    elif options.start_from:
        build.start_from_run(vae, options.start_from)
        say(f"Starting from the weights of {options.start_from}.")
    else:
        build.start_from_marginals(vae, data.expected_images(splits, run.pixels))
    vae.to(device)
    runs.cut_metrics(folder, step)
    criterion, key = _criterion(options)
    speeds: list[float] = []

    with (
        tqdm(total=_total_steps(run), initial=step, unit="step", desc="training") as bar,
        quiet_about_nan(),
    ):

        def save_best(state: TrainingState) -> None:
            runs.save_tensors(folder / runs.MODEL, state.best_weights, {"step": state.best_step})

        def on_epoch(record: dict[str, Any]) -> None:
            runs.append_metrics(folder, record)
            speeds.append(record["train_images_per_second"])
            value = record.get(f"validation_{key}_nats_per_image")
            seen = "no validation images" if value is None else f"validation {criterion} {value:.2f} nats"
            bar.set_postfix_str(f"epoch {record['epoch']}/{options.epochs}, {seen}")

        def on_checkpoint(state: TrainingState) -> None:
            # The state last: a run killed between the two goes on from the older state, and writes both again.
            if state.best_weights:
                save_best(state)
            runs.save_tensors(folder / runs.TRAINING_STATE, *state.to_tensors())

        def trained(compile: bool) -> TrainingState:
            return fit(
                vae,
                stored,
                validation,
                **build.schedule(options),
                objective=build.objective(options),
                observe=observe,
                compile=compile,
                saved=saved,
                on_compiled=lambda seconds: say(f"Compiled the training step in {seconds:.1f} s."),
                on_step=lambda state: bar.update(),
                on_epoch=on_epoch,
                on_checkpoint=on_checkpoint,
                checkpoint_seconds=options.checkpoint_seconds,
            )

        try:
            try:
                state = trained(options.compile == "on")  # "auto" is of a run from before there was a choice
            except CannotCapture as error:
                if not compile_if_possible:
                    raise
                say(f"Not compiled, training goes step by step: {error}.")
                _with_option(run, "compile", "off")
                state = trained(False)
            save_best(state)  # once more: the file may have been lost since
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
    kept = f"{best}, at step {state.best_step:,} of {state.step:,}"
    if options.keep == "last":
        kept = "the last weights are kept, as --keep last asks"
    if validation is None:
        kept = "no validation images, so the last weights are kept"
    speed = f", {statistics.median(speeds):,.0f} training images a second" if speeds else ""
    say(f"Trained {options.epochs} epochs in {state.seconds:.0f} s{speed}; {kept}.")
    if state.skipped:
        say(
            f"{state.skipped:,} of {state.step:,} steps were left out: their gradient's norm was above --skip-norm, or "
            "not finite."
        )
    if options.beta != 1 and state.best_step < state.step and not build.is_autoencoder(options):
        say(
            f"The weights of step {state.best_step:,} are kept: from then on, training with beta = {options.beta} "
            "lowered the ELBO at beta = 1, by which they are chosen."
        )


def _criterion(options: Options) -> tuple[str, str]:
    """What the best weights are chosen by, in words, and in the names of metrics.jsonl."""
    if build.is_autoencoder(options):
        return "reconstruction", "reconstruction"
    S = build.validation_particles(options)
    return ("ELBO", "elbo") if S == 1 else (f"bound L_{S}", "bound")


def _latents(options: Options) -> str:
    """How many latents there are, layer by layer, and the families of prior and guide."""
    counts = [str(options.latent_dim), *map(str, options.upper_latents or ())]
    guide = options.inference if options.upper_latents else options.posterior
    return f"latents {' + '.join(counts)}, prior {options.prior}, posterior {guide}"


def _what_is_modelled(run: Run) -> list[str]:
    """The network, the binarization and the likelihood, and on what scale its numbers will be."""
    options, splits = run.options, run.splits
    likelihood = build.likelihood(options, splits.event_shape)
    with torch.device("meta"):  # shapes without numbers
        num_weights = sum(w.numel() for w in build.vae(options, splits.event_shape).parameters())
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
    if build.is_autoencoder(options):
        lines.append(
            "A plain autoencoder: the guide is deterministic and has no density, so that every number is a "
            "reconstruction, log p(x | z(x)), and none a log-likelihood."
        )
    if run.pixels == "dequantized" and build.is_autoencoder(options):
        lines.append("Pixels are (level + u) / 256, u uniform and drawn anew; its reconstructions are of that density.")
    elif run.pixels == "dequantized":
        constant = math.prod(splits.event_shape) * math.log(256)
        lines.append(
            "Pixels are (level + u) / 256, u uniform and drawn anew at every access. Training and validation are of "
            f"that density; {constant:,.1f} nats (D log 256) less, and it bounds the levels' mass, which is evaluated."
        )
    elif likelihood.measure == "density" and splits.kind in (data.LEVELS, data.BINARY, data.COUNTS):
        pixels = {data.LEVELS: "levels / 255", data.BINARY: "zeros and ones", data.COUNTS: "counts"}[splits.kind]
        lines.append(
            f"Pixels are {pixels} here: a density of values on a grid has no upper bound, and its nats compare only "
            "with densities of the same pixels."
        )
    elif likelihood.measure == "density" and splits.kind == data.PROBABILITIES and _are_levels(splits.train):
        lines.append(
            "All pixels are multiples of 1 / 255: a density of values on a grid has no upper bound. As uint8 they are "
            "8-bit levels, of which it bounds the mass."
        )
    return lines


def _are_levels(x: Tensor) -> bool:
    """Whether every number is a multiple of 1 / 255, to single precision."""
    return all(bool(((255 * part).round() - 255 * part).abs().max() < 1e-4) for part in x.split(1000))


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Without Pyro's own warning: the error that follows says the same, with the step and the site."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        yield


def _total_steps(run: Run) -> int:
    return build.planned_steps(run.options, len(run.splits.train))


def _saved_step(run: Run) -> int:
    path = run.folder / runs.TRAINING_STATE
    return runs.load_step(path) if path.exists() else 0


def _is_trained(run: Run) -> bool:
    return _saved_step(run) >= _total_steps(run) and (run.folder / runs.MODEL).exists()
