"""A run's diagnosis, its figures, its HTML page, and its export as one folder to share."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.options import Diagnose, Export, Figures, Report
from ppl_vae.diagnostics.likelihood import NoiseSpectrum, measure_noise
from ppl_vae.diagnostics.measurement import FEWEST_IMAGES, TrainedWith, measure, summarize_estimate
from ppl_vae.diagnostics.verdicts import verdicts
from ppl_vae.reports.page.blocks import GENERATOR
from ppl_vae.reports.page.run import make_page
from ppl_vae.reports.run_figures import diagnosis_figures, is_drawn, write_figures
from ppl_vae.reports.text.diagnosis import describe_diagnosis
from ppl_vae.reports.text.run import CARD, describe_export, make_card
from ppl_vae.runs import hub
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.checkpoints import get_step
from ppl_vae.runs.load import find_run_folder, load, make_config
from ppl_vae.runs.open import Run, Say, check_no_labels, open_run, open_without_data
from ppl_vae.runs.outputs import check_new, make_folder, make_parent, write_figure
from ppl_vae.runs.resolve import find_device
from ppl_vae.runs.results import DIAGNOSIS, Diagnosis, read_diagnosis, read_per_image, to_json
from ppl_vae.runtime.global_state import seeded

# Training pixels whose covariance is measured, and the largest image for which D^3 operations are affordable.
_NOISE_PIXELS = 20_000 * 784
_MOST_PIXELS = 4096
_NOISE_SEED = 0

# A stored evaluation with fewer particles says little about the run; the one that ends a training has this many.
_FEWEST_PARTICLES = 200


def diagnose_run(options: Diagnose, *, say: Say) -> Diagnosis:
    """Measure a run, and say what stands out and what would change it.

    Writes diagnosis.json and figures/diagnosis-*.png. For dequantized levels the numbers are those of the density of
    (level + u) / 256, with one draw of u. The advice depends on the images that are measured, so by default they are
    not the test images, on which results are reported. Refuses fewer than 4 images.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    check_no_labels(run, "diagnosis")
    with runs.lock_folder(run.folder):
        device = find_device(options.device)
        split = choose_split(run) if options.split is None else options.split
        x = data.evaluation_images(run.splits, split, run.pixels, seed=options.seed)
        index = data.subset(len(x), options.images)
        if len(index) < FEWEST_IMAGES:
            raise ValueError(
                f"--images: expected at least {FEWEST_IMAGES} images of the {split} split, got {len(index)}"
            )
        x, gray = x[index], None
        if run.binarization != "none":
            gray = data.probabilities(run.splits, split)[index].to(device)
        stored = read_per_image(run.folder, split)
        quality = None
        if stored is not None and stored.num_particles >= _FEWEST_PARTICLES:
            quality = summarize_estimate(stored.result, stored.num_particles)
        numbers = measure(
            load(run.folder).to(device),
            x.to(device),
            gray=gray,
            noise=_measure_noise(run),
            trained_with=describe_training(run),
            importance=quality,
            seed=options.seed,
        )
        figures = list(diagnosis_figures(run, numbers))
        there = {path.name for path in (run.folder / runs.FIGURES).glob("*.png")} | set(figures)
        found_verdicts = (each if each.figure in there else replace(each, figure=None) for each in verdicts(numbers))
        found = Diagnosis(
            **vars(replace(run.provenance, scale=run.trained_scale)),
            step=runs.load_step(run.folder / runs.MODEL),
            split=split,
            seed=options.seed,
            numbers=numbers,
            verdicts=tuple(found_verdicts),
        )
        _write(run, found, x)
        for line in describe_diagnosis(found, str(run.folder), has_validation=len(run.splits.validation) > 0):
            say(line)
        say(f"In {run.folder}: {DIAGNOSIS}; {runs.FIGURES}/{', '.join(figures)}")
        return found


def choose_split(run: Run) -> str:
    """The split that is diagnosed by default: validation, or test if there are no validation images."""
    return "validation" if len(run.splits.validation) else "test"


def describe_training(run: Run) -> TrainedWith:
    """What the verdicts need to know of a run's training."""
    records = runs.read_metrics(run.folder)[-2:]
    last = [r["validation_elbo_nats_per_image"] for r in records if "validation_elbo_nats_per_image" in r]
    names = "beta likelihood epochs objective num_particles prior"
    return TrainedWith(
        **{name: getattr(run.options, name) for name in names.split()},
        data=run.splits.kind,
        last_rise=last[1] - last[0] if len(last) == 2 else None,
    )


