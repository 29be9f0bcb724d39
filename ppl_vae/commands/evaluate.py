"""log p(x) of a run: measured, written into evaluation.json, and said in words."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.options import Evaluate
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import Importance, evaluate, reconstruction
from ppl_vae.parts.likelihoods import fit_independent_pixels
from ppl_vae.reports.evaluation_words import describe_evaluation, has_no_density
from ppl_vae.runs.block_store import BlockStore
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.fit_arguments import decide_compile, find_device, matmul_precision
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run, Say, check_density, describe_unused_draws, evaluated_vae, open_run
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.batching import images_per_group, images_per_pass, pairs_per_pass
from ppl_vae.runtime.blocks import Stopped
from ppl_vae.runtime.errors import CannotCapture, Interrupted
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.process import stop_on_signals
from ppl_vae.runtime.progress import Progress
from ppl_vae.runtime.ranks import end_together, joined, rank_zero_first, rank_zero_only
from ppl_vae.vae import VAE

_FLOOR_SEED = 0
_FLOATS_OF_A_MASS = 48  # per pixel, which an exact mass of a level holds at once


def is_evaluated(folder: Path) -> bool:
    """The test split was evaluated with the weights that the run has now, and the numbers of each image are whole."""
    entry = runs.read_evaluations(folder).get("test", {})
    if entry.get("step") != runs.load_step(folder / runs.MODEL):
        return False
    try:
        runs.load_tensors(folder / runs.per_image("test"))
    except ValueError:  # lost or damaged: it is measured again
        return False
    return True


@dataclass(frozen=True)
class PerImage:
    """What an evaluation says of each image.

    Args:
        index: (n,) int64, the images' places in their split, ascending.
        result: ``Importance``, each field (n,) float64.
        num_particles: S.
        seed: of the importance samples.
        step: of the weights.
        dequantization_draws: M of an evaluation of before masses of levels were exact; else None.
    """

    index: Tensor
    result: Importance
    num_particles: int
    seed: int
    step: int
    dequantization_draws: int | None = None


def read_per_image(folder: Path, split: str) -> PerImage | None:
    """The stored evaluation of a split, image by image, that evaluation.json tells of.

    None where there is none, where it is an autoencoder's, which has reconstructions alone, where it is of weights that
    the run has no longer, or where a write that failed has left the two files with different evaluations.

    Raises:
        ValueError: a file is damaged.
    """
    path, entry = folder / runs.per_image(split), runs.read_evaluations(folder).get(split)
    if entry is None or not path.exists() or has_no_density(entry):
        return None
    try:
        tensors, scalars = runs.load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; evaluate_log_likelihood.py {folder} --split {split} measures it again") from None
    try:
        result = Importance(*(tensors[name] for name in Importance._fields))
        numbers = {name: scalars[name] for name in ("num_particles", "seed", "step")}
        stored = PerImage(tensors["index"], result, **numbers, dequantization_draws=scalars.get("dequantization_draws"))
    except KeyError as error:
        raise ValueError(f"{path}: damaged: no {error} in it") from None
    told = tuple(entry.get(key) for key in ("num_images", "num_particles", "seed", "step", "dequantization_draws"))
    found = (len(stored.index), stored.num_particles, stored.seed, stored.step, stored.dequantization_draws)
    return stored if told == found and stored.step == runs.load_step(folder / runs.MODEL) else None


def evaluate_run(options: Evaluate, *, say: Say) -> dict[str, Any]:
    """Estimates log p(x) of a split, writes it into evaluation.json under the split's name, and says it.

    Of a density of 8-bit levels it is log P(levels), by exact masses: ``dequantization_draws`` has no effect, as a line
    says.
    Under torchrun the processes share the images, and rank 0 alone writes and says. An evaluation that was interrupted
    goes on where it was, and ends with the same numbers.

    Returns:
        The entry, as evaluation.json holds it. The numbers of each image are in evaluation-SPLIT.safetensors.

    Raises:
        ValueError: no run, a damaged one, one that another process writes to, an autoencoder, or other data than it was
            trained on.
        Interrupted: Ctrl-C or SIGTERM; what is done is kept.
    """
    find_device(options.device)
    with joined(options.device), ExitStack() as held:
        run = rank_zero_first(lambda: open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir))
        check_density(run, "log-likelihood")
        with end_together():
            held.enter_context(runs.locked(run.folder))
        return write_evaluation(
            run,
            split=options.split,
            num_particles=options.num_particles,
            images=options.images,
            device=options.device,
            seed=options.seed,
            compile=options.compile,
            dequantization_draws=options.dequantization_draws,
            say=rank_zero_only(say),
        )


def write_evaluation(
    run: Run,
    *,
    split: str,
    num_particles: int,
    images: int | None,
    device: str,
    seed: int,
    say: Say,
    compile: str = "auto",
    dequantization_draws: int | None = None,
) -> dict[str, Any]:
    """``evaluate_run``, for a run that is already open, locked, and not an autoencoder's."""
    folder = run.folder
    runs.read_evaluations(folder)  # a damaged file is found before the work, not after it
    runs.check_writable(folder)
    step = runs.load_step(folder / runs.MODEL)
    place = find_device(device)
    for line in describe_unused_draws(run, dequantization_draws):
        say(line)
    vae = evaluated_vae(run).to(place)
    index, x = _images_of_split(run, split, run.evaluated_pixels, images, seed, say)
    x = x.to(place)
    store = _block_store(run, split, x, num_particles, seed=seed, step=step, compile=compile, say=say)
    done = store.open_stage(
        split,
        num_items=len(x),
        block_size=images_per_group(x, num_particles),
        num_columns=len(Importance._fields),
    )
    with stop_on_signals() as should_stop:  # until all is written: a signal during the last image loses nothing
        try:
            result = evaluate_with_progress(
                vae,
                x,
                num_particles=num_particles,
                seed=seed,
                compile=compile,
                say=say,
                words=f"log p(x), {split}",
                done=done,
                on_block=store.add,
                should_stop=should_stop,
            )
        except Stopped:
            store.write()
            kept = f"{store.num_finished(split):,} of {len(x):,} images are done and kept"
            raise Interrupted(f"{kept}; evaluated again, the run goes on there") from None
        entry = {
            **describe_provenance(run),
            "split": split,
            "num_images": len(x),
            "num_particles": num_particles,
            "seed": seed,
            "dequantization_draws": None,
            **_summary(result, num_particles),
            **reference_bounds(run, split, x.cpu(), index),
            "bits_per_dim": bits_per_dim(run, result.log_evidence, num_particles),
            "step": step,
            "seconds": store.seconds(split),
        }
        old = _of_these_weights(folder, step).get(split)
        if old is not None:
            before = f"{old['num_images']:,} images with S = {old['num_particles']:,}"
            say(f"Replaces the {split} split's estimate of {before}.")
        _write(run, entry, {"index": index} | result._asdict(), say)
        store.remove()
    return entry


