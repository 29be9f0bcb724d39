"""Trains the study's runs one after the other, each in a run folder like any other."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pyro
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.train import evaluate_trained_run, resume_run, train_run
from ppl_vae.objectives import Loss, loss_of_batch
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import save
from ppl_vae.runs.open import Say, open_run
from ppl_vae.runs.resolve import choose_pixels, fit_arguments, initialize_output_bias, load_splits, resolve
from ppl_vae.runs.results import is_evaluated
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.study.plan import Planned
from ppl_vae.training import Callbacks, TrainingState, fit

FAILURE = "failure.json"


class MeanOverPixels(ScaleMessenger):
    """log p(x | z) / D: what a loss that is averaged over pixels does to a model, as an effect handler.

    It scales the observed site by 1 / D, so that the objective is rec / D - KL, which has the optimum of beta = D. The
    library itself never averages.
    """

    def __init__(self, num_pixels: int) -> None:
        super().__init__(1 / num_pixels)

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            super()._process_message(msg)


def average_over_pixels(loss: Loss, num_pixels: int) -> Loss:
    """The loss of a model whose pixels are averaged."""

    def averaged(model: StochasticFunction, guide: StochasticFunction, x: Tensor) -> Tensor:
        return loss_of_batch(loss, MeanOverPixels(num_pixels)(model), guide, x)

    return averaged


def train_planned(planned: Planned, folder: Path, *, say: Say) -> None:
    """Trains a run, or the rest of it, and evaluates it.

    A run that meets a NaN is a result, too: it leaves ``failure.json`` with the message in its folder.
    """
    run_dir = folder / planned.name
    if (run_dir / FAILURE).exists():
        return
    try:
        if planned.averaged:
            _train_averaged(planned, run_dir, say=say)
        elif (run_dir / runs.CONFIG).exists():
            resume_run(str(run_dir), epochs=None, say=say, draw=False)
        else:
            train_run(planned.options, str(run_dir), say=say, draw=False)
    except NotFinite as error:
        runs.write_json(run_dir / FAILURE, {"error": str(error)})
        say(f"{planned.name}: {error}")


def read_failure(run_dir: Path) -> str | None:
    """The message that ended a run; None if none did. That of a training begins with its step."""
    path = run_dir / FAILURE
    return runs.read_json(path)["error"] if path.exists() else None


def is_finished(run_dir: Path) -> bool:
    """Whether a run was trained to the end and evaluated, which comes last, or was ended by a NaN."""
    return (run_dir / FAILURE).exists() or ((run_dir / runs.MODEL).exists() and is_evaluated(run_dir))


def _train_averaged(planned: Planned, run_dir: Path, *, say: Say) -> None:
    """As the command ``train`` does it, but for the objective: no option asks for a mean."""
    if not (run_dir / runs.MODEL).exists():
        _fit_averaged(planned, run_dir, say=say)
    if not is_evaluated(run_dir):
        evaluate_trained_run(open_run(str(run_dir)), say=say)


def _fit_averaged(planned: Planned, run_dir: Path, *, say: Say) -> None:
    seen = load_splits(planned.options)
    options = resolve(planned.options, seen)
    pixels = choose_pixels(options, seen)
    stored, transform = data.training_images(seen, pixels)
    pyro.set_rng_seed(options.seed)
    vae = build_vae(options, seen.event_shape)
    initialize_output_bias(vae, data.initialization_images(seen, pixels))
    metrics: list[dict[str, Any]] = []
    arguments = fit_arguments(options, data.evaluation_images(seen, "validation", pixels))
    arguments["objective"] = average_over_pixels(arguments["objective"], math.prod(seen.event_shape))
    state: TrainingState = fit(
        vae,
        stored,
        **arguments,
        transform=transform,
        callbacks=Callbacks(on_epoch=metrics.append),
        compile=options.compile == "on",
    )
    say(f"Trained {planned.name}, its pixels averaged, in {state.seconds:.0f} s.")
    partial = run_dir.with_name(f".{run_dir.name}.partial")  # renamed when whole: a folder that exists is a whole run
    shutil.rmtree(partial, ignore_errors=True)
    save(vae, partial, options, metrics=metrics)
    partial.replace(run_dir)
