"""One run as one HTML page: what it is, its likelihood, what stands out, its figures, and its decoder to play with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ppl_vae import data, runs
from ppl_vae.conditional import Conditional
from ppl_vae.diagnostics.measurement import FEWEST_IMAGES
from ppl_vae.evidence.moments import encode, sample_latents
from ppl_vae.reports import page as report
from ppl_vae.reports.latents_figure import measure_latent_use
from ppl_vae.reports.page import Block, Explorer, Picture, Section, Table, Text, VerdictBlock, true_minus
from ppl_vae.reports.run_figures import figure_names
from ppl_vae.reports.text.diagnosis import describe_advice, describe_left_out
from ppl_vae.reports.text.evaluation import describe_evaluation, plus_minus
from ppl_vae.reports.text.pages import (
    DIAGNOSIS_FIGURES,
    EVALUATION_ROWS,
    evaluation_row_name,
    explorer_caption,
    figure_caption,
    make_sentence,
)
from ppl_vae.reports.text.training import describe_model
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.results import Diagnosis, Evaluation, is_evaluated, read_evaluation, to_json
from ppl_vae.runtime.global_state import seeded

_SEED = 0
_NUM_POINTS = 1000  # codes, and draws of the prior, which the explorer's plane holds nearly all of
_MOST_CODES = 0.995
_LEAST_EXTENT = 1e-3


def make_page(run: Run, step: int, diagnosis: Diagnosis | None, *, split: str) -> str:
    """The page of a run as HTML.

    Args:
        run: The run, evaluated and drawn.
        step: The step of its weights.
        diagnosis: The run's diagnosis, or None if there are too few images.
        split: The split that is diagnosed.
    """
    what = "autoencoder" if is_autoencoder(run.options) else "VAE"
    sections = [
        _likelihood(run),
        _verdicts(run, diagnosis, split),
        _exploration(run),
        _drawn("Training and pictures", run, figure_names(run), "figures"),
        _drawn("Behind the verdicts", run, list(DIAGNOSIS_FIGURES), "diagnosis") if diagnosis else None,
        _setup(run, step),
    ]
    return report.page(
        f"{run.folder.resolve().name}: one {what} of {run.splits.name}",
        [section for section in sections if section is not None and section.blocks],
        subtitle=make_sentence(describe_model(run)[0]),
    )


# --- What it is ---


def _setup(run: Run, step: int) -> Section:
    """The section with every option of the run, and its data."""
    words = f"{run.splits.describe()}\n\nThe weights are those of step {step:,}; its folder is `{run.folder}`."
    words += " Its training is elsewhere: in Python, or before it was shipped." if run.from_python else ""
    rows = [
        [f"`{format_flag(name)}`", _option(value)] for name, value in to_json(run.options).items() if value is not None
    ]
    table = Table(["option", "value"], rows, "Every option of the run; config.json holds the same.")
    return Section("What was trained", [Text(words), table], anchor="setup")


def _option(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- Its likelihood ---


def _likelihood(run: Run) -> Section:
    autoencoder = is_autoencoder(run.options)
    title = "How well it reconstructs" if autoencoder else "How likely it finds test images"
    entry = read_evaluation(run.folder) if is_evaluated(run.folder) else None
    if entry is None:
        command = "" if autoencoder else f"`ppl-vae evaluate {run.folder}` makes one."
        words = f"There is no evaluation of the test images with these weights. {command}".strip()
        return Section(title, [Text(words)], anchor="likelihood")
    keys = ("reconstruction",) if entry.log_likelihood is None else tuple(EVALUATION_ROWS)
    rows = [
        [evaluation_row_name(entry, key), true_minus(plus_minus(getattr(entry, key))), EVALUATION_ROWS[key]]
        for key in keys
    ]
    table = Table(
        ["nats an image", "mean ± standard error", "what it is"],
        rows,
        f"{entry.num_images:,} test images. The standard error is over images: how far the mean would move with "
        "other test images. It does not know what another training would give.",
        highlight=None if autoencoder else 0,
    )
    return Section(title, [table, Text(_details(entry))], anchor="likelihood")


def _details(entry: Evaluation) -> str:
    """The rest of the evaluation: how it was measured, and how far to trust it."""
    lines = [line.strip() for line in describe_evaluation(entry)]
    others = [line for line in lines if not line.startswith(("log-likelihood ", "ELBO "))]
    return true_minus(" ".join(map(make_sentence, others)))


# --- What stands out ---


def _verdicts(run: Run, diagnosis: Diagnosis | None, split: str) -> Section:
    if diagnosis is None:
        few = f"There are fewer than {FEWEST_IMAGES} {split} images: too few for a diagnosis."
        return Section("What stands out", [Text(few)], anchor="verdicts")
    text = Text(f"Measured on {diagnosis.numbers.num_images:,} images of the {diagnosis.split} split.")
    blocks: list[Block] = [text, *(Text(make_sentence(line)) for line in describe_left_out(diagnosis.numbers))]
    for verdict in diagnosis.verdicts:
        blocks.append(
            VerdictBlock(
                verdict.word,
                true_minus(make_sentence(verdict.evidence)),
                describe_advice(verdict),
                figure=_picture(run, verdict.figure) if verdict.figure else None,
                severity="healthy" if verdict.severity == "note" else "warning",
            )
        )
    return Section("What stands out", blocks, anchor="verdicts")


# --- Figures ---


def _picture(run: Run, name: str) -> Picture | None:
    """A figure of the run's folder with its caption; None if it does not exist."""
    path = run.folder / runs.FIGURES / name
    if not path.is_file():
        return None
    caption = figure_caption(run, name)
    return Picture(path.read_bytes(), caption, caption or Path(name).stem)


