"""The study: trains and measures every run, writes ``study.json`` with all numbers, and a report."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ppl_vae import runs
from ppl_vae.commands.options import RunStudy
from ppl_vae.commands.run_series import check_same_options
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Section, Text
from ppl_vae.reports.run_page import make_explorer
from ppl_vae.reports.text.pages import EXPLORE
from ppl_vae.runs.open import Say, open_run
from ppl_vae.runs.options import compiling_pays
from ppl_vae.runs.outputs import make_output_folder, write_figure
from ppl_vae.runs.resolve import check_support, count_steps, find_device, load_splits, resolve
from ppl_vae.runs.results import to_json
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import Interrupted
from ppl_vae.runtime.process import progress_bar
from ppl_vae.study.compare import assemble_numbers
from ppl_vae.study.data import PICTURES, StudyData, make_study_data, originals_path, write_strip
from ppl_vae.study.experiment import is_finished, measure_run, train_planned
from ppl_vae.study.figures import PageSource, draw_figures, format_mean
from ppl_vae.study.plan import DEFAULT, QUICK, Planned, Size, base, dataset_word, name_run, plan
from ppl_vae.study.questions import QUESTIONS
from ppl_vae.study.results import RUNS, STUDY, RunNumbers, read_study

LoadedData = dict[str, StudyData]


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
        page = write_report(path.parent)
    say(f"All numbers are in {path}, and the report is {page}.")


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

    Raises:
        Interrupted: SIGINT or SIGTERM; finished runs are kept.
        ValueError: Before any training: data that cannot be read or are no images, or a folder that holds something
            else, such as a study of another size, or that another process writes to.
    """
    loaded = _load_data(size, datasets, data_dir)
    num_pixels = {each.options.dataset: each.num_pixels for each in loaded.values()}
    planned = [
        replace(each, options=replace(each.options, data_dir=data_dir))
        for each in plan(size, [each.options.dataset for each in loaded.values()], num_pixels=num_pixels)
    ]
    planned = choose_compiled(planned, loaded)
    folder = Path(output)
    _make_folder(folder, planned, loaded)
    with runs.lock_folder(folder):
        say(
            f"The {name} study of {', '.join(loaded)}: {len(planned)} runs, in {folder}. "
            "After an interruption the same command continues it."
        )
        for word, each in loaded.items():
            write_strip(folder / originals_path(word), each.gray[each.shown])
        try:
            found = _train_and_measure(folder, planned, loaded, say)
        except KeyboardInterrupt as error:
            words = f"finished runs are in {folder}, and the same command continues the study"
            raise Interrupted(words, number=getattr(error, "number", signal.SIGINT)) from None
        say("Comparing the runs.")
        study = assemble_numbers(folder, size, name, loaded, found)
        runs.write_json(folder / STUDY, to_json(study))
    return folder / STUDY


# --- Before any training ---


def _load_data(size: Size, datasets: Sequence[str], data_dir: str | None) -> LoadedData:
    """The data sets by their words, in their order.

    Raises:
        ValueError: Data that cannot be read, or are no images; two data sets with the same word.
    """
    found: LoadedData = {}
    for dataset in datasets:
        options = replace(base(size, dataset), data_dir=data_dir)
        try:
            splits = load_splits(options)
            each = make_study_data(options, splits, size.images)
            check_support(each.options, splits)
        except ValueError as error:
            reason = str(error).removeprefix("--datasets: ").removeprefix("dataset: ")
            raise ValueError(f"--datasets {dataset}: {reason}") from None
        if dataset_word(dataset) in found:
            raise ValueError(f"--datasets: expected different names, got {dataset_word(dataset)} twice")
        found[dataset_word(dataset)] = each
    return found


def _find_data(planned: Planned, loaded: LoadedData) -> StudyData:
    return loaded[dataset_word(planned.options.dataset)]


