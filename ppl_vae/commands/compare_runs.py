"""Several runs on the same images: the paired differences of their bounds on log p(x)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import estimate_bits_per_dim, evaluate_with_progress
from ppl_vae.commands.options import CompareRuns
from ppl_vae.evidence.estimate import Estimate, combine_stderrs
from ppl_vae.evidence.importance import Importance
from ppl_vae.evidence.paired import BoundDifference, bound_difference
from ppl_vae.reports import figures as plots
from ppl_vae.reports.text.comparison import compare_in_words, comparison_title, describe_comparison
from ppl_vae.runs.comparison_results import ComparedPair, ComparedRun, Comparison
from ppl_vae.runs.evaluations import read_per_image
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.open import Run, Say, check_density, load_evaluated_vae, open_run
from ppl_vae.runs.outputs import make_output_folder, remove_if_empty, write_figure
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.batching import evaluation_batch_size
from ppl_vae.runtime.global_state import seeded
from ppl_vae.vae import VAE

COMPARISON, FIGURE, PER_IMAGE = "comparison.json", "comparison.png", "comparison.safetensors"


class Entrant(NamedTuple):
    """One of the runs: its unique name, its trained VAE, and the step of its weights."""

    name: str
    run: Run
    vae: VAE
    step: int


class ComparisonConditions(NamedTuple):
    """What all runs are measured on: images x (n, *E), their indices (n,) in the split, S and the seed."""

    split: str
    places: Tensor
    x: Tensor
    num_particles: int
    seed: int


def compare_runs(options: CompareRuns, *, say: Say) -> Comparison:
    """Compares each further run with the first: mean_n [L_S(x_n; run) - L_S(x_n; first run)] on the same images.

    Images, their binarization and the seed of the importance samples are one for all runs. What the runs have stored is
    taken where every one of them was evaluated, with its present weights, on exactly these images with this S and seed;
    else all are evaluated. Nothing is written into the run folders. The statistics are in ``paired``: two-sided 95% t
    intervals, Bonferroni-corrected, and a rule for when a difference of bounds may be read as one of log p(x).

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        The comparison, as comparison.json holds it.

    Raises:
        ValueError: fewer than two runs or images, a run twice, an autoencoder, or runs whose numbers are not on one
            scale: other data, protocol, binarization, images or measure. All of that is found before any evaluation.
    """
    _check_arguments(options.run_dirs, options.images)
    opened = _open_runs(options.run_dirs, options.dataset, options.data_dir)
    for run in opened:
        check_density(run, "bound on log p(x) to compare")
    _check_one_scale(opened, options.split)
    conditions = ComparisonConditions(
        options.split,
        *_load_shared_images(opened, options.split, options.images, options.seed),
        options.num_particles,
        options.seed,
    )
    entrants = [
        Entrant(name, run, load_evaluated_vae(run), runs.load_step(run.folder / runs.MODEL))
        for name, run in zip(_choose_names(opened), opened, strict=True)
    ]
    stored, place = _read_stored(entrants, conditions), find_device(options.device)
    folder = _make_folder(options.output, opened[0].splits.name)
    with remove_if_empty(folder):
        started = time.monotonic()
        results = stored or [_evaluate_run(entrant, conditions, place, options.compile, say) for entrant in entrants]
        _check_finite(entrants, results)
        seconds = time.monotonic() - started
        found = _summarize(entrants, results, conditions, stored=stored is not None, seconds=seconds)
        _write(
            folder, found, conditions.places, {e.name: r.log_evidence for e, r in zip(entrants, results, strict=True)}
        )
    for line in describe_comparison(found):
        say(line)
    say(f"Written to {folder}: {COMPARISON}, {FIGURE}, {PER_IMAGE}")
    return found


def _open_runs(run_dirs: Sequence[str], dataset: str | None, data_dir: str | None) -> list[Run]:
    """Opens the runs. Data that they share is read once."""
    first = open_run(run_dirs[0], dataset=dataset, data_dir=data_dir)
    return [first, *(open_run(path, dataset=dataset, data_dir=data_dir, like=first) for path in run_dirs[1:])]


# --- What is refused ---


def _check_arguments(run_dirs: Sequence[str], images: int | None) -> None:
    if len(run_dirs) < 2:
        raise ValueError(f"RUN: expected at least two run folders, got {len(run_dirs)}")
    if images is not None and images < 2:
        raise ValueError(f"--images: expected at least 2, for a standard error, got {images}")
    seen: dict[Path, str] = {}
    for run_dir in run_dirs:
        place = Path(run_dir).resolve()
        if place in seen:
            raise ValueError(f"RUN: expected different run folders, got {seen[place]} and {run_dir}, which are one")
        seen[place] = run_dir


def _describe_scale(run: Run, split: str) -> dict[str, str]:
    """What two runs must share for their nats to be comparable: its name, and its value in words."""
    splits = run.splits
    # Under the vampprior protocol they differ in training only: both are evaluated on one draw, which is new to both
    # but on the training images, where "fixed" has learned it.
    one_draw = run.binarization in ("dynamic", "fixed") and splits.protocol == "vampprior" and split != "train"
    return {
        "data": f"SHA-256 {splits.sha256}",
        "shape of an image": "x".join(map(str, splits.event_shape)),
        "scale": f"the {run.scale}",
        "protocol": splits.protocol,
        "binarization": "dynamic or fixed" if one_draw else run.binarization,
    }


def _check_one_scale(opened: Sequence[Run], split: str) -> None:
    first = opened[0]
    for run in opened[1:]:
        for (name, expected), got in zip(
            _describe_scale(first, split).items(), _describe_scale(run, split).values(), strict=True
        ):
            if got != expected:
                raise ValueError(
                    f"{name}: expected one for all runs, got {expected} in {first.folder} and {got} in {run.folder}"
                )


def _load_shared_images(opened: Sequence[Run], split: str, images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The indices in the split (n,) and the images (n, *E), which must be the same pixels for all runs."""
    first = opened[0]
    x = data.evaluation_images(first.splits, split, first.evaluated_pixels, seed=seed)
    for run in opened[1:]:
        if run.splits is first.splits and run.evaluated_pixels == first.evaluated_pixels:
            continue
        if not torch.equal(x, data.evaluation_images(run.splits, split, run.evaluated_pixels, seed=seed)):
            raise ValueError(
                f"{split} images: expected the same in all runs, got others in {first.folder} and {run.folder}; "
                "were they brought to their size or color in another way?"
            )
    places = data.subset(len(x), images)
    if len(places) < 2:
        raise ValueError(f"{split}: expected at least 2 images, for a standard error, got {len(places)}")
    return places, x[places]