def _drawn(title: str, run: Run, names: list[str], anchor: str) -> Section:
    pictures = [picture for name in names if (picture := _picture(run, name)) is not None]
    return Section(title, pictures, anchor=anchor)


# --- The explorer ---


def _exploration(run: Run) -> Section:
    try:
        block: Block = make_explorer(run)
    except ValueError as error:
        block = Text(f"There is no live picture here. {make_sentence(str(error))}")
    return Section("Move through its latent space", [block], anchor="explore")


def make_explorer(run: Run) -> Explorer:
    """The live decoder over the plane of the two most used latents; the others stay as they are of a first image.

    Raises:
        ValueError: A decoder that a page cannot draw, with the reason.
    """
    vae = load(run.folder)
    if not isinstance(vae.likelihood, Conditional):
        raise ValueError("decoder: a page can draw dense networks that end in a likelihood, got a program of its own")
    decoder = report.decoder_weights(vae.likelihood)
    if decoder.latent_dim < 2:
        raise ValueError("decoder: a page shows a plane of two latents, got one latent")
    x = data.evaluation_images(run.splits, "test", run.pixels)
    index = data.subset(len(x), _NUM_POINTS)
    with seeded(_SEED, torch.device("cpu")), torch.no_grad():
        codes = encode(vae, x[index])
        use = measure_latent_use(vae, x[index], codes)
        draws = sample_latents(vae.prior(), _NUM_POINTS)
    i, j = sorted(use.values.argsort(descending=True)[:2].tolist())
    points = codes.mean[:, [i, j]].numpy()
    reach = np.quantile(np.abs(np.concatenate([points, draws[:, [i, j]].numpy()])), _MOST_CODES)
    labels = run.splits.labels.get("test")
    classes = None if labels is None else labels[index].numpy()
    few = classes is not None and classes.min() >= 0 and classes.max() < 10
    return Explorer(
        decoder,
        explorer_caption(run, (i, j)),
        points,
        start=(float(points[0, 0]), float(points[0, 1])),
        extent=float(max(reach, _LEAST_EXTENT)),
        labels=classes if few else None,
        label_names=run.splits.class_names if few else (),
        axes=(i, j),
        base=codes.mean[0].numpy(),
    )
