"""Other networks, and fewer and more latents."""

from __future__ import annotations

from ppl_vae.reports.page import Section
from ppl_vae.study.page.source import Source
from ppl_vae.study.page.tables import known_table, mean_cell, number_cell, paired_cell
from ppl_vae.study.words import data_name


def networks_section(source: Source) -> Section:
    """L_S by network, latents, time and weights."""
    part = source.study.get("architectures") or {}
    rows = [
        [
            row["network"],
            row["latent_dim"],
            row["active"],
            row["parameters"],
            number_cell(row["seconds"]),
            mean_cell(row["elbo"]),
            mean_cell(row["log_likelihood"]),
            paired_cell(row["difference_log_likelihood"]),
        ]
        for row in part.get("rows", ())
    ]
    if not rows:
        return Section("Networks and numbers of latents", [])
    blocks = source.long("architectures")
    blocks += source.figure(
        "architectures",
        "L_S, the bound on log p(x), by the number of latents, the time that training took, and the number of "
        "weights. Numbers beside points are latents of the gated network.",
        "L_S against latents, seconds and weights",
    )
    columns = ["network", "latents", "active", "weights", "seconds", "ELBO", "L_S", "L_S - that of the base"]
    caption = (
        f"{data_name(part['dataset'])}, the same epochs and one training each; nats an image, L_S is the bound on "
        "log p(x), differences are paired."
    )
    places = [k for k, row in enumerate(part["rows"]) if row["varied"] == "base"]
    blocks += known_table(columns, rows, caption, places)
    return Section("Networks and numbers of latents", blocks, anchor="architectures")
