"""How to check that the regularization worked."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.study.answers.sentences import (
    Answer,
    Row,
    Study,
    answer_from,
    difference_of,
    each_dataset,
    first_dataset,
    introduced,
    part_of,
    row_at,
)
from ppl_vae.study.words import beta, count, data_name, differs, number, percent, percent_plus_minus, plus_minus

# A classifier that tells codes from prior draws by less than this effect finds them alike. Source: ours.
ALIKE = 0.1


def check_answer(study: Study) -> Answer:
    """Codes against the prior, and what they still say about the images."""
    dataset = first_dataset(study)
    return answer_from(
        "check",
        "How do I check that the regularization worked?",
        [
            "It worked if codes of test images, one draw each, look like draws of the prior, and still say something "
            "about the images.",
            _rejected(study, dataset),
            _effects(study, dataset),
            _alike_but_empty(study, dataset),
            _information(study, dataset),
        ],
        *([_rejected(study, d), _effects(study, d), _information(study, d)] for d in study["datasets"][1:]),
        introduced("The plain autoencoder was never asked to match anything.", each_dataset(study, _autoencoder_codes)),
        each_dataset(study, _holes_along),
    )


def _regular_rows(study: Study, dataset: str) -> Sequence[Row]:
    return (part_of(study, "regularization", dataset) or {}).get("rows", ())


def _rejected(study: Study, dataset: str) -> str | None:
    row = row_at(_regular_rows(study, dataset), 1.0)
    distance = None if row is None else row.get("kolmogorov_smirnov")
    if distance is None:
        return None
    images = (part_of(study, "regularization", dataset) or {}).get("images") or study["regularization"].get("images")
    of = f" of {count(images)} images" if images else ""
    return (
        f"A p-value answers another question: at {beta(1.0)} on {data_name(dataset)} a Kolmogorov-Smirnov test{of} "
        f"rejects {count(distance['rejected'])} of {count(distance['latent_dim'])} latents, while the largest gap "
        f"between the two distribution functions is {number(distance['max'])}."
    )


def _effects(study: Study, dataset: str) -> str | None:
    row = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("classifier"):
        return None
    effect = row["classifier"]["effect"]
    verdict = "barely tells" if effect["mean"] < ALIKE else "tells"
    text = (
        f"So look at sizes: at {beta(1.0)} a classifier {verdict} codes from prior draws (effect {plus_minus(effect)}; "
        "none if alike, one if told apart always)"
    )
    if row.get("holes"):
        text += (
            f", and {percent_plus_minus(row['holes'])} of the prior's draws fall where no code lies "
            f"({percent(row['expected_holes'])} would if nothing were wrong)"
        )
    return text + "."


def _alike_but_empty(study: Study, dataset: str) -> str | None:
    rows = [row for row in _regular_rows(study, dataset) if row.get("classifier") and not row["autoencoder"]]
    dead = [row for row in rows if row["active"] == 0]
    if not dead:
        return None
    row = dead[0]
    effect = row["classifier"]["effect"]
    like = "passes" if effect["mean"] < ALIKE else "does not even pass"
    return (
        f"A match alone proves nothing: the run of {beta(row['beta'])}, whose latents are all dead, {like} the same "
        f"test (effect {plus_minus(effect)}), so count the active latents as well."
    )


def _information(study: Study, dataset: str) -> str | None:
    row = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("mutual_information") or not row.get("kl"):
        return None
    text = (
        f"Of the KL at {beta(1.0)} on {data_name(dataset)}, {plus_minus(row['kl'])} nats, "
        f"{plus_minus(row['mutual_information'])} tell which of the images it is"
    )
    if row.get("saturated"):
        return text + (
            f", and that is all that so many images can show (the logarithm of their number is {number(row['cap'])}): "
            "the rest cannot be split between information and distance from the prior."
        )
    return text + f", and {plus_minus(row['marginal_kl'])} are the distance of all codes together from the prior."


def _autoencoder_codes(study: Study, dataset: str) -> str | None:
    row = next((row for row in _regular_rows(study, dataset) if row["autoencoder"]), None)
    one = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or one is None or not row.get("classifier") or not one.get("classifier"):
        return None
    theirs, ours = row["classifier"]["effect"], one["classifier"]["effect"]
    apart = differs(difference_of(theirs, ours), 0.0)
    word = {1: "further from the prior than", -1: "nearer to the prior than", 0: "no further from the prior than"}[
        apart
    ]
    return (
        f"On {data_name(dataset)} its codes are {word} those of the VAE: the classifier's effect is "
        f"{plus_minus(theirs)}, against {plus_minus(ours)}."
    )


def _holes_along(study: Study, dataset: str) -> str | None:
    rows = [row for row in _regular_rows(study, dataset) if row.get("holes") and not row["autoencoder"]]
    if len(rows) < 2:
        return None
    worst = max(rows, key=lambda row: row["holes"]["mean"])
    least = min(rows, key=lambda row: row["holes"]["mean"])
    if differs(difference_of(worst["holes"], least["holes"]), 0.0) == 0:
        return (
            f"Holes on {data_name(dataset)} are as many at every beta that was measured "
            f"({percent_plus_minus(worst['holes'])} of prior draws at most)."
        )
    return (
        f"Holes on {data_name(dataset)} along beta: most at {beta(worst['beta'])} "
        f"({percent_plus_minus(worst['holes'])} of prior draws), fewest at {beta(least['beta'])} "
        f"({percent_plus_minus(least['holes'])})."
    )
