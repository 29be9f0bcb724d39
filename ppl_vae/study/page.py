"""The study's report: every question's section in order, as one HTML page, with its figures as files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ppl_vae import runs
from ppl_vae.conditional import Conditional
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Explorer, Section, Slider, Table, Text, true_minus
from ppl_vae.runs.load import load
from ppl_vae.study._cells import format_mean, name_data
from ppl_vae.study.context import STUDY
from ppl_vae.study.figures import draw
from ppl_vae.study.questions import (
    EXPLORE,
    Row,
    Source,
    explain_averaging,
    explain_beta,
    explain_blur,
    explain_check,
    explain_collapse,
    explain_method,
    explain_networks,
    explain_scale_maps,
)

REPORT = "report.html"
# A base that gains less than this share of the floor on it has learned too little to speak of. Source: ours.
LEAST_GAIN = 0.1

_EXTENT = 3.0  # of the plane of a standard normal prior
_AUTOENCODER_SHARE = 0.99  # of an autoencoder's codes, which have no scale of their own


def write_report(folder: Path) -> Path:
    """Writes FOLDER/report.html from study.json and the pictures beside it, and the figures as files.

    Runs no model; of the runs it reads only the decoders with two latents, which the page draws with.

    Args:
        folder: The study's folder.

    Returns:
        The page's file.

    Raises:
        ValueError: no study, or a damaged one.
    """
    study = runs.read_json(folder / STUDY)
    try:
        source = Source(study, folder, draw(study))
        html = compose_page(source)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / STUDY}: damaged: {type(error).__name__}, {error}") from error
    figures = folder / runs.FIGURES
    figures.mkdir(exist_ok=True)
    for name, figure in source.drawn.items():
        runs.write_bytes(figures / f"{name}.png", figure.light)
        runs.write_bytes(figures / f"{name}-dark.png", figure.dark)
    runs.write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def compose_page(source: Source) -> str:
    """The page as a string."""
    made = [
        explain_beta(source),
        explain_check(source),
        explain_blur(source),
        explain_averaging(source),
        explain_collapse(source),
        explain_networks(source),
        explain_scale_maps(source),
        _make_explorers(source),
        explain_method(source),
    ]
    study = source.study
    names = " and ".join(name_data(word) for word in study["datasets"])
    failed = sum(record.get("failed") is not None for record in study["runs"].values())
    subtitle = f"{len(study['runs'])} trainings on {names}. Every number was measured by one command."
    if failed:
        subtitle += f" {failed} of them ended without a result."
    if study["size"] == "quick":
        subtitle += " This is the quick study: fewer and shorter runs, so its numbers are rough."
    missing = [section.title for section in made if not section.blocks]
    if missing:
        subtitle += f" Not measured: {'; '.join(missing)}"
    warned = [_warn_undertrained(source, word) for word in study["datasets"]]
    warnings = [Text(text) for text in warned if text]
    sections = [Section("Trained too little", warnings)] if warnings else []
    sections += [_with_true_minus(section) for section in made if section.blocks]
    return report.page("What a VAE does and why", sections, subtitle=subtitle)


def _warn_undertrained(source: Source, dataset: str) -> str | None:
    """A warning where even the base is hardly better than independent pixels."""
    floor = ((source.study.get("data") or {}).get(dataset) or {}).get("floor")
    rows = ((source.study.get("sweep") or {}).get(dataset) or {}).get("rows", ())
    reached = next((row.get("log_likelihood") for row in rows if row["beta"] == 1), None)
    if not floor or not reached or reached["mean"] - floor["mean"] >= LEAST_GAIN * abs(floor["mean"]):
        return None
    return (
        f"On {name_data(dataset)} the run with beta = 1 reaches L_S = {format_mean(reached)} nats per image; "
        f"independent pixels, without latents, have {format_mean(floor)}. What follows says little about trained "
        "models: more images or more epochs are needed first."
    )


def _with_true_minus(section: Section) -> Section:
    """The section with true minus signs before its numbers."""

    def convert(block: Any) -> Any:
        if isinstance(block, Table):
            return replace(
                block, rows=[[true_minus(c) if isinstance(c, str) else c for c in row] for row in block.rows]
            )
        if isinstance(block, Slider):
            stops = [replace(s, numbers={n: true_minus(w) for n, w in s.numbers.items()}) for s in block.positions]
            return replace(block, positions=stops)
        return block

    return replace(section, blocks=[convert(block) for block in section.blocks])


# --- Latent spaces of two dimensions, which the page draws itself ---


def _make_explorers(source: Source) -> Section:
    found = [_make_explorer(source, entry) for entry in source.study.get("explorers") or ()]
    explorers = [explorer for explorer in found if explorer is not None]
    return Section("Move through a latent space", [Text(EXPLORE), *explorers] if explorers else [], anchor="explore")


def _make_explorer(source: Source, entry: Row) -> Explorer | None:
    """None where the run's weights are gone, or its decoder is one that a page cannot draw."""
    run_dir = source.folder / entry["folder"]
    if not (run_dir / runs.MODEL).exists():
        return None
    try:
        decoder = report.decoder_weights(cast(Conditional, load(run_dir).likelihood))
    except ValueError:
        return None
    codes = entry["codes"]
    points = np.array([[code[0], code[1]] for code in codes], dtype=np.float32).reshape(-1, 2)
    classes = [code[2] for code in codes if len(code) > 2 and code[2] is not None]
    names = source.study["data"][source.study["runs"][entry["run"]]["dataset"]].get("classes") or ()
    extent = _EXTENT
    if entry["autoencoder"] and len(points):
        extent = max(_EXTENT, float(np.ceil(np.quantile(np.abs(points), _AUTOENCODER_SHARE))))
    return Explorer(
        decoder,
        "The plain autoencoder, on its own scale." if entry["autoencoder"] else "The VAE: its prior is N(0, I).",
        extent=extent,
        points=points,
        labels=np.array(classes, dtype=np.uint8) if codes and len(classes) == len(codes) else None,
        label_names=tuple(map(str, names)),
    )
