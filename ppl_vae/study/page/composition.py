"""The report: its sections in order, as one page and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ppl_vae import runs
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Block, Section, Text
from ppl_vae.study.answers import answers
from ppl_vae.study.answers.sentences import floor_of, part_of, row_at
from ppl_vae.study.context import STUDY
from ppl_vae.study.figures import Drawn, draw
from ppl_vae.study.page.beta import beta_section
from ppl_vae.study.page.blur import blur_section
from ppl_vae.study.page.collapse import collapse_section
from ppl_vae.study.page.explore import explore_section
from ppl_vae.study.page.mean import mean_section
from ppl_vae.study.page.method import method_section
from ppl_vae.study.page.networks import networks_section
from ppl_vae.study.page.prior import prior_section
from ppl_vae.study.page.scale_maps import scales_section
from ppl_vae.study.page.source import Source, Study
from ppl_vae.study.page.typesetting import typeset
from ppl_vae.study.words import beta, count, data_name, listed, plus_minus, several

REPORT = "report.html"
# A base that gains less than this share of the floor on it has learned too little to speak of. Source: ours.
LEAST_GAIN = 0.1


def write_report(folder: Path) -> Path:
    """Composes FOLDER/report.html of study.json and the pictures beside it, and writes the figures as files too.

    Runs no model; of the runs it reads only the weights of decoders with two latents, which the page draws with.

    Args:
        folder: of the study.

    Returns:
        The page.

    Raises:
        ValueError: no study, or a damaged one.
    """
    study = runs.read_json(folder / STUDY)
    try:
        drawn = draw(study)
        html = compose(study, folder, drawn)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / STUDY}: damaged: {type(error).__name__}, {error}") from error
    figures = folder / runs.FIGURES
    figures.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        runs.write_bytes(figures / f"{name}.png", figure.light)
        runs.write_bytes(figures / f"{name}-dark.png", figure.dark)
    runs.write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def compose(study: Study, folder: Path, drawn: Mapping[str, Drawn]) -> str:
    """The page as a string.

    Args:
        study: study.json.
        folder: where its pictures and runs are.
        drawn: its figures by name.
    """
    source = Source(study, folder, drawn, {answer.key: answer for answer in answers(study)})
    made = [
        _short_answers(source),
        explore_section(source),
        mean_section(source),
        beta_section(source),
        collapse_section(source),
        blur_section(source),
        prior_section(source),
        networks_section(source),
        scales_section(source),
        method_section(source),
    ]
    sections = [typeset(section) for section in made if section.blocks]
    names = listed([data_name(word) for word in study["datasets"]])
    missing = [section.title for section in made if not section.blocks]
    quick = " This is the quick study: fewer and shorter runs, so its numbers are rough." * (study["size"] == "quick")
    left_out = f" Not measured in it: {'; '.join(missing)}." if missing else ""
    return report.page(
        "What a VAE does and why",
        sections,
        subtitle=f"{several(len(study['runs']), 'training')} on {names}{_without_result(study)}, to answer what "
        f"everyone who trains one asks. Every number below was measured by one command.{quick}{left_out}",
    )


def _without_result(study: Study) -> str:
    failed = sum(record.get("failed") is not None for record in study["runs"].values())
    return f" ({count(failed)} of them ended without a result)" if failed else ""


_PLACES = {
    "regularizer": "beta",
    "check": "prior",
    "blur": "blur",
    "averaging": "mean",
    "peak": "beta",
    "collapse": "collapse",
    "architectures": "architectures",
    "scale_maps": "scales",
}


def _short_answers(source: Source) -> Section:
    blocks: list[Block] = [
        Text(words) for words in map(partial(_too_little, source.study), source.study["datasets"]) if words
    ]
    blocks += [
        report.Answer(answer.question, f"{answer.short} [How it was found](#{_PLACES[key]}).")
        for key, answer in source.answers.items()
    ]
    return Section("The answers, in short", blocks, anchor="answers")


def _too_little(study: Study, dataset: str) -> str | None:
    """A warning where even the base is hardly better than pixels on their own."""
    floor = floor_of(study, dataset)
    row = row_at((part_of(study, "sweep", dataset) or {}).get("rows", ()), 1.0)
    reached = None if row is None else row.get("log_likelihood")
    if not floor or not reached or reached["mean"] - floor["mean"] >= LEAST_GAIN * abs(floor["mean"]):
        return None
    return (
        f"**Trained too little.** On {data_name(dataset)} even the run of {beta(1.0)} reaches "
        f"{plus_minus(reached)} nats in L_S, where pixels on their own, without latents, have {plus_minus(floor)}. "
        "What follows says little of trained models: more images or more epochs are needed first."
    )
