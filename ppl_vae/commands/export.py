"""Exports a run as one folder to share: the model without its training, its numbers, its model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppl_vae import runs
from ppl_vae.commands.options import Export
from ppl_vae.reports.text.card import CARD, describe_export, make_card
from ppl_vae.runs.load import find_run_folder, load
from ppl_vae.runs.open import Run, Say, open_without_data
from ppl_vae.runs.options import EXPORT_FORMAT, model_to_json

FIGURES = ("prior_samples.png", "reconstructions.png")


def export_run(options: Export, *, say: Say) -> Path:
    """Writes config.json, model.safetensors, evaluation.json, README.md and figures/ of a run into one folder.

    ``load``, evaluate_log_likelihood.py, sample.py and encode.py take the folder, wherever it is. It holds the model's
    options and the shape of its data, no option of the training and no path, and the evaluations of these weights.
    It is written as a whole or not at all.

    Raises:
        ValueError: no run, one without weights, a damaged one, or an output folder that holds something or cannot be
            replaced.
        OSError: it cannot be written; nothing is left of it.
    """
    run = open_without_data(find_run_folder(options.run_dir))
    folder = Path(options.output) if options.output is not None else Path("exports") / run.folder.resolve().name
    place = _find_place(folder)
    load(run.folder)  # weights that do not fit are found here, and not by whoever gets them
    weights, scalars = runs.load_tensors(run.folder / runs.MODEL)
    step = runs.get_step(run.folder / runs.MODEL, scalars)
    entries = runs.read_evaluations(run.folder, step=step)
    drawn_of = (run.folder / runs.MODEL).stat().st_mtime_ns
    paths = [run.folder / runs.FIGURES / name for name in FIGURES]
    figures = [path.name for path in paths if path.is_file() and path.stat().st_mtime_ns >= drawn_of]
    card = make_card(run, entries, step=step, figures=figures)
    with _whole(place) as partial:
        runs.write_json(partial / runs.CONFIG, _config(run))
        runs.save_tensors(partial / runs.MODEL, weights, {"step": step})
        if entries:
            runs.write_json(partial / runs.EVALUATION, entries)
        runs.write_bytes(partial / CARD, card.encode())
        for name in figures:
            (partial / runs.FIGURES).mkdir(exist_ok=True)
            runs.write_bytes(partial / runs.FIGURES / name, (run.folder / runs.FIGURES / name).read_bytes())
    for line in describe_export(run, folder, entries, figures):
        say(line)
    return folder


def _config(run: Run) -> dict[str, object]:
    splits = run.splits
    seen = {"kind": splits.kind, "event_shape": list(splits.event_shape), "sha256": splits.sha256}
    return {"format": EXPORT_FORMAT, "model": model_to_json(run.options), "data": seen}


def _find_place(folder: Path) -> Path:
    """The folder that is written: where a link points to. Raises ValueError where it holds something."""
    place = folder.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"--output: expected a new or empty folder, but {folder} exists")
    return place


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the folder's place at the end of the block, and is removed if the block fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made: {error.strerror}") from None
    try:
        yield partial
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
