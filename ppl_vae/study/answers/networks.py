"""Which network, and how many latents."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.study.answers.sentences import (
    Answer,
    Row,
    Study,
    answer_from,
    difference_of,
    floor_of,
    gained,
    part_of,
    row_at,
    useless,
)
from ppl_vae.study.words import count, differs, number, plus_minus, several, signed, size_of

_DIGITS = 2  # of times and spreads


def architectures_answer(study: Study) -> Answer:
    """The network with the highest bound, fewer and more latents, and what training takes."""
    part = study.get("architectures") or {}
    floor = floor_of(study, part.get("dataset"))
    rows = [row for row in part.get("rows", ()) if row.get("log_likelihood") and row.get("parameters")]
    return answer_from(
        "architectures",
        "Which network, and how many latents?",
        [_best(rows, floor), _two_latents(rows, floor), _most_latents(rows), _quickest(rows)] if len(rows) > 1 else [],
        [
            "All of them are trained for as many epochs as the base, so a slower network has had more time; the errors "
            "are of the test images, and do not know what another training would give."
            if len(rows) > 1
            else None,
            _seed_spread(study),
        ],
    )


def _seed_spread(study: Study) -> str | None:
    """What another seed does to the base, where it was trained with several."""
    entry = row_at((part_of(study, "sweep") or {}).get("seeds") or (), 1.0)
    if entry is None:
        return None
    return (
        f"The base itself, trained with {several(len(entry['seeds']), 'seed')}, has a spread of "
        f"{number(entry['log_likelihood']['spread'], _DIGITS)} nats in L_S."
    )


def _name(row: Row) -> str:
    return f"the {row['network']} network with {several(row['latent_dim'], 'latent')}"


def _best(rows: Sequence[Row], floor: Row | None) -> str:
    """The highest bound, against pixels on their own, against the base and against the next one."""
    ordered = sorted(rows, key=lambda row: row["log_likelihood"]["mean"], reverse=True)
    best, second = ordered[0], ordered[1]
    base = next((row for row in rows if row["varied"] == "base"), None)
    text = (
        f"Highest in the bound L_S on log p(x), of those trained, is {_name(best)}: "
        f"{plus_minus(best['log_likelihood'])} nats"
    )
    if base is best:
        text += ", which is the base itself"
    elif base is not None:
        text += f" (the base, {_name(base)}: {plus_minus(base['log_likelihood'])}){_beside_base(best)}"
    if best.get("reliable") is False:
        text += "; its estimate has not settled"
    if words := useless(best["log_likelihood"], floor):
        text += f"; {words}"
    return text + _against_the_next(best, second) + "."


def _beside_base(best: Row) -> str:
    """What it gains on the base in the bound L_S, also where that may still rise by as much."""
    difference = best.get("difference_log_likelihood")
    if difference is None or difference.get("ranks_log_likelihood") is not False:
        return gained(best)
    if difference["word"] == "not distinguishable":
        return f", which is not distinguishable in L_S ({signed(difference)} nats)"
    return f", which is {difference['word']} by {size_of(difference)} nats in the bound L_S, though L_S may still rise"


def _against_the_next(best: Row, second: Row) -> str:
    """By what both gain on the base, on the same images; the errors as if these gains were independent."""
    gains = [row.get("difference_log_likelihood") or {"mean": 0.0} for row in (best, second)]
    if differs(difference_of(*gains), 0.0) == 0:
        return f"; {_name(second)} cannot be told from it"
    return ""


def _of_latents(rows: Sequence[Row]) -> list[Row]:
    """Those that differ in their latents alone, ascending."""
    return sorted((row for row in rows if row["varied"] in ("base", "latents")), key=lambda row: row["latent_dim"])


def _two_latents(rows: Sequence[Row], floor: Row | None) -> str | None:
    series = _of_latents(rows)
    if len(series) < 2:
        return None
    few = series[0]
    words = useless(few["log_likelihood"], floor)
    return (
        f"With {several(few['latent_dim'], 'latent')} the same network reaches {plus_minus(few['log_likelihood'])} nats"
        f"{gained(few)}{'; ' if words else ''}{words}."
    )


def _most_latents(rows: Sequence[Row]) -> str | None:
    series = _of_latents(rows)
    base = next((row for row in series if row["varied"] == "base"), None)
    if base is None or series[-1] is base or series[-1]["active"] is None:
        return None
    most = series[-1]
    if most["active"] == most["latent_dim"]:
        return f"Of {count(most['latent_dim'])} latents all are active{gained(most)}."
    words = "More latents than the base's stay unused" if most["active"] <= base["active"] else "Not all are used"
    return (
        f"{words}: of {count(most['latent_dim'])}, {count(most['active'])} are active "
        f"(of {count(base['latent_dim'])}, {count(base['active'])}){gained(most)}."
    )


def _quickest(rows: Sequence[Row]) -> str | None:
    timed = [row for row in rows if row.get("seconds")]
    if len(timed) < 2:
        return None
    quick, slow = (choose(timed, key=lambda row: row["seconds"]) for choose in (min, max))
    return (
        f"Training took from {number(quick['seconds'], _DIGITS)} seconds ({_name(quick)}, {count(quick['parameters'])} "
        f"weights) to {number(slow['seconds'], _DIGITS)} ({_name(slow)}, {count(slow['parameters'])})."
    )
