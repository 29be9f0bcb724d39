"""How the guide's scales are kept positive."""

from __future__ import annotations

from collections.abc import Mapping

from ppl_vae.report import Section
from ppl_vae.study.page.source import Source
from ppl_vae.study.page.tables import known_table, mean_cell, number_cell, percent_cell
from ppl_vae.study.words import count


def scales_section(source: Source) -> Section:
    """Gradients at initialization, and training under stress."""
    part = source.study.get("scale_maps") or {}
    gradients = [
        [
            row["scale_map"],
            number_cell(row["largest_feature"]),
            mean_cell(row["gradient_norm"])
            if isinstance(row["gradient_norm"], Mapping)
            else number_cell(row["gradient_norm"]),
            percent_cell(row["not_finite"]),
            percent_cell(row.get("kl_overflow")),
            number_cell(row.get("largest_scale")),
            percent_cell(row.get("vanished")),
        ]
        for row in part.get("gradients") or ()
    ]
    stressed = [
        [
            row["scale_map"],
            "yes" if row["finished"] else "no",
            None if row.get("step") is None else f"{count(row['step'])} of {count(row['num_steps'])}",
            mean_cell(row.get("elbo")),
            row.get("failure"),
        ]
        for row in part.get("stressed") or ()
    ]
    if not gradients and not stressed:
        return Section("How the guide's scales are kept positive", [])
    blocks = source.long("scale_maps")
    blocks += source.figure(
        "scale-maps",
        "The gradient that reaches the features of the guide's scales at initialization, as these features are made "
        "larger. A good map keeps it neither huge nor broken.",
        "Gradient norm and share of broken gradients against the largest feature",
    )
    columns = [
        "map",
        "largest feature",
        "gradient norm",
        "NaN or infinite",
        "KL infinite",
        "largest scale",
        "zero entries",
    ]
    blocks += known_table(columns, gradients, "At initialization, features scaled up by hand.")
    names = ["map", "finished", "step of the failure", "ELBO", "what was said"]
    blocks += known_table(names, stressed, "Training under stress: a high learning rate, no warm-up, no clipping.")
    return Section("How the guide's scales are kept positive", blocks, anchor="scales")
