"""What all answers are made of: sentences that may be missing, and the rows of study.json that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_vae.study.words import differs, plus_minus, signed, size_of

Study = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A question and what the measurements say.

    Args:
        key: a word for it, by which the report finds its place.
        question: a reader's.
        short: some sentences, for a README.
        long: paragraphs, for the report; the short ones are not repeated.
    """

    key: str
    question: str
    short: str
    long: tuple[str, ...]


def answer_from(key: str, question: str, short: Iterable[str | None], *long: Iterable[str | None]) -> Answer:
    """An answer from sentences, of which those that could not be said are None."""
    paragraphs = (_joined(paragraph) for paragraph in long)
    return Answer(key, question, _joined(short), tuple(p for p in paragraphs if p))


def _joined(sentences: Iterable[str | None]) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def first_dataset(study: Study) -> str:
    """The one that is spoken of first."""
    return study["datasets"][0]


def part_of(study: Study, section: str, dataset: str | None = None) -> Any:
    """A section's part for a data set (the first one by default); None where there is none."""
    return (study.get(section) or {}).get(dataset or first_dataset(study))


def each_dataset(study: Study, say: Callable[[Study, str], str | None]) -> list[str | None]:
    """The same sentence of each data set."""
    return [say(study, dataset) for dataset in study["datasets"]]


def introduced(general: str, found: Sequence[str | None]) -> list[str | None]:
    """A general sentence before those of the data sets, where there are any."""
    return [general, *found] if any(found) else []


def row_at(rows: Sequence[Row], value: float) -> Row | None:
    """The VAE's row of that beta."""
    return next((row for row in rows if row.get("beta") == value and not row.get("autoencoder")), None)


def difference_of(first: Row, second: Row) -> dict[str, float]:
    """first - second, with the error as if they were independent: too large a one where images are shared."""
    spread = (first.get("stderr") or 0.0) ** 2 + (second.get("stderr") or 0.0) ** 2
    return {"mean": first["mean"] - second["mean"], "stderr": spread**0.5}


def floor_of(study: Study, dataset: str | None) -> Row | None:
    """The log-likelihood of a data set's test images without latents."""
    return ((study.get("data") or {}).get(dataset) or {}).get("floor")


def useless(bound: Row | None, floor: Row | None) -> str:
    """What is to be said of a bound that is not measurably above pixels on their own; empty where it is above."""
    if not bound or not floor:
        return ""
    above = differs(difference_of(bound, floor), 0.0)
    word = {1: "", 0: "no better", -1: "worse"}[above]
    return f"{word} than pixels on their own without latents, {plus_minus(floor)}" if word else ""


def gain(row: Row) -> str:
    """The difference from its reference in the bound L_S, or in the ELBO where L_S may still rise by as much."""
    bound, difference = "the bound L_S", row.get("difference_log_likelihood")
    if difference is None or difference.get("ranks_log_likelihood") is False:
        bound, difference = "the ELBO", row.get("difference_elbo")
    if difference is None:
        return ""
    if difference["word"] == "not distinguishable":
        return f"not distinguishable in {bound}, {signed(difference)} nats"
    return f"{difference['word']} by {size_of(difference)} nats in {bound}"


def gained(row: Row) -> str:
    """The same at the end of a sentence."""
    words = gain(row)
    return f", which is {words}" if words else ""
