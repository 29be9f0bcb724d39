"""A published model made again: trained stage by stage, evaluated, and held against the number in print."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import write_evaluation
from ppl_vae.commands.options import Reproduce
from ppl_vae.commands.train import resume_run, train_run
from ppl_vae.diagnostics import active_units
from ppl_vae.evidence.moments import compute_moments, encode
from ppl_vae.reports.run_figures import is_drawn, write_figures
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs import recipes
from ppl_vae.runs.asked_run import check_comparable, check_same
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.fields import format_flag
from ppl_vae.runs.fit_arguments import fit_arguments
from ppl_vae.runs.opening import Run, Say, evaluated_vae, open_run
from ppl_vae.runs.options import Options, to_json
from ppl_vae.runs.recipes import RECIPES, Published, Recipe, in_words, recipe
from ppl_vae.runs.resolve import check_support, load_splits, resolve

EVALUATION_SEED = 0

_ELBO, _BOUND = "validation_elbo_nats_per_image", "validation_bound_nats_per_image"
_WHERE = ("data_dir", "start_from")  # places on a machine, of which a row says nothing


def run(options: Reproduce, *, say: Say) -> None:
    """The command: lists the recipes, prints the table, or reproduces a model."""
    if options.list:
        say("\n".join(recipes.describe()))
    elif options.table:
        rows = read_rows(options.output)
        say("\n\n".join(table for table in (reproduction_table(rows), seeds_table(rows)) if table))
    else:
        assert options.name is not None
        reproduce_recipe(
            options.name,
            epochs=options.epochs,
            epochs_share=options.epochs_share,
            precision=options.precision,
            seed=options.seed,
            device=options.device,
            data_dir=options.data_dir,
            run_dir=options.run_dir,
            output=options.output,
            say=say,
        )


def reproduce_recipe(
    name: str,
    *,
    run_dir: str | None,
    output: str,
    say: Say,
    epochs: int | None = None,
    epochs_share: float | None = None,
    precision: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Trains a recipe in run folders RUN_DIR/1, /2, ..., evaluates the last on every test image, and adds a row.

    Asked for again it goes on where it stands: stages that are finished are taken as they are, and so is an evaluation.
    A row of the same recipe, seed, budget and precision is replaced.

    Args:
        name: one of ``recipes.RECIPES``.
        run_dir: the folder of the run folders; None for runs/reproduce/NAME-seedN.
        output: the JSON file of the rows.
        epochs: of all stages together, instead of the recipe's; each has its share of them, and at least one.
        epochs_share: of the recipe's epochs, instead of that.
        precision: a word of ``--precision``; None for the recipe's own.
        seed: of every stage.
        data_dir: as for ``train``.

    Returns:
        The row.

    Raises:
        ValueError: no such recipe, what cannot be built, a damaged results file, or a folder that holds a run with
            other options; all of that before any training.
    """
    found, parent = recipe(name), Path(run_dir or f"runs/reproduce/{name}-seed{seed}")
    share = _share(found, epochs, epochs_share)
    changes: dict[str, Any] = {"seed": seed, "device": device, "data_dir": data_dir}
    changes |= {} if precision is None else {"precision": precision}
    folders = [parent / str(place) for place in range(1, 1 + len(found.stages))]
    stages = [replace(stage, **changes) for stage in shortened(found.stages, share)]
    stages[1:] = [replace(stage, start_from=str(before)) for before, stage in zip(folders, stages[1:], strict=False)]
    read_rows(output)
    _check(folders, stages)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {Path(output).parent} cannot be made: {error.strerror}") from None
    run = None
    for folder, stage in zip(folders, stages, strict=True):
        say(f"{name}, stage {folder.name} of {len(stages)}: {stage.epochs:,} epochs.")
        run = _trained(folder, stage, run, say)
    assert run is not None
    evaluated_now = _evaluate(run, found.particles, device, say)
    asked: dict[str, Any] = {"epochs": epochs, "epochs_share": epochs_share, "precision": precision, "seed": seed}
    asked |= {"device": None if device == "cpu" else device}
    row = {
        **_head(name, found, seed, share, stages),
        **_measured(run, found, folders),
        "command": _command(name, asked),
        **_made_with(folders, device if evaluated_now else None),
    }
    write_row(output, row)
    for line in describe(row, output):
        say(line)
    if not is_drawn(run):
        write_figures(run, say=say)
    return row


