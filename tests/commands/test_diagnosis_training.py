"""What a diagnosis says of a training that had not settled, and of the diagnosis that it replaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_run import SMALL, save_bars, train_small

from ppl_vae import runs
from ppl_vae.commands.diagnose import diagnose_run, trained_with
from ppl_vae.commands.options import Diagnose
from ppl_vae.reports.text.diagnosis import SETTLED_RISE
from ppl_vae.runs.opening import open_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train_small(tmp_path / "run", replace(SMALL, dataset=str(save_bars(tmp_path / "bars.npz"))))


def _with_validation(folder: Path, *values: float) -> Path:
    """The run, as if these had been its validation ELBOs."""
    (folder / runs.METRICS).unlink()
    for epoch, value in enumerate(values, 1):
        runs.append_metrics(folder, {"step": 5 * epoch, "epoch": epoch, "validation_elbo_nats_per_image": value})
    return folder


def _said(folder: Path, images: int = 20) -> list[str]:
    said: list[str] = []
    diagnose_run(
        Diagnose(str(folder), split=None, images=images, device="cpu", seed=0, dataset=None, data_dir=None),
        say=said.append,
    )
    return said


def test_what_the_last_epoch_gained_is_taken_from_the_metrics(folder: Path) -> None:
    run = open_run(str(_with_validation(folder, -50.0, -40.0, -32.5)))
    assert trained_with(run)["last_rise"] == 7.5


def test_a_single_epoch_tells_of_no_rise(folder: Path) -> None:
    assert trained_with(open_run(str(_with_validation(folder, -50.0))))["last_rise"] is None


@pytest.mark.parametrize(("rise", "settled"), [(SETTLED_RISE - 0.1, True), (SETTLED_RISE + 0.1, False)])
def test_a_training_that_had_not_settled_is_said(folder: Path, rise: float, settled: bool) -> None:
    said = _said(_with_validation(folder, -50.0, -50.0 + rise))
    assert any("training had not settled" in line for line in said) != settled


def test_a_diagnosis_that_goes_is_said(folder: Path) -> None:
    assert not any("Replaces" in line for line in _said(folder))
    assert "Replaces the diagnosis of 20 images." in _said(folder, images=10)
