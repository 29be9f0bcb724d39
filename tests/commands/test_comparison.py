"""Paired comparisons of trained models: against exact log p(x), scipy, and the rates that they promise."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import LinearGaussian
from scipy import stats
from small_run import SMALL as SMALL_RUN
from small_run import contents, train_small

from ppl_vae import data, runs
from ppl_vae.commands import compare_runs as comparison
from ppl_vae.commands.compare_runs import compare_runs
from ppl_vae.commands.options import CompareRuns
from ppl_vae.evidence.estimate import bound_difference, paired_difference, student_t_quantile
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.importance import Importance
from ppl_vae.runs.open import load_evaluated_vae, open_run
from ppl_vae.runs.results import to_json

# --- The statistics ---


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 31, 100, 999, 4999])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99, 0.9995])
def test_the_quantile_is_that_of_student(confidence, degrees):
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_t_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-10)


def _correlated(n, *, shift=0.0, noise=1.0, seed=0):
    """Images of which some are hard for both models (scale 20), and on which the models differ little (noise)."""
    generator = torch.Generator().manual_seed(seed)
    hard, ours, theirs = torch.randn(3, n, generator=generator, dtype=torch.double)
    return -90 + 20 * hard + noise * ours, -90 + 20 * hard + noise * theirs + shift


@pytest.mark.parametrize(("comparisons", "confidence"), [(1, 0.95), (4, 0.9875)])
def test_the_interval_is_that_of_scipy(comparisons, confidence):
    a, b = _correlated(60, shift=0.3)
    found = paired_difference(a, b, comparisons=comparisons)
    expected = stats.ttest_rel(b.numpy(), a.numpy()).confidence_interval(confidence)
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_pairing_takes_out_what_both_models_find_hard():
    a, b = _correlated(500)
    found = paired_difference(a, b)
    assert found.stderr == pytest.approx(stats.sem((b - a).numpy()), rel=1e-12)
    assert found.unpaired_stderr == pytest.approx(math.hypot(stats.sem(a.numpy()), stats.sem(b.numpy())), rel=1e-12)
    assert found.stderr < found.unpaired_stderr / 10


@pytest.mark.parametrize(
    ("a", "b", "comparisons", "words"),
    [
        (torch.zeros(3), torch.zeros(4), 1, r"b: expected one number for each image of a, \(3,\), got \(4,\)"),
        (torch.zeros(3, 1), torch.zeros(3, 1), 1, r"b: expected one number for each image"),
        (torch.zeros(1), torch.zeros(1), 1, "a: expected at least 2 images, for a standard error, got 1"),
        (torch.zeros(3), torch.tensor([0.0, -math.inf, math.nan]), 1, "b: expected finite numbers, got 2 that are not"),
    ],
)
def test_what_has_no_difference_is_refused(a, b, comparisons, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(a, b, comparisons=comparisons)


# --- Models whose log p(x) is known ---

FIRST = LinearGaussian.random(D=6, L=3, scale=0.7)


def _bounds(model, x, *, num_particles, seed=0, **guide):
    return evaluate(model.vae(**guide), x, num_particles=num_particles, seed=seed)


@pytest.mark.parametrize(
    ("second", "word"),
    [
        (replace(FIRST, scale=0.9), "worse"),
        (replace(FIRST, b=FIRST.b + 0.3), "worse"),
        (replace(FIRST, W=1.2 * FIRST.W), "worse"),
    ],
    ids=["scale", "mean", "loadings"],
)
def test_with_exact_guides_the_difference_is_that_of_log_p_x(second, word):
    """x is drawn from the first model, which no other can beat in expectation."""
    x = FIRST.draw(400)
    exact = second.log_evidence(x) - FIRST.log_evidence(x)
    found = bound_difference(_bounds(FIRST, x, num_particles=20), _bounds(second, x, num_particles=20))
    assert found.bounds.mean == pytest.approx(float(exact.mean()), abs=1e-9)
    assert found.bounds.stderr == pytest.approx(stats.sem(exact.numpy()), abs=1e-9)
    assert (found.bounds.word, found.ranks_log_evidence) == (word, True)


def test_with_wider_guides_the_difference_is_that_of_log_p_x_within_the_monte_carlo_error():
    """At S = 2,000 the bounds lack about 0.0005 nats, the Monte Carlo error is about 0.003."""
    x, second = FIRST.draw(200), replace(FIRST, scale=0.9)
    exact = float((second.log_evidence(x) - FIRST.log_evidence(x)).mean())
    results = [
        _bounds(model, x, num_particles=2000, widen=1.3, seed=seed) for seed, model in enumerate((FIRST, second))
    ]
    found = bound_difference(*results)
    assert 0 < found.monte_carlo_stderr < 0.01
    assert abs(found.bounds.mean - exact) < 5 * found.monte_carlo_stderr


@pytest.mark.thorough
def test_the_monte_carlo_error_is_how_much_other_particles_move_the_difference():
    x, second = FIRST.draw(30), replace(FIRST, scale=0.9)
    found = []
    for seed in range(60):
        results = [
            _bounds(model, x, num_particles=200, widen=1.3, seed=2 * seed + i)
            for i, model in enumerate((FIRST, second))
        ]
        found.append(bound_difference(*results))
    moved = np.std([each.bounds.mean for each in found], ddof=1)
    # A standard deviation of 60 has a relative error of 1 / sqrt(118).
    assert np.mean([each.monte_carlo_stderr for each in found]) == pytest.approx(moved, rel=4 / math.sqrt(118))


def test_one_model_under_a_bad_guide_has_the_worse_bound_but_log_p_x_is_not_ranked():
    """log p(x) is the same to the last digit; only the bounds differ, and the rise shows that they may."""
    x = FIRST.draw(400)
    found = bound_difference(_bounds(FIRST, x, num_particles=20), _bounds(FIRST, x, num_particles=20, widen=3.0))
    assert (found.bounds.word, found.ranks_log_evidence) == ("worse", False)


def test_a_guide_much_narrower_than_the_posterior_fools_the_rise():
    """The limit of the rule: one model again, but weights of a Pareto k of 0.88 show about half of what is lacking."""
    x = FIRST.draw(400)
    found = bound_difference(_bounds(FIRST, x, num_particles=20), _bounds(FIRST, x, num_particles=20, widen=0.35))
    assert found.bounds.mean == pytest.approx(-1.06, abs=0.15)
    assert found.tenfold_gain == pytest.approx(0.55, abs=0.1)
    assert found.ranks_log_evidence


@pytest.mark.parametrize("swapped", [False, True])
def test_the_rise_is_the_larger_of_the_two(swapped):
    x = FIRST.draw(50)
    results = [_bounds(FIRST, x, num_particles=50), _bounds(FIRST, x, num_particles=50, widen=1.6)]
    found = bound_difference(*(results[::-1] if swapped else results))
    assert found.tenfold_gain == float(results[1].tenfold_gain.mean())
    assert found.tenfold_gain > 10 * abs(float(results[0].tenfold_gain.mean()))


def test_too_few_particles_for_a_rise_rank_no_log_p_x():
    x, second = FIRST.draw(200), replace(FIRST, scale=1.5)
    found = bound_difference(_bounds(FIRST, x, num_particles=9), _bounds(second, x, num_particles=9))
    assert math.isnan(found.tenfold_gain)
    assert (found.bounds.word, found.ranks_log_evidence) == ("worse", False)


# --- Run folders ---

SMALL = replace(SMALL_RUN, batch_size=10, images=30, evaluation_particles=20)
ASKED = {"split": "test", "num_particles": 20, "images": 30, "device": "cpu", "seed": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs on the same binary table, in which pixels go together: "a", "b" (learns much faster), "wide" (3 latents)."""
    place = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    halves = generator.integers(0, 2, (400, 2), dtype=np.uint8)
    np.save(place / "table.npy", np.repeat(halves, 6, axis=1))
    np.save(place / "other.npy", generator.integers(0, 2, (400, 12), dtype=np.uint8))
    np.save(place / "gray.npy", generator.random((400, 12), dtype=np.float32))
    changed = {
        "a": {"learning_rate": 1e-4},
        "b": {"learning_rate": 0.03, "epochs": 4},
        "wide": {"latent_dim": 3},
        "other": {"dataset": str(place / "other.npy")},
        "dynamic": {"dataset": str(place / "gray.npy"), "binarization": "dynamic"},
        "fixed": {"dataset": str(place / "gray.npy"), "binarization": "fixed"},
        "threshold": {"dataset": str(place / "gray.npy"), "binarization": "threshold"},
    }
    asked = {name: {"dataset": str(place / "table.npy")} | changes for name, changes in changed.items()}
    return {name: train_small(place / name, replace(SMALL, **changes)) for name, changes in asked.items()}


