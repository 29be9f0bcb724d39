"""The wording of comparisons: of runs, likelihoods and networks, and with numbers in print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ppl_vae.evidence.estimate import CONFIDENCE, INDISTINCT, SEED_NATS, Estimate, PairedDifference
from ppl_vae.reports.text import format_number, markdown_table, plus_minus
from ppl_vae.reports.text.diagnosis import describe_calibration
from ppl_vae.runs.command_results import ComparedPair, Comparison, LikelihoodRow, NetworkRow, TrainedRow
from ppl_vae.runs.recipes import Published, Recipe, Reproduction

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
        f"{name} is {judged} {baseline}, by their bounds: {found.mean:+.3f} ± {found.stderr:.3f} nats per image "
        f"({100 * found.confidence:.4g}% interval {found.lower:+.3f} to {found.upper:+.3f})"
    )


def describe_comparison(found: Comparison) -> list[str]:
    """A comparison of runs, line by line."""
    stored = "taken from the runs' stored evaluations, which are of exactly this kind"
    lines = [comparison_title(found), f"  {stored if found.stored_evaluations else 'evaluated now'}"]
    for run in found.runs:
        bits = f" ({run.bits_per_dim.mean:.4f} bits per dimension)" if run.bits_per_dim else ""
        lines.append(
            f"  {run.name}: bound L_{found.num_particles} {plus_minus(run.log_likelihood)} nats per image{bits}; ten "
            f"times the particles gained {format_number(run.rise, 3)}"
        )
    for pair in found.comparisons:
        errors = (
            f"  ± is the standard error over images, paired; unpaired it would be {pair.unpaired_stderr:.3f}. Within "
            f"it, the particles' Monte Carlo error is {format_number(pair.monte_carlo_stderr, 3)} (the delta method's, "
            "a floor)"
        )
        lines += [pair.verdict, errors, _describe_log_p(pair)]
    low, high = SEED_NATS
    rising = [f"{run.name} ({run.last_gain:+.1f} nats)" for run in found.runs if (run.last_gain or 0) > high]
    if rising:
        lines.append(
            f"Not trained to the end: the last tenth of the epochs still raised the validation bound of "
            f"{', '.join(rising)}. This compares how far the runs have come. To train further: "
            "ppl-vae train --resume RUN --epochs N."
        )
    return [
        *lines,
        f"All intervals hold at once with {CONFIDENCE:.0%}; those of fewer than 30 images are rough.",
        "One training each: these trained models are compared, not methods. Another seed moves a VAE by "
        f"{low} to {high} nats, so a claim about methods under {high} nats needs several seeds of each.",
    ]


def _describe_log_p(pair: ComparedPair) -> str:
    """What the difference of the bounds says of log p(x)."""
    gained = f"what ten times the particles gained ({format_number(pair.rise, 3)} nats)"
    if pair.bound == INDISTINCT:
        return "  that is not the same as equal: a difference within the interval would not have been seen"
    if pair.ranks_log_likelihood:
        return (
            f"  the whole interval is beyond {gained}: log p(x) ranks so too, unless a guide much narrower than its "
            "posterior hides that a bound lacks more"
        )
    return f"  the bounds are ranked, log p(x) is not: {gained} may hide it; more --num-particles say more"


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
    low, high = SEED_NATS
    unsure = ", ".join(row.likelihood for row in rows if row.ranks_log_likelihood is False) or "none"
    return [
        "floor: independent pixels with the training images' marginals; best: the epoch that validation chose",
        "behind the best: paired on the same images, bits per dimension of 8-bit levels, else nats; ~ is not "
        f"distinguishable from the first row (intervals that hold together with {CONFIDENCE:.0%})",
        "exact: trained as a density of (level + u) / 256, evaluated by the exact masses that it gives to levels",
        f"bounds ranked, log p(x) not, since ten times the particles gained as much as the difference: {unsure}",
        *_describe_unfinished([(row.likelihood, row) for row in rows]),
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
        *_describe_unfinished([(row.network, row) for row in rows]),
    ]


def _describe_unfinished(rows: Sequence[tuple[str, TrainedRow]]) -> list[str]:
    """Which trainings, by their names, were best in their last epoch."""
    names = [name for name, row in rows if row.best_epoch == row.epochs]
    if not names:
        return []
    return [f"best in the last epoch, so that more --epochs may change the order: {', '.join(names)}"]


# --- Reproductions of numbers in print ---


def describe_recipes(recipes: Mapping[str, Recipe]) -> list[str]:
    """Each recipe's name, model and epochs, and below it the numbers that it is compared with."""
    lines = []
    for name, found in recipes.items():
        epochs = " + ".join(f"{stage.epochs:,}" for stage in found.stages)
        lines.append(f"{name}: {found.model}; {epochs} epochs")
        lines += [f"    published {_describe_published(number)}" for number in found.published]
    return lines


