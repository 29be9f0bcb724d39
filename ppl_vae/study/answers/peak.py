"""Where the likelihood peaks along beta."""

from __future__ import annotations

from operator import eq, gt, lt
from typing import Any

from ppl_vae.diagnostics.verdicts import MOST_RISE
from ppl_vae.study.answers.sentences import Answer, Study, answer_from, difference_of, first_dataset, part_of, row_at
from ppl_vae.study.words import beta, data_name, differs, listed, number, plus_minus, several, signed

_LIKELIHOOD, _ELBO = "log_likelihood", "elbo"
_BOUND = "the bound L_S on log p(x)"


def peak_answer(study: Study) -> Answer:
    """The best beta by the bound L_S and by the ELBO, how far each is known, and why it need not be one."""
    dataset = first_dataset(study)
    return answer_from(
        "peak",
        "Where does the likelihood peak along beta?",
        [
            _peak_of(study, dataset, _LIKELIHOOD),
            _peak_of(study, dataset, _ELBO),
            _same_peak(study, dataset),
            _how_chosen(study, dataset),
            _why_not_one(study, dataset),
        ],
        *(
            [_peak_of(study, d, _LIKELIHOOD), _peak_of(study, d, _ELBO), _same_peak(study, d)]
            for d in study["datasets"][1:]
        ),
        [_seeds(study, d) for d in study["datasets"]],
        [*(_unreliable(study, d) for d in study["datasets"]), _what_settled_means(study)],
        [
            "Three things can move the peak; none of them is measured here on its own. The ELBO is log p(x) less a "
            "gap, the distance between the guide and the true posterior; training pays for both together, and another "
            "beta shares them out differently.",
            "Training ends before its optimum, and a lower or higher price may get further in the same epochs.",
            "And the training images are not the test images: what is best for the one need not be for the other.",
            *(_gaps(study, d) for d in study["datasets"]),
        ],
    )


def _peaks(study: Study, dataset: str) -> Any:
    return (part_of(study, "sweep", dataset) or {}).get("peaks")


def _ranked(peak: Any) -> bool:
    """Whether the estimates rank log p(x) itself, and not its bound alone."""
    return bool(peak.get("ranks_log_likelihood")) and peak.get("reliable") is not False


def _name(peak: Any, bound: str) -> str:
    if bound == _ELBO:
        return "the ELBO"
    return _BOUND


def _peak_of(study: Study, dataset: str, bound: str) -> str | None:
    peak = (_peaks(study, dataset) or {}).get(bound)
    if not peak:
        return None
    alike = [value for value in peak["not_distinguishable"] if value != peak["beta"]]
    text = (
        f"On {data_name(dataset)} {_name(peak, bound)} of test images is highest at {beta(peak['beta'])} "
        f"({plus_minus(peak['value'])} nats"
    )
    difference = peak.get("difference_to_reference")
    if difference and not peak["is_reference"]:
        text += f"; {signed(difference)} against {beta(1.0)}, on the same images"
    text += ")"
    if alike:
        text += f", but is not distinguishable from beta = {listed(alike)}"
    betas = [row["beta"] for row in part_of(study, "sweep", dataset)["rows"]]
    if peak["beta"] in (betas[0], betas[-1]):
        text += "; that is an end of the sweep, so the peak may lie beyond"
    return text + (_not_certain(peak) if bound == _LIKELIHOOD else "") + "."


def _not_certain(peak: Any) -> str:
    """Where log p(x) may be higher than at the peak of its bound."""
    if peak.get("unranked"):
        return f"; at beta = {listed(peak['unranked'])} log p(x) itself may be as high, for there L_S may still rise"
    if peak.get("reliable") is False:
        return "; the estimate still rises with more importance samples, so the peak of log p(x) is not certain"
    return ""


def _same_peak(study: Study, dataset: str) -> str | None:
    part, peaks = part_of(study, "sweep", dataset), _peaks(study, dataset)
    if not peaks or not peaks.get(_LIKELIHOOD) or not peaks.get(_ELBO):
        return None
    likelihood, elbo = peaks[_LIKELIHOOD], peaks[_ELBO]
    shared = sorted(set(likelihood["not_distinguishable"]) & set(elbo["not_distinguishable"]))
    if part["same_peak"]:
        others = sorted({*likelihood["not_distinguishable"], *elbo["not_distinguishable"]} - {elbo["beta"]})
        end = f", though beta = {listed(others)} cannot be excluded for one of them" if others else ""
        return f"Both are highest at the same beta on {data_name(dataset)}{end}."
    side = "lower" if likelihood["beta"] < elbo["beta"] else "higher"
    if part["peaks_distinguishable"] and part.get("peaks_ranked") and _ranked(likelihood):
        return (
            f"So the bound L_S peaks at a {side} beta than the ELBO, beyond chance of the images and by more than ten "
            "times the samples raise it."
        )
    if part["peaks_distinguishable"]:
        return (
            f"So the bound L_S peaks at a {side} beta than the ELBO, beyond chance of the images; whether log p(x) "
            "does is not settled."
        )
    of = f": beta = {listed(shared)} cannot be told from the best of either" if shared else ""
    return f"So the highest L_S is at a {side} beta than the highest ELBO, but the peaks cannot be told apart{of}."


