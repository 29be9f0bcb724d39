"""The study's page and its figures, from a study of small runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Visit
from PIL import Image
from small_study import TINY

from ppl_vae.study.figures import FIGURES
from ppl_vae.study.page import compose_page, write_report
from ppl_vae.study.questions import PageSource
from ppl_vae.study.results import StudyNumbers, read_study

pytestmark = pytest.mark.thorough

MOST_FIGURE_BYTES = 150_000


def headings(html: str) -> list[str]:
    """The titles of the sections, without the table of contents."""
    return [words for words in re.findall(r"<h2>(.*?)</h2>", html) if words != "Contents"]


@pytest.fixture(scope="module")
def study_folder(study) -> Path:
    """The folder of a small study with its report."""
    write_report(study[0])
    return study[0]


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_file_for_light_and_for_dark_pages(study_folder, name):
    paths = [study_folder / "figures" / f"{name}{suffix}.png" for suffix in ("", "-dark")]
    light, dark = (np.asarray(Image.open(path).convert("RGBA"), dtype=float) for path in paths)
    assert light.shape == dark.shape
    assert all(path.stat().st_size < MOST_FIGURE_BYTES for path in paths)
    assert (light[0, 0, 3], dark[0, 0, 3]) == (0, 0)
    assert light[light[..., 3] > 250][:, :3].max(1).min() < 60
    assert dark[dark[..., 3] > 250][:, :3].min(1).max() > 210


def test_the_report_has_every_section(study_folder):
    assert len(headings((study_folder / "report.html").read_text())) == 9


def test_the_report_embeds_each_figure_in_both_versions(study_folder):
    html = (study_folder / "report.html").read_text()
    assert html.count('class="only-light') >= len(FIGURES)
    assert html.count('class="only-light') == html.count('class="only-dark')


def test_beta_moves_pictures_and_numbers_together(study_folder, chromium):
    with Visit(chromium, study_folder / "report.html") as visit:
        slider = visit.tab.locator("figure.slider").first
        seen = []
        for place in range(len(TINY.betas["bars"])):
            slider.locator("input").fill(str(place))
            visit.frame()
            stop = slider.locator(".stop:visible")
            pictures = stop.locator("img").evaluate_all("images => images.map((image) => image.src)")
            seen.append((pictures, stop.locator("dd").all_inner_texts()))
        assert visit.complaints == []
    assert all(len(pictures) == 2 for pictures, _ in seen)
    assert all(seen[k][part] != seen[k + 1][part] for k in range(len(seen) - 1) for part in (0, 1))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_reads_on_a_phone(study_folder, chromium, scheme):
    with Visit(chromium, study_folder / "report.html", width=400, scheme=scheme) as visit:
        assert visit.tab.evaluate("() => document.documentElement.scrollWidth") <= 400
        assert visit.complaints == []
        assert all(address.startswith(("file:", "data:")) for address in visit.requests)


def without_runs(study: StudyNumbers, *parts: str) -> StudyNumbers:
    """The study without the runs whose names contain one of the parts."""
    left = {name: run for name, run in study.runs.items() if not any(part in name for part in parts)}
    return replace(study, runs=left)


@pytest.mark.parametrize(
    ("change", "title"),
    [
        (lambda study: without_runs(study, "beta", "mean"), "What does averaging over pixels do?"),
        (lambda study: without_runs(study, "beta"), "Why is the regularizer troublesome?"),
        (lambda study: without_runs(study, "remedy", "beta"), "What helps against collapse?"),
        (lambda study: replace(study, blur={}), "Why do VAEs blur, and autoencoders too?"),
        (lambda study: without_runs(study, "beta", "auto"), "How do I check that the regularization worked?"),
        (lambda study: without_runs(study, "beta", "latents", "network"), "Which network, and how many latents?"),
        (lambda study: replace(without_runs(study, "stress"), gradients=()), "Does the scale map matter?"),
    ],
)
def test_a_question_that_was_not_measured_is_named_as_missing(numbers, tmp_path, change, title):
    study = replace(change(numbers), size="quick")
    html = compose_page(PageSource(study, tmp_path, {})).replace("&#x27;", "'")
    assert title not in headings(html)
    assert title in html.split("Not measured: ")[1].split("</p>")[0]
    assert "quick study" in html


def test_the_stored_study_answers_every_question_but_the_explorer(tmp_path):
    stored = read_study(Path(__file__).parents[2] / "scripts" / "results")
    html = compose_page(PageSource(stored, tmp_path, {}))
    assert html.split("Not measured: ")[1].split("</p>")[0] == "Move through a latent space"
