"""Several runs on the same images: the paired differences of their bounds on log p(x), measured, stored, and said."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import estimate_bits_per_dim, evaluate_with_progress
from ppl_vae.commands.options import CompareRuns
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import Importance
from ppl_vae.evidence.paired import CONFIDENCE, INDISTINCT, SEED_NATS, BoundDifference, bound_difference
from ppl_vae.reports import figures as plots
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs.evaluations import read_per_image
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.opening import Run, Say, check_density, describe_unused_draws, evaluated_vae, open_run
from ppl_vae.runs.outputs import output_folder, removed_if_empty, write_figure
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.batching import evaluation_batch_size
from ppl_vae.runtime.global_state import seeded
from ppl_vae.vae import VAE

COMPARISON, FIGURE, PER_IMAGE = "comparison.json", "comparison.png", "comparison.safetensors"

# With fewer differences their mean is not yet close to normal unless they are. Source: a rule of thumb.
_FEW_IMAGES = 30


class Entrant(NamedTuple):
    """One of the runs: a name that no other has, its trained VAE, and the step of its weights."""

    name: str
    run: Run
    vae: VAE
    step: int


class Asked(NamedTuple):
    """How all are measured: on images x (n, *E), at these places (n,) of the split, with S particles of one seed."""

    split: str
    places: Tensor
    x: Tensor
    num_particles: int
    seed: int


def compare_runs(options: CompareRuns, *, say: Say) -> dict[str, Any]:
    """mean_n [L_S(x_n; run) - L_S(x_n; first run)] of each further run, with its error, on the same n images.

    Images, their binarization and the seed of the importance samples are one for all runs. What the runs have stored is
    taken where every one of them was evaluated, with its present weights, on exactly these images with this S and seed;
    else all are evaluated. Nothing is written into the run folders. The statistics are in ``paired``: two-sided 95% t
    intervals, Bonferroni-corrected, and a rule for when a difference of bounds may be read as one of log p(x).

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: fewer than two runs or images, a run twice, an autoencoder, or runs whose numbers are not on one
            scale: other data, protocol, binarization, images or measure. All of that is found before any evaluation.
    """
    _check_asked(options.run_dirs, options.images)
    opened = _opened(options.run_dirs, options.dataset, options.data_dir)
    for run in opened:
        check_density(run, "bound on log p(x) to compare")
    _check_one_scale(opened, options.split)
    asked = Asked(
        options.split,
        *_same_images(opened, options.split, options.images, options.seed),
        options.num_particles,
        options.seed,
    )
    entrants = [
        Entrant(name, run, evaluated_vae(run), runs.load_step(run.folder / runs.MODEL))
        for name, run in zip(_names(opened), opened, strict=True)
    ]
    unused = [line for run in opened for line in describe_unused_draws(run, options.dequantization_draws)]
    for line in dict.fromkeys(unused):
        say(line)
    stored, place = _stored(entrants, asked), find_device(options.device)
    folder = _output_folder(options.output, opened[0].splits.name)
    with removed_if_empty(folder):
        started = time.monotonic()
        results = stored or [_evaluated(entrant, asked, place, options.compile, say) for entrant in entrants]
        _check_finite(entrants, results)
        entry = _entry(entrants, results, asked, stored=stored is not None) | {"seconds": time.monotonic() - started}
        _write(folder, entry, asked.places, {e.name: r.log_evidence for e, r in zip(entrants, results, strict=True)})
    for line in describe_comparison(entry):
        say(line)
    say(f"Written to {folder}: {COMPARISON}, {FIGURE}, {PER_IMAGE}")
    return entry


def _opened(run_dirs: Sequence[str], dataset: str | None, data_dir: str | None) -> list[Run]:
    """The runs, with the first one's data where they ask for the same: it is read once."""
    first = open_run(run_dirs[0], dataset=dataset, data_dir=data_dir)
    return [first, *(open_run(path, dataset=dataset, data_dir=data_dir, like=first) for path in run_dirs[1:])]


# --- What is refused ---


def _check_asked(run_dirs: Sequence[str], images: int | None) -> None:
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


def _scale(run: Run, split: str) -> dict[str, str]:
    """What must be the same for two runs, so that their nats are on one scale: its name, and its value in words."""
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
        for (name, expected), got in zip(_scale(first, split).items(), _scale(run, split).values(), strict=True):
            if got != expected:
                raise ValueError(
                    f"{name}: expected one for all runs, got {expected} in {first.folder} and {got} in {run.folder}"
                )