def _how_chosen(study: Study, dataset: str) -> str | None:
    """On which images, and by how many trainings; and whether these agree."""
    if not _peaks(study, dataset):
        return None
    text = "Peaks are chosen on the test images that they are reported on, from one training a beta"
    pairs = _seed_pairs(study, dataset)
    if not pairs:
        return text + ", so another training may move them."
    betas = sorted({entry["beta"] for entry in part_of(study, "sweep", dataset)["seeds"]})
    lower, same, higher = (sum(side(ours, elbo) for ours, elbo in pairs) for side in (lt, eq, gt))
    found = [
        f"{words} in {number(times)}"
        for words, times in (("lower than the ELBO's", lower), ("the same", same), ("higher", higher))
        if times
    ]
    agree = "they agree" if len(found) == 1 else "they do not agree"
    return (
        f"{text}; at beta = {listed(betas)} there are {several(len(pairs), 'seed')}, and {agree}: among these betas "
        f"the peak of L_S is {listed(found)}."
    )


def _seed_pairs(study: Study, dataset: str) -> list[tuple[float, float]]:
    """By seed, the best beta by L_S and by the ELBO."""
    peaks = (part_of(study, "sweep", dataset) or {}).get("seed_peaks") or {}
    return list(zip(peaks.get(_LIKELIHOOD) or (), peaks.get(_ELBO) or (), strict=False))


def _why_not_one(study: Study, dataset: str) -> str | None:
    if not _peaks(study, dataset):
        return None
    return (
        f"Nothing makes {beta(1.0)} best for log p(x): it maximizes a bound with a gap that depends on the guide, on "
        "training images, in a training that ends."
    )


def _gaps(study: Study, dataset: str) -> str | None:
    """L_S - ELBO at the peak beside that at beta = 1; where the peak is there, that alone."""
    rows = [row for row in (part_of(study, "sweep", dataset) or {}).get("rows", ()) if row.get("gap")]
    peak, one = (_peaks(study, dataset) or {}).get(_LIKELIHOOD), row_at(rows, 1.0)
    if not peak or not one:
        return None
    on = f"On {data_name(dataset)} L_S - ELBO, which is that gap at least, is"
    best = row_at(rows, peak["beta"])
    if peak["is_reference"] or not best:
        return f"{on} {plus_minus(one['gap'])} nats at {beta(1.0)}."
    side = differs(difference_of(best["gap"], one["gap"]), 0.0)
    word = {1: "larger", 0: "not measurably larger or smaller", -1: "smaller"}[side]
    return (
        f"{on} {word} at {beta(peak['beta'])} than at {beta(1.0)} ({plus_minus(best['gap'])} against "
        f"{plus_minus(one['gap'])} nats); two such bounds do not order the gaps themselves."
    )


def _seeds(study: Study, dataset: str) -> str | None:
    peaks = (part_of(study, "sweep", dataset) or {}).get("seed_peaks") or {}
    names = {_LIKELIHOOD: "L_S", _ELBO: "the ELBO"}
    by_bound = [(name, peaks[bound]) for bound, name in names.items() if peaks.get(bound)]
    if not by_bound:
        return None
    said = []
    for name, values in by_bound:
        if len(set(values)) == 1:
            said.append(f"{name} is highest at {beta(values[0])} in every one")
        else:
            said.append(f"{name} is highest at beta = {listed(values)}")
    return (
        f"With {several(len(by_bound[0][1]), 'seed')} on {data_name(dataset)}, and among the betas that all of them "
        f"have, {', and '.join(said)}.{_spread(study, dataset)}"
    )


def _spread(study: Study, dataset: str) -> str:
    spreads = [
        entry[_LIKELIHOOD]["spread"]
        for entry in part_of(study, "sweep", dataset).get("seeds") or ()
        if (entry.get(_LIKELIHOOD) or {}).get("spread") is not None
    ]
    if not spreads:
        return ""
    return (
        f" Over seeds L_S has a standard deviation of up to {number(max(spreads))} nats at one beta, which errors over "
        "images do not contain."
    )


def _unreliable(study: Study, dataset: str) -> str | None:
    values = (part_of(study, "sweep", dataset) or {}).get("unreliable_betas")
    if not values:
        return None
    return (
        f"On {data_name(dataset)} the importance estimate has not settled at beta = {listed(values)}: there L_S is a "
        "lower bound that may lack nats."
    )


def _what_settled_means(study: Study) -> str | None:
    if not any(_peaks(study, dataset) for dataset in study["datasets"]):
        return None
    return (
        f"Settled means a rise of no more than {number(MOST_RISE)} nats with ten times the samples. Neighbors may "
        "differ by less than that, so log p(x) is ranked only where a difference exceeds what either estimate may "
        "still rise."
    )