def partial_path(folder: Path, split: str) -> Path:
    """The file of the finished blocks of an evaluation that is not complete."""
    return folder / f"evaluation-{split}.partial.safetensors"


def _block_store(
    run: Run, split: str, x: Tensor, num_particles: int, *, seed: int, step: int, compile: str, say: Say
) -> BlockStore:
    """The finished blocks of this evaluation, identified by everything that decides its numbers."""
    identity = {
        "split": split,
        "num_particles": num_particles,
        "seed": seed,
        "dequantization_draws": None,
        "images": hashlib.sha256(x.cpu().contiguous().numpy().data).hexdigest(),
        "images_per_group": images_per_group(x, num_particles),
        "dtype": str(x.dtype),
        "device": x.device.type,
        "compile": compile,
        "step": step,
        "weights": data.compute_sha256(run.folder / runs.MODEL),
    }
    return BlockStore(partial_path(run.folder, split), {split: identity}, say)


def write_reconstructions(
    run: Run, *, split: str, images: int | None, device: str, seed: int, say: Say
) -> dict[str, Any]:
    """An autoencoder's entry of evaluation.json: log p(x | z(x)), and null for whatever takes a density.

    Images are as its training saw them: of a density of 8-bit levels it is that of (level + u) / 256, with one draw of
    u an image.

    Returns:
        The entry. The number of each image is in evaluation-SPLIT.safetensors, as "reconstruction".

    Raises:
        ValueError: as ``evaluate_run``.
    """
    folder, place = run.folder, find_device(device)
    runs.read_evaluations(folder)
    runs.check_writable(folder)
    vae = load(folder).to(place)
    index, x = _images_of_split(run, split, run.pixels, images, seed, say)
    started = time.monotonic()
    with _bar(len(x), f"log p(x | z), {split}") as bar, matmul_precision("float32"), stop_on_signals() as should_stop:
        try:
            log_p_x_given_z = reconstruction(
                vae, x.to(place), seed=seed, progress=bar.update, should_stop=should_stop, say=say
            ).cpu()
        except Stopped:
            raise Interrupted("the evaluation was not finished, and nothing of it is kept") from None
    entry = {
        **describe_provenance(run),
        "scale": run.trained_scale,
        "split": split,
        "num_images": len(x),
        "num_particles": None,
        "seed": seed,
        "dequantization_draws": None,
        **dict.fromkeys(_OF_A_DENSITY),
        "reconstruction": Estimate.from_values(log_p_x_given_z, 1).to_json(),
        "step": runs.load_step(folder / runs.MODEL),
        "seconds": time.monotonic() - started,
    }
    _write(run, entry, {"index": index, "reconstruction": log_p_x_given_z}, say)
    return entry


