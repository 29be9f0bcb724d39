"""The study: trains and measures every run, writes ``study.json`` with all numbers, and a report."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ppl_vae import data, runs
from ppl_vae.commands.options import RunStudy
from ppl_vae.commands.run_series import check_runs, train_or_resume
from ppl_vae.diagnostics.likelihood import measure_noise
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.page.blocks import Section, page, text
from ppl_vae.reports.page.explorer import make_explorer
from ppl_vae.reports.text.pages import QUESTIONS, SUBTITLE, TITLE
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.open import Say, open_run
from ppl_vae.runs.outputs import make_output_folder, write_figure
from ppl_vae.runs.results import is_evaluated, read_evaluation, to_json
from ppl_vae.runtime.errors import Interrupted
from ppl_vae.runtime.process import progress_bar
from ppl_vae.study.data import MOST_TRAINING_IMAGES, StudyData, load_study_data, write_strip
from ppl_vae.study.figures import FIGURES
from ppl_vae.study.measure import compare_bounds, measure_labelled, measure_run
from ppl_vae.study.plan import DEFAULT, QUICK, Planned, Size, base, name_run, plan, sweep_name
from ppl_vae.study.questions import EXPLANATIONS, PageSource, format_mean
from ppl_vae.study.results import RUNS, STUDY, DataNumbers, LabelledNumbers, RunNumbers, StudyNumbers, read_study

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
        report = write_report(path.parent)
    say(f"All numbers are in {path}, and the report is {report}.")


def collect(
    size: Size, datasets: Sequence[str], *, name: str, output: str, say: Say, data_dir: str | None = None
) -> Path:
    """Trains and measures what is planned, and writes OUTPUT/study.json and OUTPUT/pictures.

    A study that was interrupted goes on: finished runs and measurements are kept.

    Args:
        size: How much.
        datasets: Names of data sets, or paths of a user's own images; the first has all parts.
        name: The name of the size.
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
        for each in plan(
            size,
            [each.options.dataset for each in loaded.values()],
            num_pixels=num_pixels,
            num_labels=_most_labels(next(iter(loaded.values())).splits),
        )
    ]
    folder = Path(output)
    _make_folder(folder, planned, loaded)
    with runs.lock_folder(folder):
        say(
            f"The {name} study of {', '.join(loaded)}: {len(planned)} runs, in {folder}. "
            "After an interruption the same command continues it."
        )
        for each in loaded.values():
            write_strip(folder / each.originals, each.gray[each.shown])
        try:
            found, labelled = _train_and_measure(folder, planned, loaded, say)
        except KeyboardInterrupt as error:
            words = f"finished runs are in {folder}, and the same command continues the study"
            raise Interrupted(words, number=getattr(error, "number", signal.SIGINT)) from None
        say("Comparing the runs.")
        runs.write_json(folder / STUDY, to_json(_assemble_numbers(folder / RUNS, size, name, loaded, found, labelled)))
    return folder / STUDY


# --- Before any training ---


def _load_data(size: Size, datasets: Sequence[str], data_dir: str | None) -> LoadedData:
    """The data sets by their words, in their order.

    Raises:
        ValueError: Data that cannot be read, or are no images; two data sets with the same word.
    """
    found: LoadedData = {}
    for dataset in datasets:
        try:
            each = load_study_data(replace(base(size, dataset), data_dir=data_dir), size.images)
        except ValueError as error:
            raise ValueError(f"--datasets {dataset}: {str(error).removeprefix('dataset: ')}") from None
        if each.word in found:
            raise ValueError(f"--datasets: expected different names, got {each.word} twice")
        found[each.word] = each
    return found


def _make_folder(folder: Path, planned: Sequence[Planned], loaded: LoadedData) -> None:
    """Makes a new folder, or takes one with runs of the same options.

    Raises:
        ValueError: Another folder.
    """
    for word, each in loaded.items():
        asked = {folder / RUNS / run.name: run.options for run in planned if run.dataset == word}
        check_runs(asked, each.splits)
    if not (folder / RUNS).is_dir():
        make_output_folder(str(folder), folder)
        (folder / RUNS).mkdir()
    runs.check_writable(folder)


def _most_labels(splits: data.Splits) -> int:
    """The most labels of training images that can be kept, equally many of each class 0 to K - 1; 0 without classes."""
    if any(split not in splits.labels for split in data.SPLITS):
        return 0
    counts = splits.labels["train"].bincount() if (splits.labels["train"] >= 0).all() else None
    return 0 if counts is None else len(counts) * int(counts.min())


# --- Training and measuring ---


