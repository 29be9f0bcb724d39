"""Why the regularizer is troublesome, and what helps against collapse."""

from __future__ import annotations

from ppl_vae.study.answers.sentences import (
    Answer,
    Row,
    Study,
    answer_from,
    each_dataset,
    first_dataset,
    floor_of,
    gain,
    gained,
    introduced,
    part_of,
    row_at,
    useless,
)
from ppl_vae.study.words import beta, count, data_name, listed, number, percent_plus_minus, plus_minus, several

# A difference of at least this share of the latents is one that is spoken of. Source: ours.
MANY = 0.1


def regularizer_answer(study: Study) -> Answer:
    """The KL term as a price: what it makes of rate and distortion, and which latents it silences."""
    dataset = first_dataset(study)
    return answer_from(
        "regularizer",
        "Why is the regularizer troublesome?",
        [
            "The KL term is a price on information: each nat that a code tells about its image costs beta nats, and "
            "pays only if it earns more than that in the reconstruction.",
            _rate_and_distortion(study, dataset),
            _all_collapsed(study, dataset),
            _unused_at_one(study, dataset),
            _warmup_matters(study),
        ],
        each_dataset(study, lambda s, d: _rate_and_distortion(s, d) if d != dataset else None),
        each_dataset(study, lambda s, d: _all_collapsed(s, d) if d != dataset else None),
        [
            "The price is the same for all latents, so those that would earn least go first; a latent that is unused "
            "says nearly the same of every image (its KL is next to zero), and the decoder learns not to listen to it.",
            *introduced(
                "The price can be read off finished weights, at which no small change of the guide's scales pays.",
                each_dataset(study, _implied),
            ),
        ],
    )


def _rate_and_distortion(study: Study, dataset: str) -> str | None:
    rows = [
        row for row in (part_of(study, "sweep", dataset) or {}).get("rows", ()) if row["rate"] and row["distortion"]
    ]
    if len(rows) < 2:
        return None
    low, high = rows[0], rows[-1]
    return (
        f"On {data_name(dataset)}, from {beta(low['beta'])} to {beta(high['beta'])}, the rate (the KL) goes from "
        f"{plus_minus(low['rate'])} to {plus_minus(high['rate'])} nats an image, and the distortion (minus the "
        f"reconstruction term) from {plus_minus(low['distortion'])} to {plus_minus(high['distortion'])}."
    )


def _all_collapsed(study: Study, dataset: str) -> str | None:
    rows = [row for row in (part_of(study, "sweep", dataset) or {}).get("rows", ()) if row["active"] is not None]
    dead = [row["beta"] for row in rows if row["active"] == 0]
    if not rows:
        return None
    if len(dead) == len(rows):
        return f"On {data_name(dataset)} no latent is active at any beta of the sweep."
    if not dead:
        return f"On {data_name(dataset)} no beta of the sweep is high enough to silence all latents."
    living = [row for row in rows if row["beta"] < min(dead)]
    until = f"; at {_still_active(study, living[-1])}" if living else ""
    variation = next(row.get("variation") for row in rows if row["beta"] == min(dead))
    vary = f", and reconstructions vary {percent_plus_minus(variation)} of what the images do" if variation else ""
    return f"On {data_name(dataset)} the price is too high at {beta(min(dead))}: no latent is active{vary}{until}."


def _still_active(study: Study, row: Row) -> str:
    """A beta, and how many latents are active there."""
    L = ((study["runs"].get(row["run"]) or {}).get("options") or {}).get("latent_dim")
    if L is None:
        return f"{beta(row['beta'])}, {count(row['active'])} still are"
    if row["active"] == L:
        return f"{beta(row['beta'])} all {count(L)} still are"
    return f"{beta(row['beta'])}, {count(row['active'])} of {count(L)} still are"


def _unused_at_one(study: Study, dataset: str) -> str | None:
    row = row_at((part_of(study, "sweep", dataset) or {}).get("rows", ()), 1.0)
    run = None if row is None else study["runs"].get(row["run"])
    if row is None or run is None or row["active"] is None:
        return None
    active, L = row["active"], run["options"]["latent_dim"]
    if active == L:
        return f"At {beta(1.0)} all {count(L)} latents are active."
    return f"At {beta(1.0)}, {count(active)} of {count(L)} latents are active; the others tell next to nothing."