# What an autoencoder's entry has no number for. Independent pixels ("floor") and the binarization's entropy are there
# to hold a log-likelihood against.
_OF_A_DENSITY = (
    "log_likelihood",
    "elbo",
    "kl",
    "monte_carlo_stderr",
    "bias",
    "rise",
    "ess",
    "pareto_k",
    "unreliable_images",
    "floor",
    "binarization_entropy",
    "bits_per_dim",
)


def _images_of_split(
    run: Run, split: str, pixels: str, images: int | None, seed: int, say: Say
) -> tuple[Tensor, Tensor]:
    """Places in the split (n,) and the images (n, *E): all, or a fixed random subset."""
    x = data.evaluation_images(run.splits, split, pixels, seed=seed)
    if images is not None and images > len(x):
        say(f"--images {images:,}: the {split} split has {len(x):,}, and all are taken.")
    index = data.subset(len(x), images)
    return index, x[index]


def _of_these_weights(folder: Path, step: int) -> dict[str, Any]:
    """What was measured with weights that the run has no longer says nothing of the run, and is left out."""
    return {key: old for key, old in runs.read_evaluations(folder).items() if old.get("step") == step}


def _write(run: Run, entry: dict[str, Any], tensors: dict[str, Tensor], say: Say) -> None:
    """The numbers of each image, then the entry, in files and in words."""
    scalars = {name: entry[name] for name in ("num_particles", "seed", "step", "dequantization_draws")}
    with end_together():
        if distributed.is_writer():
            kept = _of_these_weights(run.folder, entry["step"])
            runs.save_tensors(run.folder / runs.per_image(entry["split"]), tensors, scalars)
            runs.write_json(run.folder / runs.EVALUATION, kept | {entry["split"]: entry})
    for line in describe_evaluation(entry):
        say(line)