def _compare(folders, names, output, **changes):
    said = []
    found = compare_runs(
        CompareRuns([str(folders[name]) for name in names], **ASKED | changes, output=str(output)), say=said.append
    )
    return to_json(found), "\n".join(said)


@pytest.fixture
def no_evaluation(monkeypatch):
    """What evaluates fails."""

    def evaluated(*arguments, **options):
        raise AssertionError("evaluated")

    monkeypatch.setattr(comparison, "evaluate_images", evaluated)


def test_the_stored_numbers_of_each_image_give_the_difference(folders, tmp_path):
    entry, _ = _compare(folders, ["a", "b"], tmp_path / "out")
    tensors, scalars = runs.load_tensors(tmp_path / "out" / "comparison.safetensors")
    difference = (tensors["log_evidence/b"] - tensors["log_evidence/a"]).numpy()
    assert entry["comparisons"][0]["difference"]["mean"] == pytest.approx(difference.mean(), rel=1e-12)
    assert entry["comparisons"][0]["difference"]["stderr"] == pytest.approx(stats.sem(difference), rel=1e-12)
    assert scalars == {"split": "test", "num_particles": 20, "seed": 0}


def test_the_options_that_take_the_stored_evaluations_are_named(folders, tmp_path):
    _, said = _compare(folders, ["a", "b"], tmp_path / "out", num_particles=21)
    assert "To take the stored ones: --images 30 --num-particles 20 --seed 0" in said


