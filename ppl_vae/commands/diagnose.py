"""What a run does and why: every diagnostic, what the numbers mean in words, and what would change it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.diagnosis_numbers import importance_numbers, measure, measure_if_possible, noise_numbers
from ppl_vae.commands.options import Diagnose
from ppl_vae.diagnostics.verdicts import Verdict, verdicts
from ppl_vae.reports.diagnosis_command import command_line
from ppl_vae.reports.diagnosis_figures import diagnosis_figures, names_drawn
from ppl_vae.reports.text.diagnosis import describe_numbers, describe_verdicts
from ppl_vae.reports.text.evaluation import describe_images_scale
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.evaluations import read_per_image
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run, Say, open_run
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runs.results import Provenance, from_json
from ppl_vae.runtime.global_state import seeded

__all__ = ["DIAGNOSIS", "diagnose_run", "measure", "noise_numbers", "noise_of"]

DIAGNOSIS = "diagnosis.json"

# The covariance of the training pixels: how many pixels it is taken of, and the largest image whose D^3 is affordable.
_NOISE_PIXELS = 20_000 * 784
_MOST_PIXELS = 4096
_NOISE_SEED = 0

_PARTICLES = "particles.png"  # a figure of the run's test images

# A stored evaluation by fewer is of its own haste, not of the run; the quick one that ends a training has as many.
_FEWEST_PARTICLES = 200


def diagnose_run(options: Diagnose, *, say: Say) -> dict[str, Any]:
    """Measures a run, says what stands out and what would change it: diagnosis.json, and figures/diagnosis-*.png.

    Of dequantized levels the numbers are of the density of (level + u) / 256, with one draw of u. What it recommends is
    chosen by the images that it measures, so they are not those that results are reported on.

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        What diagnosis.json holds.

    Raises:
        ValueError: no run, a damaged or a read-only one, one that another process writes to, other data than it was
            trained on, or fewer than 4 images; nothing is written.
    """
    split = options.split
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    with runs.locked(run.folder):
        step = runs.load_step(run.folder / runs.MODEL)
        place = find_device(options.device)
        split = split_diagnosed(run) if split is None else split
        x, gray = _images(run, split, options.images, options.seed)
        left_out: dict[str, str] = {}
        numbers = measure(
            load(run.folder).to(place),
            x.to(place),
            gray=None if gray is None else gray.to(place),
            noise=measure_if_possible(left_out, "noise", lambda: noise_of(run)),
            trained_with=trained_with(run),
            importance=_stored_importance(run, split),
            seed=options.seed,
        )
        numbers["left_out"] |= left_out
        figures = names_drawn(run, numbers)
        entry = {
            "step": step,
            "split": split,
            "seed": options.seed,
            **vars(run.provenance),
            "scale": run.trained_scale,
            "numbers": numbers,
            "verdicts": [_verdict_entry(run, verdict, split, figures) for verdict in verdicts(numbers)],
        }
        replaced = _replaced(run, step)
        _write(run, entry, x)
        for line in [_measured_in_words(run, entry), *describe_numbers(numbers), *describe_verdicts(entry["verdicts"])]:
            say(line)
        if replaced is not None:
            say(f"Replaces the diagnosis of {replaced:,} images.")
        say(f"In {run.folder}: {DIAGNOSIS}; {runs.FIGURES}/{', '.join(figures)}")
        return entry


def _replaced(run: Run, step: int) -> int | None:
    """How many images a diagnosis of the same weights, which goes, was measured on."""
    path = run.folder / DIAGNOSIS
    try:
        stored = runs.read_json(path) if path.exists() else {}
    except ValueError:  # damaged: it is made again
        return None
    found = stored.get("numbers", {}).get("num_images") if stored.get("step") == step else None
    return found if isinstance(found, int) else None


def split_diagnosed(run: Run) -> str:
    """The split that a diagnosis takes by itself: validation, or test where there are no validation images."""
    return "validation" if len(run.splits.validation) else "test"


def trained_with(run: Run) -> dict[str, Any]:
    """What the verdicts take of a run's options."""
    options = run.options
    names = ("beta", "likelihood", "epochs", "warmup_epochs", "objective", "num_particles", "prior", "posterior")
    found = {name: getattr(options, name) for name in names}
    return found | {"data": run.splits.kind, "last_rise": _last_rise(run)}


