"""The wording of a training: what is modelled, its epochs, and how it ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from ppl_vae import data
from ppl_vae.data.splits import pluralize
from ppl_vae.runs.build import build_likelihood, count_weights, is_autoencoder
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import validation_particles
from ppl_vae.runtime.numerics import mean_and_variance
from ppl_vae.training import TrainingState

# Likelihoods with one scale for all pixels or columns.
_ONE_SCALE = ("normal", "normal-fixed", "normal-optimal", "laplace", "student-t")
_UNEVEN = 10  # ratio of the widest to the narrowest column's spread, above which one scale fits neither


def describe_model(run: Run) -> list[str]:
    """The network, the binarization and the likelihood of a run, and the scale of its numbers."""
    options, splits = run.options, run.splits
    likelihood = build_likelihood(options, splits.event_shape)
    num_weights = count_weights(options, splits.event_shape)
    counts = " + ".join([str(options.latent_dim), *map(str, options.upper_latents or ())])
    guide = options.inference if options.upper_latents else options.posterior
    transform = ", transform logit" if options.transform == "logit" else ""
    lines = [
        f"network {options.network} ({num_weights:,} weights), latents {counts}, prior {options.prior}, posterior "
        f"{guide}, objective {options.objective}, binarization {options.binarization}, likelihood "
        f"{options.likelihood}{transform} (a {likelihood.measure})"
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
    return lines + _describe_pixels(run, likelihood.measure)


def _describe_pixels(run: Run, measure: str) -> list[str]:
    """How pixels become numbers under a density, and what its nats can be compared with."""
    options, splits = run.options, run.splits
    if run.pixels == "dequantized" and is_autoencoder(options):
        return ["Pixels are (level + u) / 256, u uniform and drawn anew; its reconstructions are of that density."]
    if run.pixels == "dequantized":
        constant = math.prod(splits.event_shape) * math.log(256)
        return [
            "Pixels are (level + u) / 256, u uniform and drawn anew at every access. Training and validation are of "
            f"that density; {constant:,.1f} nats (D log 256) less, and it bounds the levels' mass, which is evaluated."
        ]
    if measure != "density":
        return []
    if splits.kind in (data.LEVELS, data.BINARY, data.COUNTS):
        pixels = {data.LEVELS: "levels / 255", data.BINARY: "zeros and ones", data.COUNTS: "counts"}[splits.kind]
        advice = " Counts have a mass under --likelihood negative-binomial." if splits.kind == data.COUNTS else ""
        return [
            f"Pixels are {pixels} here: a density of values on a grid has no upper bound, and its nats compare only "
            f"with densities of the same pixels.{advice}"
        ]
    repeats = data.find_repeats(splits.train)
    return [repeats.describe()] if repeats else []


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


def _name_criterion(options: Options) -> tuple[str, str]:
    """What the best weights are chosen by, in words and in the keys of metrics.jsonl."""
    if is_autoencoder(options):
        return "reconstruction", "reconstruction"
    S = validation_particles(options)
    return ("ELBO", "elbo") if S == 1 else (f"bound L_{S}", "bound")


def describe_validation(options: Options, record: Mapping[str, float]) -> str:
    """The validation number of an epoch."""
    criterion, key = _name_criterion(options)
    value = record.get(f"validation_{key}_nats_per_image")
    return "no validation images" if value is None else f"validation {criterion} {value:.2f} nats"


def describe_epoch(options: Options, record: Mapping[str, float], validated: str) -> str:
    """An epoch's numbers and times, for a log."""
    return (
        f"Epoch {record['epoch']} of {options.epochs}: {validated}, training loss "
        f"{record['train_loss_nats_per_image']:.2f} nats; {tqdm.format_interval(record['seconds'])} elapsed."
    )


def describe_training(run: Run, state: TrainingState, speeds: Sequence[float]) -> list[str]:
    """How a training ended: its time, the weights that are kept, and the steps that were skipped.

    Args:
        run: The run.
        state: The state at its end.
        speeds: The training images per second of each epoch.
    """
    options = run.options
    density = " of the density of (level + u) / 256" if run.pixels == "dequantized" else ""
    best = f"best validation {_name_criterion(options)[0]}{density} {state.best_validation:.2f} nats"
    chosen = f"{best}, at step {state.best_step:,} of {state.step:,}"
    if state.best_step == 0:
        chosen = f"{best}, that of the weights that it started from: no epoch had a better one, and they are kept"
    if options.keep == "last":
        chosen = "the last weights are kept, as --keep last asks"
    if not len(run.splits.validation):
        chosen = "no validation images, so the last weights are kept"
    speed = f", {statistics.median(speeds):,.0f} training images a second" if speeds else ""
    lines = [f"Trained {pluralize(options.epochs, 'epoch')} in {state.seconds:.0f} s{speed}; {chosen}."]
    if state.skipped:
        lines.append(
            f"{state.skipped:,} of {state.step:,} steps were left out: their gradient's norm was above --skip-norm, or "
            "not finite."
        )
    if options.beta != 1 and state.best_step < state.step and not is_autoencoder(options):
        lines.append(
            f"The weights of step {state.best_step:,} are kept: from then on, training with beta = {options.beta} "
            "lowered the ELBO at beta = 1, by which they are chosen."
        )
    return lines
