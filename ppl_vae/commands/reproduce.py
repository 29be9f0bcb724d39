"""A published model trained again stage by stage, evaluated, and compared with the number in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ppl_vae import runs
from ppl_vae.commands.evaluate import write_evaluation
from ppl_vae.commands.options import Evaluate, Reproduce
from ppl_vae.commands.run_series import check_runs, train_or_resume
from ppl_vae.reports.run_figures import is_drawn, write_figures
from ppl_vae.reports.text.comparison import describe_recipes, describe_reproduction, reproduction_table, seeds_table
from ppl_vae.runs.build import count_weights
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.open import Run, Say
from ppl_vae.runs.options import PLACES, Options, format_flag
from ppl_vae.runs.outputs import make_parent
from ppl_vae.runs.recipes import (
    RECIPES,
    Budget,
    EvaluationProtocol,
    Recipe,
    Reproduction,
    StageSeconds,
    ValidationCurve,
    find_recipe,
    read_reproductions,
)
from ppl_vae.runs.resolve import find_device, load_splits
from ppl_vae.runs.results import find_last_gain, read_evaluation, to_json

EVALUATION_SEED = 0


def run(options: Reproduce, *, say: Say) -> None:
    """The command: lists the recipes, prints the table, or reproduces a model."""
    if options.list:
        say("\n".join(describe_recipes(RECIPES)))
    elif options.table:
        rows = read_reproductions(Path(options.output))
        say("\n\n".join(table for table in (reproduction_table(rows), seeds_table(rows)) if table))
    else:
        reproduce_recipe(options, say=say)


def reproduce_recipe(options: Reproduce, *, say: Say) -> Reproduction:
    """Trains a recipe in run folders RUN_DIR/1, /2, ..., evaluates the last on every test image, and adds a row.

    Called again it goes on where it stands: finished stages and a finished evaluation are taken as they are. A row of
    the same recipe, seed, budget and precision is replaced. Raises ValueError before any training for what would end a
    later stage.
    """
    options = replace(options, device=str(find_device(options.device)))
    assert options.name is not None
    found, share = find_recipe(options.name), 1.0
    if options.epochs is not None:
        share = options.epochs / sum(stage.epochs for stage in found.stages)
    elif options.epochs_share is not None:
        share = options.epochs_share
    parent = Path(options.run_dir or f"runs/reproduce/{options.name}-seed{options.seed}")
    changes: JsonObject = {"seed": options.seed, "device": options.device, "data_dir": options.data_dir}
    if options.precision is not None:
        changes["precision"] = options.precision
    stages: dict[Path, Options] = {}
    for place, stage in enumerate(shorten_stages(found.stages, share), start=1):
        if stages:
            changes["start_from"] = str(parent / str(place - 1))
        stages[parent / str(place)] = replace(stage, **changes)
    read_reproductions(Path(options.output))
    check_runs(stages, load_splits(next(iter(stages.values()))), free=frozenset({"start_from"}))
    make_parent(Path(options.output))
    run = None
    for folder, stage in stages.items():
        say(f"{options.name}, stage {folder.name} of {len(stages)}: {stage.epochs:,} epochs.")
        run = train_or_resume(folder, stage, run, say=say, draw=False)
    assert run is not None
    _evaluate(run, found.particles, options.device, say)
    row = _make_row(options, found, share, stages, run)
    write_row(options.output, row)
    for line in describe_reproduction(row, options.output):
        say(line)
    if not is_drawn(run):
        write_figures(run, say=say)
    return row


def shorten_stages(stages: Sequence[Options], share: float) -> list[Options]:
    """The same stages with a share of their epochs, at least one, and of their warm-up."""
    return [
        replace(
            stage,
            epochs=max(1, round(share * stage.epochs)),
            warmup_epochs=None if stage.warmup_epochs is None else round(share * stage.warmup_epochs),
        )
        for stage in stages
    ]


def _evaluate(run: Run, num_particles: int, device: str, say: Say) -> None:
    """Evaluates every test image, unless that was done before."""
    there = runs.read_evaluations(run.folder).get("test", {})
    asked = {
        "step": runs.load_step(run.folder / runs.MODEL),
        "num_images": len(run.splits.test),
        "num_particles": num_particles,
        "seed": EVALUATION_SEED,
    }
    if asked.items() <= there.items():
        say(f"{run.folder} has its evaluation: S = {num_particles:,}, {asked['num_images']:,} test images.")
        return
    compile = "off" if run.options.compile == "off" else "auto"
    options = Evaluate(
        str(run.folder), num_particles=num_particles, device=device, seed=EVALUATION_SEED, compile=compile
    )
    write_evaluation(run, options, say=say)


def _make_row(asked: Reproduce, found: Recipe, share: float, stages: Mapping[Path, Options], run: Run) -> Reproduction:
    """The row, from the files of the runs."""
    assert asked.name is not None
    evaluation, metrics = read_evaluation(run.folder), [runs.read_metrics(folder) for folder in stages]
    assert evaluation is not None
    assert evaluation.log_likelihood is not None
    keys = ("dataset", "protocol", "binarization", "split", "num_images", "num_particles")
    environments = [runs.read_json(folder / runs.ENVIRONMENT) for folder in stages]
    starts = [start for first in environments for start in (first, *first.get("resumed", []))]
    commits = [f"{start['git_commit']}{'-dirty' * bool(start['git_dirty'])}" for start in starts if start["git_commit"]]
    return Reproduction(
        recipe=asked.name,
        model=found.model,
        published=found.published,
        seed=asked.seed,
        budget=Budget(
            share, tuple(stage.epochs for stage in stages.values()), tuple(stage.epochs for stage in found.stages)
        ),
        precision=run.options.precision,
        options=tuple(
            {key: value for key, value in to_json(stage).items() if key not in PLACES} for stage in stages.values()
        ),
        ours=evaluation.log_likelihood,
        **{key: getattr(evaluation, key) for key in ("elbo", "kl", "rise")},
        protocol=EvaluationProtocol(**{key: getattr(evaluation, key) for key in keys}),
        weights=count_weights(run.options, run.splits.event_shape),
        validation=ValidationCurve(tuple(map(find_last_gain, metrics))),
        seconds=StageSeconds(tuple(records[-1]["seconds"] for records in metrics), evaluation.seconds),
        command=_make_command(asked),
        commits=tuple(dict.fromkeys(commits)),
        environment={key: value for key, value in environments[-1].items() if key not in ("argv", "resumed")},
    )


def _make_command(asked: Reproduce) -> str:
    """The command line that makes the row again, without places on this machine."""
    given = {name: getattr(asked, name) for name in ("epochs", "epochs_share", "precision", "seed", "device")}
    words = [f"{format_flag(name)} {value}" for name, value in given.items() if value is not None]
    return " ".join(["ppl-vae reproduce", str(asked.name), *words])


def write_row(output: str, row: Reproduction) -> None:
    """Adds the row, or replaces the one of the same recipe, seed, budget and precision; the file as a whole."""

    def identify(row: Reproduction) -> tuple[object, ...]:
        return row.recipe, row.seed, row.budget.share, row.precision

    kept = [old for old in read_reproductions(Path(output)) if identify(old) != identify(row)]
    order = {name: place for place, name in enumerate(RECIPES)}
    rows = sorted([*kept, row], key=lambda row: (order.get(row.recipe, len(order)), row.seed))
    runs.write_json(Path(output), {"rows": to_json(rows)})
