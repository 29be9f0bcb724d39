"""Several runs on the same images: the paired differences of their bounds on log p(x)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import estimate_bits_per_dim, evaluate_images
from ppl_vae.commands.options import CompareRuns
from ppl_vae.evidence.estimate import Estimate, bound_difference
from ppl_vae.evidence.importance import Importance
from ppl_vae.reports.figures.measurements import paired_bounds
from ppl_vae.reports.text.comparison import compare_in_words, comparison_title, describe_comparison
from ppl_vae.runs.command_results import ComparedPair, ComparedRun, Comparison
from ppl_vae.runs.open import Run, Say, check_density, open_run
from ppl_vae.runs.outputs import make_new_folder, make_output_folder, write_figure
from ppl_vae.runs.resolve import find_device
from ppl_vae.runs.results import find_last_gain, read_per_image, summarize_importance, to_json

COMPARISON, FIGURE, PER_IMAGE = "comparison.json", "comparison.png", "comparison.safetensors"


def compare_runs(options: CompareRuns, *, say: Say) -> Comparison:
    """Compares each further run with the first: mean_n [L_S(x_n; run) - L_S(x_n; first run)] on the same images.

    Images, their binarization and the seed of the importance samples are one for all runs. What the runs have stored is
    taken where every one of them was evaluated, with its present weights, on exactly these images with this S and seed;
    else all are evaluated. Nothing is written into the run folders. The statistics are in ``estimate``: two-sided 95% t
    intervals, Bonferroni-corrected, and a rule for when a difference of bounds may be read as one of log p(x). Raises
    ValueError before any evaluation for runs whose numbers are not on one scale.

    Returns:
        The comparison, as comparison.json holds it.
    """
    opened = _open_runs(options, say)
    first, S = opened[0], options.num_particles
    places, x = _load_shared_images(opened, options)
    find_device(options.device)
    if options.output is None:
        folder = make_new_folder(f"compare-{Path(first.splits.name).stem}")
    else:
        folder = make_output_folder(options.output, Path(options.output))
    started = time.monotonic()
    names = [run.folder.resolve().name for run in opened]
    names = names if len(set(names)) == len(names) else [str(run.folder) for run in opened]
    stored = _read_stored(opened, places, options)
    if stored is None and (words := _name_stored_kind(opened, options.split)):
        say(
            "The stored evaluations have other settings, so every run is evaluated again, which takes a while. "
            f"To take the stored ones: {words}."
        )
    results = stored or [
        evaluate_images(run, x, options, compile=options.compile, words=f"log p(x), {name}", say=say)
        for run, name in zip(opened, names, strict=True)
    ]
    bounds = {name: result.log_evidence for name, result in zip(names, results, strict=True)}
    for name, bound in bounds.items():
        broken = int((~bound.isfinite()).sum())
        if broken:
            raise ValueError(f"{name}: expected a finite bound for every image, got {broken:,} that are not")
    found = Comparison(
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        dataset=first.splits.name,
        split=options.split,
        protocol=first.splits.protocol,
        binarization=" or ".join(sorted({run.binarization for run in opened})),
        scale=first.scale,
        num_images=len(places),
        num_particles=S,
        seed=options.seed,
        stored_evaluations=stored is not None,
        runs=tuple(_summarize_run(*each, S) for each in zip(opened, names, results, strict=True)),
        comparisons=tuple(_compare(names, results, i) for i in range(1, len(opened))),
        seconds=time.monotonic() - started,
    )
    scalars = {"split": options.split, "num_particles": S, "seed": options.seed}
    scalars |= first.name_files(options.split, places)
    tensors = {"index": places} | {f"log_evidence/{name}": bound for name, bound in bounds.items()}
    runs.save_tensors(folder / PER_IMAGE, tensors, scalars)
    write_figure(folder / FIGURE, paired_bounds(found, bounds, title=comparison_title(found)))
    runs.write_json(folder / COMPARISON, to_json(found))
    for line in describe_comparison(found):
        say(line)
    say(f"Written to {folder}: {COMPARISON}, {FIGURE}, {PER_IMAGE}")
    return found


def _open_runs(options: CompareRuns, say: Say) -> list[Run]:
    """The runs, whose nats must be comparable. Data that they share is read once."""
    run_dirs, images = options.run_dirs, options.images
    if len(run_dirs) < 2:
        raise ValueError(f"RUN: expected at least two run folders, got {len(run_dirs)}")
    if images is not None and images < 2:
        raise ValueError(f"--images: expected at least 2, for a standard error, got {images}")
    if len({Path(run_dir).resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise ValueError(f"RUN: expected different run folders, got one of them twice: {', '.join(run_dirs)}")
    opened: list[Run] = []
    for path in run_dirs:
        like = opened[0] if opened else None
        opened.append(open_run(path, dataset=options.dataset, data_dir=options.data_dir, like=like, say=say))
    first = opened[0]
    for run in opened:
        check_density(run, "bound on log p(x) to compare")
        found = _describe_scale(run, options.split)
        for name, value in _describe_scale(first, options.split).items():
            if found[name] != value:
                raise ValueError(
                    f"{name}: expected one for all runs, got {value} in {first.folder} and {found[name]} in "
                    f"{run.folder}"
                )
    return opened


def _describe_scale(run: Run, split: str) -> dict[str, str]:
    """What two runs must share for their nats to be comparable: its name, and its value in words."""
    splits = run.splits
    # Under the vampprior protocol they differ in training only: both are evaluated on one draw, which is new to both
    # but on the training images, where "fixed" has learned it.
    one_draw = run.binarization in ("dynamic", "fixed") and splits.protocol == "vampprior" and split != "train"
    return {
        "data": f"{splits.name} (SHA-256 {splits.sha256})",
        "shape of an image": "x".join(map(str, splits.event_shape)),
        "scale": f"the {run.scale}",
        "protocol": splits.protocol,
        "binarization": "dynamic or fixed" if one_draw else run.binarization,
    }


def _load_shared_images(opened: Sequence[Run], options: CompareRuns) -> tuple[Tensor, Tensor]:
    """The indices in the split (n,) and the images (n, *E), which must be the same pixels for all runs."""
    first, split = opened[0], options.split
    x = data.evaluation_images(first.splits, split, first.evaluated_pixels, seed=options.seed)
    for run in opened[1:]:
        if run.splits is first.splits and run.evaluated_pixels == first.evaluated_pixels:
            continue
        if not torch.equal(x, data.evaluation_images(run.splits, split, run.evaluated_pixels, seed=options.seed)):
            raise ValueError(
                f"{split} images: expected the same in all runs, got others in {first.folder} and {run.folder}; "
                "were they brought to their size or color in another way?"
            )
    places = data.subset(len(x), options.images)
    if len(places) < 2:
        raise ValueError(f"{split}: expected at least 2 images, for a standard error, got {len(places)}")
    return places, x[places]


def _read_stored(opened: Sequence[Run], places: Tensor, options: CompareRuns) -> list[Importance] | None:
    """The runs' own evaluations, if every run has one of exactly this kind."""
    found = []
    for run in opened:
        stored = read_per_image(run.folder, options.split)
        if stored is None or (stored.num_particles, stored.seed) != (options.num_particles, options.seed):
            return None
        if not torch.equal(stored.index, places):
            return None
        found.append(stored.result)
    return found


