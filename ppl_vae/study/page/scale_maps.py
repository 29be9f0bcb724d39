"""How the guide's scales are kept positive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppl_vae.reports.page import Section
from ppl_vae.study.page.source import Source
from ppl_vae.study.page.tables import known_table, mean_cell, number_cell, percent_cell
from ppl_vae.study.words import count


def _norm_cell(row: Mapping[str, Any]) -> str | None:
    norm = row.get("gradient_norm")
    return mean_cell(norm) if isinstance(norm, Mapping) else number_cell(norm)


def scales_section(source: Source) -> Section:
    """Gradients at initialization, and training under stress."""
    part = source.study.get("scale_maps") or {}
    gradients = [
        [
            row["scale_map"],
            number_cell(row["largest_feature"]),
            _norm_cell(row),
            percent_cell(row["not_finite"]),
            percent_cell(row.get("kl_overflow")),
            number_cell(row.get("largest_scale")),
            percent_cell(row.get("vanished")),
            _norm_cell(row.get("sampled") or {}),
            percent_cell((row.get("sampled") or {}).get("not_finite")),
        ]
        for row in part.get("gradients") or ()
    ]
    stressed = [
        [
            row["scale_map"],
            "yes" if row["finished"] else "no, in evaluation" if row.get("failure_phase") == "evaluation" else "no",
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
        "larger. A good map keeps it neither huge nor broken. Solid: with the KL in closed form; dashed, where "
        "measured: with the sampled KL, which trains the runs of this study.",
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
        "gradient norm, sampled",
        "NaN or infinite, sampled",
    ]
    blocks += known_table(
        columns,
        gradients,
        "At initialization, features scaled up by hand; sampled: with the sampled KL, else in closed form.",
    )
    names = ["map", "finished", "step of the failure", "ELBO", "what was said"]
    blocks += known_table(names, stressed, "Training under stress: a high learning rate, no warm-up, no clipping.")
    return Section("How the guide's scales are kept positive", blocks, anchor="scales")
