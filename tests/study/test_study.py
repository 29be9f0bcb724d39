"""The study on small images: it measures every part, and continues where it was interrupted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_study import TINY, raise_killed, run_tiny_study, without_times

from ppl_vae import data, runs
from ppl_vae.commands.options import RunStudy
from ppl_vae.runs.options import PLAIN
from ppl_vae.runs.results import read_per_image, to_json
from ppl_vae.study import measure, plan, run
from ppl_vae.study.plan import DEFAULT
from ppl_vae.study.results import StudyNumbers, read_study

Study = tuple[Path, StudyNumbers]

STORED = Path(__file__).parents[2] / "scripts" / "results"


# --- The whole ---


def test_every_planned_run_is_measured(numbers):
    planned = [each.name for each in plan.plan(TINY, ["bars"], num_labels=300)]
    assert [*numbers.runs, *numbers.labelled] == planned
    assert list(numbers.labelled) == ["bars-labels-20"]


def test_a_semi_supervised_run_is_measured_on_the_base_s_images(study):
    folder, numbers = study
    found = numbers.labelled["bars-labels-20"]
    one, base = (read_per_image(folder / "runs" / name, "test").result for name in ("bars-labels-20", "bars-beta-1"))
    difference = (one.log_evidence - base.log_evidence).mean()
    assert numbers.differences["labels"]["bars-labels-20"].log_likelihood.mean == pytest.approx(float(difference))
    assert 0 <= found.classifier.mean <= 1
    assert (folder / found.picture).exists()


def test_study_json_holds_the_numbers_and_nothing_else(study):
    assert to_json(study[1]) == runs.read_json(study[0] / "study.json")


@pytest.mark.thorough
def test_a_killed_study_ends_with_the_numbers_of_an_uninterrupted_one(numbers, tmp_path, bars_file):
    uninterrupted = run_tiny_study(tmp_path / "whole", bars_file)
    assert without_times(to_json(numbers)) == without_times(to_json(uninterrupted))


def test_a_finished_study_trains_and_measures_nothing_again(study, bars_file, monkeypatch):
    monkeypatch.setattr(run, "train_or_resume", raise_killed)
    monkeypatch.setattr(measure, "measure", raise_killed)
    assert without_times(to_json(run_tiny_study(study[0], bars_file))) == without_times(to_json(study[1]))


def test_the_stored_study_is_that_of_the_planned_runs():
    stored = {name: each.options for name, each in read_study(STORED).runs.items()}
    planned = {each.name: each.options for each in plan.plan(DEFAULT, RunStudy().datasets)}
    few = plan.plan_labels(DEFAULT, "mnist", 50_000)
    assert {each.name: each.options.labels for each in few} == {
        name: each.labels for name, each in read_study(STORED).labelled.items()
    }
    assert planned.keys() == stored.keys()
    for name, options in planned.items():
        assert {word: getattr(options, word) for word in stored[name]} == stored[name]
        others = PLAIN.keys() - stored[name].keys()
        assert {word: getattr(options, word) for word in others} == {word: PLAIN[word] for word in others}


# --- Refusals ---


def test_a_folder_with_a_study_of_another_size_is_refused(study, bars_file):
    with pytest.raises(ValueError, match="others in epochs"):
        run_tiny_study(study[0], bars_file, replace(TINY, epochs=2))


# --- The numbers ---


def test_a_paired_difference_is_that_of_the_images(study):
    folder, numbers = study
    found = numbers.differences["beta"]["bars-beta-0.1"].log_likelihood
    a, b = (read_per_image(folder / "runs" / name, "test") for name in ("bars-beta-1", "bars-beta-0.1"))
    assert a is not None
    assert b is not None
    d = (b.result.log_evidence - a.result.log_evidence).numpy()
    assert found.mean == pytest.approx(d.mean(), rel=1e-9)
    assert found.stderr == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)), rel=1e-9)


@pytest.mark.parametrize("changed", [{"num_particles": 1000}, {"seed": 1}])
def test_evaluations_with_other_particles_or_another_seed_are_not_subtracted(study, changed, monkeypatch):
    stored = {"a": read_per_image(study[0] / "runs" / "bars-beta-1", "test")}
    assert stored["a"] is not None
    stored["b"] = replace(stored["a"], **changed)
    monkeypatch.setattr(measure, "_read", lambda folder: stored[folder.name])
    with pytest.raises(ValueError, match=f"b: expected an evaluation with the {next(iter(changed))}"):
        measure.compare_with_reference(Path(), ["a", "b"], "a")


def pixels_seen(bars_file: Path) -> np.ndarray:
    return data.evaluation_images(data.load(str(bars_file)), "train", "dynamic").flatten(1).double().numpy()


def test_eigenvalues_in_noise_units_are_those_of_the_pixels_correlations(numbers, bars_file):
    expected = np.linalg.eigvalsh(np.corrcoef(pixels_seen(bars_file).T))[::-1]
    np.testing.assert_allclose(numbers.data["bars"].eigenvalues, expected, rtol=0.02)  # marginals are smoothed


def test_directions_are_kept_above_the_eigenvalues_of_permuted_pixels(numbers, bars_file):
    x = pixels_seen(bars_file)
    edge = np.linalg.eigvalsh(np.corrcoef(np.random.default_rng(0).permuted(x, axis=0).T))[-1]
    assert numbers.data["bars"].edge == pytest.approx(edge, rel=0.1)
    kept = int((np.linalg.eigvalsh(np.corrcoef(x.T)) > edge).sum())
    assert numbers.count_directions(numbers.runs["bars-beta-1"]) == kept
