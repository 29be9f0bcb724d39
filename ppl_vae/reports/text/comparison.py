"""The wording of comparisons: runs on the same images, the table of likelihoods, and the table of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_vae.evidence.paired import CONFIDENCE, INDISTINCT, SEED_NATS, PairedDifference
from ppl_vae.reports.text.diagnosis import describe_calibration
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs.command_results import ComparedPair, Comparison, LikelihoodRow, NetworkRow

# With fewer differences their mean is not yet close to normal unless they are. Source: a rule of thumb.
_FEW_IMAGES = 30


# --- Runs on the same images ---


def comparison_title(found: Comparison) -> str:
    """The conditions that all runs of a comparison share."""
    return (
        f"{found.dataset}, {found.split} split, the same {found.num_images:,} images for all, "
        f"binarization {found.binarization}, S = {found.num_particles:,}, seed {found.seed}"
    )


def compare_in_words(name: str, baseline: str, found: PairedDifference) -> str:
    """Which of two bounds is better, by how much, and how sure that is."""
    judged = "not distinguishable from" if found.word == INDISTINCT else f"{found.word} than"
    return (
        f"{name} is {judged} {baseline}, by their bounds: {found.mean:+.3f} ± {found.stderr:.3f} nats an image "
        f"({100 * found.confidence:.4g}% interval {found.lower:+.3f} to {found.upper:+.3f})"
    )


def describe_comparison(found: Comparison) -> list[str]:
    """A comparison of runs, line by line."""
    S = found.num_particles
    stored = "taken from the runs' stored evaluations, which are of exactly this kind"
    lines = [comparison_title(found), f"  {stored if found.stored_evaluations else 'evaluated now'}"]
    for run in found.runs:
        bits = f" ({run.bits_per_dim.mean:.4f} bits per dimension)" if run.bits_per_dim else ""
        gained = "" if math.isnan(run.rise) else f"; ten times the particles gained {run.rise:.3f}"
        lines.append(f"  {run.name}: bound L_{S} {plus_minus(run.log_likelihood)} nats an image{bits}{gained}")
    for pair in found.comparisons:
        lines += [pair.verdict, _describe_errors(pair), _describe_log_p(pair, S)]
    if len(found.comparisons) > 1:
        lines.append(f"{len(found.comparisons)} comparisons: all their intervals hold at once with {CONFIDENCE:.0%}.")
    if found.num_images < _FEW_IMAGES:
        lines.append(f"Fewer than {_FEW_IMAGES} images: the intervals are rough.")
    low, high = SEED_NATS
    return [
        *lines,
        "One training each: these trained models are compared, not methods. Another seed moves a VAE by "
        f"{low} to {high} nats, so a claim about methods under {high} nats needs several seeds of each.",
    ]


def _describe_errors(pair: ComparedPair) -> str:
    noise = pair.monte_carlo_stderr
    seen = "not known at S = 1" if math.isnan(noise) else f"{noise:.3f} (the delta method's, a floor)"
    return (
        f"  ± is the standard error over images, paired; unpaired it would be {pair.unpaired_stderr:.3f}. "
        f"Within it, the particles' Monte Carlo error is {seen}"
    )


def _describe_log_p(pair: ComparedPair, num_particles: int) -> str:
    """What the difference of the bounds says of log p(x)."""
    if pair.interval == (0, 0):
        return "  every image has the same bound, to the last bit: the two are one model"
    if pair.bound == INDISTINCT:
        return "  that is not the same as equal: a difference within the interval would not have been seen"
    if pair.ranks_log_likelihood:
        return (
            f"  the whole interval is beyond what ten times the particles gained ({pair.rise:.3f} nats): log p(x) "
            "ranks so too, unless a guide much narrower than its posterior hides that a bound lacks more"
        )
    if math.isnan(pair.rise):
        return (
            f"  the bounds are ranked, log p(x) is not: S = {num_particles} shows nothing of what the bounds still "
            "lack; --num-particles 200 says more"
        )
    return (
        f"  the bounds are ranked, log p(x) is not: ten times the particles still gained {pair.rise:.3f} nats, which "
        f"may hide it; --num-particles {10 * num_particles} says more"
    )


# --- The table of likelihoods ---


def describe_likelihood_table(rows: Sequence[LikelihoodRow]) -> list[str]:
    """The table of likelihoods, the best first, how to read it, and how the pixels of each are calibrated."""
    first, has_bits = rows[0], rows[0].bits_per_dim is not None
    lines = [
        f"{first.scale}, {first.split} split, the same {first.num_images:,} images for all, "
        f"bound L_{first.num_particles}, epochs of training: {first.epochs}",
        f"{'likelihood':29} {'kind':8} {'bits/dim':>16} {'behind the best':>18} {'nats':>20} {'ELBO':>10} "
        f"{'reconstr.':>10} {'KL':>7} {'floor':>10} {'seconds':>8} {'best':>5}",
    ]
    for row in rows:
        bits = plus_minus(row.bits_per_dim, 4) if has_bits else "-"
        behind = "-"
        if has_bits and row.difference_bits_per_dim is not None:
            behind = f"{row.difference_bits_per_dim.mean:+.4f} ± {row.difference_bits_per_dim.stderr:.4f}"
        elif row.difference_nats is not None:
            behind = f"{-row.difference_nats.mean:+.2f} ± {row.difference_nats.stderr:.2f}"
        mark = " ~" if row.verdict == INDISTINCT else "  "
        lines.append(
            f"{row.likelihood:29} {row.kind:8} {bits:>16} {behind + mark:>18} {plus_minus(row.log_likelihood):>20} "
            f"{row.elbo.mean:>10.2f} {row.reconstruction.mean:>10.2f} {row.kl.mean:>7.2f} {row.floor.mean:>10.2f} "
            f"{row.seconds:>8.0f} {row.best_epoch:>5}"
        )
    calibrated = [f"{row.likelihood}: {describe_calibration(row.calibration)}" for row in rows]
    return [*lines, *_explain_likelihood_table(rows), *calibrated]


def _explain_likelihood_table(rows: Sequence[LikelihoodRow]) -> list[str]:
    lines = ["floor: independent pixels with the training images' marginals; best: the epoch that validation chose"]
    if len(rows) > 1:
        unit = "bits/dim" if rows[0].bits_per_dim is not None else "nats an image"
        lines.append(
            f"behind the best: paired on the same images, {unit} ± standard error; ~ is not distinguishable from the "
            f"first row (intervals that hold together with {CONFIDENCE:.0%})"
        )
    if any(row.kind == "exact" for row in rows):
        lines.append(
            "exact: trained as a density of (level + u) / 256, evaluated by the exact masses that it gives to levels"
        )
    unsure = [row.likelihood for row in rows if row.ranks_log_likelihood is False]
    if unsure:
        lines.append(
            f"ten times the particles gained as much as separates the first row from {', '.join(unsure)}: there the "
            "bounds are ranked, log p(x) is not"
        )
    low, high = SEED_NATS
    return [
        *lines,
        "the same epochs are not the same time: see seconds. One training each: these trained models are compared, and "
        f"another seed moves a VAE by {low} to {high} nats on binary pixels, often more on others",
    ]


# --- The table of networks ---


def describe_network_table(rows: Sequence[NetworkRow]) -> list[str]:
    """The table of networks, a line per network."""
    S = ", ".join(sorted({f"S = {row.num_particles:,}" for row in rows}))
    head = f"{'network':15} {'weights':>10} {'s/epoch':>8} {'epochs':>6} {'best':>5} {'log p(x), ' + S:>20} {'ELBO':>8}"
    return [
        head,
        *(
            f"{row.network:15} {row.weights:>10,} {row.seconds_an_epoch:>8.1f} {row.epochs:>6} {row.best_epoch:>5} "
            f"{plus_minus(row.log_likelihood):>20} {row.elbo.mean:>8.2f}"
            for row in rows
        ),
    ]
