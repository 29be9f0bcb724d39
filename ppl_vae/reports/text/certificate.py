"""A certificate in words: which number is a bound, which an estimate, and how far each can be trusted."""

from __future__ import annotations

from typing import Any

from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.reports.text.evaluation import describe_images_scale, plus_minus
from ppl_vae.reports.text.evaluation import format_number as number
from ppl_vae.runs.results import Provenance, from_json

_NAMED_AT_MOST = 12  # unreliable images
_STDERRS = 3.0
_STARTS = {"guide": "the guide", "prior": "the prior", "normal": "a normal with the guide's moments"}


def describe_certificate(entry: dict[str, Any]) -> list[str]:
    """The numbers of evaluation.json's "certificate-SPLIT", in words."""
    lines = [*_bounds(entry), *_doubts(entry)]
    if entry["simulated"] is not None:
        lines += _sandwich(entry)
    lines += _convergence(entry)
    if entry["gaps"] is not None:
        lines += _gaps(entry["gaps"])
    if entry["calibration"] is not None:
        found = entry["calibration"]
        lines.append(f"calibration of the guide on the model's own images: {found['verdict']}")
    if entry["against"] is not None:
        lines += _against(entry["against"])
    return [*lines, _time(entry)]


def _bounds(entry: dict[str, Any]) -> list[str]:
    chains, plain, own = (entry[key] for key in ("ais", "importance", "improved"))
    S = plain["num_particles"]
    return [
        f"log p(x) {plus_minus(chains)} nats an image: the bound of annealed importance sampling (AIS), in expectation "
        "below log p(x)",
        f"  {entry['split']} split, {entry['num_images']:,} images, {_scale(entry)}; ± is the standard error "
        "over images",
        f"  {entry['chains']} chains from {_STARTS[entry['start']]}, {entry['temperatures']:,} temperatures, "
        f"{entry['leapfrogs']} leapfrogs: Monte Carlo error {number(chains['monte_carlo_stderr'], 3)}, "
        f"and by the jackknife {number(chains['bias'], 3)} nats still lacking, both as floors; accepted "
        f"{_percent(chains['acceptance'])}",
        f"  importance sampling with the guide, bound L_{S}: {plus_minus(plain)}; AIS minus it "
        f"{_paired(entry['ais_minus_importance'])}",
        f"  with a normal refined for each image, bound L_{S}: {plus_minus(own)}; AIS minus it "
        f"{_paired(entry['ais_minus_improved'])}",
        f"  log p(x) - ELBO, AIS minus the guide's ELBO {plus_minus(plain['elbo'])}: {plus_minus(entry['total_gap'])}",
        "  estimates, no bounds: with the jackknife's correction these two are "
        f"{plus_minus(plain['corrected_estimate'])} and {plus_minus(own['corrected_estimate'])}; with as many other "
        f"draws of the guide, their largest weights smoothed, it is {plus_minus(plain['smoothed_estimate'])}",
    ]


def _scale(entry: dict[str, Any]) -> str:
    return describe_images_scale(from_json(Provenance, entry), entry["seed"])


def _paired(found: dict[str, float]) -> str:
    mean, stderr, noise = (number(found[key], 3) for key in ("mean", "stderr", "monte_carlo_stderr"))
    return f"{mean} ± {stderr} (paired; Monte Carlo error {noise})"


def _percent(values: dict[str, float | None]) -> str:
    median, low, high = (values[key] for key in ("median", "q05", "q95"))
    if median is None or low is None or high is None:
        return "no proposals, as there were none"
    return f"{median:.0%} of the proposals of the median image ({low:.0%} to {high:.0%})"


def _doubts(entry: dict[str, Any]) -> list[str]:
    found = entry["unreliable"]
    lines = []
    below, error = (entry["ais_minus_improved"][key] for key in ("mean", "monte_carlo_stderr"))
    if error is not None and below < -_STDERRS * error:
        lines.append(
            "  importance sampling is above AIS by more than three Monte Carlo errors: the chains are too short; take "
            "more --temperatures" + (", or --start guide" if entry["start"] != "guide" else "")
        )
    names = ", ".join(str(place) for place in found[:_NAMED_AT_MOST])
    more = f" and {len(found) - _NAMED_AT_MOST} more" if len(found) > _NAMED_AT_MOST else ""
    lines.append(
        f"  unreliable images (AIS and the refined normal more than {UNRELIABLE_BIAS} nats apart, or AIS still lacking "
        f"as much): {len(found):,} of {entry['num_images']:,}" + (f", at the places {names}{more}" if found else "")
    )
    return lines


def _sandwich(entry: dict[str, Any]) -> list[str]:
    found = entry["simulated"]
    gap = found["gap"]
    return [
        f"from both sides, on {found['num_images']:,} images that the model made: lower bound "
        f"{plus_minus(found['lower'])}, upper bound {plus_minus(found['upper'])}, a gap of "
        f"{number(gap['mean'], 3)} ± {number(gap['stderr'], 3)} nats an image{_widest(found)} "
        "(bidirectional Monte Carlo)",
        "  The upper bound holds for data simulated from the model, since only there an exact draw of p(z | x) is "
        "known; it says nothing certain about real data.",
    ]


def _widest(found: dict[str, Any]) -> str:
    """Each bound holds in expectation; what noise leaves of a closed gap is as often below 0."""
    widest = f", the widest {number(found['widest_gap'], 2)}" if found["widest_gap"] > 0 else ""
    return widest + (", below 0 by noise, since each bound holds in expectation" if found["gap"]["mean"] < 0 else "")


def _convergence(entry: dict[str, Any]) -> list[str]:
    found = entry["convergence"]
    parts = []
    for name, words in (("temperatures", "temperatures"), ("particles", "importance samples")):
        curve = found[name]
        shown = [
            f"{effort:,}: {number(mean, 2)} ± {number(stderr, 2)}"
            for effort, mean, stderr in zip(curve["effort"], curve["minus_ais"], curve["minus_ais_stderr"], strict=True)
            if effort != entry["temperatures"] or name == "particles"
        ]
        if shown:
            parts.append(f"{words} {', '.join(shown)}")
    return [
        f"convergence, bounds by other draws minus that of AIS in full, on {found['num_images']:,} of the images: "
        + "; ".join(parts)
    ]


def _gaps(gaps: dict[str, Any]) -> list[str]:
    lines = ["where log p(x) - ELBO is lost, nats an image (log p(x) by AIS, from below):"]
    for split, found in gaps.items():
        parts = {name: plus_minus(found[name]) for name in ("total", "approximation", "amortization")}
        lines.append(
            f"  {split}, {found['num_images']:,} images: {parts['total']} = approximation {parts['approximation']} "
            f"(the guide's family) + amortization {parts['amortization']} (one network for all images)"
        )
    return lines


def _against(found: dict[str, Any]) -> list[str]:
    own, other = found["own"], found["other"]
    return [
        f"against {found['dataset']}: L_{found['num_particles']} {plus_minus(other)} nats an image on "
        f"{other['num_images']:,} of its test images, {plus_minus(own)} on the run's own",
        *(f"  {words[:1].upper()}{words[1:]}." for words in found["words"]),
    ]


def _time(entry: dict[str, Any]) -> str:
    stages = sorted(entry["stage_seconds"].items(), key=lambda each: -each[1])
    told = [f"{name} {seconds:,.0f} s" for name, seconds in stages if seconds >= 1]
    return f"took {entry['seconds']:,.0f} s" + (f": {', '.join(told)}" if told else "")
