"""What was done against collapse."""

from __future__ import annotations

from ppl_vae.reports.page import Section
from ppl_vae.study.page.source import Source
from ppl_vae.study.page.tables import known_table, mean_cell, paired_cell
from ppl_vae.study.words import data_name


def collapse_section(source: Source) -> Section:
    """Active latents and bounds by remedy."""
    part = source.study.get("collapse") or {}
    blocks = source.long("collapse")
    blocks += source.figure(
        "remedies",
        "Active latents after the same training, by what was done against collapse. Free bits give each latent nats "
        "for nothing, so that it counts as active nearly by construction.",
        "Bars of active latents by network and remedy",
    )
    rows = [
        [
            network,
            row["remedy"],
            row["active"],
            mean_cell(row["kl"]),
            mean_cell(row["elbo"]),
            mean_cell(row["log_likelihood"]),
            paired_cell(row["difference_log_likelihood"]),
        ]
        for network, of_network in (part.get("networks") or {}).items()
        for row in of_network["rows"]
    ]
    columns = ["network", "remedy", "active", "KL", "ELBO", "L_S", "L_S - that of none"]
    caption = (
        f"{data_name(part['dataset'])}, nats an image; L_S is the bound on log p(x), differences are paired."
        if rows
        else ""
    )
    blocks += known_table(columns, rows, caption)
    return Section("Against collapse: warm-up and free bits", blocks if rows else [], anchor="collapse")
