"""The study: trains and measures every run, writes ``study.json`` with all numbers, and a report."""

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
from ppl_vae.commands.run_series import check_same_options
from ppl_vae.runs.evaluations import read_evaluation
from ppl_vae.runs.fit_arguments import count_steps, find_device
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Say
from ppl_vae.runs.options import compiling_pays
from ppl_vae.runs.resolve import check_support, load_splits, resolve
from ppl_vae.runs.results import to_json
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import Interrupted
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.study.compare import compare_with_reference, measure_scale_gradients, measure_training_noise, split_blur
from ppl_vae.study.data import StudyData, study_data, write_strip
from ppl_vae.study.measure import measure_run
from ppl_vae.study.page import write_report
from ppl_vae.study.plan import (
    DEFAULT,
    QUICK,
    REMEDIED_NETWORKS,
    REMEDIES,
    Planned,
    Size,
    autoencoder_name,
    base,
    dataset_word,
    latents_name,
    network_name,
    plan,
    remedy_name,
    sweep_name,
)
from ppl_vae.study.results import (
    PICTURES,
    RUNS,
    STUDY,
    BlurParts,
    BoundDifferences,
    DataNumbers,
    RunNumbers,
    StudyNumbers,
)
from ppl_vae.study.tables import format_mean
from ppl_vae.study.training import is_finished, train_planned

PLAN = "plan.json"

Materials = dict[str, StudyData]


def run(options: RunStudy, *, say: Say) -> None:
    """Runs the command: ``collect``, and the report of its numbers, OUTPUT/report.html with figures/."""
    path = collect(
        QUICK if options.quick else DEFAULT,
        options.datasets,
        name="quick" if options.quick else "default",
        output=options.output or ("runs/study-quick" if options.quick else "runs/study"),
        data_dir=options.data_dir,
        say=say,
    )
    with runs.lock_folder(path.parent):
        report = write_report(path.parent)
    say(f"All numbers are in {path}, and the report is {report}.")


def collect(
    size: Size, datasets: Sequence[str], *, name: str, output: str, say: Say, data_dir: str | None = None
) -> Path:
    """Trains and measures what is planned, and writes OUTPUT/study.json and OUTPUT/pictures.

    A study that was interrupted goes on: finished runs and measurements are kept.

    Args:
        size: How much.
        datasets: Names of data sets, or paths of a person's own images; the first has all parts.
        name: Of the size.
        output: The study's folder.
        say: Takes each line for the reader.
        data_dir: The folder of the named data sets.

    Returns:
        The JSON file.

    Raises:
        Interrupted: SIGINT or SIGTERM; finished runs are kept.
        ValueError: Before any training: data that cannot be read or are no images, or a folder that holds something
            else, such as a study of another size, or that another process writes to.
    """
    materials = _load_data(size, datasets, data_dir)
    num_pixels = {each.options.dataset: each.num_pixels for each in materials.values()}
    planned = [
        replace(each, options=replace(each.options, data_dir=data_dir))
        for each in plan(size, [each.options.dataset for each in materials.values()], num_pixels=num_pixels)
    ]
    planned = choose_compiled(planned, materials)
    folder = Path(output)
    settings = json.loads(json.dumps(asdict(size)))
    _check_folder(folder, planned, materials, {"size": name, "datasets": [*materials], "settings": settings})
    with runs.lock_folder(folder):
        say(
            f"The {name} study of {', '.join(materials)}: {len(planned)} runs, in {folder}. "
            "After an interruption the same command continues it."
        )
        for word, each in materials.items():
            write_strip(folder / _originals(word), each.gray[each.shown], columns=len(each.shown))
        try:
            found = _train_and_measure(folder, planned, materials, say)
        except KeyboardInterrupt as error:
            words = f"finished runs are in {folder}, and the same command continues the study"
            raise Interrupted(words, number=getattr(error, "number", signal.SIGINT)) from None
        say("Comparing the runs.")
        study = _compare(folder, size, name, materials, found)
        runs.write_json(folder / STUDY, to_json(study))
    return folder / STUDY


