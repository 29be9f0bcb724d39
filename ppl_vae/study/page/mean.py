"""The sum over pixels beside the mean."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.reports.page import Block, Section
from ppl_vae.study.page.pictures import strips
from ppl_vae.study.page.source import Row, Source
from ppl_vae.study.page.tables import known_table, mean_cell, number_cell, share_cell
from ppl_vae.study.words import data_name

_REDUCTIONS = {"sum": "the sum", "mean": "the mean over pixels", "beta-of-mean": "the sum, beta = the number of pixels"}


def mean_section(source: Source) -> Section:
    """What averaging over pixels does: eigenvalues, active latents, pictures and numbers."""
    parts = source.parts("mean")
    if not parts:
        return Section("Sum or mean over pixels", [])
    blocks = source.long("averaging")
    blocks += source.figure(
        "spectrum",
        "Eigenvalues of the training images' covariance, each in units of the likelihood's noise. A linear "
        "decoder near collapse keeps a direction where it is above the dashed line: count those above that of a sum, "
        "and above that of a mean. Values near one are partly sampling noise.",
        "Eigenvalues by rank on logarithmic axes, with the thresholds of sum and mean",
    )
    blocks += source.figure(
        "active",
        "Active latents along beta, beside what the eigenvalues predict. Look at where both reach zero, and at the "
        "cross: the mean over pixels, at the beta that it amounts to.",
        "Active latents against beta, measured and predicted",
    )
    for dataset, part in parts.items():
        blocks += _reconstructions(source, dataset, part["conditions"])
        blocks += _conditions_table(dataset, part["conditions"])
    return Section("Sum or mean over pixels", blocks, anchor="mean")


def _reconstructions(source: Source, dataset: str, conditions: Sequence[Row]) -> list[Block]:
    by_word = {row["condition"]: row for row in conditions}
    named = [("test images", source.originals(dataset))]
    named += [
        (words, source.picture_of((by_word.get(word) or {}).get("run"), "reconstructions"))
        for word, words in _REDUCTIONS.items()
    ]
    return strips(named, f"{data_name(dataset)}: same network, same training.", "Reconstructions")


def _conditions_table(dataset: str, conditions: Sequence[Row]) -> list[Block]:
    shown = _shown(conditions)
    rows = [
        [
            "mean over pixels" if row["condition"] == "mean" else "sum",
            f"{row['beta']:g}",
            number_cell(row["threshold"]),
            row["predicted_live"],
            row["active"],
            share_cell(row["variation"]),
            mean_cell(row["kl"]),
            mean_cell(row["reconstruction"]),
            None if row["as_predicted"] is None else "yes" if row["as_predicted"] else "no",
        ]
        for row in shown
    ]
    columns = ["loss", "beta", "threshold", "directions above", "active", "variation", "KL", "reconstruction"]
    caption = (
        f"{data_name(dataset)}. Variation: how much reconstructions differ between images, as a share of what the "
        "images do; at zero they are all one picture. As predicted: whether all latents died exactly where no "
        "eigenvalue is above the threshold."
    )
    places = [k for k, row in enumerate(shown) if row["condition"] == "mean"]
    return known_table([*columns, "as predicted"], rows, caption, places)


def _shown(conditions: Sequence[Row]) -> list[Row]:
    """The named conditions, and then the sweep without the runs that they have already."""
    by_word = {row["condition"]: row for row in conditions}
    named_runs = {row["run"] for row in conditions if row["condition"] != "beta"}
    sweep = [row for row in conditions if row["condition"] == "beta" and row["run"] not in named_runs]
    return [by_word[word] for word in _REDUCTIONS if word in by_word] + sweep
