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
from ppl_vae.study import questions
from ppl_vae.study.figures import draw_figures
from ppl_vae.study.questions import PageSource
from ppl_vae.study.results import RUNS, RunNumbers, read_study
from ppl_vae.study.tables import name_data

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
    source = PageSource(study, folder, draw_figures(study))
    html = compose_page(source)
    figures = folder / runs.FIGURES
    figures.mkdir(exist_ok=True)
    for name, figure in source.drawn.items():
        runs.write_bytes(figures / f"{name}.png", figure.light)
        runs.write_bytes(figures / f"{name}-dark.png", figure.dark)
    runs.write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def compose_page(source: PageSource) -> str:
    """The page as a string."""
    sections = [
        questions.explain_beta(source),
        questions.explain_check(source),
        questions.explain_blur(source),
        questions.explain_averaging(source),
        questions.explain_collapse(source),
        questions.explain_networks(source),
        questions.explain_scale_maps(source),
        _explore(source),
        questions.explain_method(source),
    ]
    study = source.study
    failed = sum(run.failed is not None for run in study.runs.values())
    missing = [section.title for section in sections if not section.blocks]
    sentences = [
        f"{len(study.runs)} trainings on {' and '.join(map(name_data, study.datasets))}, measured by one command.",
        f"Ended without a result: {failed}." if failed else "",
        "The quick study has fewer and shorter runs, so its numbers are rough." if study.size == "quick" else "",
        f"Not measured: {'; '.join(missing)}" if missing else "",
    ]
    subtitle = " ".join(filter(None, sentences))
    return report.page("What a VAE does and why", [each for each in sections if each.blocks], subtitle=subtitle)


# --- Latent spaces of two dimensions, which the page draws itself ---


def _explore(source: PageSource) -> Section:
    """A map of each latent space of two dimensions, the VAE's first."""
    found = sorted((run for run in source.study.runs.values() if run.codes), key=lambda run: run.is_autoencoder)
    explorers = [explorer for run in found if (explorer := _make_explorer(source, run)) is not None]
    return Section("Move through a latent space", [Text(EXPLORE), *explorers] if explorers else [], anchor="explore")


def _make_explorer(source: PageSource, run: RunNumbers) -> Explorer | None:
    """None if the run's weights are gone, or a page cannot draw its decoder."""
    run_dir = source.folder / RUNS / run.name
    if not (run_dir / runs.MODEL).exists():
        return None
    try:
        decoder = report.decoder_weights(cast(Conditional, load(run_dir).likelihood))
    except ValueError:
        return None
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
        labels=np.array(classes, dtype=np.uint8) if len(classes) == len(points) else None,
        label_names=source.study.data[run.dataset].classes,
    )
