"""Whether it matters how the guide's scales are kept positive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ppl_vae.study.answers.sentences import Answer, Row, Study, answer_from, floor_of, useless
from ppl_vae.study.words import count, listed, number, percent, plus_minus


def scale_maps_answer(study: Study) -> Answer:
    """The gradient through each map at large features, and training under stress."""
    part = study.get("scale_maps") or {}
    return answer_from(
        "scale_maps",
        "Does it matter how the guide's scales are kept positive?",
        [
            _extremes(part.get("gradients") or ()),
            _stressed(part.get("stressed") or (), floor_of(study, part.get("dataset"))),
        ],
        [_vanishing(part.get("gradients") or ())],
    )


def _extremes(rows: Sequence[Row]) -> str | None:
    """Of each map, at the largest features: of the KL in closed form, and of the sampled one that trains."""
    if not rows:
        return None
    largest = max(row["largest_feature"] for row in rows)
    at = [row for row in rows if row["largest_feature"] == largest]
    closed = _broken(at, lambda row: row.get("not_finite"))
    sampled = _broken(at, lambda row: (row.get("sampled") or {}).get("not_finite"))
    if not closed:
        return None
    text = f"At features as large as {number(largest)}, the gradient of the loss is NaN or infinite for this share of "
    text += f"images: with the KL in closed form {closed}"
    return text + (f"; with the sampled KL, which trains here, {sampled}." if sampled else ".")


def _broken(rows: Sequence[Row], share_of: Callable[[Row], Any]) -> str:
    known = [(row["scale_map"], share_of(row)) for row in rows if share_of(row) is not None]
    if not known:
        return ""
    if not any(share for _, share in known):
        return "none with any map"
    return listed([f"{word} {percent(share)}" for word, share in known])


def _stressed(rows: Sequence[Row], floor: Row | None) -> str | None:
    if not rows:
        return None
    rate = next((row["learning_rate"] for row in rows if row.get("learning_rate")), None)
    rates = f" with a learning rate of {number(rate)} and no clipping" if rate else ""
    return f"Trained once each under stress{rates}, {listed([_ended(row, floor) for row in rows])}."


def _ended(row: Row, floor: Row | None) -> str:
    if row["finished"]:
        return f"{row['scale_map']} ended{_at_elbo(row, floor)}"
    if row.get("failure_phase") == "evaluation":
        return f"{row['scale_map']} trained to its end and broke in evaluation"
    where = f" at step {count(row['step'])} of {count(row['num_steps'])}" if row.get("step") else ""
    return f"{row['scale_map']} broke{where}"


def _at_elbo(row: Row, floor: Row | None) -> str:
    elbo = row.get("elbo")
    if not elbo:
        return ""
    words = useless(elbo, floor)
    return f" at an ELBO of {plus_minus(elbo)} nats{', ' if words else ''}{words}"


def _vanishing(rows: Sequence[Row]) -> str | None:
    gone = [row for row in rows if (row.get("vanished") or 0) > 0]
    if not gone:
        return None
    most = max(gone, key=lambda row: row["vanished"])
    return (
        f"A map may also fail in silence: {percent(most['vanished'])} of the gradient's entries are exactly zero with "
        f"{most['scale_map']} at features of {number(most['largest_feature'])} (with the KL in closed form), and what "
        "has no gradient does not move."
    )
