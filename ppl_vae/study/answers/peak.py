"""Where the likelihood peaks along beta."""

from __future__ import annotations

from typing import Any

from ppl_vae.study.answers.sentences import Answer, Study, answer_from, difference_of, first_dataset, part_of, row_at
from ppl_vae.study.words import beta, data_name, differs, listed, plus_minus, several, signed

_BOUNDS = {"log_likelihood": "log p(x)", "elbo": "the ELBO"}


def peak_answer(study: Study) -> Answer:
    """The best beta by log p(x) and by the ELBO, and why it need not be one."""
    dataset = first_dataset(study)
    return answer_from(
        "peak",
        "Where does the likelihood peak along beta?",
        [
            _peak_of(study, dataset, "log_likelihood"),
            _peak_of(study, dataset, "elbo"),
            _same_peak(study, dataset),
            _why_not_one(study, dataset),
        ],
        *(
            [_peak_of(study, d, "log_likelihood"), _peak_of(study, d, "elbo"), _same_peak(study, d)]
            for d in study["datasets"][1:]
        ),
        [_seeds(study, d) for d in study["datasets"]],
        [_unreliable(study, d) for d in study["datasets"]],
        [
            "Three things move the peak. The ELBO is log p(x) less a gap, the distance between the guide and the true "
            "posterior; training pays for both together, and another beta shares them out differently.",
            "Training ends before its optimum, and a lower or higher price may get further in the same epochs.",
            "And the training images are not the test images: what is best for the one need not be for the other.",
            *(_gaps(study, d) for d in study["datasets"]),
        ],
    )


def _peaks(study: Study, dataset: str) -> Any:
    return (part_of(study, "sweep", dataset) or {}).get("peaks")


def _peak_of(study: Study, dataset: str, bound: str) -> str | None:
    peak = (_peaks(study, dataset) or {}).get(bound)
    if not peak:
        return None
    name, alike = _BOUNDS[bound], [value for value in peak["not_distinguishable"] if value != peak["beta"]]
    text = (
        f"On {data_name(dataset)} {name} of test images peaks at {beta(peak['beta'])} ({plus_minus(peak['value'])} nats"
    )
    difference = peak.get("difference_to_reference")
    if peak["is_reference"]:
        text += ")"
    elif difference:
        text += f"; {signed(difference)} against {beta(1.0)}, on the same images)"
    else:
        text += ")"
    if alike:
        text += f", but is not distinguishable from beta = {listed(alike)}"
    betas = [row["beta"] for row in part_of(study, "sweep", dataset)["rows"]]
    if peak["beta"] in (betas[0], betas[-1]):
        text += "; that is an end of the sweep, so the peak may lie beyond"
    if peak.get("reliable") is False:
        text += "; the estimate there is still rising with more importance samples, so the peak is not certain"
    return text + "."


def _same_peak(study: Study, dataset: str) -> str | None:
    part, peaks = part_of(study, "sweep", dataset), _peaks(study, dataset)
    if not peaks or not peaks.get("log_likelihood") or not peaks.get("elbo"):
        return None
    if part["same_peak"]:
        return f"Both peak at the same beta on {data_name(dataset)}."
    higher = "lower" if peaks["log_likelihood"]["beta"] < peaks["elbo"]["beta"] else "higher"
    if part["peaks_distinguishable"]:
        return f"So log p(x) peaks at a {higher} beta than the ELBO, and not by chance of the images."
    return f"So log p(x) peaks at a {higher} beta than the ELBO, though some beta is as good as the best of both."


def _why_not_one(study: Study, dataset: str) -> str | None:
    peak = (_peaks(study, dataset) or {}).get("log_likelihood")
    if not peak:
        return None
    return (
        f"Nothing makes {beta(1.0)} best for log p(x): it maximizes a bound with a gap that depends on the guide, on "
        "training images, in a training that ends. " + (_gaps(study, dataset) or "")
    ).strip()


def _gaps(study: Study, dataset: str) -> str | None:
    """The gap at the peak beside that at beta = 1; where the peak is there, beside that at the next beta."""
    rows = [row for row in (part_of(study, "sweep", dataset) or {}).get("rows", ()) if row.get("gap")]
    peak, one = (_peaks(study, dataset) or {}).get("log_likelihood"), row_at(rows, 1.0)
    if not peak or not one:
        return None
    if peak["is_reference"]:
        return f"On {data_name(dataset)} that gap is at least {plus_minus(one['gap'])} nats at {beta(1.0)}."
    best = row_at(rows, peak["beta"])
    if not best:
        return None
    side = differs(difference_of(best["gap"], one["gap"]), 0.0)
    word = {1: "larger", 0: "about the same", -1: "smaller"}[side]
    return (
        f"On {data_name(dataset)} the gap is {word} at {beta(peak['beta'])} than at {beta(1.0)}: at least "
        f"{plus_minus(best['gap'])} against {plus_minus(one['gap'])} nats."
        if side
        else f"On {data_name(dataset)} the gap is {word} at {beta(peak['beta'])} and at {beta(1.0)}: at least "
        f"{plus_minus(best['gap'])} and {plus_minus(one['gap'])} nats."
    )


def _seeds(study: Study, dataset: str) -> str | None:
    peaks = (part_of(study, "sweep", dataset) or {}).get("seed_peaks") or {}
    by_bound = [(name, peaks[bound]) for bound, name in _BOUNDS.items() if peaks.get(bound)]
    if not by_bound:
        return None
    said = []
    for name, values in by_bound:
        if len(set(values)) == 1:
            said.append(f"{name} peaks at {beta(values[0])} in every one")
        else:
            said.append(f"{name} peaks at beta = {listed(values)}")
    return (
        f"With {several(len(by_bound[0][1]), 'seed')} on {data_name(dataset)}, and among the betas that all of them "
        f"have, {', and '.join(said)}."
    )


def _unreliable(study: Study, dataset: str) -> str | None:
    values = (part_of(study, "sweep", dataset) or {}).get("unreliable_betas")
    if not values:
        return None
    return (
        f"On {data_name(dataset)} the importance estimate has not settled at beta = {listed(values)}: there log p(x) "
        "is a lower bound, and no claim about a peak rests on it."
    )
