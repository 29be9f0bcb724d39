"""The study's report from invented numbers, and one run's page from small runs of every kind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Visit
from PIL import Image
from small_run import SMALL, save_bars, train_small
from study_numbers import BETAS, study_numbers, write_pictures

from ppl_vae.commands.cli import parse
from ppl_vae.commands.options import COMMANDS, Report
from ppl_vae.reports.run_page import report_run
from ppl_vae.runs.results import to_json
from ppl_vae.study.figures import FIGURES, find_seed_gains
from ppl_vae.study.page import compose_page, write_report
from ppl_vae.study.questions import Material
from ppl_vae.study.results import StudyNumbers

LARGEST_FIGURE = 150_000  # bytes, by the study's own measure of what a page may weigh


def silent(line: str) -> None:
    """Nothing is said."""


def headings(html: str) -> list[str]:
    """What stands over the sections, but for the contents."""
    return [words for words in re.findall(r"<h2>(.*?)</h2>", html) if words != "Contents"]


# --- The study's report ---


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory, runs_of: dict[str, Path]) -> Path:
    """A study with invented numbers and one real run of two latents, and its report."""
    folder = tmp_path_factory.mktemp("study")
    study = study_numbers()
    for name in ("mnist-latents-2", "mnist-autoencoder-2"):
        study.runs[name] = replace(study.runs[name], codes=((0.5, -1.0, 3), (1.5, 0.25, 7)))
        shutil.copytree(runs_of["vae"], folder / "runs" / name)
    write_pictures(study, folder)
    (folder / "study.json").write_text(json.dumps(to_json(study)))
    write_report(folder)
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_a_file_for_light_and_for_dark_pages(study_folder, name):
    paths = [study_folder / "figures" / f"{name}{suffix}.png" for suffix in ("", "-dark")]
    light, dark = (np.asarray(Image.open(path).convert("RGBA"), dtype=float) for path in paths)
    assert light.shape == dark.shape
    assert all(path.stat().st_size < LARGEST_FIGURE for path in paths)
    assert (light[0, 0, 3], dark[0, 0, 3]) == (0, 0)
    assert light[light[..., 3] > 250][:, :3].max(1).min() < 60
    assert dark[dark[..., 3] > 250][:, :3].min(1).max() > 210


def test_the_report_has_every_section(study_folder):
    assert len(headings((study_folder / "report.html").read_text())) == 9


def test_the_report_embeds_each_figure_in_both_versions(study_folder):
    html = (study_folder / "report.html").read_text()
    assert html.count('class="only-light') >= len(FIGURES)
    assert html.count('class="only-light') == html.count('class="only-dark')


def test_numbers_have_a_true_minus(study_folder):
    html = (study_folder / "report.html").read_text()
    shown = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    assert len(re.findall(r"−\d+\.\d+ ± \d", shown)) > 10
    assert re.findall(r"(?<![\w-])-\d", shown) == []


def test_beta_moves_pictures_and_numbers_together(study_folder, chromium):
    with Visit(chromium, study_folder / "report.html") as visit:
        slider = visit.tab.locator("figure.slider").first
        seen = []
        for place in range(len(BETAS)):
            slider.locator("input").fill(str(place))
            visit.frame()
            stop = slider.locator(".stop:visible")
            pictures = stop.locator("img").evaluate_all("images => images.map((image) => image.src)")
            seen.append((pictures, stop.locator("dd").all_inner_texts()))
        assert visit.complaints == []
    assert all(len(pictures) == 2 for pictures, _ in seen)
    assert all(seen[k][part] != seen[k + 1][part] for k in range(len(seen) - 1) for part in (0, 1))


def test_the_report_shows_the_planes_of_two_latents(study_folder, chromium):
    with Visit(chromium, study_folder / "report.html") as visit:
        before = visit.tab.evaluate("() => window.pplExplorer.explorerPixels(0)")
        visit.tab.evaluate("() => window.pplExplorer.explorerSet(0, 2.0, -2.0)")
        visit.frame()
        after = visit.tab.evaluate("() => window.pplExplorer.explorerPixels(0)")
        assert visit.tab.locator("figure.explorer").count() == 2
    assert len(before) == 64
    assert np.abs(np.array(before) - np.array(after)).max() > 0.001


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
def test_a_question_that_was_not_measured_is_named_as_missing(tmp_path, change, title):
    study = replace(change(study_numbers()), size="quick")
    html = compose_page(Material(study, tmp_path, {})).replace("&#x27;", "'")
    assert title not in headings(html)
    assert title in html.split("Not measured: ")[1].split("</p>")[0]
    assert "quick study" in html


def test_seeds_are_compared_with_themselves():
    study = study_numbers(("mnist",))
    runs = {name: study.runs[name].log_likelihood.mean for name in ("mnist-beta-0.3-seed-1", "mnist-beta-1-seed-1")}
    gain = runs["mnist-beta-0.3-seed-1"] - runs["mnist-beta-1-seed-1"]
    assert sorted(find_seed_gains(study, "mnist", "log_likelihood")) == [(0.3, gain), (1.0, 0.0)]


def test_links_of_the_contents_lead_somewhere(tmp_path):
    html = compose_page(Material(study_numbers(("mnist",)), tmp_path, {}))
    links = set(re.findall(r'href="#([\w-]+)"', html))
    assert len(links) > 5
    assert links <= set(re.findall(r'\bid="([\w-]+)"', html))


def test_a_damaged_study_is_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"datasets": ["mnist"]}))
    with pytest.raises(ValueError, match=r"study\.json: damaged"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


# --- One run's page ---


def save_table(path: Path) -> Path:
    """Two numbers that go together, a thousand times."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(1000, 1)) + 0.1 * generator.normal(size=(1000, 6))
    np.save(path, numbers.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    options = replace(SMALL, dataset=str(save_bars(folder / "bars.npz")))
    table = str(save_table(folder / "table.npy"))
    kinds = {
        "vae": options,
        "autoencoder": replace(options, posterior="delta", beta=0.0, latent_dim=3),
        "conv": replace(options, network="conv", channels=(2, 4)),
        "table": replace(options, dataset=table, likelihood="normal", latent_dim=3, binarization=None),
    }
    return {kind: train_small(folder / kind, each) for kind, each in kinds.items()}


@pytest.fixture(scope="module")
def page_of(runs_of: dict[str, Path]) -> Callable[[str], str]:
    """The page of each run, written once."""
    pages: dict[str, str] = {}

    def page(kind: str) -> str:
        if kind not in pages:
            pages[kind] = report_run(Report(str(runs_of[kind])), say=silent).read_text()
        return pages[kind]

    return page


@pytest.mark.parametrize("kind", ["vae", "autoencoder", "conv", "table"])
def test_every_kind_of_run_has_a_page_with_its_verdicts(runs_of, page_of, kind):
    html = page_of(kind)
    diagnosis: dict[str, Any] = json.loads((runs_of[kind] / "diagnosis.json").read_text())
    words = re.findall(r'aria-label="Verdict: (.*?)"', html)
    assert words == [verdict["word"] for verdict in diagnosis["verdicts"]]
    assert words


@pytest.mark.parametrize("kind", ["vae", "autoencoder", "conv", "table"])
def test_every_figure_of_the_run_is_on_its_page(runs_of, page_of, kind):
    html, figures = page_of(kind), list((runs_of[kind] / "figures").glob("*.png"))
    assert len(figures) > 5
    assert len(re.findall(r'<figure class="picture', html)) >= len(figures)


def test_a_likelihood_is_shown_with_its_error_and_what_it_means(runs_of, page_of):
    entry = json.loads((runs_of["vae"] / "evaluation.json").read_text())["test"]["log_likelihood"]
    assert f"−{-entry['mean']:.2f} ± {entry['stderr']:.2f}" in page_of("vae")
    assert "a lower bound on log p(x)" in page_of("vae")


def test_an_autoencoder_has_no_likelihood_on_its_page(page_of):
    assert "log p(x): L_" not in page_of("autoencoder")
    assert "How well it reconstructs" in headings(page_of("autoencoder"))


@pytest.mark.parametrize(
    ("kind", "words"), [("conv", "dense networks (mlp, gated), got"), ("table", "images (1, H, W)")]
)
def test_a_decoder_that_cannot_be_drawn_live_is_explained(page_of, kind, words):
    assert "There is no live picture here" in page_of(kind)
    assert words in page_of(kind)


@pytest.mark.parametrize("kind", ["vae", "autoencoder"])
def test_a_dense_decoder_draws_on_the_page(runs_of, page_of, chromium, kind):
    page_of(kind)
    with Visit(chromium, runs_of[kind] / "report.html", width=400) as visit:
        assert len(visit.tab.evaluate("() => window.pplExplorer.explorerPixels(0)")) == 64
        assert visit.tab.evaluate("() => document.documentElement.scrollWidth") <= 400
        assert visit.complaints == []


def test_a_diagnosis_of_these_weights_is_not_made_again(runs_of, page_of):
    page_of("vae")
    path = runs_of["vae"] / "diagnosis.json"
    marked = json.loads(path.read_text())
    marked["verdicts"][0]["evidence"] = "as it was written before"
    path.write_text(json.dumps(marked))
    page = report_run(Report(str(runs_of["vae"]), output=str(runs_of["vae"] / "again.html")), say=silent)
    assert "As it was written before." in page.read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is .* a run folder"):
        report_run(Report(str(tmp_path)), say=silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "own.npz"])