def test_stored_evaluations_of_the_same_kind_are_taken(folders, tmp_path, no_evaluation):
    entry, said = _compare(folders, ["a", "b"], tmp_path / "out")
    assert entry["stored_evaluations"]
    assert "stored evaluations" in said
    stored = [runs.read_evaluations(folders[name])["test"]["log_likelihood"] for name in ("a", "b")]
    assert [run["log_likelihood"] for run in entry["runs"]] == stored


@pytest.mark.parametrize("change", [{"num_particles": 19}, {"images": 29}, {"seed": 1}, {"split": "validation"}])
def test_stored_evaluations_of_another_kind_are_not_taken(folders, tmp_path, change):
    entry, _ = _compare(folders, ["a", "b"], tmp_path / "out", **change)
    assert not entry["stored_evaluations"]


def test_the_run_folders_are_left_as_they_are(folders, tmp_path):
    before = [contents(folders[name]) for name in ("a", "b")]
    _compare(folders, ["a", "b"], tmp_path / "out", num_particles=7, images=None)
    assert [contents(folders[name]) for name in ("a", "b")] == before


def test_a_copy_of_a_run_draws_the_same_noise_and_differs_by_nothing(folders, tmp_path):
    copy = Path(shutil.copytree(folders["a"], tmp_path / "copy"))
    entry, _ = _compare({"a": folders["a"], "copy": copy}, ["a", "copy"], tmp_path / "out", seed=5)
    found = entry["comparisons"][0]
    assert (found["difference"]["mean"], found["bound"]) == (0, "not distinguishable")