def _originals(word: str) -> str:
    """The picture of test images, in the study's folder."""
    return f"{PICTURES}/{word}/originals.png"


# --- Before any training ---


def _load_data(size: Size, datasets: Sequence[str], data_dir: str | None) -> Materials:
    """The data sets by their words, in their order.

    Raises:
        ValueError: Data that cannot be read, or are no images; two data sets with the same word.
    """
    found: Materials = {}
    for dataset in datasets:
        options = replace(base(size, dataset), data_dir=data_dir)
        try:
            splits = load_splits(options)
            each = study_data(options, splits, size.images)
            check_support(each.options, splits)
        except ValueError as error:
            reason = str(error).removeprefix("--datasets: ").removeprefix("dataset: ")
            raise ValueError(f"--datasets {dataset}: {reason}") from None
        if dataset_word(dataset) in found:
            raise ValueError(f"--datasets: expected different names, got {dataset_word(dataset)} twice")
        found[dataset_word(dataset)] = each
    return found


def choose_compiled(planned: Sequence[Planned], materials: Materials) -> list[Planned]:
    """Compiles short runs if enough of them share a graph, which the compiler's cache knows after the first.

    beta is a tensor in the graph, and the data are no part of it.
    """
    if capture.capture_obstacle(find_device("cpu")) is not None:
        return list(planned)

    def graph(each: Planned) -> tuple[Any, ...]:
        options, shape = each.options, materials[dataset_word(each.options.dataset)].splits.event_shape
        model = (options.network, options.latent_dim, options.posterior, options.scale_map, *shape)
        return (*model, options.objective, options.free_bits, options.clip_norm, each.averaged)

    steps: Counter[Any] = Counter()
    for each in planned:
        steps[graph(each)] += count_steps(each.options, len(materials[dataset_word(each.options.dataset)].splits.train))
    return [
        replace(each, options=replace(each.options, compile="on")) if compiling_pays(steps[graph(each)]) else each
        for each in planned
    ]