def _measure_noise(run: Run) -> NoiseSpectrum | None:
    """``measure_noise`` of the run's likelihood, with new parameters, and its training images.

    None for images of more than 4,096 pixels, or a likelihood whose first feature is not a location.
    """
    D = math.prod(run.splits.event_shape)
    if D > _MOST_PIXELS:
        return None
    stored, transform = data.training_images(run.splits, run.pixels)
    index = data.subset(len(stored), _NOISE_PIXELS // D)
    x = transform(stored[index], torch.Generator().manual_seed(_NOISE_SEED))
    return measure_noise(build_likelihood(run.options, run.splits.event_shape), x)


def _write(run: Run, found: Diagnosis, x: Tensor) -> None:
    """Write the figures and then the numbers, so that numbers never stand next to figures of others."""
    with seeded(found.seed, torch.device("cpu")), torch.no_grad():
        figures = {name: draw(x) for name, draw in diagnosis_figures(run, found.numbers).items()}
    folder, path = run.folder / runs.FIGURES, run.folder / DIAGNOSIS
    folder.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    for old in folder.glob("diagnosis-*.png"):
        old.unlink()
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    runs.write_json(path, to_json(found))


REPORT = "report.html"

_HEAD = 1000  # bytes of a page, within which its generator stands


def draw_run(options: Figures, *, say: Say) -> None:
    """Draws a run's figures again, from its files."""
    write_figures(open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say), say=say)


def report_run(options: Report, *, say: Say) -> Path:
    """Writes one self-contained page of a run; draws and diagnoses it first, where that is not done.

    Refuses to replace any file but an earlier page.

    Returns:
        The page.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    path = run.folder / REPORT if options.output is None else Path(options.output)
    make_parent(path)
    if path.exists() and options.output is not None and GENERATOR.encode() not in path.read_bytes()[:_HEAD]:
        raise ValueError(f"--output: expected a new file, or an earlier page, but {path} is neither")
    step = runs.load_step(run.folder / runs.MODEL)
    if not is_drawn(run):
        write_figures(run, say=say)
    diagnosis = read_diagnosis(run.folder)
    if diagnosis is None or diagnosis.step != step:
        asked = Diagnose(str(run.folder), dataset=options.dataset, data_dir=options.data_dir)
        can = run.options.condition == "none" and len(getattr(run.splits, choose_split(run))) >= FEWEST_IMAGES
        diagnosis = diagnose_run(asked, say=say) if can else None
    runs.write_bytes(path, make_page(run, step, diagnosis, split=choose_split(run)).encode())
    say(f"The page of this run: {path}")
    return path


# --- Export ---

_EXPORTED_FIGURES = ("prior_samples.png", "reconstructions.png")


def export_run(options: Export, *, say: Say) -> Path:
    """Writes config.json, model.safetensors, evaluation.json, README.md and figures/ of a run into one folder.

    ``load`` and the commands evaluate, sample and encode take the folder, wherever it is. It holds the model's
    options and the shape of its data, no option of the training and no path, and the evaluations of these weights.
    It is written as a whole or not at all. With ``options.push`` it is also uploaded.
    """
    if options.push is not None:
        hub.check_push(options.push)
    run = open_without_data(find_run_folder(options.run_dir))
    named = Path(hub.get_name(options.run_dir)) if hub.is_address(options.run_dir) else run.folder.resolve()
    folder = Path(options.output) if options.output is not None else Path("exports") / named.name
    target = folder.resolve()  # where a link points to
    check_new(target, "--output")
    load(run.folder)  # weights that do not fit are found here, and not by whoever gets them
    weights, scalars = runs.load_tensors(run.folder / runs.MODEL)
    step = get_step(run.folder / runs.MODEL, scalars)
    entries = runs.read_evaluations(run.folder, step=step)
    drawn_of = (run.folder / runs.MODEL).stat().st_mtime_ns
    paths = [run.folder / runs.FIGURES / name for name in _EXPORTED_FIGURES]
    figures = [path.name for path in paths if path.is_file() and path.stat().st_mtime_ns >= drawn_of]
    address = None if options.push is None else hub.SCHEME + options.push
    card = make_card(run, entries, step=step, figures=figures, address=address)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    make_folder(partial, "--output")
    try:
        runs.write_json(partial / runs.CONFIG, make_config(run.options, run.splits, exported=True))
        runs.save_tensors(partial / runs.MODEL, weights, {"step": step})
        if entries:
            runs.write_json(partial / runs.EVALUATION, entries)
        runs.write_bytes(partial / CARD, card.encode())
        for name in figures:
            (partial / runs.FIGURES).mkdir(exist_ok=True)
            runs.write_bytes(partial / runs.FIGURES / name, (run.folder / runs.FIGURES / name).read_bytes())
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for line in describe_export(run, folder, entries, figures):
        say(line)
    if options.push is not None:
        page = hub.push(folder, options.push)
        say(f"Pushed to {page}: load({address!r}) makes the model of it.")
        say("  A new repository is private: fill in the license of its card before you make it public.")
    return folder