def _check_finite(entrants: Sequence[Entrant], results: Sequence[Importance]) -> None:
    for entrant, result in zip(entrants, results, strict=True):
        broken = int((~result.log_evidence.isfinite()).sum())
        if broken:
            raise ValueError(f"{entrant.name}: expected a finite bound for every image, got {broken:,} that are not")


def _make_folder(output: str | None, dataset: str) -> Path:
    """Makes the folder of the result."""
    if output is None:
        return runs.make_new_folder(f"compare-{Path(dataset).stem}")
    return make_output_folder(output, Path(output))


# --- What is measured ---


def _choose_names(opened: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths if two share a name."""
    names = [run.folder.resolve().name for run in opened]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in opened]


def _read_stored(entrants: Sequence[Entrant], conditions: ComparisonConditions) -> list[Importance] | None:
    """The runs' own evaluations, if every run has one of exactly this kind."""
    found = []
    for entrant in entrants:
        stored = read_per_image(entrant.run.folder, conditions.split)
        if stored is None or (stored.num_particles, stored.seed) != (conditions.num_particles, conditions.seed):
            return None
        if not torch.equal(stored.index, conditions.places):
            return None
        found.append(stored.result)
    return found


def _evaluate_run(
    entrant: Entrant, conditions: ComparisonConditions, place: torch.device, compile: str, say: Say
) -> Importance:
    vae = entrant.vae.to(place)
    result = evaluate_with_progress(
        vae,
        conditions.x.to(place),
        num_particles=conditions.num_particles,
        seed=conditions.seed,
        compile=compile,
        say=say,
        words=f"log p(x), {entrant.name}",
    )
    vae.cpu()
    return result.cpu()


def _describe_noise(vae: VAE, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """The family and shape of each draw that the guide makes for an image, in order. x: (n, *E)."""
    with seeded(0, x.device), torch.no_grad():
        trace = poutine.trace(vae.guide).get_trace(x[:1])
    drawn = []
    for name in trace.stochastic_nodes:
        family = trace.nodes[name]["fn"]
        while hasattr(family, "base_dist"):
            family = family.base_dist
        drawn.append((type(family).__name__, tuple(trace.nodes[name]["value"].shape)))
    return drawn


# --- What is written ---


def _summarize(
    entrants: Sequence[Entrant],
    results: Sequence[Importance],
    conditions: ComparisonConditions,
    *,
    stored: bool,
    seconds: float,
) -> Comparison:
    first, S = entrants[0].run, conditions.num_particles
    noises = [
        (run.pixels == "dequantized", evaluation_batch_size(vae, conditions.x, S), _describe_noise(vae, conditions.x))
        for _, run, vae, _ in entrants
    ]
    pairs = []
    for entrant, result, noise in zip(entrants[1:], results[1:], noises[1:], strict=True):
        found = bound_difference(results[0], result, comparisons=len(results) - 1)
        pairs.append(_make_pair(entrants[0].name, entrant.name, found, same_noise=noise == noises[0]))
    return Comparison(
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        dataset=first.splits.name,
        split=conditions.split,
        protocol=first.splits.protocol,
        binarization=" or ".join(sorted({entrant.run.binarization for entrant in entrants})),
        scale=first.scale,
        num_images=len(conditions.places),
        num_particles=S,
        seed=conditions.seed,
        stored_evaluations=stored,
        runs=tuple(_summarize_run(*each, S) for each in zip(entrants, results, strict=True)),
        comparisons=tuple(pairs),
        seconds=seconds,
    )


def _summarize_run(entrant: Entrant, result: Importance, num_particles: int) -> ComparedRun:
    return ComparedRun(
        name=entrant.name,
        folder=str(entrant.run.folder),
        step=entrant.step,
        training_seed=entrant.run.options.seed,
        binarization=entrant.run.binarization,
        likelihood=entrant.run.options.likelihood,
        bits_per_dim=estimate_bits_per_dim(entrant.run, result.log_evidence, num_particles),
        log_likelihood=Estimate.from_values(result.log_evidence, num_particles),
        elbo=Estimate.from_values(result.elbo, num_particles),
        monte_carlo_stderr=combine_stderrs(result.monte_carlo_stderr),
        rise=float(result.tenfold_gain.mean()),
    )


def _make_pair(baseline: str, name: str, found: BoundDifference, *, same_noise: bool) -> ComparedPair:
    bounds = found.bounds
    return ComparedPair(
        name=name,
        baseline=baseline,
        difference=Estimate(bounds.mean, bounds.stderr, bounds.n),
        interval=(bounds.lower, bounds.upper),
        confidence=bounds.confidence,
        unpaired_stderr=bounds.unpaired_stderr,
        monte_carlo_stderr=found.monte_carlo_stderr,
        rise=found.tenfold_gain,
        bound=bounds.word,
        ranks_log_likelihood=found.ranks_log_evidence,
        verdict=compare_in_words(name, baseline, bounds),
        same_noise=same_noise,
    )


def _write(folder: Path, found: Comparison, places: Tensor, bounds: dict[str, Tensor]) -> None:
    """Writes the bounds of each image, the figure, and last comparison.json."""
    scalars = {key: getattr(found, key) for key in ("split", "num_particles", "seed")}
    runs.save_tensors(
        folder / PER_IMAGE, {"index": places} | {f"log_evidence/{name}": L for name, L in bounds.items()}, scalars
    )
    shown = [
        plots.PairShown(
            names=(pair.baseline, pair.name),
            first=bounds[pair.baseline].numpy(),
            second=bounds[pair.name].numpy(),
            difference=(bounds[pair.name] - bounds[pair.baseline]).numpy(),
            mean=pair.difference.mean,
            lower=pair.interval[0],
            upper=pair.interval[1],
            words=pair.verdict,
        )
        for pair in found.comparisons
    ]
    figure = plots.paired_bounds(shown, bound=f"L_{found.num_particles}", title=comparison_title(found))
    write_figure(folder / FIGURE, figure)
    runs.write_json(folder / COMPARISON, to_json(found))
