"""A diagnosis in words: a line for each group of numbers, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ppl_vae.diagnostics import plus_minus
from ppl_vae.diagnostics.verdicts import is_importance_weighted

Numbers = Mapping[str, Any]

# A last epoch that raises the validation ELBO by more nats than this had not settled. Source: ours.
SETTLED_RISE = 1.0


def describe_numbers(numbers: Numbers) -> list[str]:
    """One line for each group of numbers; a group that this run has not is left out."""
    lines = [_training(numbers), _terms(numbers), _latents(numbers), _split(numbers), _aggregate(numbers)]
    return [
        f"  {line}"
        for line in [*lines, _noise(numbers), *_pictures(numbers), _pixels(numbers), _estimate(numbers)]
        if line
    ] + [f"  {line}" for line in describe_left_out(numbers)]


_MEASURES = {
    "variation": "how much reconstructions vary",
    "blur": "how sharp reconstructions are",
    "noise": "the data's directions in units of the likelihood's noise",
}


def describe_left_out(numbers: Numbers) -> list[str]:
    """Each measure that the images do not allow, with the reason."""
    return [f"not measured: {_MEASURES[name]} ({reason})" for name, reason in numbers.get("left_out", {}).items()]


def describe_verdicts(entries: Sequence[Numbers]) -> list[str]:
    """Each verdict with its evidence, its figure, and the command that would change it."""
    lines = ["Verdicts:"]
    for entry in entries:
        severity = f" ({entry['severity']})" if entry["severity"] != "note" else ""
        lines.append(f"  {entry['word']}{severity}: {entry['evidence']}")
        if entry["figure"] is not None:
            lines.append(f"    see figures/{entry['figure']}")
        if entry["command"] is not None:
            lines.append(f"    to change it: {entry['command']}")
    return lines


_UNKNOWN_BETA = (
    "unknown (too little is carried or by several layers, all images are alike, or wider posteriors would not trade "
    "reconstruction for KL)"
)


def _terms(numbers: Numbers) -> str:
    distortion = f"distortion -E_q[log p(x | z)] {plus_minus(numbers['reconstruction'], 2, sign=-1)} nats"
    if numbers["kl"] is None:
        return distortion
    implied = numbers["implied_beta"]
    beta = _UNKNOWN_BETA if implied is None else plus_minus(implied)
    words = "" if implied is None else _other_than_beta(numbers)
    return f"rate KL {plus_minus(numbers['kl'], 2)} nats, {distortion}; the weights imply beta = {beta}{words}"


def _other_than_beta(numbers: Numbers) -> str:
    """What else than beta sets a guide's widths in this training."""
    if is_importance_weighted(numbers):
        return " (of an ELBO; a bound of several particles asks for other widths)"
    return " (free bits imply less than their own)" * ((numbers["trained_with"] or {}).get("objective") == "free-bits")


def _training(numbers: Numbers) -> str:
    """Said where the run had not settled: what else is measured may change with it."""
    rise = (numbers["trained_with"] or {}).get("last_rise")
    if rise is None or rise <= SETTLED_RISE:
        return ""
    return (
        f"training had not settled: the last epoch still raised the validation ELBO by {rise:.1f} nats; more --epochs "
        "come before any other change, and the beta that the weights imply is not yet what they were trained with"
    )


def _latents(numbers: Numbers) -> str:
    return f"latents: {numbers['active']['count']} of {numbers['latent_dim']} are active"


def _split(numbers: Numbers) -> str:
    split = numbers["elbo_split"]
    if split is None:
        return ""
    information = split["mutual_information"]
    if split["saturated"]:  # at the cap its spread is small, whatever is not known of it
        information = information | {"stderr": None}
    parts = [f"mutual information {plus_minus(information, 2)}"]
    if split["total_correlation"] is None:
        parts.append(f"KL(q(z) || p(z)) {plus_minus(split['marginal_kl'], 2)}")
    else:
        parts.append(f"total correlation {plus_minus(split['total_correlation'], 2)}")
        parts.append(f"sum of KL(q(z_l) || p(z_l)) {plus_minus(split['sum_of_dimension_kl'], 2)}")
    capped = f" (cap log N = {split['cap']:.2f}" + (
        ": nearly reached, so that the next is overstated)" if split["saturated"] else ")"
    )
    return f"KL = {parts[0]}{capped} + {' + '.join(parts[1:])} nats"


def _aggregate(numbers: Numbers) -> str:
    found = numbers["aggregate"]
    largest = max(found["kolmogorov_smirnov"]["statistic"], default=math.nan)
    line = (
        f"aggregate posterior against prior: a classifier's effect {plus_minus(found['classifier']['effect'], 2)}, "
        f"largest Kolmogorov-Smirnov distance of a latent {largest:.2f}"
    )
    holes = found["holes"]
    if holes is None:
        return line
    covered = f"covered less than {1 - holes['expected']:.0%} of other images' codes are"
    return f"{line}, prior draws in holes ({covered}) {plus_minus(holes['share'], 3)}"


def _noise(numbers: Numbers) -> str:
    noise, beta = numbers["noise"], (numbers["trained_with"] or {}).get("beta")
    if noise is None or numbers["autoencoder"]:  # nothing is weighed against it there
        return ""
    edge = noise.get("edge") or 0.0
    words = [f"{noise['live_by_sum']:,} of {len(noise['eigenvalues']):,} directions of the data exceed it at beta = 1"]
    if beta not in (None, 1):
        words.append(f"{sum(value > max(beta, edge) for value in noise['eigenvalues']):,} at beta = {beta:g}")
    words.append(f"{noise['live_by_mean']:,} had pixels been averaged")
    if edge > min(1.0, 1.0 if beta is None else beta):
        words.append(f"counted above {edge:.2f}, which independent pixels reach by chance")
    return f"effective noise: {', '.join(words)}"


def _pictures(numbers: Numbers) -> list[str]:
    found = numbers["pictures"]
    lines, parts = [], []
    if found["variation"] is not None:
        parts.append(f"reconstructions vary {plus_minus(found['variation'], 3)} of what the images do")
    blur = found["blur"]
    if blur is not None:
        steps = ("at_mean", "at_draw", "averaged")
        sharp = ", ".join(
            f"{plus_minus(blur[name], 3)} {words}"
            for name, words in zip(steps, ("at the posterior's mean", "at a draw", "averaged over draws"), strict=True)
        )
        parts.append(f"sharpness against the data's {sharp}")
        lines.append(
            f"squared error a pixel {plus_minus(blur['error'], 5)} = posterior noise "
            f"{plus_minus(blur['posterior_noise'], 5)} + the rest {plus_minus(blur['bias'], 5)}"
        )
    return ["; ".join(parts), *lines]


def _pixels(numbers: Numbers) -> str:
    found = numbers["calibration"]
    if found is None:
        return ""
    return (
        f"pixels in p(x | z): {found['verdict']}, cumulative histogram off by up to "
        f"{100 * found['largest_deviation']:.1f} points"
    )


def _estimate(numbers: Numbers) -> str:
    found = numbers["importance"]
    if found is None:
        return ""
    S = found["num_particles"]
    return (
        f"log p(x): L_{S} = {plus_minus(found['log_likelihood'], 2)} nats ({found['num_images']:,} images); ten times "
        f"the particles gained {plus_minus(found['rise'], 2)}, unreliable images "
        f"{plus_minus(found['unreliable'], 2)} of all"
    )
