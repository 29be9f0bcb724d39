"""The study's report: every question's section in order, as one HTML page, with its figures as files."""

from __future__ import annotations

from pathlib import Path

from ppl_vae import runs
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Section, Text
from ppl_vae.reports.run_page import make_explorer
from ppl_vae.reports.text.study import EXPLORE
from ppl_vae.runs.open import open_run
from ppl_vae.runs.outputs import write_figure
from ppl_vae.study.figures import draw_figures
from ppl_vae.study.plan import name_run
from ppl_vae.study.questions import QUESTIONS, PageSource
from ppl_vae.study.results import RUNS, read_study

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Writes FOLDER/report.html from study.json and the pictures next to it, and the figures as files.

    Of the runs it reads only those with two latents, whose decoders the page draws with.

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


def _explore(source: PageSource) -> Section:
    """A map of each latent space of two dimensions whose weights are there, the VAE's first."""
    places = [
        source.folder / RUNS / name_run(source.study.datasets[0], what) for what in ("latents-2", "autoencoder-2")
    ]
    explorers = [make_explorer(open_run(str(place))) for place in places if (place / runs.MODEL).exists()]
    return Section("Move through a latent space", [Text(EXPLORE), *explorers], anchor="explore")
