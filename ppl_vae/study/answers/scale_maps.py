"""Whether it matters how the guide's scales are kept positive."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.study.answers.sentences import Answer, Row, Study, answer_from
from ppl_vae.study.words import count, listed, number, percent, plus_minus


def scale_maps_answer(study: Study) -> Answer:
    """The gradient through each map at large features, and training under stress."""
    part = study.get("scale_maps") or {}
    return answer_from(
        "scale_maps",
        "Does it matter how the guide's scales are kept positive?",
        [_extremes(part.get("gradients") or ()), _stressed(part.get("stressed") or ())],
        [_vanishing(part.get("gradients") or ())],
    )


def _extremes(rows: Sequence[Row]) -> str | None:
    """Of each map, at the largest features."""
    if not rows:
        return None
    largest = max(row["largest_feature"] for row in rows)
    at = [row for row in rows if row["largest_feature"] == largest]
    said = [f"{row['scale_map']} {percent(row['not_finite'])}" for row in at if row.get("not_finite") is not None]
    if not said:
        return None
    broken = any(row["not_finite"] for row in at)
    return (
        f"At features as large as {number(largest)}, the gradient of the loss is NaN or infinite for this share of "
        f"images: {listed(said)}" + ("." if broken else "; none of them breaks there.")
    )


def _stressed(rows: Sequence[Row]) -> str | None:
    if not rows:
        return None
    said = []
    for row in rows:
        if row["finished"]:
            elbo = f" at an ELBO of {plus_minus(row['elbo'])} nats" if row.get("elbo") else ""
            said.append(f"{row['scale_map']} ended{elbo}")
        else:
            where = f" at step {count(row['step'])} of {count(row['num_steps'])}" if row.get("step") else ""
            said.append(f"{row['scale_map']} broke{where}")
    rate = next((row["learning_rate"] for row in rows if row.get("learning_rate")), None)
    rates = f" with a learning rate of {number(rate)} and no clipping" if rate else ""
    return f"Trained under stress{rates}, {listed(said)}."


def _vanishing(rows: Sequence[Row]) -> str | None:
    gone = [row for row in rows if (row.get("vanished") or 0) > 0]
    if not gone:
        return None
    most = max(gone, key=lambda row: row["vanished"])
    return (
        f"A map may also fail in silence: {percent(most['vanished'])} of the gradient's entries are exactly zero with "
        f"{most['scale_map']} at features of {number(most['largest_feature'])}, and what has no gradient does not move."
    )
