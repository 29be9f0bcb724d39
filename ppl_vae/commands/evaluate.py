"""Evaluates log p(x) of a run, writes it into evaluation.json, and prints it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.commands.options import Certify, CompareRuns, Encode, Evaluate
from ppl_vae.diagnostics.likelihood import calibrate_pixels
from ppl_vae.evidence.classes import ClassEvidence, classify, count_confusions
from ppl_vae.evidence.dequantization import LevelsPosterior, levels_of
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance
from ppl_vae.labels import ConditionalVAE
from ppl_vae.parts.likelihoods import fit_independent_pixels
from ppl_vae.reports.text.evaluation import describe_evaluation, describe_replacement
from ppl_vae.runs.build import build_likelihood, is_autoencoder
from ppl_vae.runs.checkpoints import BlockStore
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run, Say, check_density, load_evaluated_vae, open_run
from ppl_vae.runs.resolve import decide_compile, find_device, matmul_precision
from ppl_vae.runs.results import (
    Evaluation,
    LabelledEvaluation,
    RunCalibration,
    from_json,
    summarize_importance,
    to_json,
)
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.batching import Stopped, images_per_group, images_per_pass, pairs_per_pass
from ppl_vae.runtime.errors import CannotCapture, Interrupted
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.process import progress_bar, stop_on_signals
from ppl_vae.runtime.ranks import end_together, joined, rank_zero_first, rank_zero_only
from ppl_vae.runtime.records import Data, EachLabel
from ppl_vae.vae import VAE

_FLOOR_SEED = 0
_FLOATS_PER_MASS = 48  # per pixel, for the exact mass of a level


def evaluate_run(options: Evaluate, *, say: Say) -> Evaluation:
    """Estimates log p(x) of a split, writes it into evaluation.json under the split's name, and prints it.

    A density of 8-bit levels is evaluated as log P(levels) by exact masses. Under torchrun the processes share the
    images, and rank 0 alone writes and prints. An interrupted evaluation resumes where it stopped, and ends with the
    same numbers. The numbers of each image are in evaluation-SPLIT.safetensors, with the names
    of a folder's files in its metadata.
    """
    with joined(str(find_device(options.device))), ExitStack() as held:
        run = rank_zero_first(
            lambda: open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
        )
        check_density(run, "log-likelihood")
        with end_together():
            held.enter_context(runs.lock_folder(run.folder))
        return write_evaluation(run, options, say=rank_zero_only(say))


def write_evaluation(run: Run, options: Evaluate, *, say: Say) -> Evaluation:
    """``evaluate_run`` for a run that is already open and locked, which may be an autoencoder.

    An autoencoder's evaluation is log p(x | z(x)) of pixels as in training, and None for whatever needs a density.
    """
    runs.read_evaluations(run.folder)  # a damaged file is found before the work, not after it
    estimate = _reconstruct if is_autoencoder(run.options) else _estimate
    with stop_on_signals() as should_stop:  # until all is written: a signal during the last image loses nothing
        found, tensors = estimate(run, options, should_stop, say)
        scalars = {name: getattr(found, name) for name in ("num_particles", "seed", "step", "dequantization_draws")}
        scalars |= run.name_files(found.split, tensors["index"])
        with end_together():
            if distributed.is_writer():
                kept = runs.read_evaluations(run.folder, step=found.step)
                if found.split in kept:
                    say(describe_replacement(kept[found.split]))
                runs.save_tensors(run.folder / runs.per_image_file(found.split), tensors, scalars)
                runs.write_json(run.folder / runs.EVALUATION, kept | {found.split: to_json(found)})
                partial_path(run.folder, found.split).unlink(missing_ok=True)
    for line in describe_evaluation(found):
        say(line)
    return found


def partial_path(folder: Path, split: str) -> Path:
    """The file of the finished blocks of an evaluation that is not complete."""
    return folder / f"evaluation-{split}.partial.safetensors"


def _estimate(
    run: Run, options: Evaluate, should_stop: Callable[[], bool], say: Say
) -> tuple[Evaluation, dict[str, Tensor]]:
    """log p(x) of each image, from the finished blocks of an interrupted evaluation."""
    split, S, step = options.split, options.num_particles, runs.load_step(run.folder / runs.MODEL)
    index, x = choose_images(run, run.evaluated_pixels, options, say)
    x = x.to(find_device(options.device))
    rows = _rows_of(run, x)
    identity = {  # everything that decides the numbers
        "split": split,
        "num_particles": S,
        "seed": options.seed,
        "images": hashlib.sha256(x.cpu().contiguous().numpy().data).hexdigest(),
        "images_per_group": images_per_group(x, S),
        "dtype": str(x.dtype),
        "device": x.device.type,
        "compile": options.compile,
        "step": step,
        "weights": data.compute_sha256(run.folder / runs.MODEL),
    }
    store = BlockStore(partial_path(run.folder, split), {split: identity}, say)
    shape = {"num_items": len(rows), "block_size": images_per_group(x, S), "num_columns": len(IMPORTANCE_NAMES)}
    blocks = Blocks(store.open_stage(split, **shape), store.add, should_stop)
    words = f"log p(x), {split}"
    try:
        measured = measure_images(run, x, options, compile=options.compile, words=words, say=say, blocks=blocks)
    except Stopped:
        store.write()
        kept = f"{store.num_finished(split) * len(x) // len(rows):,} of {len(x):,} images are done and kept"
        raise Interrupted(f"{kept}; evaluated again, the run goes on there") from None
    result = measured.marginal() if isinstance(measured, ClassEvidence) else measured
    found = Evaluation(
        **vars(run.provenance),
        split=split,
        num_images=len(x),
        num_particles=S,
        seed=options.seed,
        log_likelihood=Estimate.mean_of(result.log_evidence, S),
        **vars(summarize_importance(result, S)),
        reconstruction=Estimate.mean_of(result.reconstruction, S),
        kl=Estimate.mean_of(result.kl, S),
        floor=estimate_independent_pixels(run, x.cpu()),
        binarization_entropy=binarization_entropy(run, split, index),
        bits_per_dim=estimate_bits_per_dim(run, result.log_evidence, S),
        step=step,
        seconds=store.seconds(split),
    )
    tensors = {"index": index} | result.to_tensors()
    if isinstance(measured, ClassEvidence):
        y = run.splits.labels[split][index]
        found = _classify(run, found, measured, x.cpu(), y)
        tensors |= {"labels": y, "log_evidence_by_class": measured.given.log_evidence}
    return found, tensors


def _classify(run: Run, found: Evaluation, measured: ClassEvidence, x: Tensor, y: Tensor) -> LabelledEvaluation:
    """Adds to the evaluation of log p(x) of images x, (n, *E), what their labels y, (n,), say."""
    log_posterior, given, S = measured.log_posterior(), measured.given_label(y), found.num_particles
    predicted, guessed = log_posterior.argmax(1), None
    if run.options.labels is not None:
        classifier: nn.Module = load(run.folder).get_submodule("classifier")
        if run.pixels == "dequantized":
            classifier = LevelsPosterior(classifier)
        with seeded(found.seed, x.device):  # of the draw of u, where levels are dequantized
            guessed = Estimate.mean_of((classify(classifier, x) == y).double(), 1)
    return LabelledEvaluation(
        **vars(found),
        log_likelihood_given_label=Estimate.mean_of(given.log_evidence, S),
        elbo_given_label=Estimate.mean_of(given.elbo, S),
        accuracy=Estimate.mean_of((predicted == y).double(), S),
        log_prob_label=Estimate.mean_of(log_posterior.gather(1, y[:, None])[:, 0], S),
        confusion=tuple(map(tuple, count_confusions(y, predicted, len(measured.log_prior)).tolist())),
        class_probs=tuple(measured.log_prior.exp().tolist()),
        class_names=run.splits.class_names,
        classifier_accuracy=guessed,
    )


def _reconstruct(
    run: Run, options: Evaluate, should_stop: Callable[[], bool], say: Say
) -> tuple[Evaluation, dict[str, Tensor]]:
    """log p(x | z(x)) of each image; under a density, 8-bit levels become (level + u) / 256 with one draw of u each."""
    started, device = time.monotonic(), find_device(options.device)
    index, x = choose_images(run, run.pixels, options, say)
    vae, x = load(run.folder).to(device), x.to(device)
    with _make_bar(len(x), f"log p(x | z), {options.split}") as bar, matmul_precision("float32"):
        try:
            log_p_x_given_z = reconstruction(
                vae, x, seed=options.seed, progress=bar.update, should_stop=should_stop, say=say
            ).cpu()
        except Stopped:
            raise Interrupted("the evaluation was not finished, and nothing of it is kept") from None
    found = Evaluation(
        **vars(replace(run.provenance, scale=run.trained_scale)),
        split=options.split,
        num_images=len(x),
        num_particles=None,
        seed=options.seed,
        reconstruction=Estimate.mean_of(log_p_x_given_z, 1),
        step=runs.load_step(run.folder / runs.MODEL),
        seconds=time.monotonic() - started,
    )
    return found, {"index": index, "reconstruction": log_p_x_given_z}


def choose_images(run: Run, pixels: str, options: Evaluate | Certify, say: Say) -> tuple[Tensor, Tensor]:
    """The indices in the split (n,) and the images (n, *E): all, or a fixed random subset."""
    x = data.evaluation_images(run.splits, options.split, pixels, seed=options.seed)
    if options.images is not None and options.images > len(x):
        say(f"--images {options.images:,}: the {options.split} split has {len(x):,}, and all are taken.")
    index = data.subset(len(x), options.images)
    return index, x[index]


def _rows_of(run: Run, x: Tensor) -> Data:
    """What an evaluation of images x (n, *E) measures: the images, or with labels each image with each label."""
    return x if run.options.classes is None else EachLabel(x, run.options.classes)


class Blocks(NamedTuple):
    """What is finished of an evaluation (by a block's first image), where it is kept, and whether to stop."""

    done: Mapping[int, Tensor] = {}
    on_block: Callable[[int, Tensor], None] | None = None
    should_stop: Callable[[], bool] | None = None


def evaluate_images(
    run: Run, x: Tensor, options: Evaluate | Encode | CompareRuns, *, words: str, say: Say, compile: str = "auto"
) -> Importance:
    """log p(x) of images x (N, *E) as ``measure_images`` finds it; with labels, summed over them."""
    found = measure_images(run, x, options, words=words, say=say, compile=compile)
    return found.marginal() if isinstance(found, ClassEvidence) else found


def measure_images(
    run: Run,
    x: Tensor,
    options: Evaluate | Encode | CompareRuns,
    *,
    words: str,
    say: Say,
    compile: str = "auto",
    blocks: Blocks = Blocks(),  # noqa: B008  (frozen)
) -> Importance | ClassEvidence:
    """``evaluate`` of x (N, *E) with a progress bar, compiled if that is asked for and possible; the result on the CPU.

    With labels it is of each image with each label.

    Raises ``Stopped`` where the blocks' ``should_stop`` says so, and ValueError where compile is "on", and it is
    impossible.
    """
    S, device = options.num_particles, find_device(options.device)
    vae, rows = load_evaluated_vae(run).to(device), _rows_of(run, x.to(device))
    # Counted over the passes of all ranks and of earlier calls, so that every block is computed in the same way.
    compiled = decide_compile(compile, math.ceil(len(rows) * S / pairs_per_pass(vae, rows)), device)
    with _make_bar(len(rows), words, sum(map(len, blocks.done.values()))) as bar, matmul_precision("float32"):
        measure = partial(
            evaluate, vae, rows, num_particles=S, seed=options.seed, progress=bar.update, say=say, **blocks._asdict()
        )
        found = None
        if compiled:
            say("Compiling the passes of the evaluation ...")
            try:
                found = measure(compile=True, on_compiled=lambda seconds: bar.unpause()).cpu()
            except CannotCapture as error:
                if compile == "on":
                    raise ValueError(f"--compile on: {error}") from None
                say(f"Not compiled: {error}.")
        found = measure().cpu() if found is None else found
    return ClassEvidence.gather(found, vae.class_probs) if isinstance(vae, ConditionalVAE) else found


def _make_bar(num_images: int, words: str, before: int = 0) -> tqdm:
    """A progress bar of images, shown by rank 0 alone."""
    return progress_bar(total=num_images, initial=before, unit="image", desc=words, disable=not distributed.is_writer())


def estimate_bits_per_dim(run: Run, log_p: Tensor, num_particles: int) -> Estimate | None:
    """-log2 P(x) / D of 8-bit levels and its standard error, from (n,) nats; None on any other scale."""
    if run.evaluated_pixels != "levels":
        return None
    num_pixels = math.prod(run.splits.event_shape)
    return Estimate.mean_of(-log_p / (num_pixels * math.log(2)), num_particles)


def estimate_independent_pixels(run: Run, x: Tensor) -> Estimate:
    """log prod_d p(x_d) of images x (n, *E): the result of a model without dependence between pixels.

    Each pixel has the likelihood's own family, fitted to the training images by maximum likelihood
    (``fit_independent_pixels``; for a density of levels their exact mass).
    """
    likelihood = build_likelihood(run.options, run.splits.event_shape)
    with torch.no_grad(), seeded(_FLOOR_SEED, x.device):
        train = data.expected_images(run.splits, run.pixels)
        log_prob = fit_independent_pixels(likelihood, train, is_dequantized=run.pixels == "dequantized")
        chunk = images_per_pass(x, likelihood, extra_floats=_FLOATS_PER_MASS)
        return Estimate.mean_of(torch.cat([log_prob(part) for part in x.split(chunk)]), 1)


def binarization_entropy(run: Run, split: str, index: Tensor) -> float | None:
    """The mean entropy of the draw that binarized the images at ``index``, (n,), in nats per image.

    A model that has not seen the draw cannot exceed minus this entropy in expectation. None where nothing was drawn, or
    where training saw the draw.
    """
    if split == "train" and run.pixels == "fixed":
        return None
    entropy = data.binarization_entropy(run.splits, split, run.pixels)
    return None if entropy is None else float(entropy[index].mean())


# --- Calibration of pixels ---

_CALIBRATION_SEED, _MOST_IMAGES, _NUM_DRAWS = 0, 1000, 99


def calibrate_run(run: Run) -> RunCalibration:
    """``calibrate_pixels`` on 1,000 fixed random test images, or the stored result for the same weights.

    A density of dequantized levels is calibrated as the mass that it gives to levels, and to the whole numbers beyond 0
    and 255, where no pixel can be. If it were cut at the ends, a density with half its mass below 0 would seem to
    expect black half of the time. z is drawn given (x + u) / 256 with a uniform u, so even the exact posterior gives a
    result that is uniform only up to how the density varies within a level.
    """
    path = run.folder / "calibration.json"
    x = data.evaluation_images(run.splits, "test", run.evaluated_pixels)
    index = data.subset(len(x), min(run.options.images, _MOST_IMAGES))
    identity = {
        "step": runs.load_step(run.folder / runs.MODEL),
        "split": "test",
        "num_images": len(index),
        "num_draws": _NUM_DRAWS,
        "seed": _CALIBRATION_SEED,
    }
    if path.exists() and identity.items() <= (stored := runs.read_json(path)).items():
        return from_json(RunCalibration, stored)
    with (
        progress_bar(total=len(index), unit="image", desc="calibration") as bar,
        seeded(_CALIBRATION_SEED, torch.device("cpu")),
        pyro.validation_enabled(False),
    ):
        vae, transform = load(run.folder), None
        if run.pixels == "dequantized":
            vae, transform = VAE(vae.prior, vae.likelihood, LevelsPosterior(vae.posterior)), levels_of
        found = calibrate_pixels(vae, x[index], num_draws=_NUM_DRAWS, transform=transform, progress=bar.update)
    entry = to_json(found) | identity
    runs.write_json(path, entry)
    return from_json(RunCalibration, entry)
