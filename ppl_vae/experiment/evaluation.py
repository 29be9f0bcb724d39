"""log p(x) of a run: measured, written into evaluation.json, and said in words."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ppl_vae import build, data, runs
from ppl_vae.evidence import UNRELIABLE_BIAS, Estimate, Importance, evaluate
from ppl_vae.experiment.opening import Run, Say, open_run

# Below this Pareto k the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5


def is_evaluated(folder: Path) -> bool:
    """The test split was evaluated with the weights that the run has now."""
    entry = runs.read_evaluations(folder).get("test", {})
    return entry.get("step") == runs.load_step(folder / runs.MODEL)


def evaluate_run(
    run_dir: str, *, split: str, num_particles: int, images: int | None, device: str, seed: int, say: Say
) -> dict[str, Any]:
    """Estimates log p(x) of a split, writes it into evaluation.json under the split's name, and says it.

    Returns:
        The entry, as evaluation.json holds it.

    Raises:
        ValueError: no run, a damaged one, or other data than it was trained on.
    """
    run = open_run(run_dir)
    return write_evaluation(
        run, split=split, num_particles=num_particles, images=images, device=device, seed=seed, say=say
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
) -> dict[str, Any]:
    """``evaluate_run``, for a run that is already open."""
    folder, options, splits = run
    runs.read_evaluations(folder)  # a damaged file is found before the work, not after it
    step = runs.load_step(folder / runs.MODEL)
    place = build.device(device)
    vae = build.load(folder).to(place)
    x = data.evaluation_images(splits, split, run.binarization)
    if images is not None and images > len(x):
        say(f"--images {images:,}: the {split} split has {len(x):,}, and all are taken.")
    x = x[data.subset(len(x), images)].to(place)
    started = time.monotonic()
    with tqdm(total=len(x), unit="image", desc=f"log p(x), {split}") as bar:
        result = evaluate(vae, x, num_particles=num_particles, seed=seed, progress=bar.update)
    entry = {
        "dataset": splits.name,
        "split": split,
        "binarization": options.binarization,
        "num_images": len(x),
        "num_particles": num_particles,
        "seed": seed,
        "likelihood": options.likelihood,
        "measure": build.LIKELIHOODS[options.likelihood](splits.event_shape).measure,
        **_summary(result, num_particles),
        "bits_per_dim": None,  # binarized pixels are no 8-bit data
        "step": step,
        "seconds": time.monotonic() - started,
    }
    # What was measured with weights that the run has no longer says nothing of the run.
    kept = {key: old for key, old in runs.read_evaluations(folder).items() if old.get("step") == step}
    if split in kept:
        old = kept[split]
        say(f"Replaces the {split} split's estimate of {old['num_images']:,} images with S = {old['num_particles']:,}.")
    runs.write_json(folder / runs.EVALUATION, kept | {split: entry})
    for line in describe_evaluation(entry):
        say(line)
    return entry


def _summary(result: Importance, num_particles: int) -> dict[str, Any]:
    def mean(values: Tensor) -> dict[str, float]:
        estimate = Estimate.of(values, num_particles)
        return {"mean": estimate.mean, "stderr": estimate.stderr}

    def quantiles(values: Tensor) -> dict[str, float | None]:
        known = values[~values.isnan()]
        if not len(known):
            return {"median": None, "q05": None, "q95": None}
        return {
            name: float(known.quantile(q, interpolation="lower"))
            for name, q in (("median", 0.5), ("q05", 0.05), ("q95", 0.95))
        }

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


def describe_evaluation(entry: dict[str, Any]) -> list[str]:
    """The numbers of one evaluation, in words."""
    S, n = entry["num_particles"], entry["num_images"]
    ll, elbo, rec, kl = (entry[key] for key in ("log_likelihood", "elbo", "reconstruction", "kl"))
    lines = [
        f"log-likelihood {_pm(ll)} nats an image: the importance-weighted bound L_{S}, in expectation below log p(x)",
        f"  {entry['split']} split, {n:,} images, binarization {entry['binarization']}; "
        "± is the standard error over images",
        f"  ELBO (beta = 1) {_pm(elbo)} = reconstruction {_pm(rec)} - KL {_pm(kl)}",
    ]
    if S == 1:
        return [*lines, "  one importance sample says nothing of its own error: take more"]
    k = entry["pareto_k"]["median"]
    fitted = "not estimated" if k is None else f"median {k:.2f}"
    lines.append(
        f"  effective particles: median {_number(entry['ess']['median'], 1)} of {S:,}; Pareto k-hat: {fitted} "
        "(above 0.7 is normal for a healthy VAE)"
    )
    seen = "see" if k is not None and k < _K_WITH_VARIANCE else "see, as a floor since k-hat is not below 0.5,"
    lines.append(
        f"  delta method and jackknife {seen} a Monte Carlo error of {_number(entry['monte_carlo_stderr'], 3)} "
        f"and {_number(entry['bias'], 3)} nats still lacking"
    )
    lines.append(f"  ten times the particles, S = {S // 10:,} to {S:,}, gained {_number(entry['rise'], 3)} nats")
    return [
        *lines,
        f"  unreliable images (jackknife above {UNRELIABLE_BIAS} nats): {entry['unreliable_images']:,} of {n:,}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value + 0.0:.{digits}f}"


def _pm(estimate: dict[str, float]) -> str:
    return f"{_number(estimate['mean'], 2)} ± {_number(estimate['stderr'], 2)}"  # unknown for one image
