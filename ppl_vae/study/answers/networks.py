"""Which network, and how many latents."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.study.answers.sentences import Answer, Row, Study, answer_from, gained, part_of, row_at
from ppl_vae.study.words import count, number, plus_minus, several


def architectures_answer(study: Study) -> Answer:
    """The best network, fewer and more latents, and what training takes."""
    part = study.get("architectures") or {}
    rows = [row for row in part.get("rows", ()) if row.get("log_likelihood") and row.get("parameters")]
    return answer_from(
        "architectures",
        "Which network, and how many latents?",
        [_best(rows), _two_latents(rows), _most_latents(rows), _quickest(rows)] if len(rows) > 1 else [],
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
        f"{number(entry['log_likelihood']['spread'], 2)} nats in log p(x)."
    )


def _name(row: Row) -> str:
    return f"the {row['network']} network with {several(row['latent_dim'], 'latent')}"


def _best(rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: row["log_likelihood"]["mean"])
    base = next((row for row in rows if row["varied"] == "base"), None)
    text = f"Best in log p(x) is {_name(best)}: {plus_minus(best['log_likelihood'])} nats"
    if base is None or base is best:
        return text + (", which is the base itself." if base is best else ".")
    return text + f" (the base, {_name(base)}: {plus_minus(base['log_likelihood'])}){gained(best)}."


def _of_latents(rows: Sequence[Row]) -> list[Row]:
    """Those that differ in their latents alone, ascending."""
    return sorted((row for row in rows if row["varied"] in ("base", "latents")), key=lambda row: row["latent_dim"])


def _two_latents(rows: Sequence[Row]) -> str | None:
    series = _of_latents(rows)
    if len(series) < 2:
        return None
    few = series[0]
    return (
        f"With {several(few['latent_dim'], 'latent')} the same network reaches {plus_minus(few['log_likelihood'])} nats"
        f"{gained(few)}."
    )


def _most_latents(rows: Sequence[Row]) -> str | None:
    series = _of_latents(rows)
    base = next((row for row in series if row["varied"] == "base"), None)
    if base is None or series[-1] is base or series[-1]["active"] is None:
        return None
    most = series[-1]
    return (
        f"More latents than needed stay unused: of {count(most['latent_dim'])}, {count(most['active'])} are active "
        f"(of {count(base['latent_dim'])}, {count(base['active'])}){gained(most)}."
        if most["active"] < most["latent_dim"]
        else f"Of {count(most['latent_dim'])} latents all are active{gained(most)}."
    )


def _quickest(rows: Sequence[Row]) -> str | None:
    timed = [row for row in rows if row.get("seconds")]
    if len(timed) < 2:
        return None
    quick, slow = (choose(timed, key=lambda row: row["seconds"]) for choose in (min, max))
    return (
        f"Training took from {number(quick['seconds'], 2)} seconds ({_name(quick)}, {count(quick['parameters'])} "
        f"weights) to {number(slow['seconds'], 2)} ({_name(slow)}, {count(slow['parameters'])})."
    )