def _last_rise(run: Run) -> float | None:
    """What the last epoch added to the validation ELBO, nats; None where that was not measured twice."""
    path = run.folder / runs.METRICS
    records = runs.read_metrics(run.folder) if path.exists() else []
    key = "validation_elbo_nats_per_image"
    last = [record[key] for record in records[-2:] if key in record]
    return last[1] - last[0] if len(last) == 2 else None


def noise_of(run: Run) -> dict[str, Any] | None:
    """``noise_numbers`` of a run's likelihood, with fresh parameters, and of its training images; no weight enters.

    None for images of more than 4,096 pixels, or a likelihood whose first feature is no location.
    """
    D = math.prod(run.splits.event_shape)
    if D > _MOST_PIXELS:
        return None
    stored, observe = data.training_images(run.splits, run.pixels)
    index = data.subset(len(stored), _NOISE_PIXELS // D)
    x = observe(stored[index], torch.Generator().manual_seed(_NOISE_SEED))
    return noise_numbers(build_likelihood(run.options, run.splits.event_shape), x)


def _images(run: Run, split: str, images: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """A fixed random subset as the model sees it, and as gray where that was binarized."""
    x = data.evaluation_images(run.splits, split, run.pixels, seed=seed)
    index = data.subset(len(x), images)
    if len(index) < 4:
        raise ValueError(f"--images: expected at least 4 images of the {split} split, got {len(index)}")
    gray = data.probabilities(run.splits, split)[index] if run.binarization != "none" else None
    return x[index], gray


def _stored_importance(run: Run, split: str) -> dict[str, Any] | None:
    """What the run's evaluation with these weights says of itself; None where it is of fewer than S = 200."""
    stored = read_per_image(run.folder, split)
    if stored is None or stored.num_particles < _FEWEST_PARTICLES:
        return None
    return importance_numbers(stored.result, stored.num_particles)


def _verdict_entry(run: Run, verdict: Verdict, split: str, figures: list[str]) -> dict[str, Any]:
    """A verdict as JSON, with the figure where there is one and the command line that would change it."""
    shown = verdict.figure in figures or _is_drawn(run, verdict, split)
    found = verdict if shown else replace(verdict, figure=None)
    return found.to_json() | {"command": command_line(run, verdict, split)}


def _is_drawn(run: Run, verdict: Verdict, split: str) -> bool:
    if verdict.figure is None or (verdict.figure == _PARTICLES and split != "test"):
        return False
    return (run.folder / runs.FIGURES / verdict.figure).exists()


def _write(run: Run, entry: dict[str, Any], x: Tensor) -> None:
    """The figures, and then the numbers that they are of: these never stand beside figures of others."""
    with seeded(entry["seed"], torch.device("cpu")), torch.no_grad():
        figures = diagnosis_figures(run, entry["numbers"], x)
    folder, path = run.folder / runs.FIGURES, run.folder / DIAGNOSIS
    folder.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for old in folder.glob("diagnosis-*.png"):
        old.unlink()
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    runs.write_json(Path(path), entry)


def _measured_in_words(run: Run, entry: dict[str, Any]) -> str:
    n, split = entry["numbers"]["num_images"], entry["split"]
    lacking = "" if len(run.splits.validation) or split != "test" else " (which has no validation split)"
    scale = describe_images_scale(from_json(Provenance, entry), entry["seed"])
    return (
        f"{run.folder}: {n:,} images of the {split} split of {run.splits.name}{lacking}, {scale}; "
        "± is the standard error over images"
    )
