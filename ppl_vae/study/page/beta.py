"""Along beta: a slider of pictures, rate and distortion, and where the bounds peak."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.reports.page import Block, Section, Slider, SliderStop
from ppl_vae.study.page.source import Row, Source
from ppl_vae.study.page.tables import known_table, mean_cell, paired_cell
from ppl_vae.study.words import count, data_name, listed


def beta_section(source: Source) -> Section:
    """The runs along beta: pictures, rate and distortion, bounds and their peaks."""
    parts = source.parts("sweep")
    if not parts:
        return Section("Along beta", [])
    blocks: list[Block] = []
    for dataset, part in parts.items():
        blocks += _slider(source, dataset, part["rows"])
    blocks += source.long("regularizer")
    blocks += source.figure(
        "rate-distortion",
        "Each point is a model, with its beta. Going left, codes tell less and reconstructions cost more. "
        "The sum of both axes is minus the ELBO: all points of the dotted line have the best one.",
        "Distortion against rate along beta",
    )
    blocks += source.long("peak")
    blocks += source.figure(
        "bounds",
        "What each beta gains or loses on beta = 1, on the same test images: L_S is the importance-weighted bound on "
        "log p(x). Bars are standard errors of the paired difference and say nothing of another training; small dots "
        "are further seeds, and hollow marks are estimates that have not settled. Look at each curve's peak.",
        "Differences of L_S and ELBO to beta = 1, along beta",
    )
    for dataset, part in parts.items():
        blocks += _sweep_table(dataset, part)
    return Section("Along beta", blocks, anchor="beta")


def _slider(source: Source, dataset: str, rows: Sequence[Row]) -> list[Block]:
    stops = []
    for row in rows:
        pictures = [(name, source.picture_of(row["run"], name)) for name in ("reconstructions", "samples")]
        known = [(name, png) for name, png in pictures if png is not None]
        if len(known) == len(pictures):
            stops.append(SliderStop(f"{row['beta']:g}", known, _numbers(row)))
    originals = source.originals(dataset)
    if not stops or originals is None:
        return []
    labels = [stop.label for stop in stops]
    caption = (
        f"{data_name(dataset)}. Move beta and compare both rows with the test images: where are reconstructions exact, "
        "where are samples of the prior like the data, and from where on are all pictures the same?"
    )
    start = labels.index("1") if "1" in labels else len(labels) // 2
    return [Slider("beta", stops, caption, fixed=("test images", originals), start=start)]


def _numbers(row: Row) -> dict[str, str]:
    values = {
        "L_S, nats": mean_cell(row["log_likelihood"]),
        "ELBO, nats": mean_cell(row["elbo"]),
        "rate, nats": mean_cell(row["rate"]),
        "distortion, nats": mean_cell(row["distortion"]),
        "active latents": None if row["active"] is None else count(row["active"]),
    }
    return {name: value or "–" for name, value in values.items()}


def _sweep_table(dataset: str, part: Row) -> list[Block]:
    columns = ["beta", "rate", "distortion", "ELBO", "L_S", "L_S - that of beta = 1", "L_S - ELBO", "active"]
    rows = [
        [
            f"{row['beta']:g}" + ("" if row["reliable"] is not False else " *"),
            mean_cell(row["rate"]),
            mean_cell(row["distortion"]),
            mean_cell(row["elbo"]),
            mean_cell(row["log_likelihood"]),
            paired_cell(row["difference_log_likelihood"]),
            mean_cell(row["gap"]),
            row["active"],
            mean_cell(row.get("implied_beta")),
        ]
        for row in part["rows"]
    ]
    peak = (part.get("peaks") or {}).get("log_likelihood") or {}
    places = [k for k, row in enumerate(part["rows"]) if row["beta"] == peak.get("beta")]
    caption = (
        f"{data_name(dataset)}, nats an image ± standard error over images; differences are paired. The row of the "
        "highest L_S, the importance-weighted bound on log p(x), is marked. L_S - ELBO is the guide's gap at least. "
        "Implied beta: read off the finished weights."
    )
    if peak.get("unranked"):
        caption += f" Of beta = {listed(peak['unranked'])} log p(x) itself may be as high as at the marked row."
    if any(row["reliable"] is False for row in part["rows"]):
        caption += " *: the importance estimate has not settled."
    return known_table([*columns, "implied beta"], rows, caption, places)
