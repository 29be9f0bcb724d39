"""The wording of reproductions: the list of recipes, a row, and the two tables in Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs.options import PLACES, Options, to_json
from ppl_vae.runs.recipes import Published, Recipe, Reproduction

# Options that do not decide how good the trained model is, apart from the noise of the seed.
_UNIMPORTANT = {
    *("seed", "stream", "tensorboard", "checkpoint_seconds", "images", "evaluation_particles"),
    *PLACES,
}


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
        f"{row.recipe}, seed {row.seed}: log p(x) {plus_minus(row.ours)} nats an image, "
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
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *map(_make_cells, rows)))
    return "\n".join([head, "|" + "---|" * len(header), *body])


def seeds_table(rows: Sequence[Reproduction]) -> str:
    """Three or more seeds of one training together, in Markdown; empty where there are no such rows.

    All rows are evaluated on the same test images, so that the error over images is common to them. Trainings differ by
    s, the standard deviation between seeds. The mean of n trainings is uncertain by s / sqrt(n), and its difference
    from a number in print by sqrt(s^2 / n + e^2), with the printed error e, where there is one.
    """
    groups: dict[str, list[Reproduction]] = {}
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
        lines.append(f"| `{group[0].recipe}` | {len(group)} | {average} | {spread:.2f} | {apart} |")
    head = "| recipe | seeds | mean | s between seeds | above what is published |"
    return "\n".join([head, "|" + "---|" * 5, *lines]) if lines else ""


def _identify_training(row: Reproduction) -> str:
    """What two rows of one training share, apart from the seed. An option that a row lacks has its default there."""
    usual = {name: value for name, value in to_json(Options()).items() if name not in _UNIMPORTANT}
    stages = [{name: stage.get(name, value) for name, value in usual.items()} for stage in row.options]
    return json.dumps([row.recipe, vars(row.protocol), stages], sort_keys=True)


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
    gains = () if row.validation is None else row.validation.last_tenth_gains
    if all(gain is None for gain in gains):
        return ""
    return ", ".join("-" if gain is None else f"{gain:+.2f}" for gain in gains)


def _format_epochs(row: Reproduction) -> str:
    """The epochs of each stage, with its number of particles above 1, and the recipe's where those differ."""
    stages = zip(row.budget.epochs, (stage["num_particles"] for stage in row.options), strict=True)
    words = " + ".join(f"{epochs:,}" + (f" of L_{k}" if k > 1 else "") for epochs, k in stages)
    usual = " + ".join(f"{epochs:,}" for epochs in row.budget.recipe_epochs)
    return words if row.budget.epochs == row.budget.recipe_epochs else f"{words} (of {usual})"