def choose_compiled(planned: Sequence[Planned], loaded: LoadedData) -> list[Planned]:
    """Compiles short runs if enough of them share a graph, which the compiler's cache knows after the first.

    beta is a tensor in the graph, and the data are no part of it.
    """
    if capture.capture_obstacle(find_device("cpu")) is not None:
        return list(planned)

    def graph(each: Planned) -> tuple[object, ...]:
        options, shape = each.options, _find_data(each, loaded).splits.event_shape
        model = (options.network, options.latent_dim, options.posterior, options.scale_map, *shape)
        return (*model, options.objective, options.free_bits, options.clip_norm, each.averaged)

    steps: Counter[object] = Counter()
    for each in planned:
        steps[graph(each)] += count_steps(each.options, len(_find_data(each, loaded).splits.train))
    return [
        replace(each, options=replace(each.options, compile="on")) if compiling_pays(steps[graph(each)]) else each
        for each in planned
    ]


def _make_folder(folder: Path, planned: Sequence[Planned], loaded: LoadedData) -> None:
    """Makes a new folder, or takes one with runs of the same options.

    Raises:
        ValueError: Another folder.
    """
    for each in planned:
        run_dir = folder / RUNS / each.name
        if (run_dir / runs.CONFIG).exists():
            splits = _find_data(each, loaded).splits
            check_same_options(run_dir, each.options, resolve(each.options, splits), frozenset({"compile"}))
    if not (folder / RUNS).is_dir():
        make_output_folder(str(folder), folder)
        (folder / RUNS).mkdir()
    runs.check_writable(folder)


# --- Training and measuring ---


def _train_and_measure(folder: Path, planned: Sequence[Planned], loaded: LoadedData, say: Say) -> dict[str, RunNumbers]:
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
            numbers = measure_run(each, run_dir, _find_data(each, loaded), pictures=folder / PICTURES)
            found[each.name] = numbers
            if new:
                say(describe_run(numbers))
                bar.update()
    return found


def describe_run(run: RunNumbers) -> str:
    """One run in a line."""
    if run.failed is not None:
        return f"{run.name}: ended by {run.failed}"
    numbers = {"reconstruction": run.reconstruction, "KL": run.kl, "L_S": run.log_likelihood}
    words = [f"{name} {format_mean(value)}" for name, value in numbers.items() if value is not None]
    return f"{run.name}: {', '.join(words)} nats"


# --- The report ---


def write_report(folder: Path) -> Path:
    """Writes FOLDER/report.html from study.json and the pictures next to it, and the figures as files.

    Of the runs it reads only those with two latents, whose decoders the page draws with.

    Returns:
        The page's file.

    Raises:
        ValueError: No study, or a damaged one.
    """
    study = read_study(folder)
    (folder / runs.FIGURES).mkdir(exist_ok=True)
    for name, figure in draw_figures(study).items():
        write_figure(folder / runs.FIGURES / f"{name}.png", figure)
    runs.write_bytes(folder / "report.html", compose_page(PageSource(study, folder)).encode())
    return folder / "report.html"


def compose_page(source: PageSource) -> str:
    """The page as a string."""
    study = source.study
    failed = sum(run.failed is not None for run in study.runs.values())
    subtitle = (
        f"{len(study.runs)} trainings on {' and '.join(study.datasets)}, measured by one command; ended without a "
        f"result: {failed}. The size of this study is {study.size}; the numbers of a quick one are rough."
    )
    sections = [explain(source) for explain in QUESTIONS]
    return report.page("What a VAE does and why", [*sections, _explore(source)], subtitle=subtitle)


def _explore(source: PageSource) -> Section:
    """A map of each latent space of two dimensions whose weights are there, the VAE's first."""
    places = [
        source.folder / RUNS / name_run(source.study.datasets[0], what) for what in ("latents-2", "autoencoder-2")
    ]
    explorers = [make_explorer(open_run(str(place))) for place in places if (place / runs.MODEL).exists()]
    return Section("Move through a latent space", [Text(EXPLORE), *explorers], anchor="explore")