def test_a_page_takes_the_place_of_a_page_alone(runs_of, tmp_path, name):
    place = (tmp_path if name == "own.npz" else runs_of["conv"]) / name
    if name == "own.npz":
        place.write_bytes(b"numbers")
    before = place.read_bytes()
    with pytest.raises(ValueError, match="expected a new file, or an earlier page"):
        report_run(Report(str(runs_of["conv"]), output=str(place)), say=silent)
    assert place.read_bytes() == before


@pytest.mark.parametrize("damage", ["numbers", "verdicts", "split"])
def test_a_damaged_diagnosis_is_named_in_one_line(runs_of, page_of, tmp_path, damage):
    page_of("vae")  # which diagnoses it
    folder = tmp_path / "run"
    shutil.copytree(runs_of["vae"], folder)
    stored = json.loads((folder / "diagnosis.json").read_text())
    del stored[damage]
    (folder / "diagnosis.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"diagnosis\.json: damaged: expected split, numbers, verdicts"):
        report_run(Report(str(folder)), say=silent)


@pytest.mark.parametrize(
    ("place", "words"), [("", "expected a file, but .* is a folder"), ("no/page.html", "in a folder that is there")]
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(runs_of, tmp_path, place, words):
    before = sorted(runs_of["conv"].rglob("*"))
    with pytest.raises(ValueError, match=words):
        report_run(Report(str(runs_of["conv"]), output=str(tmp_path / place)), say=silent)
    assert sorted(runs_of["conv"].rglob("*")) == before


def test_the_command_takes_a_run_and_a_file():
    asked = parse(COMMANDS["report"], ["runs/x", "--output", "page.html"])
    assert (asked.run_dir, asked.output, asked.dataset) == ("runs/x", "page.html", None)