def _implied(study: Study, dataset: str) -> str | None:
    rows = [row for row in (part_of(study, "sweep", dataset) or {}).get("rows", ()) if row.get("implied_beta")]
    if not rows:
        return None
    pairs = [f"{plus_minus(row['implied_beta'])} at {beta(row['beta'])}" for row in rows]
    return f"On {data_name(dataset)} that implied beta is {listed(pairs)}."


def _warmup_matters(study: Study) -> str | None:
    """Of the network that a warm-up changes most."""
    pairs = [(n, _remedy(study, n, "none"), _remedy(study, n, "warm-up")) for n in _networks(study)]
    known = [(n, without, with_) for n, without, with_ in pairs if without and with_]
    if not known:
        return None
    network, without, with_ = max(known, key=lambda item: abs(item[2]["active"] - item[1]["active"]))
    if abs(with_["active"] - without["active"]) < MANY * with_["latent_dim"]:
        return (
            "Whether beta was warmed up changed the number of active latents little or not at all "
            f"({count(without['active'])} without and {count(with_['active'])} with it, of "
            f"{count(with_['latent_dim'])}, in the {network} network)."
        )
    return (
        f"And the outcome can depend on how training begins: a {network} network, trained once each way, ended with "
        f"{count(without['active'])} of {count(without['latent_dim'])} latents active where beta acted at once, and "
        f"with {count(with_['active'])} where it was warmed up{gained(with_)}."
    )


def collapse_answer(study: Study) -> Answer:
    """Active latents with and without a warm-up and free bits, and what each gains."""
    return answer_from(
        "collapse",
        "What helps against collapse?",
        [*_with_and_without(study), _by_construction(study)],
        [
            "A warm-up lets the decoder learn to use codes before they cost anything; free bits make the first part of "
            "each latent's KL cost nothing for good. Each way was trained once, so small differences may be chance. "
            f"Neither changes what is reported: every number here is at {beta(1.0)}."
            if _networks(study)
            else None
        ],
    )


def _with_and_without(study: Study) -> list[str | None]:
    said: list[str | None] = []
    for network in _networks(study):
        none = _remedy(study, network, "none")
        if none is None:
            continue
        floor = floor_of(study, study["collapse"].get("dataset"))
        ways = [f"{several(none['active'], 'active latent')} without help{_bracketed(useless(_bound(none), floor))}"]
        for remedy, words in (("warm-up", "a warm-up"), ("free-bits", "free bits"), ("both", "both")):
            row = _remedy(study, network, remedy)
            if row is not None:
                found = [gain(row), useless(_bound(row), floor)]
                ways.append(f"{count(row['active'])} with {words}{_bracketed(*found)}")
        said.append(f"The {network} network has {listed(ways)}.")
    return said


def _bound(row: Row) -> Row | None:
    return row.get("log_likelihood")


def _bracketed(*words: str) -> str:
    known = "; ".join(word for word in words if word)
    return f" ({known})" if known else ""


def _by_construction(study: Study) -> str | None:
    """What a count of latents is worth where each was given nats for nothing."""
    rows = [_remedy(study, network, remedy) for network in _networks(study) for remedy in ("free-bits", "both")]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    bits = next((row["free_bits"] for row in known if row.get("free_bits")), None)
    each = f" ({number(bits)} nats each)" if bits else ""
    return (
        f"With free bits{each} nearly every latent counts as active by construction, so there look at the bound and "
        "not at the count."
    )


def _remedy(study: Study, network: str, remedy: str) -> Row | None:
    networks = (study.get("collapse") or {}).get("networks") or {}
    rows = (networks.get(network) or {}).get("rows", ())
    return next((row for row in rows if row["remedy"] == remedy and row["active"] is not None), None)


def _networks(study: Study) -> list[str]:
    return list((study.get("collapse") or {}).get("networks") or {})
