"""One run as one HTML page: its likelihood, what stands out, its live decoder, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ppl_vae import runs
from ppl_vae.reports.page import blocks as page
from ppl_vae.reports.page.blocks import Section, true_minus
from ppl_vae.reports.page.explorer import make_explorer
from ppl_vae.reports.run_figures import figure_names
from ppl_vae.reports.text import make_sentence, plus_minus
from ppl_vae.reports.text import pages as text
from ppl_vae.reports.text.diagnosis import describe_advice
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.reports.text.run import describe_model
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.results import Diagnosis, read_evaluation, to_json


def make_page(run: Run, step: int, diagnosis: Diagnosis | None, *, split: str) -> str:
    """The page of a run as HTML.

    Args:
        run: The run, evaluated and drawn.
        step: The step of its weights.
        diagnosis: The run's diagnosis, or None if there are too few images.
        split: The split that is diagnosed.
    """
    try:
        explorer = make_explorer(run).to_html()
    except ValueError as error:
        explorer = page.text(text.NO_EXPLORER.format(reason=make_sentence(str(error))))
    blocks: dict[str, Sequence[str]] = {
        "likelihood": _likelihood(run, step),
        "verdicts": _verdicts(run, diagnosis, split) if run.options.condition == "none" else [],
        "explore": [explorer],
        "figures": _pictures(run, figure_names(run)),
        "diagnosis": _pictures(run, list(text.DIAGNOSIS_FIGURES)) if diagnosis else [],
        "setup": _setup(run, step),
    }
    sections = [Section(text.SECTIONS[anchor], found, anchor) for anchor, found in blocks.items() if found]
    return page.page(text.page_title(run), sections, subtitle=make_sentence(describe_model(run)[0]))


def _setup(run: Run, step: int) -> list[str]:
    """Every option of the run, and its data."""

    def show(value: object) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    options = {name: value for name, value in to_json(run.options).items() if value is not None}
    rows = [[f"`{format_flag(name)}`", show(value)] for name, value in options.items()]
    return [page.text(text.describe_setup(run, step)), page.table(["option", "value"], rows, text.OPTIONS_CAPTION)]


def _likelihood(run: Run, step: int) -> list[str]:
    """The evaluation: its numbers, how they were measured, and how far to trust them."""
    entry = read_evaluation(run.folder)
    if entry is None or entry.step != step:
        return [page.text(text.describe_missing_evaluation(run))]
    keys = ("reconstruction",) if entry.log_likelihood is None else tuple(text.EVALUATION_ROWS)
    names = {"log_likelihood": f"log p(x): L_{entry.num_particles}", "elbo": "ELBO", "kl": "KL"}
    rows = [
        [names.get(key, key), true_minus(plus_minus(getattr(entry, key))), text.EVALUATION_ROWS[key]] for key in keys
    ]
    if entry.bits_per_dim is not None:
        bits = plus_minus(entry.bits_per_dim, 4)
        rows.insert(1, [text.BITS_PER_DIM, bits, text.BITS_PER_DIM_MEANING])
    caption = text.EVALUATION_CAPTION.format(num_images=entry.num_images)
    highlight = None if is_autoencoder(run.options) else 0
    lines = [line.strip() for line in describe_evaluation(entry)]
    details = [make_sentence(line) for line in lines if not line.startswith(("log-likelihood ", "ELBO "))]
    table = page.table(["nats per image", "mean ± standard error", "what it is"], rows, caption, highlight=highlight)
    return [table, page.text(true_minus(" ".join(details)))]


def _verdicts(run: Run, diagnosis: Diagnosis | None, split: str) -> list[str]:
    """What stands out."""
    if diagnosis is None:
        return [page.text(text.TOO_FEW_IMAGES.format(split=split))]
    numbers = diagnosis.numbers
    blocks: list[str] = [page.text(text.MEASURED_ON.format(num_images=numbers.num_images, split=diagnosis.split))]
    for verdict in diagnosis.verdicts:
        figures = _pictures(run, [verdict.figure] if verdict.figure else [])
        blocks.append(
            page.verdict(
                verdict.word,
                true_minus(make_sentence(verdict.evidence)),
                describe_advice(verdict),
                figure="".join(figures),
                is_healthy=verdict.severity == "note",
            )
        )
    return blocks


def _pictures(run: Run, names: Sequence[str]) -> list[str]:
    """The figures of the run's folder that exist, with their captions."""
    found = []
    for name in names:
        path, caption = run.folder / runs.FIGURES / name, (text.FIGURES | text.DIAGNOSIS_FIGURES).get(name, "")
        if path.is_file():
            found.append(page.picture(path.read_bytes(), caption, caption or Path(name).stem))
    return found
