"""One run's page, from small runs of every kind."""

from __future__ import annotations

import functools
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
from small_run import SMALL, save_bars, silent, train_small

from ppl_vae.commands.options import Report
from ppl_vae.commands.report import report_run


def save_table(path: Path) -> Path:
    """Two numbers that go together, a thousand times."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(1000, 1)) + 0.1 * generator.normal(size=(1000, 6))
    np.save(path, numbers.astype(np.float32))
    return path


KINDS = ["vae", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("autoencoder", "conv", "table"))]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of each kind, trained once."""
    folder = tmp_path_factory.mktemp("runs")
    options = replace(SMALL, dataset=str(save_bars(folder / "bars.npz")))
    table = str(save_table(folder / "table.npy"))
    kinds = {
        "vae": options,
        "autoencoder": replace(options, posterior="delta", beta=0.0, latent_dim=3),
        "conv": replace(options, network="conv", channels=(2, 4)),
        "table": replace(options, dataset=table, likelihood="normal", latent_dim=3, binarization=None),
    }
    return functools.cache(lambda kind: train_small(folder / kind, kinds[kind], draw=True))


@pytest.fixture(scope="module")
def page_of(run_of: Callable[[str], Path]) -> Callable[[str], str]:
    """The page of each run, written once."""
    return functools.cache(lambda kind: report_run(Report(str(run_of(kind))), say=silent).read_text())


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["vae", "autoencoder", "conv", "table"])
def test_every_kind_of_run_has_a_page_with_its_verdicts(run_of, page_of, kind):
    html = page_of(kind)
    diagnosis: dict[str, Any] = json.loads((run_of(kind) / "diagnosis.json").read_text())
    words = re.findall(r'aria-label="Verdict: (.*?)"', html)
    assert words == [verdict["word"] for verdict in diagnosis["verdicts"]]
    assert words


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_the_run_is_on_its_page(run_of, page_of, kind):
    html, figures = page_of(kind), list((run_of(kind) / "figures").glob("*.png"))
    assert len(figures) > 5
    assert len(re.findall(r'<figure class="picture', html)) >= len(figures)


def test_a_likelihood_is_shown_with_its_error(run_of, page_of):
    entry = json.loads((run_of("vae") / "evaluation.json").read_text())["test"]["log_likelihood"]
    assert f"−{-entry['mean']:.2f} ± {entry['stderr']:.2f}" in page_of("vae")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_dense_decoder_draws_on_the_page(run_of, page_of, chromium, kind):
    page_of(kind)
    with Visit(chromium, run_of(kind) / "report.html", width=400) as visit:
        assert len(visit.tab.evaluate("() => window.pplExplorer.explorerPixels(0)")) == 64
        assert visit.tab.evaluate("() => document.documentElement.scrollWidth") <= 400
        assert visit.complaints == []


def test_a_diagnosis_of_these_weights_is_not_made_again(run_of, page_of):
    page_of("vae")
    path = run_of("vae") / "diagnosis.json"
    marked = json.loads(path.read_text())
    marked["verdicts"][0]["evidence"] = "as it was written before"
    path.write_text(json.dumps(marked))
    page = report_run(Report(str(run_of("vae")), output=str(run_of("vae") / "again.html")), say=silent)
    assert "As it was written before." in page.read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "own.npz"])
def test_a_page_takes_the_place_of_a_page_alone(run_of, tmp_path, name):
    place = (tmp_path if name == "own.npz" else run_of("vae")) / name
    if name == "own.npz":
        place.write_bytes(b"numbers")
    before = place.read_bytes()
    with pytest.raises(ValueError, match="expected a new file, or an earlier page"):
        report_run(Report(str(run_of("vae")), output=str(place)), say=silent)
    assert place.read_bytes() == before


@pytest.mark.parametrize("damage", ["numbers", "verdicts", "split"])
def test_a_damaged_diagnosis_is_named_in_one_line(run_of, page_of, tmp_path, damage):
    page_of("vae")  # which diagnoses it
    folder = tmp_path / "run"
    shutil.copytree(run_of("vae"), folder)
    stored = json.loads((folder / "diagnosis.json").read_text())
    del stored[damage]
    (folder / "diagnosis.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"diagnosis\.json: damaged: .*'{damage}', which is missing"):
        report_run(Report(str(folder)), say=silent)
