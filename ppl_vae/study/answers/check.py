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
from ppl_vae.study.words import Value, beta, count, data_name, differs, number, percent, percent_plus_minus, plus_minus

# A classifier's effect below this is a small one, and one that is no smaller is spoken of as clear. Source: ours.
ALIKE = 0.1
# The p-value below which a single test rejects, where study.json does not say it.
_UNCORRECTED = 0.05
# Standard errors beyond which the most and the fewest of many values, which were picked, differ. Source: ours.
_OF_MANY = 3.0

_NOT, _LITTLE, _CLEARLY = "not measurably", "only a little", "clearly"
_UNCERTAIN = "by an effect that is not small, but cannot be told from none"


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
    test = f"at {beta(1.0)} on {data_name(dataset)} a Kolmogorov-Smirnov test{of} rejects"
    size = f"the gap between the two distribution functions is {_gap(distance)}"
    if distance["rejected"] == 0:
        return f"A p-value answers another question: {test} none of {_tested(distance)}, which proves no match; {size}."
    return f"A p-value answers another question: {test} {count(distance['rejected'])} of {_tested(distance)}; {size}."


def _told(effect: Value) -> str:
    """How well the classifier tells codes from the prior: by the effect's size, if it can be told from none."""
    small = effect["mean"] < ALIKE
    if differs(effect, 0.0) <= 0:
        return _NOT if small else _UNCERTAIN
    return _LITTLE if small else _CLEARLY


def _tested(distance: Row) -> str:
    """The latents, and what chance alone would reject of them."""
    L, level = distance["latent_dim"], distance.get("level")
    if level is not None:
        return f"{count(L)} latents (p below {number(level)} each, corrected for their number)"
    return (
        f"{count(L)} latents (p below {number(_UNCORRECTED)} each: {number(_UNCORRECTED * L)} are expected by chance)"
    )


def _gap(distance: Row) -> str:
    most = f"{number(distance['max'])} in the worst latent"
    return f"{number(distance['median'])} in the median latent and {most}" if distance.get("median") else most


def _effects(study: Study, dataset: str) -> str | None:
    row = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("classifier"):
        return None
    effect = row["classifier"]["effect"]
    text = (
        f"So look at sizes: at {beta(1.0)} a classifier tells codes from prior draws {_told(effect)} (effect "
        f"{plus_minus(effect)}; none if alike, one if told apart always)"
    )
    if row.get("holes"):
        text += (
            f", and {percent_plus_minus(row['holes'])} of the prior's draws are in holes: covered by the codes less "
            f"than all but {percent(row['expected_holes'])} of other images' codes are "
            f"({percent(row['expected_holes'])} would be if nothing were wrong)"
        )
    return text + "."


def _alike_but_empty(study: Study, dataset: str) -> str | None:
    rows = [row for row in _regular_rows(study, dataset) if row.get("classifier") and not row["autoencoder"]]
    dead = [row for row in rows if row["active"] == 0]
    if not dead:
        return None
    row = dead[0]
    effect = row["classifier"]["effect"]
    like = {
        _NOT: "passes",
        _LITTLE: "nearly passes",
        _CLEARLY: "does not even pass",
        _UNCERTAIN: "cannot be said to fail",
    }[_told(effect)]
    return (
        f"A match alone proves nothing: the run of {beta(row['beta'])}, none of whose latents is active, {like} the "
        f"same test (effect {plus_minus(effect)}), so count the active latents as well."
    )


def _information(study: Study, dataset: str) -> str | None:
    row = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("mutual_information") or not row.get("kl"):
        return None
    text = f"Of the KL at {beta(1.0)} on {data_name(dataset)}, {plus_minus(row['kl'])} nats,"
    if row.get("saturated"):
        return text + (
            f" at least about {number(row['mutual_information']['mean'])} tell which of the images it is, and that is "
            f"all that so many images can show (the logarithm of their number is {number(row['cap'])}): the rest "
            "cannot be split between information and distance from the prior."
        )
    return text + (
        f" {plus_minus(row['mutual_information'])} tell which of the images it is, and "
        f"{plus_minus(row['marginal_kl'])} are the distance of all codes together from the prior."
    )


def _autoencoder_codes(study: Study, dataset: str) -> str | None:
    row = next((row for row in _regular_rows(study, dataset) if row["autoencoder"]), None)
    one = row_at(_regular_rows(study, dataset), 1.0)
    if row is None or one is None or not row.get("classifier") or not one.get("classifier"):
        return None
    theirs, ours = row["classifier"]["effect"], one["classifier"]["effect"]
    apart = differs(difference_of(theirs, ours), 0.0)
    word = {
        1: "further from the prior than",
        -1: "nearer to the prior than",
        0: "not measurably further from the prior, or nearer to it, than",
    }[apart]
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
    if differs(difference_of(worst["holes"], least["holes"]), 0.0, _OF_MANY) == 0:
        return (
            f"The share of holes on {data_name(dataset)} does not measurably change along beta "
            f"({percent_plus_minus(worst['holes'])} of prior draws at most)."
        )
    return (
        f"Holes on {data_name(dataset)} along beta: most at {beta(worst['beta'])} "
        f"({percent_plus_minus(worst['holes'])} of prior draws), fewest at {beta(least['beta'])} "
        f"({percent_plus_minus(least['holes'])})."
    )
