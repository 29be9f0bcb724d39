"""A run's figures and its HTML page, drawn from its files."""

from __future__ import annotations

from pathlib import Path

from ppl_vae import runs
from ppl_vae.commands.diagnose import choose_split, diagnose_run
from ppl_vae.commands.options import Diagnose, Figures, Report
from ppl_vae.diagnostics.measurement import FEWEST_IMAGES
from ppl_vae.reports.page import GENERATOR
from ppl_vae.reports.run_figures import is_drawn, write_figures
from ppl_vae.reports.run_page import make_page
from ppl_vae.runs.evaluations import read_diagnosis
from ppl_vae.runs.open import Run, Say, open_run
from ppl_vae.runs.results import Diagnosis

REPORT = "report.html"

_HEAD = 1000  # bytes of a page, within which its generator stands


def draw_run(options: Figures, *, say: Say) -> None:
    """Draws a run's figures again, from its files.

    Raises:
        ValueError: No run, a damaged one, or other data than it was trained on.
    """
    write_figures(open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir), say=say)


def report_run(options: Report, *, say: Say) -> Path:
    """Writes one self-contained page of a run; draws and diagnoses it first, where that is not done.

    Returns:
        The page.

    Raises:
        ValueError: No run, a damaged one, other data than it was trained on, or a file that cannot be written. No page
            is written then.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    path = run.folder / REPORT if options.output is None else Path(options.output)
    _check_file(path, is_ours=options.output is None)
    step = runs.load_step(run.folder / runs.MODEL)
    if not is_drawn(run):
        write_figures(run, say=say)
    diagnosis = _find_diagnosis(run, step, options, say)
    runs.write_bytes(path, make_page(run, step, diagnosis, split=choose_split(run)).encode())
    say(f"The page of this run: {path}")
    return path


def _check_file(path: Path, *, is_ours: bool) -> None:
    """Checks before the work that the page can be written. An earlier page is replaced, any other file is not."""
    if path.is_dir():
        raise ValueError(f"--output: expected a file, but {path} is a folder")
    if path.exists() and not is_ours and GENERATOR.encode() not in path.read_bytes()[:_HEAD]:
        raise ValueError(f"--output: expected a new file, or an earlier page, but {path} is neither")
    if not path.parent.is_dir():
        raise ValueError(f"--output: expected a file in a folder that is there, but {path.parent} is not")
    runs.check_writable(path.parent)


def _find_diagnosis(run: Run, step: int, options: Report, say: Say) -> Diagnosis | None:
    """The diagnosis of these weights, made now if there is none; None if there are too few images."""
    stored = read_diagnosis(run.folder)
    if stored is not None and stored.step == step:
        return stored
    if len(getattr(run.splits, choose_split(run))) < FEWEST_IMAGES:
        return None
    return diagnose_run(Diagnose(str(run.folder), dataset=options.dataset, data_dir=options.data_dir), say=say)