def evaluate_with_progress(
    vae: VAE,
    x: Tensor,
    *,
    num_particles: int,
    seed: int,
    compile: str,
    say: Say,
    words: str,
    done: Mapping[int, Tensor] | None = None,
    on_block: Callable[[int, Tensor], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Importance:
    """``evaluate`` of x (N, *E) with a progress bar, compiled where the word says so and it is possible.

    Raises:
        ValueError: compile is "on", and it is impossible.
        Stopped: ``should_stop`` said so.
    """
    # By all passes, of all ranks and of before: what is computed may not depend on who computes it and when.
    passes = math.ceil(len(x) * num_particles / pairs_per_pass(vae, x))
    compiled = decide_compile(compile, passes, x.device)
    before = sum(len(rows) for rows in (done or {}).values())
    with _bar(len(x), words, before) as bar, matmul_precision("float32"):

        def told(seconds: float) -> None:
            bar.show_bar()
            say(f"Compiled the passes of the evaluation in {seconds:.1f} s.")

        def run(compiled: bool) -> Importance:
            if compiled and distributed.is_writer():
                bar.show_clock("Compiling the passes of the evaluation", say)
            return evaluate(
                vae,
                x,
                num_particles=num_particles,
                seed=seed,
                compile=compiled,
                on_compiled=told,
                progress=bar.update,
                done=done,
                on_block=on_block,
                should_stop=should_stop,
                say=say,
            )

        try:
            return run(compiled)
        except CannotCapture as error:
            bar.close()
            if compile == "on":
                raise ValueError(f"--compile on: {error}") from None
            say(f"Not compiled: {error}.")
            return run(False)


def _bar(num_images: int, words: str, before: int = 0) -> Progress:
    """A bar of images, which rank 0 alone shows."""
    return Progress(total=num_images, initial=before, unit="image", desc=words, disable=not distributed.is_writer())


def describe_provenance(run: Run) -> dict[str, Any]:
    """What a number depends on beside the model: data, protocol, binarization, likelihood and its measure."""
    return {
        "dataset": run.splits.name,
        "protocol": run.splits.protocol,
        "binarization": run.binarization,
        "likelihood": run.options.likelihood,
        "transform": run.options.transform,
        "measure": build_likelihood(run.options, run.splits.event_shape).measure,
        "pixels": run.pixels,
        "scale": run.scale,
    }


def bits_per_dim(run: Run, log_p: Tensor, num_particles: int) -> dict[str, float] | None:
    """-log2 P(x) / D of 8-bit levels and its standard error, from (n,) nats; None on any other scale."""
    if run.evaluated_pixels != "levels":
        return None
    num_pixels = math.prod(run.splits.event_shape)
    return Estimate.from_values(-log_p / (num_pixels * math.log(2)), num_particles).to_json()


def reference_bounds(run: Run, split: str, x: Tensor, index: Tensor) -> dict[str, Any]:
    """What log p of x (n, *E) can be held against: independent pixels below it, the binarization's entropy above.

    "floor" is log prod_d p(x_d) of the likelihood's own kind, each pixel fitted to the training images by maximum
    likelihood (``fit_independent_pixels``; for a density of levels their exact mass): a model below it has learned
    nothing about how pixels go together. "binarization_entropy" is the
    mean entropy of what was drawn to binarize these images: no model that has not seen the draw gets above minus it in
    expectation. None where nothing was drawn, or where training saw the draw.
    """
    options, splits = run.options, run.splits
    likelihood = build_likelihood(options, splits.event_shape)
    with torch.no_grad(), seeded(_FLOOR_SEED, x.device):
        train = data.expected_images(splits, run.pixels)
        log_prob = fit_independent_pixels(likelihood, train, is_dequantized=run.pixels == "dequantized")
        at_once = images_per_pass(x, likelihood, extra_floats=_FLOATS_OF_A_MASS)
        floor = Estimate.from_values(torch.cat([log_prob(part) for part in x.split(at_once)]), 1).to_json()
    seen = split == "train" and run.pixels == "fixed"
    entropy = None if seen else data.binarization_entropy(splits, split, run.pixels)
    return {
        "floor": floor,
        "binarization_entropy": None if entropy is None else float(entropy[index].mean()),
    }


def quantiles(values: Tensor) -> dict[str, float | None]:
    """The median of (n,) and what 5% and 95% of the known values are below; None where none is known."""
    known = values[~values.isnan()]
    if not len(known):
        return {"median": None, "q05": None, "q95": None}
    shares = {"median": 0.5, "q05": 0.05, "q95": 0.95}
    return {name: float(known.quantile(share, interpolation="lower")) for name, share in shares.items()}


def _summary(result: Importance, num_particles: int) -> dict[str, Any]:
    def mean(values: Tensor) -> dict[str, float]:
        return Estimate.from_values(values, num_particles).to_json()

    count = len(result.log_evidence)
    return {
        "log_likelihood": mean(result.log_evidence),
        "elbo": mean(result.elbo),
        "reconstruction": mean(result.reconstruction),
        "kl": mean(result.kl),
        "monte_carlo_stderr": float(result.monte_carlo_stderr.square().sum().sqrt()) / count,
        "bias": float(result.bias.mean()),
        "rise": float(result.rise.mean()),
        "ess": quantiles(result.ess),
        "pareto_k": quantiles(result.pareto_k),
        "unreliable_images": int(result.unreliable().sum()) if num_particles > 1 else None,
    }