def _name_stored_kind(opened: Sequence[Run], split: str) -> str | None:
    """The options with which the runs' own evaluations are compared, where these are all of one kind."""
    stored = [read_per_image(run.folder, split) for run in opened]
    kinds = {(len(each.index), each.num_particles, each.seed) for each in stored if each is not None}
    if len(kinds) != 1 or None in stored:
        return None
    ((num_images, num_particles, seed),) = kinds
    return f"--images {num_images} --num-particles {num_particles} --seed {seed}"


def _summarize_run(run: Run, name: str, result: Importance, num_particles: int) -> ComparedRun:
    return ComparedRun(
        name=name,
        folder=str(run.folder),
        step=runs.load_step(run.folder / runs.MODEL),
        training_seed=run.options.seed,
        binarization=run.binarization,
        likelihood=run.options.likelihood,
        bits_per_dim=estimate_bits_per_dim(run, result.log_evidence, num_particles),
        log_likelihood=Estimate.mean_of(result.log_evidence, num_particles),
        last_gain=find_last_gain(runs.read_metrics(run.folder)),
        **vars(summarize_importance(result, num_particles)),
    )


def _compare(names: Sequence[str], results: Sequence[Importance], i: int) -> ComparedPair:
    """Run i minus the first."""
    found = bound_difference(results[0], results[i], comparisons=len(results) - 1)
    bounds = found.bounds
    return ComparedPair(
        name=names[i],
        baseline=names[0],
        difference=Estimate(bounds.mean, bounds.stderr, bounds.n),
        interval=(bounds.lower, bounds.upper),
        confidence=bounds.confidence,
        unpaired_stderr=bounds.unpaired_stderr,
        monte_carlo_stderr=found.monte_carlo_stderr,
        rise=found.tenfold_gain,
        bound=bounds.word,
        ranks_log_likelihood=found.ranks_log_evidence,
        verdict=compare_in_words(names[i], names[0], bounds),
    )
