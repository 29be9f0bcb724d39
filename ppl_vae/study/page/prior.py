"""All codes together against the prior."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.reports.page import Block, Picture, Section
from ppl_vae.study.page.source import Row, Source
from ppl_vae.study.page.tables import known_table, mean_cell, number_cell, share_cell
from ppl_vae.study.words import data_name, number


def prior_section(source: Source) -> Section:
    """Four measures along beta, holes as pictures, and all numbers."""
    parts = source.parts("regularization")
    if not parts:
        return Section("Was the regularization successful?", [])
    blocks = source.long("check")
    blocks += source.figure(
        "aggregate",
        "How far all codes together are from the prior, along beta; dashed: the autoencoder. The first three should be "
        "low and the last, what codes tell about images, should not be zero. It cannot exceed the logarithm of the "
        "number of images.",
        "Four measures of codes against prior, along beta",
    )
    for dataset in parts:
        blocks += _holes(source, dataset)
    for dataset, part in parts.items():
        blocks += _codes_table(dataset, part["rows"])
    return Section("Was the regularization successful?", blocks, anchor="prior")


def _holes(source: Source, dataset: str) -> list[Block]:
    """Of the run at beta = 1."""
    run = (((source.study.get("sweep") or {}).get(dataset) or {}).get("reference")) or None
    png = source.picture_of(run, "holes")
    if png is None:
        return []
    caption = (
        f"{data_name(dataset)}, beta = 1: above, the prior draws that the codes cover least, decoded; below, ordinary "
        "ones."
    )
    return [Picture(png, caption, "Decoded prior draws: worst holes and ordinary ones", dark_png=png)]


def _information_cell(row: Row) -> str | None:
    """Without an error where it is at its cap, of which an error says nothing."""
    value = row.get("mutual_information")
    return f"{number(value['mean'])} (cap)" if value and row.get("saturated") else mean_cell(value)


def _level(entries: Sequence[Row]) -> str:
    levels = [(row.get("kolmogorov_smirnov") or {}).get("level") for row in entries]
    known = [level for level in levels if level is not None]
    return f"{number(known[0])}, corrected for the number of latents" if known else "five percent, uncorrected"


def _codes_table(dataset: str, entries: Sequence[Row]) -> list[Block]:
    rows = [
        [
            "autoencoder" if row["autoencoder"] else f"{row['beta']:g}",
            row["active"],
            number_cell(((row.get("moments") or {}).get("mean") or {}).get("max")),
            number_cell(((row.get("moments") or {}).get("log_scale") or {}).get("max")),
            number_cell((row.get("kolmogorov_smirnov") or {}).get("max")),
            (row.get("kolmogorov_smirnov") or {}).get("rejected"),
            mean_cell((row.get("classifier") or {}).get("effect")),
            share_cell(row.get("holes")),
            _information_cell(row),
            mean_cell(row.get("marginal_kl")),
            mean_cell(row.get("total_correlation")),
        ]
        for row in entries
    ]
    columns = ["beta", "active", "largest |mean|", "largest |log scale|", "largest KS", "rejected", "classifier"]
    caption = (
        f"{data_name(dataset)}: codes of test images, one draw each, against the prior. Means and scales are in "
        f"scales of the prior. Rejected: latents whose Kolmogorov-Smirnov test has p below {_level(entries)}. Holes: "
        "prior draws that the codes cover less than all but one percent of other images' codes. KL to prior: of all "
        "codes together; it and the mutual information add up to the mean KL."
    )
    return known_table([*columns, "holes", "mutual information", "KL to prior", "total correlation"], rows, caption)