def _check_folder(folder: Path, planned: Sequence[Planned], materials: Materials, asked: dict[str, Any]) -> None:
    """Takes a new or empty folder, or one of the same study, and writes ``plan.json`` into it.

    Raises:
        ValueError: Another folder.
    """
    path = folder / PLAN
    if path.exists():
        stored = runs.read_json(path)
        differ = [key for key, value in asked.items() if stored.get(key) != value]
        if differ:
            raise ValueError(
                f"{folder}: expected a study like this one, got the {stored.get('size')} study of "
                f"{', '.join(stored.get('datasets', []))}, with other {' and '.join(differ)}; name another --output"
            )
    elif folder.exists() and not (runs.is_empty(folder) or (folder / RUNS).is_dir()):
        raise ValueError(f"{folder}: expected a new or empty folder, or that of a study; name another --output")
    for each in planned:
        run_dir = folder / RUNS / each.name
        if (run_dir / runs.CONFIG).exists():
            splits = materials[dataset_word(each.options.dataset)].splits
            check_same_options(run_dir, each.options, resolve(each.options, splits), frozenset({"compile"}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made: {error.strerror}") from None
    runs.check_writable(folder)
    runs.write_json(path, asked)


# --- Training and measuring ---


def _train_and_measure(
    folder: Path, planned: Sequence[Planned], materials: Materials, say: Say
) -> dict[str, RunNumbers]:
    """The numbers of each run, in the order of training."""
    found = {}
    finished = sum(is_finished(folder / RUNS / each.name) for each in planned)  # they would spoil the time left
    with progress_bar(total=len(planned), initial=finished, unit="run", desc="study") as bar:
        for each in planned:
            bar.set_description(each.name)
            run_dir = folder / RUNS / each.name
            new = not is_finished(run_dir)
            if new:
                train_planned(each, folder / RUNS, say=lambda line: None)  # its folder holds what it says
            numbers = measure_run(
                each, run_dir, materials[dataset_word(each.options.dataset)], pictures=folder / PICTURES
            )
            found[each.name] = numbers
            if new:
                say(describe_run(numbers))
                bar.update()
    return found


def describe_run(run: RunNumbers) -> str:
    """One run in a line."""
    if run.failed is not None:
        return f"{run.name}: ended by {run.failed}"
    words = f"{run.name}: reconstruction {format_mean(run.reconstruction)}"
    if run.log_likelihood is not None:
        words += f", KL {format_mean(run.kl)}, L_S {format_mean(run.log_likelihood)} nats"
    return words + ("" if run.active is None else f", {run.active} latents active")


def _compare(folder: Path, size: Size, name: str, materials: Materials, found: dict[str, RunNumbers]) -> StudyNumbers:
    """All numbers of the study."""
    first, place = next(iter(materials)), folder / RUNS
    seconds = {
        "training": sum(run.seconds or 0.0 for run in found.values()),
        "evaluation": sum(run.seconds_evaluation or 0.0 for run in found.values()),
        "measuring": sum(run.seconds_measuring or 0.0 for run in found.values()),
    }
    return StudyNumbers(
        size=name,
        settings=size,
        datasets=tuple(materials),
        data={word: _describe_data(place, each) for word, each in materials.items()},
        runs=found,
        environment=runs.describe_environment("cpu"),
        seconds=seconds,
        differences=_compare_bounds(place, size, materials),
        blur={word: blur for word in materials if (blur := _split_blur(place, found, materials[word])) is not None},
        gradients=measure_scale_gradients(materials[first].options, materials[first].x[:500]),
    )


def _describe_data(place: Path, each: StudyData) -> DataNumbers:
    splits, noise = each.splits, measure_training_noise(each)
    evaluation = read_evaluation(place / sweep_name(each.word, 1.0))
    return DataNumbers(
        description=splits.describe(),
        num_pixels=each.num_pixels,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        classes=tuple(splits.class_names),
        eigenvalues=tuple(noise.eigenvalues.tolist()),
        edge=noise.edge,
        floor=None if evaluation is None else evaluation.floor,
        originals=_originals(each.word),
    )


def _compare_bounds(place: Path, size: Size, materials: Materials) -> dict[str, dict[str, BoundDifferences]]:
    """The differences of each table to its reference, by table."""
    tables: dict[str, dict[str, BoundDifferences]] = {"beta": {}, "collapse": {}, "networks": {}}
    for word in materials:
        betas = [sweep_name(word, beta) for beta in size.betas_of(word)]
        tables["beta"] |= compare_with_reference(place, betas, sweep_name(word, 1.0))
    first = next(iter(materials))
    for network in REMEDIED_NETWORKS:
        remedies = [remedy_name(first, network, remedy) for remedy in REMEDIES]
        tables["collapse"] |= compare_with_reference(place, remedies, remedy_name(first, network, "none"))
    varied = [latents_name(first, L) for L in size.latent_dims]
    varied += [network_name(first, network) for network in size.networks]
    base_name = sweep_name(first, 1.0)
    tables["networks"] = compare_with_reference(place, [base_name, *varied], base_name)
    return tables


def _split_blur(place: Path, found: dict[str, RunNumbers], each: StudyData) -> BlurParts | None:
    """The parts of the error of one data set; None if the VAE or the autoencoder did not end."""
    names = (sweep_name(each.word, 1.0), autoencoder_name(each.word), autoencoder_name(each.word, 2))
    ended = [name in found and found[name].failed is None for name in names]
    if not all(ended[:2]):
        return None
    two = load(place / names[2]) if ended[2] else None
    return split_blur(load(place / names[0]), load(place / names[1]), two, each)
