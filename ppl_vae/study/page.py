"""The study's report: every question's section in order, as one HTML page, with its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from ppl_vae import runs
from ppl_vae.conditional import Conditional
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Explorer, Section, Text
from ppl_vae.reports.text.study import EXPLORE
from ppl_vae.runs.load import load
from ppl_vae.runs.outputs import write_figure
from ppl_vae.study.figures import draw_figures
from ppl_vae.study.questions import QUESTIONS, PageSource
from ppl_vae.study.results import RUNS, RunNumbers, read_study

REPORT = "report.html"

_EXTENT = 3.0  # of the plane of a standard normal prior
_AUTOENCODER_SHARE = 0.99  # of an autoencoder's codes, which have no scale of their own, lie within its plane


def write_report(folder: Path) -> Path:
    """Writes FOLDER/report.html from study.json and the pictures next to it, and the figures as files.

    It runs no model. Of the runs it reads only the decoders with two latents, which the page draws with.

    Returns:
        The page's file.

    Raises:
        ValueError: No study, or a damaged one.
    """
    study = read_study(folder)
    (folder / runs.FIGURES).mkdir(exist_ok=True)
    for name, figure in draw_figures(study).items():
        write_figure(folder / runs.FIGURES / f"{name}.png", figure)
    runs.write_bytes(folder / REPORT, compose_page(PageSource(study, folder)).encode())
    return folder / REPORT


def compose_page(source: PageSource) -> str:
    """The page as a string."""
    study = source.study
    failed = sum(run.failed is not None for run in study.runs.values())
    subtitle = (
        f"{len(study.runs)} trainings on {' and '.join(study.datasets)}, measured by one command; ended without a "
        f"result: {failed}. The size of this study is {study.size}; the numbers of a quick one are rough."
    )
    sections = [explain(source) for explain in QUESTIONS]
    return report.page("What a VAE does and why", [*sections, _explore(source)], subtitle=subtitle)


# --- Latent spaces of two dimensions, which the page draws itself ---


def _explore(source: PageSource) -> Section:
    """A map of each latent space of two dimensions whose weights are there, the VAE's first."""
    found = sorted((run for run in source.study.runs.values() if run.codes), key=lambda run: run.is_autoencoder)
    there = [run for run in found if (source.folder / RUNS / run.name / runs.MODEL).exists()]
    explorers = [_make_explorer(source, run) for run in there]
    return Section("Move through a latent space", [Text(EXPLORE), *explorers], anchor="explore")


def _make_explorer(source: PageSource, run: RunNumbers) -> Explorer:
    decoder = report.decoder_weights(cast(Conditional, load(source.folder / RUNS / run.name).likelihood))
    points = np.array([code[:2] for code in run.codes], dtype=np.float32)
    classes = [code[2] for code in run.codes if code[2] is not None]
    extent = _EXTENT
    if run.is_autoencoder:
        extent = max(_EXTENT, float(np.ceil(np.quantile(np.abs(points), _AUTOENCODER_SHARE))))
    return Explorer(
        decoder,
        "The plain autoencoder, on its own scale." if run.is_autoencoder else "The VAE: its prior is N(0, I).",
        extent=extent,
        points=points,
        labels=np.array(classes, dtype=np.uint8) if classes else None,
        label_names=source.study.data[run.dataset].classes,
    )