def _same_images(opened: Sequence[Run], split: str, images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Places in the split (n,) and the images (n, *E). What every run would see is compared pixel by pixel."""
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


def _output_folder(output: str | None, dataset: str) -> Path:
    """The result's folder, made now: a place that cannot be written to is found before the work."""
    if output is None:
        return runs.new_folder(f"compare-{Path(dataset).stem}")
    return output_folder(output, Path(output))


# --- What is measured ---


def _names(opened: Sequence[Run]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    names = [run.folder.resolve().name for run in opened]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in opened]


def _stored(entrants: Sequence[Entrant], asked: Asked) -> list[Importance] | None:
    """The runs' own evaluations, if every run has one of exactly what is asked."""
    found = []
    for entrant in entrants:
        stored = read_per_image(entrant.run.folder, asked.split)
        if stored is None or (stored.num_particles, stored.seed) != (asked.num_particles, asked.seed):
            return None
        if not torch.equal(stored.index, asked.places):
            return None
        found.append(stored.result)
    return found


def _evaluated(entrant: Entrant, asked: Asked, place: torch.device, compile: str, say: Say) -> Importance:
    vae = entrant.vae.to(place)
    result = evaluate_with_progress(
        vae,
        asked.x.to(place),
        num_particles=asked.num_particles,
        seed=asked.seed,
        compile=compile,
        say=say,
        words=f"log p(x), {entrant.name}",
    )
    vae.cpu()
    return result.cpu()


def _noise(vae: VAE, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """What the guide draws for an image, in its order: the family that the noise is of, and its shape. x: (n, *E)."""
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


def _entry(entrants: Sequence[Entrant], results: Sequence[Importance], asked: Asked, *, stored: bool) -> dict[str, Any]:
    """What comparison.json holds, but for the seconds."""
    differences = [bound_difference(results[0], result, comparisons=len(results) - 1) for result in results[1:]]
    noises = [
        (
            entrant.run.pixels == "dequantized",
            evaluation_batch_size(entrant.vae, asked.x, asked.num_particles),
            _noise(entrant.vae, asked.x),
        )
        for entrant in entrants
    ]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_conditions([entrant.run for entrant in entrants], asked),
        "stored_evaluations": stored,
        "runs": [_run_entry(*pair, asked.num_particles) for pair in zip(entrants, results, strict=True)],
        "comparisons": [
            _comparison_entry(entrants[0].name, entrant.name, found) | {"same_noise": noise == noises[0]}
            for entrant, found, noise in zip(entrants[1:], differences, noises[1:], strict=True)
        ],
    }


def _conditions(opened: Sequence[Run], asked: Asked) -> dict[str, Any]:
    """What is one for all: the binarization of the images, by each word that leads to it."""
    run = opened[0]
    return {
        "dataset": run.splits.name,
        "split": asked.split,
        "protocol": run.splits.protocol,
        "binarization": " or ".join(sorted({run.binarization for run in opened})),
        "scale": run.scale,
        "num_images": len(asked.places),
        "num_particles": asked.num_particles,
        "seed": asked.seed,
    }


def _run_entry(entrant: Entrant, result: Importance, num_particles: int) -> dict[str, Any]:
    own, elbo = (Estimate.from_values(values, num_particles) for values in (result.log_evidence, result.elbo))
    return {
        "name": entrant.name,
        "folder": str(entrant.run.folder),
        "step": entrant.step,
        "training_seed": entrant.run.options.seed,
        "binarization": entrant.run.binarization,
        "likelihood": entrant.run.options.likelihood,
        "bits_per_dim": to_json(estimate_bits_per_dim(entrant.run, result.log_evidence, num_particles)),
        "log_likelihood": own.to_json(),
        "elbo": elbo.to_json(),
        "monte_carlo_stderr": float(result.monte_carlo_stderr.square().sum().sqrt()) / len(result.log_evidence),
        "rise": float(result.tenfold_gain.mean()),
    }


def _comparison_entry(baseline: str, name: str, found: BoundDifference) -> dict[str, Any]:
    """One comparison, as comparison.json holds it."""
    bounds = found.bounds
    entry = {
        "name": name,
        "baseline": baseline,
        "difference": {"mean": bounds.mean, "stderr": bounds.stderr},
        "interval": [bounds.lower, bounds.upper],
        "confidence": bounds.confidence,
        "unpaired_stderr": bounds.unpaired_stderr,
        "monte_carlo_stderr": found.monte_carlo_stderr,
        "rise": found.tenfold_gain,
        "bound": bounds.word,
        "ranks_log_likelihood": found.ranks_log_evidence,
    }
    return entry | {"verdict": _verdict(entry)}


def _write(folder: Path, entry: dict[str, Any], places: Tensor, bounds: dict[str, Tensor]) -> None:
    """The bounds of each image, the figure, and last comparison.json."""
    scalars = {key: entry[key] for key in ("split", "num_particles", "seed")}
    runs.save_tensors(
        folder / PER_IMAGE, {"index": places} | {f"log_evidence/{name}": L for name, L in bounds.items()}, scalars
    )
    shown = [
        plots.PairShown(
            names=(compared["baseline"], compared["name"]),
            first=bounds[compared["baseline"]].numpy(),
            second=bounds[compared["name"]].numpy(),
            difference=(bounds[compared["name"]] - bounds[compared["baseline"]]).numpy(),
            mean=compared["difference"]["mean"],
            lower=compared["interval"][0],
            upper=compared["interval"][1],
            words=compared["verdict"],
        )
        for compared in entry["comparisons"]
    ]
    write_figure(folder / FIGURE, plots.paired_bounds(shown, bound=f"L_{entry['num_particles']}", title=_title(entry)))
    runs.write_json(folder / COMPARISON, entry)


# --- In words ---


def describe_comparison(entry: dict[str, Any]) -> list[str]:
    """The numbers of one comparison, in words."""
    S, comparisons = entry["num_particles"], entry["comparisons"]
    lines = [_title(entry), *_about_source(entry)]
    for run in entry["runs"]:
        own, rise = run["log_likelihood"], run["rise"]
        gained = "" if math.isnan(rise) else f"; ten times the particles gained {rise:.3f}"
        lines.append(f"  {run['name']}: bound L_{S} {plus_minus(own)} nats an image{_bits(run)}{gained}")
    for compared in comparisons:
        lines += [compared["verdict"], _about_errors(compared), _about_log_p(compared, S)]
    if len(comparisons) > 1:
        lines.append(f"{len(comparisons)} comparisons: all their intervals hold at once with {CONFIDENCE:.0%}.")
    if entry["num_images"] < _FEW_IMAGES:
        lines.append(f"Fewer than {_FEW_IMAGES} images: the intervals are rough.")
    low, high = SEED_NATS
    return [
        *lines,
        "One training each: these trained models are compared, not methods. Another seed moves a VAE by "
        f"{low} to {high} nats, so a claim about methods under {high} nats needs several seeds of each.",
    ]


def _title(entry: dict[str, Any]) -> str:
    return (
        f"{entry['dataset']}, {entry['split']} split, the same {entry['num_images']:,} images for all, "
        f"binarization {entry['binarization']}, S = {entry['num_particles']:,}, seed {entry['seed']}"
    )


def _bits(run: dict[str, Any]) -> str:
    """Bits per dimension, where they are known."""
    return "" if run["bits_per_dim"] is None else f" ({run['bits_per_dim']['mean']:.4f} bits per dimension)"


def _about_source(entry: dict[str, Any]) -> list[str]:
    unmatched = [compared["name"] for compared in entry["comparisons"] if not compared["same_noise"]]
    if unmatched:
        noise = f"not matched for {', '.join(unmatched)}: the guide draws other numbers from the same seed"
    elif entry["stored_evaluations"]:
        noise = "matched, where all were evaluated on one kind of device: the guides draw the same numbers"
    else:
        noise = "matched: the guides draw the same numbers"
    stored = "taken from the runs' stored evaluations, which are of exactly this kind"
    source = stored if entry["stored_evaluations"] else "evaluated now; the run folders are left as they are"
    return [f"  {source}", f"  noise of the particles {noise}"]


def _verdict(compared: dict[str, Any]) -> str:
    """Which bound is better, by how much, and how sure that is."""
    name, baseline, word = compared["name"], compared["baseline"], compared["bound"]
    mean, stderr = compared["difference"]["mean"], compared["difference"]["stderr"]
    low, high = compared["interval"]
    judged = "not distinguishable from" if word == INDISTINCT else f"{word} than"
    return (
        f"{name} is {judged} {baseline}, by their bounds: {mean:+.3f} ± {stderr:.3f} nats an image "
        f"({100 * compared['confidence']:.4g}% interval {low:+.3f} to {high:+.3f})"
    )


def _about_errors(compared: dict[str, Any]) -> str:
    noise = compared["monte_carlo_stderr"]
    seen = "not known at S = 1" if math.isnan(noise) else f"{noise:.3f} (the delta method's, a floor)"
    return (
        f"  ± is the standard error over images, paired; unpaired it would be {compared['unpaired_stderr']:.3f}. "
        f"Within it, the particles' Monte Carlo error is {seen}"
    )


def _about_log_p(compared: dict[str, Any], num_particles: int) -> str:
    """What the difference of the bounds says of log p(x)."""
    rise = compared["rise"]
    if compared["interval"] == [0, 0]:
        return "  every image has the same bound, to the last bit: the two are one model"
    if compared["bound"] == INDISTINCT:
        return "  that is not the same as equal: a difference within the interval would not have been seen"
    if compared["ranks_log_likelihood"]:
        return (
            f"  the whole interval is beyond what ten times the particles gained ({rise:.3f} nats): log p(x) ranks so "
            "too, unless a guide much narrower than its posterior hides that a bound lacks more"
        )
    if math.isnan(rise):
        why, more = f"S = {num_particles} shows nothing of what the bounds still lack", 200
    else:
        why, more = f"ten times the particles still gained {rise:.3f} nats, which may hide it", 10 * num_particles
    return f"  the bounds are ranked, log p(x) is not: {why}; --num-particles {more} says more"