# --- Stages ---


def _share(found: Recipe, epochs: int | None, epochs_share: float | None) -> float:
    """Of the recipe's epochs, those that are asked for."""
    if epochs is not None and epochs_share is not None:
        raise ValueError("--epochs: expected it without --epochs-share, got both")
    if epochs is not None:
        return epochs / sum(stage.epochs for stage in found.stages)
    return 1.0 if epochs_share is None else epochs_share


def shortened(stages: Sequence[Options], share: float) -> list[Options]:
    """The same stages with a share of their epochs, at least one, and of their warm-up."""

    def of(stage: Options) -> Options:
        warmup = stage.warmup_epochs
        return replace(
            stage,
            epochs=max(1, round(share * stage.epochs)),
            warmup_epochs=None if warmup is None else round(share * warmup),
        )

    return [of(stage) for stage in stages]


def _check(folders: Sequence[Path], stages: Sequence[Options]) -> None:
    """What could end a later stage is found before hours of an earlier one. Raises ValueError as ``reproduce``."""
    splits = load_splits(stages[0])
    for folder, stage in zip(folders, stages, strict=True):
        check_comparable(stage)
        options = resolve(stage, splits)
        check_support(options, splits)
        fit_arguments(options, None)
        with torch.device("meta"):
            build_vae(options, splits.event_shape)
        if (folder / runs.CONFIG).exists():
            check_same(folder, stage, splits, free=frozenset({"start_from"}))
        elif folder.exists() and not runs.is_empty(folder):
            raise ValueError(f"{folder}: expected a run, a new or an empty folder, got another; name another --run-dir")


def _trained(folder: Path, stage: Options, before: Run | None, say: Say) -> Run:
    """The stage's run, trained to its end from wherever it stands."""
    if (folder / runs.CONFIG).exists():
        resume_run(str(folder), epochs=None, say=say, data_dir=stage.data_dir, like=before, draw=False)
    else:
        train_run(stage, str(folder), say=say, draw=False)
    return open_run(str(folder), data_dir=stage.data_dir, like=before)


def _evaluate(run: Run, num_particles: int, device: str, say: Say) -> bool:
    """The estimate of every test image, unless it is there; returns whether it was made now."""
    there = runs.read_evaluations(run.folder).get("test", {})
    asked = {
        "step": runs.load_step(run.folder / runs.MODEL),
        "num_images": len(run.splits.test),
        "num_particles": num_particles,
        "seed": EVALUATION_SEED,
    }
    if asked.items() <= there.items():
        say(f"{run.folder} has its evaluation: S = {num_particles:,}, {asked['num_images']:,} test images.")
        return False
    write_evaluation(
        run,
        split="test",
        num_particles=num_particles,
        images=None,
        device=device,
        seed=EVALUATION_SEED,
        compile="off" if run.options.compile == "off" else "auto",
        say=say,
    )
    return True


# --- The row ---


def _head(name: str, found: Recipe, seed: int, share: float, stages: Sequence[Options]) -> dict[str, Any]:
    """What was asked for, and what it is held against."""
    return {
        "recipe": name,
        "model": found.model,
        "published": [number._asdict() for number in found.published],
        "differs": found.differs if share == 1 else f"{share:.3g} of the epochs of this: {found.differs}",
        "seed": seed,
        "budget": {
            "share": share,
            "epochs": [stage.epochs for stage in stages],
            "recipe_epochs": [stage.epochs for stage in found.stages],
        },
        "precision": stages[-1].precision,
        "options": [{key: v for key, v in to_json(stage).items() if key not in _WHERE} for stage in stages],
    }


def _measured(run: Run, found: Recipe, folders: Sequence[Path]) -> dict[str, Any]:
    """What came of it, from the files of its runs."""
    entry = runs.read_evaluations(run.folder)["test"]
    metrics = [runs.read_metrics(folder) for folder in folders]
    vae = evaluated_vae(run)
    keys = ("dataset", "protocol", "binarization", "split", "num_images", "num_particles")
    return {
        "ours": entry["log_likelihood"],
        **{key: entry[key] for key in ("elbo", "kl", "rise")},
        "protocol": {key: entry[key] for key in keys},
        "weights": sum(w.numel() for w in vae.parameters()),
        "active_units": _active_units(run, vae),
        "validation": validation_curve(metrics, entry["step"]),
        "seconds": {"training": [records[-1]["seconds"] for records in metrics], "evaluation": entry["seconds"]},
    }


