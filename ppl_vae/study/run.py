"""The whole study: every run trained and measured, one JSON of all numbers, and a report."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ppl_vae import runs
from ppl_vae.commands.options import RunStudy
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs.asked_run import check_same
from ppl_vae.runs.evaluations import is_evaluated
from ppl_vae.runs.fit_arguments import count_steps, find_device
from ppl_vae.runs.opening import Say
from ppl_vae.runs.options import compiling_pays
from ppl_vae.runs.resolve import check_support, load_splits
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import Interrupted
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.study.autoencoder_section import autoencoder_section
from ppl_vae.study.context import PICTURES, RUNS, STUDY, Study
from ppl_vae.study.material import StudyData, material
from ppl_vae.study.measuring import measured
from ppl_vae.study.page import write_report
from ppl_vae.study.pictures import ORIGINALS, write_strip
from ppl_vae.study.plan import DEFAULT, QUICK, Planned, Size, base, dataset_word, plan
from ppl_vae.study.sections import (
    architectures_section,
    collapse_section,
    mean_section,
    regularization_section,
    scale_maps_section,
    sweep_section,
)
from ppl_vae.study.training import FAILURE, train_planned

PLAN = "plan.json"
_VERSION = 2


def run(options: RunStudy, *, say: Say) -> None:
    """The command: trains, measures and reports the whole study."""
    run_study(
        QUICK if options.quick else DEFAULT,
        options.datasets,
        name="quick" if options.quick else "default",
        output=options.output or ("runs/study-quick" if options.quick else "runs/study"),
        data_dir=options.data_dir,
        say=say,
    )


def run_study(
    size: Size, datasets: Sequence[str], *, name: str, output: str, say: Say, data_dir: str | None = None
) -> Path:
    """``collect``, and then the report of its numbers and pictures, OUTPUT/report.html with figures/.

    Returns:
        The report.

    Raises:
        ValueError: as ``collect``.
    """
    path = collect(size, datasets, name=name, output=output, say=say, data_dir=data_dir)
    with runs.locked(path.parent):
        report = write_report(path.parent)
    say(f"All numbers are in {path}, and the report is {report}.")
    return report


def collect(
    size: Size, datasets: Sequence[str], *, name: str, output: str, say: Say, data_dir: str | None = None
) -> Path:
    """Trains what is planned, measures it, and writes OUTPUT/study.json, of all numbers, and OUTPUT/pictures.

    A study that was interrupted goes on: finished runs and measurements are taken as they are.

    Args:
        size: how much.
        datasets: names of data sets, or paths of a person's own images; the first has all parts.
        name: of the size.
        output: the study's folder.
        say: takes each line for the reader.
        data_dir: of the named data sets.

    Returns:
        The JSON file.

    Raises:
        Interrupted: SIGINT or SIGTERM; what is finished is kept.
        ValueError: data that cannot be read or is no images, or a folder that holds something else, such as a study of
            another size, or that another process writes to; all of that before any training.
    """
    materials = _materials(size, datasets, data_dir)
    num_pixels = {each.options.dataset: each.num_pixels for each in materials.values()}
    planned = [
        replace(each, options=replace(each.options, data_dir=data_dir))
        for each in plan(size, [each.options.dataset for each in materials.values()], num_pixels=num_pixels)
    ]
    planned = _compiled_where_it_pays(planned, materials)
    folder = Path(output)
    _check_folder(folder, planned, materials, {"size": name, "datasets": [*materials], "settings": _settings(size)})
    with runs.locked(folder):
        words = f"The {name} study of {', '.join(materials)}: {len(planned)} runs, in {folder}"
        say(f"{words}; asked for again, it goes on.")
        for word, each in materials.items():
            write_strip(folder / PICTURES / word / ORIGINALS, each.gray[each.shown], columns=len(each.shown))
        try:
            records = _train_and_measure(folder, planned, materials, say)
        except KeyboardInterrupt as error:
            words = f"what is finished is in {folder}, and the same command goes on from there"
            raise Interrupted(words, number=getattr(error, "number", signal.SIGINT)) from None
        study = Study(folder, size, {each.name: each for each in planned}, records, materials)
        runs.write_json(folder / STUDY, _as_json(study, name, say), checksum=True)
    return folder / STUDY


def _settings(size: Size) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(size)))


# --- Before anything is trained ---


def _materials(size: Size, datasets: Sequence[str], data_dir: str | None) -> dict[str, StudyData]:
    """The data sets by their words, in their order.

    Raises:
        ValueError: one that cannot be read, or is no images; two with the same word.
    """
    found: dict[str, StudyData] = {}
    for dataset in datasets:
        options = replace(base(size, dataset), data_dir=data_dir)
        try:
            splits = load_splits(options)
            each = material(options, splits, size.images)
            check_support(each.options, splits)
        except ValueError as error:
            others = [other for other in datasets if other != dataset]
            hint = f"; --datasets {' '.join(others)} does without" if others else ""
            why = str(error).removeprefix("--datasets: ").removeprefix("dataset: ")
            raise ValueError(f"--datasets {dataset}: {why}{hint}") from None
        if dataset_word(dataset) in found:
            raise ValueError(f"--datasets: expected different names, got {dataset_word(dataset)} twice")
        found[dataset_word(dataset)] = each
    return found


def _compiled_where_it_pays(planned: Sequence[Planned], materials: dict[str, StudyData]) -> list[Planned]:
    """Runs that are too short to be compiled each for itself are compiled where enough of them share a graph.

    The compiler's cache knows a graph after the first of them; beta is a tensor in it, and the data no part of it.
    """
    if capture.capture_obstacle(find_device("cpu")) is not None:
        return list(planned)
    steps: Counter[Any] = Counter()
    for each in planned:
        splits = materials[dataset_word(each.options.dataset)].splits
        steps[_graph(each, splits.event_shape)] += count_steps(each.options, len(splits.train))

    def pays(each: Planned) -> bool:
        return compiling_pays(steps[_graph(each, materials[dataset_word(each.options.dataset)].splits.event_shape)])

    return [replace(each, options=replace(each.options, compile="on")) if pays(each) else each for each in planned]


def _graph(planned: Planned, event_shape: Sequence[int]) -> tuple[Any, ...]:
    """What two runs must share for their training steps to be one graph."""
    options = planned.options
    of_model = (options.network, options.latent_dim, options.posterior, options.scale_map, *event_shape)
    return (*of_model, options.objective, options.free_bits, options.clip_norm, planned.averaged)


def _check_folder(
    folder: Path, planned: Sequence[Planned], materials: dict[str, StudyData], asked: dict[str, Any]
) -> None:
    """Takes a new or empty folder, or one of the same study, and writes down in it what it is.

    Raises:
        ValueError: another folder.
    """
    path = folder / PLAN
    if path.exists():
        stored = runs.read_json(path)
        differ = [key for key, value in asked.items() if stored.get(key) != value]
        if differ:
            told = f"the {stored.get('size')} study of {', '.join(stored.get('datasets', []))}"
            raise ValueError(
                f"{folder}: expected a study like this one, got {told}, with other {' and '.join(differ)}; "
                "name another --output"
            )
    elif folder.exists() and not (runs.is_empty(folder) or (folder / RUNS).is_dir()):
        raise ValueError(f"{folder}: expected a new or empty folder, or that of a study; name another --output")
    for each in planned:
        run_dir = folder / RUNS / each.name
        if (run_dir / runs.CONFIG).exists():
            splits = materials[dataset_word(each.options.dataset)].splits
            check_same(run_dir, each.options, splits, free=frozenset({"compile"}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made: {error.strerror}") from None
    runs.check_writable(folder)
    runs.write_json(path, asked, checksum=True)


# --- Training and measuring ---


def _train_and_measure(
    folder: Path, planned: Sequence[Planned], materials: dict[str, StudyData], say: Say
) -> dict[str, dict[str, Any]]:
    """The record of each run, in the order in which they are trained."""
    records = {}
    finished = sum(_is_finished(folder / RUNS / each.name) for each in planned)  # they would spoil the time left
    with progress_bar(total=len(planned), initial=finished, unit="run", desc="study") as bar:
        for each in planned:
            bar.set_description(each.name)
            run_dir = folder / RUNS / each.name
            word = dataset_word(each.options.dataset)
            new = not _is_finished(run_dir)
            if new:
                train_planned(each, folder / RUNS, say=_silence)
            record = measured(each, run_dir, materials[word], in_full=not each.stressed, pictures=folder / PICTURES)
            records[each.name] = record
            if new:
                say(_in_words(record))
                bar.update()
    return records


def _silence(line: str) -> None:
    """What a single run says of itself is in its folder."""


def _is_finished(run_dir: Path) -> bool:
    """Trained to the end and evaluated, which comes last; or ended by a NaN."""
    return (run_dir / FAILURE).exists() or ((run_dir / runs.MODEL).exists() and is_evaluated(run_dir))


def _in_words(record: dict[str, Any]) -> str:
    """One run in a line."""
    if record["failed"] is not None:
        return f"{record['name']}: ended by {record['failed']}"
    evaluation = record["evaluation"]
    words = f"{record['name']}: reconstruction {plus_minus(evaluation['reconstruction'])}"
    if evaluation["log_likelihood"] is not None:
        S = evaluation["num_particles"]
        words += f", KL {plus_minus(evaluation['kl'])}, L_{S} {plus_minus(evaluation['log_likelihood'])} nats"
    return words + ("" if record["active"] is None else f", {record['active']} latents active")


# --- All numbers ---


def _as_json(study: Study, name: str, say: Say) -> dict[str, Any]:
    """study.json; see the sections."""
    say("Comparing the runs.")
    records = study.records.values()
    return {
        "version": _VERSION,
        "size": name,
        "settings": _settings(study.size),
        "datasets": [*study.materials],
        "data": {word: _data_of(study, each) for word, each in study.materials.items()},
        "environment": runs.describe_environment("cpu"),
        "seconds": {
            "training": sum(record["seconds"] or 0.0 for record in records),
            "evaluation": sum(record["seconds_evaluation"] or 0.0 for record in records),
            "measuring": sum(record["seconds_measuring"] or 0.0 for record in records),
        },
        "runs": {record["name"]: {k: v for k, v in record.items() if k != "codes"} for record in records},
        "mean": mean_section(study),
        "sweep": sweep_section(study),
        "collapse": collapse_section(study),
        "autoencoder": autoencoder_section(study),
        "regularization": regularization_section(study),
        "architectures": architectures_section(study),
        "scale_maps": scale_maps_section(study),
        "explorers": _explorers(study),
    }


def _data_of(study: Study, material: StudyData) -> dict[str, Any]:
    """The data, and what any log-likelihood on it is held against, as the base's evaluation has it."""
    evaluations = [
        runs.read_evaluations(study.run(record["name"])).get("test", {})
        for record in study.records.values()
        if record["dataset"] == material.word and not record["autoencoder"] and record["evaluation"] is not None
    ]
    first = evaluations[0] if evaluations else {}
    scale = {key: first.get(key) for key in ("binarization", "binarization_entropy", "floor")}
    return material.describe() | scale | {"originals": f"{PICTURES}/{material.word}/{ORIGINALS}"}


def _explorers(study: Study) -> list[dict[str, Any]]:
    """Runs with two latents, with where they put test images: the VAE first."""
    found = [record for record in study.records.values() if record.get("codes")]
    return [
        {
            "run": record["name"],
            "folder": f"{RUNS}/{record['name']}",
            "autoencoder": record["autoencoder"],
            "codes": record["codes"],
        }
        for record in sorted(found, key=lambda record: record["autoencoder"])
    ]
