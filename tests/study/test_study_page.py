"""The study's page and its figures, from a study of small runs."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from ppl_vae.study.results import read_study
from ppl_vae.study.run import compose_page, write_report

pytestmark = pytest.mark.thorough


def headings(html: str) -> list[str]:
    """The titles of the sections, without the table of contents."""
    return [words for words in re.findall(r"<h2>(.*?)</h2>", html) if words != "Contents"]


@pytest.fixture(scope="module")
def study_folder(study) -> Path:
    """The folder of a small study with its report."""
    write_report(study[0])
    return study[0]


def test_the_report_has_every_section_and_figure(study_folder):
    html = (study_folder / "report.html").read_text()
    assert len(headings(html)) == 9
    figures = list((study_folder / "figures").glob("*.png"))
    assert len(figures) == 3
    assert all(base64.b64encode(path.read_bytes()).decode() in html for path in figures)


def test_the_stored_study_has_a_page_without_its_pictures(tmp_path):
    stored = read_study(Path(__file__).parents[2] / "scripts" / "results")
    assert len(headings(compose_page(stored, tmp_path))) == 9