def _active_units(run: Run, vae: Any) -> int | None:
    """How many latents' posterior means vary over test images by more than 0.01, in variances of the prior.

    None with several layers of latents.
    """
    if run.options.upper_latents is not None:
        return None
    x = data.evaluation_images(run.splits, "test", run.evaluated_pixels, seed=EVALUATION_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(EVALUATION_SEED)
        return active_units(encode(vae, x), compute_moments(vae.prior()).scale).count


def validation_curve(stages: Sequence[Sequence[dict[str, Any]]], step: int) -> dict[str, Any] | None:
    """max of the last tenth - max before, of each stage's validation ELBOs, or bounds L_S where those choose.

    Args:
        stages: the records of each stage, one an epoch.
        step: of the weights that are kept, in the last stage.

    Returns:
        ``elbo`` of the kept weights and their ``epoch`` in the last stage, None and 0 where no epoch was better than
        what it started from; and ``last_tenth_gains``: what the last tenth of each stage's epochs gained over the best
        before, nats an image (None for a single epoch). None where there are no validation images.

    Source: ours.
    """
    seen = [[record for record in records if record.get(_ELBO) is not None] for records in stages]
    if not all(seen):
        return None
    kept = next((record for record in seen[-1] if record["step"] == step), seen[-1][-1])
    of_kept = {"elbo": kept[_ELBO], "epoch": kept["epoch"]} if step else {"elbo": None, "epoch": 0}
    return of_kept | {"last_tenth_gains": list(map(_last_tenth_gain, seen))}


def _last_tenth_gain(records: Sequence[dict[str, Any]]) -> float | None:
    curve = [record.get(_BOUND, record[_ELBO]) for record in records]
    tenth = math.ceil(len(curve) / 10)
    return max(curve[-tenth:]) - max(curve[:-tenth]) if len(curve) > 1 else None


def _command(name: str, asked: dict[str, Any]) -> str:
    """What makes the row again, without the places on this machine."""
    words = [f"{format_flag(key)} {value}" for key, value in asked.items() if value is not None]
    return " ".join(["python scripts/reproduce.py", name, *words])


def _made_with(folders: Sequence[Path], device: str | None) -> dict[str, Any]:
    """Versions, device and time of the last stage's start, and every commit that had a part in it."""
    firsts = [runs.read_json(folder / runs.ENVIRONMENT) for folder in folders]
    starts = [start for first in firsts for start in (first, *first.get("resumed", []))]
    starts += [] if device is None else [runs.describe_environment(device)]
    commits = [f"{start['git_commit']}{'-dirty' * bool(start['git_dirty'])}" for start in starts if start["git_commit"]]
    last = {key: value for key, value in firsts[-1].items() if key not in ("argv", "resumed")}
    return {"commits": list(dict.fromkeys(commits)), "environment": last}


def read_rows(output: str) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is no file. Raises ValueError for a damaged one."""
    path = Path(output)
    if not path.exists():
        return []
    if path.is_dir():
        raise ValueError(f"--output: expected a file, got the folder {path}")
    rows = runs.read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "recipe" in row for row in rows):
        raise ValueError(f"{path}: damaged: expected a list of rows, each of a recipe")
    return rows


def write_row(output: str, row: dict[str, Any]) -> None:
    """Adds the row, or replaces the one of the same recipe, seed, budget and precision; the file as a whole."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["recipe"], row["seed"], row["budget"]["share"], row["precision"]

    kept = [old for old in read_rows(output) if key(old) != key(row)]
    order = {name: place for place, name in enumerate(RECIPES)}
    rows = sorted([*kept, row], key=lambda row: (order.get(row["recipe"], len(order)), row["seed"]))
    runs.write_json(Path(output), {"rows": rows})


# --- In words ---


def describe(row: dict[str, Any], output: str) -> list[str]:
    """A row in words."""
    protocol = row["protocol"]
    lines = [
        f"{row['recipe']}, seed {row['seed']}: log p(x) {plus_minus(row['ours'])} nats an image, "
        f"L_{protocol['num_particles']} of {protocol['num_images']:,} test images"
    ]
    for published in row["published"]:
        ahead = row["ours"]["mean"] - published["log_likelihood"]
        lines.append(f"  {ahead:+.2f} nats against the published {in_words(Published(**published))}")
    if row["budget"]["share"] != 1:
        lines.append(f"  {row['budget']['share']:.3g} of the recipe's epochs: {_epochs(row)}")
    gains = _gains(row)
    if gains:
        of = "the epochs" if len(row["budget"]["epochs"]) == 1 else "each stage's epochs"
        lines.append(f"  the last tenth of {of} gained {gains} nats of validation bound")
    return [*lines, f"  {output} has its row."]


def reproduction_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    S = ", ".join(sorted({f"{row['protocol']['num_particles']:,}" for row in rows})) or "5,000"
    header = ["recipe", "data", f"L_S, S = {S}", "rise", "ELBO", "published", "epochs", "minutes", "seed", "last tenth"]
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *map(_cells, rows)))
    return "\n".join([head, "|" + "---|" * len(header), *body])