def _train_and_measure(
    folder: Path, planned: Sequence[Planned], loaded: LoadedData, say: Say
) -> tuple[dict[str, RunNumbers], dict[str, LabelledNumbers]]:
    """The numbers of each run, in the order of training, and those of semi-supervised runs."""

    def keep_quiet(line: str) -> None:
        """The run's folder holds what is said of it."""

    found, labelled = {}, {}
    places = {each.name: folder / RUNS / each.name for each in planned}
    finished = {name for name, place in places.items() if (place / runs.MODEL).exists() and is_evaluated(place)}
    with progress_bar(total=len(planned), initial=len(finished), unit="run", desc="study") as bar:
        for each in planned:
            bar.set_description(each.name)
            if each.name not in finished:
                train_or_resume(places[each.name], each.options, None, say=keep_quiet, draw=False)
            numbers: dict[str, Estimate | None]
            if each.options.labels is not None:
                classes = labelled[each.name] = measure_labelled(each, folder)
                numbers = {"L_S": classes.log_likelihood}
            else:
                run = found[each.name] = measure_run(each, folder, loaded[each.dataset])
                numbers = {"reconstruction": run.reconstruction, "KL": run.kl, "L_S": run.log_likelihood}
            if each.name not in finished:
                words = [f"{name} {format_mean(value)}" for name, value in numbers.items() if value is not None]
                say(f"{each.name}: {', '.join(words)} nats")
                bar.update()
    return found, labelled


def _assemble_numbers(
    place: Path,
    size: Size,
    name: str,
    loaded: LoadedData,
    found: dict[str, RunNumbers],
    labelled: dict[str, LabelledNumbers],
) -> StudyNumbers:
    """All numbers of the study, whose runs are in a folder, and of a size with a name."""
    fields = {"training": "seconds", "evaluation": "seconds_evaluation", "measuring": "seconds_measuring"}
    return StudyNumbers(
        size=name,
        settings=size,
        datasets=tuple(loaded),
        data={word: _describe_data(place, each) for word, each in loaded.items()},
        runs=found,
        environment=runs.describe_environment("cpu"),
        seconds={
            what: sum(getattr(run, field, 0.0) or 0.0 for run in [*found.values(), *labelled.values()])
            for what, field in fields.items()
        },
        differences=compare_bounds(place, size, tuple(loaded), list(labelled)),
        labelled=labelled,
    )


def _describe_data(place: Path, each: StudyData) -> DataNumbers:
    splits, evaluation = each.splits, read_evaluation(place / sweep_name(each.word))
    family = build_likelihood(each.options, splits.event_shape)
    noise = measure_noise(family, each.load_images("train", MOST_TRAINING_IMAGES))
    if noise is None:  # the study's likelihood is a Bernoulli, which has a location
        raise ValueError(f"{splits.name}: expected training images that differ, got one image every time")
    return DataNumbers(
        description=splits.describe(),
        num_pixels=each.num_pixels,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        eigenvalues=tuple(noise.eigenvalues.tolist()),
        edge=noise.edge,
        floor=None if evaluation is None else evaluation.floor,
        real=each.measure_quality(each.load_images("validation", each.num_images, gray=True)),
        originals=each.originals,
    )


# --- The report ---


def write_report(folder: Path) -> Path:
    """Writes FOLDER/report.html from study.json and the pictures next to it, and the figures as files.

    It reads only the runs with two latents, whose decoders the page draws with.

    Returns:
        The page's file.

    Raises:
        ValueError: No study, or a damaged one.
    """
    study = read_study(folder)
    (folder / runs.FIGURES).mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        write_figure(folder / runs.FIGURES / f"{name}.png", draw(study))
    runs.write_bytes(folder / "report.html", compose_page(study, folder).encode())
    return folder / "report.html"


def compose_page(study: StudyNumbers, folder: Path) -> str:
    """The page as a string, with what a study's folder has of pictures, figures, and decoders of two latents."""
    explained = [explain(PageSource(study, folder)) for explain in EXPLANATIONS]
    sections = [section for section in explained if section is not None]
    places = [folder / RUNS / name_run(study.datasets[0], what) for what in ("latents-2", "autoencoder-2")]
    explorers = [make_explorer(open_run(str(place))).to_html() for place in places if (place / runs.MODEL).exists()]
    title, words = QUESTIONS["explore"]
    sections.append(Section(title, [text(words), *explorers], anchor="explore"))
    datasets = " and ".join(study.datasets)
    subtitle = SUBTITLE.format(trainings=len(study.runs) + len(study.labelled), datasets=datasets, size=study.size)
    return page(TITLE, sections, subtitle=subtitle)