def _constant(bounds, rise):
    """Importance results with these bounds and this rise for each image, and no error otherwise."""
    zero = torch.zeros_like(bounds)
    return Importance(bounds, bounds, bounds, zero, zero + 1, zero, zero, zero, zero + rise)


@pytest.mark.parametrize(
    ("rise", "ranked", "words"), [(0.1, True, "log p(x) ranks so too"), (5.0, False, "more --num-particles say more")]
)
def test_a_difference_below_the_rise_ranks_the_bounds_alone(folders, tmp_path, monkeypatch, rise, ranked, words):
    """The second run is 2 ± 0.01 nats above the first."""
    a, b = _correlated(30, shift=2.0, noise=0.02)
    results = iter([_constant(a, rise), _constant(b, 0.0)])
    monkeypatch.setattr(comparison, "read_per_image", lambda folder, split: None)
    monkeypatch.setattr(comparison, "evaluate_images", lambda *arguments, **options: next(results))
    entry, said = _compare(folders, ["a", "b"], tmp_path / "out")
    assert entry["comparisons"][0]["bound"] == "better"
    assert entry["comparisons"][0]["ranks_log_likelihood"] is ranked
    assert words in said


def test_training_on_dynamic_or_fixed_draws_leaves_one_test_set(folders, tmp_path, monkeypatch):
    """What each run was itself evaluated on, and what both are compared on, is the published draw: by numpy alone."""
    opened = {name: open_run(str(folders[name])) for name in ("dynamic", "fixed")}
    splits, stream = opened["fixed"].splits, np.random.RandomState(777)
    stream.binomial(1, splits.validation.numpy())
    expected = torch.from_numpy(stream.binomial(1, splits.test.numpy())).float()
    for name, run in opened.items():
        assert torch.equal(data.evaluation_images(run.splits, "test", name), expected)
    seen = []

    def evaluated(run, x, options, **how):
        seen.append(x)
        return evaluate(load_evaluated_vae(run), x, num_particles=options.num_particles, seed=options.seed)

    monkeypatch.setattr(comparison, "evaluate_images", evaluated)
    entry, _ = _compare(folders, ["dynamic", "fixed"], tmp_path / "out", images=None, num_particles=7)
    assert [torch.equal(x, expected) for x in seen] == [True, True]
    assert entry["num_images"] == len(splits.test)


def test_a_run_whose_validation_bound_still_rises_is_named(folders, tmp_path, monkeypatch):
    rising = [{"validation_elbo_nats_per_image": -100.0 + epoch} for epoch in range(10)]
    records = {"a": rising + 11 * rising[-1:], "b": rising}
    monkeypatch.setattr(comparison.runs, "read_metrics", lambda folder: records[folder.name])
    entry, said = _compare(folders, ["a", "b"], tmp_path / "out")
    assert [run["last_gain"] for run in entry["runs"]] == [0.0, 1.0]
    assert "validation bound of b (+1.0 nats)" in said


# --- What is refused, before any evaluation ---


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (["a"], {}, "RUN: expected at least two run folders, got 1"),
        (["a", "b", "a"], {}, "RUN: expected different run folders, got one of them twice"),
        (["a", "b"], {"images": 1}, "--images: expected at least 2, for a standard error, got 1"),
        (["a", "other"], {}, r"data: expected one for all runs, got table.npy .* in .*a and other.npy .* in .*other$"),
        (
            ["dynamic", "threshold"],
            {},
            "binarization: expected one for all runs, got dynamic or fixed in .*dynamic and threshold in .*thr",
        ),
        (["a", "b"], {"device": "toaster"}, "--device: expected a device of this machine"),
    ],
)
@pytest.mark.usefixtures("no_evaluation")
def test_what_cannot_be_compared_is_refused_and_leaves_no_folder(folders, tmp_path, names, changes, words):
    with pytest.raises(ValueError, match=words):
        _compare(folders, names, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