def seeds_table(rows: Sequence[dict[str, Any]]) -> str:
    """What three or more seeds of one training have together, in Markdown; empty where there are no such rows.

    All are of the same test images, so the error over images is common to them. What tells one training from another
    is s, the standard deviation between seeds; the mean of n is uncertain by s / sqrt(n), and its difference to a
    number in print by sqrt(s^2 / n + e^2), e as it is printed, where it is.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_training(row), []).append(row)
    lines = []
    for group in groups.values():
        if len(group) < 3:
            continue
        means = [row["ours"]["mean"] for row in group]
        mean, spread = statistics.mean(means), statistics.stdev(means)
        error = spread / math.sqrt(len(group))
        apart = [
            f"{mean - number.log_likelihood:+.2f} ± {math.hypot(error, number.stderr or 0):.2f} ({number.source})"
            for number in (Published(**published) for published in group[0]["published"])
        ]
        of_mean = plus_minus({"mean": mean, "stderr": error})
        lines.append(f"| `{group[0]['recipe']}` | {len(group)} | {of_mean} | {spread:.2f} | {'; '.join(apart)} |")
    head = "| recipe | seeds | mean | s between seeds | above what is published |"
    return "\n".join([head, "|" + "---|" * 5, *lines]) if lines else ""


# What does not decide what a training comes to.
_NO_PART = {"seed", "stream", "tensorboard", "checkpoint_seconds", "images", "evaluation_particles", *_WHERE}


def _training(row: dict[str, Any]) -> str:
    """All by which two rows are of one training but for the seed: rows of a recipe before it was changed are not.

    An option that is younger than a row has its default there.
    """
    usual = {name: value for name, value in to_json(Options()).items() if name not in _NO_PART}
    stages = [{name: stage.get(name, value) for name, value in usual.items()} for stage in row["options"]]
    return json.dumps([row["recipe"], row["protocol"], stages], sort_keys=True)


def _cells(row: dict[str, Any]) -> list[str]:
    protocol = row["protocol"]
    drawn = "" if protocol["binarization"] == "none" else f", {protocol['binarization']}"
    return [
        f"`{row['recipe']}`",
        f"{protocol['dataset']}{drawn}",
        plus_minus(row["ours"]),
        f"{row['rise']:+.2f}",
        plus_minus(row["elbo"]),
        "; ".join(in_words(Published(**published)) for published in row["published"]),
        _epochs(row) + (f", {row['precision']}" if row["precision"] != "float32" else ""),
        f"{(sum(row['seconds']['training']) + row['seconds']['evaluation']) / 60:.0f}",
        str(row["seed"]),
        _gains(row),
    ]


def _gains(row: dict[str, Any]) -> str:
    """Of the last tenth of each stage, a dash for a stage of one epoch; empty where no stage has one."""
    gains = [] if row["validation"] is None else row["validation"]["last_tenth_gains"]
    if all(gain is None for gain in gains):
        return ""
    return ", ".join("-" if gain is None else f"{gain:+.2f}" for gain in gains)


def _epochs(row: dict[str, Any]) -> str:
    """Of each stage, with its k above 1; a budget that is not the recipe's says the recipe's too."""
    ours, usual = (" + ".join(f"{count:,}" for count in row["budget"][key]) for key in ("epochs", "recipe_epochs"))
    stages = zip(row["budget"]["epochs"], row["options"], strict=True)
    draws = [(count, stage["num_particles"]) for count, stage in stages]
    words = " + ".join(f"{count:,}" + (f" of L_{k}" if k > 1 else "") for count, k in draws)
    return words if ours == usual else f"{words} (of {usual})"