def _describe_published(number: Published) -> str:
    error = "" if number.stderr is None else f" ± {number.stderr:.2f}"
    return f"{number.log_likelihood:.2f}{error} ({number.source})"


def describe_reproduction(row: Reproduction, output: str) -> list[str]:
    """A row, and its difference from each published number."""
    lines = [
        f"{row.recipe}, seed {row.seed}: log p(x) {plus_minus(row.ours)} nats per image, "
        f"L_{row.protocol.num_particles} of {row.protocol.num_images:,} test images"
    ]
    for number in row.published:
        ahead = row.ours.mean - number.log_likelihood
        lines.append(f"  {ahead:+.2f} nats against the published {_describe_published(number)}")
    if row.budget.share != 1:
        lines.append(f"  {row.budget.share:.3g} of the recipe's epochs: {_format_epochs(row)}")
    gains = _format_gains(row)
    if gains:
        epochs = "the epochs" if len(row.budget.epochs) == 1 else "each stage's epochs"
        lines.append(f"  the last tenth of {epochs} gained {gains} nats of validation bound")
    return [*lines, f"  {output} has its row."]


def reproduction_table(rows: Sequence[Reproduction]) -> str:
    """All rows as a table in Markdown."""
    S = ", ".join(sorted({f"{row.protocol.num_particles:,}" for row in rows})) or "5,000"
    header = ["recipe", "data", f"L_S, S = {S}", "rise", "ELBO", "published", "epochs", "minutes", "seed", "last tenth"]
    return markdown_table(header, [*map(_make_cells, rows)])


def seeds_table(rows: Sequence[Reproduction]) -> str:
    """Three or more seeds of one training together, in Markdown; empty where there are no such rows.

    All rows are evaluated on the same test images, so that the error over images is common to them. Trainings differ by
    s, the standard deviation between seeds. The mean of n trainings is uncertain by s / sqrt(n), and its difference
    from a number in print by sqrt(s^2 / n + e^2), with the printed error e, where there is one.
    """
    groups: dict[tuple[object, ...], list[Reproduction]] = {}
    for row in rows:
        groups.setdefault(_identify_training(row), []).append(row)
    lines = []
    for group in groups.values():
        if len(group) < 3:
            continue
        means = [row.ours.mean for row in group]
        mean, spread = statistics.mean(means), statistics.stdev(means)
        error = spread / math.sqrt(len(group))
        apart = "; ".join(
            f"{mean - number.log_likelihood:+.2f} ± {math.hypot(error, number.stderr or 0):.2f} ({number.source})"
            for number in group[0].published
        )
        average = plus_minus(Estimate(mean, error))
        lines.append([f"`{group[0].recipe}`", str(len(group)), average, f"{spread:.2f}", apart])
    header = ["recipe", "seeds", "mean", "s between seeds", "above what is published"]
    return markdown_table(header, lines) if lines else ""


def _identify_training(row: Reproduction) -> tuple[object, ...]:
    """What two rows of one training share, apart from the seed."""
    return row.recipe, *vars(row.protocol).values(), *row.budget.epochs, row.precision


def _make_cells(row: Reproduction) -> list[str]:
    drawn = "" if row.protocol.binarization == "none" else f", {row.protocol.binarization}"
    return [
        f"`{row.recipe}`",
        f"{row.protocol.dataset}{drawn}",
        plus_minus(row.ours),
        f"{row.rise:+.2f}",
        plus_minus(row.elbo),
        "; ".join(map(_describe_published, row.published)),
        _format_epochs(row) + (f", {row.precision}" if row.precision != "float32" else ""),
        f"{(sum(row.seconds.training) + row.seconds.evaluation) / 60:.0f}",
        str(row.seed),
        _format_gains(row),
    ]


def _format_gains(row: Reproduction) -> str:
    """The gain of each stage's last tenth, a dash for a stage of one epoch; empty where no stage has one."""
    gains = row.validation.last_tenth_gains
    if all(gain is None for gain in gains):
        return ""
    return ", ".join("-" if gain is None else f"{gain:+.2f}" for gain in gains)


def _format_epochs(row: Reproduction) -> str:
    """The epochs of each stage, with its number of particles above 1, and the recipe's where those differ."""
    stages = zip(row.budget.epochs, (stage["num_particles"] for stage in row.options), strict=True)
    words = " + ".join(f"{epochs:,}" + (f" of L_{k}" if k > 1 else "") for epochs, k in stages)
    usual = " + ".join(f"{epochs:,}" for epochs in row.budget.recipe_epochs)
    return words if row.budget.epochs == row.budget.recipe_epochs else f"{words} (of {usual})"
