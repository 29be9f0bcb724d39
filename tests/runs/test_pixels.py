"""What each likelihood asks of the data, how the data obeys, on what scale the nats are, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import SMALL, killed_at_save, silent, train_small
from torch.testing import assert_close

from ppl_vae import data, runs
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.options import Evaluate
from ppl_vae.commands.train import resume_run
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.load import load
from ppl_vae.runs.open import load_evaluated_vae, open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import check_support, choose_evaluated_pixels, choose_pixels, describe_scale, resolve
from ppl_vae.runs.results import read_evaluation

pytestmark = pytest.mark.thorough

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    data.BINARY: GENERATOR.integers(0, 2, (60, 4, 4)).astype(np.uint8),
    data.LEVELS: GENERATOR.integers(0, 256, (60, 4, 4)).astype(np.uint8),
    data.PROBABILITIES: GENERATOR.uniform(0.01, 0.99, (60, 4, 4)),
    data.REAL: GENERATOR.normal(size=(60, 4, 4)),
    data.COUNTS: GENERATOR.poisson(3, (60, 4, 4)),
}

# How the model sees each kind of data under a likelihood that asks for this, and the scale of its nats.
SEEN = {
    ("bernoulli", data.BINARY): ("none", "none", "mass of binary pixels"),
    ("bernoulli", data.LEVELS): ("dynamic", "dynamic", "mass of binary pixels"),
    ("bernoulli", data.PROBABILITIES): ("dynamic", "dynamic", "mass of binary pixels"),
    ("discretized-logistic", data.LEVELS): ("levels", "levels", "mass of 8-bit levels"),
    ("beta", data.LEVELS): ("dequantized", "levels", "mass of 8-bit levels"),
    ("beta", data.PROBABILITIES): ("none", "none", "density of probabilities"),
    ("normal", data.LEVELS): ("dequantized", "levels", "mass of 8-bit levels"),
    ("normal", data.BINARY): ("none", "none", "density of binary pixels"),
    ("normal", data.PROBABILITIES): ("none", "none", "density of probabilities"),
    ("normal", data.REAL): ("none", "none", "density of real values"),
    ("normal", data.COUNTS): ("none", "none", "density of counts"),
    ("poisson", data.LEVELS): ("levels", "levels", "mass of 8-bit levels"),
    ("poisson", data.COUNTS): ("none", "none", "mass of counts"),
}

# What is refused, and what the line says.
REFUSED = {
    ("bernoulli", data.REAL): "expected pixels that are 0 or 1, got real values in train; --likelihood normal takes",
    ("bernoulli", data.COUNTS): "expected pixels that are 0 or 1, got counts in train; --likelihood negative-binomial",
    ("categorical", data.BINARY): "expected 8-bit levels .*, got binary; --likelihood bernoulli takes them",
    ("binomial", data.COUNTS): "expected 8-bit levels .*, got counts; .* saved as uint8 they are 8-bit levels",
    ("discretized-logistic", data.PROBABILITIES): "expected 8-bit levels .*, got probabilities",
    ("discretized-logistic-mixture", data.REAL): "expected 8-bit levels .*, got real values; --likelihood normal",
    ("beta", data.BINARY): "expected values between 0 and 1, got zeros and ones, which no density is of",
    ("continuous-bernoulli", data.REAL): "expected pixels that are .*, got real values in train",
    ("logit-normal", data.COUNTS): "expected pixels that are .*, got counts in train",
    ("poisson", data.REAL): "expected pixels that are .*, got real values in train",
}


def read(tmp_path: Path, kind: str) -> tuple[str, data.Splits]:
    path = tmp_path / "own.npy"
    np.save(path, ARRAYS[kind])
    splits = data.load(str(path))
    assert splits.kind == kind
    return str(path), splits


def resolved(tmp_path: Path, kind: str, **options: object) -> tuple[Options, data.Splits]:
    path, splits = read(tmp_path, kind)
    return resolve(replace(SMALL, dataset=path, **options), splits), splits


@pytest.mark.parametrize(("likelihood", "kind"), SEEN)
def test_pixels_are_brought_to_what_the_likelihood_asks_for(tmp_path, likelihood, kind):
    options, splits = resolved(tmp_path, kind, likelihood=likelihood)
    check_support(options, splits)
    found = choose_pixels(options, splits), choose_evaluated_pixels(options, splits), describe_scale(options, splits)
    assert found == SEEN[likelihood, kind]


@pytest.mark.parametrize(("likelihood", "kind"), REFUSED)
def test_data_off_the_support_is_refused_before_anything_is_written(tmp_path, likelihood, kind):
    path, _ = read(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"--likelihood {likelihood}: {REFUSED[likelihood, kind]}"):
        train_small(tmp_path / "run", replace(SMALL, dataset=path, likelihood=likelihood))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "poisson"])
def test_a_mass_is_not_dequantized(tmp_path, likelihood):
    with pytest.raises(ValueError, match=r"--dequantization: expected none for a mass of .*, got uniform"):
        resolved(tmp_path, data.LEVELS, likelihood=likelihood, dequantization="uniform")


# --- The logit transform ---


def test_the_jacobian_of_the_logit_is_counted():
    """log p(x) = log Normal(logit x) - log x - log(1 - x), for each pixel."""
    torch.manual_seed(0)
    plain = build_likelihood(Options(likelihood="normal"), (5,)).double()
    logit = build_likelihood(Options(likelihood="normal", transform="logit"), (5,)).double()
    h, x = torch.randn(7, 5).double(), torch.rand(7, 5).double()
    expected = plain(h).log_prob(x.logit()) - (x.log() + (1 - x).log()).sum(-1)
    assert_close(logit(h).log_prob(x), expected)


# --- Whole runs on 8-bit levels ---


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of a mass and one of a density, on the same levels."""
    folder = tmp_path_factory.mktemp("levels")
    np.save(folder / "own.npy", ARRAYS[data.LEVELS])
    words = ("discretized-logistic", "normal")
    asked = {word: replace(SMALL, dataset=str(folder / "own.npy"), likelihood=word) for word in words}
    return {word: train_small(folder / word, options) for word, options in asked.items()}


def entry_of(folder: Path) -> dict:
    return runs.read_evaluations(folder)["test"]


@pytest.mark.parametrize("word", ["discretized-logistic", "normal"])
def test_bits_per_dimension_are_the_nats_of_the_levels(two, word):
    entry = entry_of(two[word])
    assert entry["scale"] == "mass of 8-bit levels"
    expected = {
        key: sign * entry["log_likelihood"][key] / (16 * math.log(2)) for key, sign in (("mean", -1), ("stderr", 1))
    }
    assert entry["bits_per_dim"] == pytest.approx(expected)


def test_draws_change_no_exact_mass(two):
    asked = {"split": "validation", "num_particles": 10, "images": None, "device": "cpu", "seed": 0}
    with_draws, without = (
        evaluate_run(Evaluate(str(two["normal"]), **asked, dequantization_draws=M), say=silent) for M in (3, None)
    )
    assert with_draws.log_likelihood == without.log_likelihood


def test_the_words_of_an_evaluation_say_whether_the_mass_is_a_densitys(two):
    said = {word: "\n".join(describe_evaluation(read_evaluation(folder))) for word, folder in two.items()}
    assert {word: "exact" in words for word, words in said.items()} == {word: word == "normal" for word in said}


def test_a_run_is_evaluated_as_a_model_of_levels(two):
    run = open_run(str(two["normal"]))
    vae = load_evaluated_vae(run)
    x = data.evaluation_images(run.splits, "test", run.evaluated_pixels)
    torch.manual_seed(0)
    drawn = vae.likelihood(vae.posterior(x).sample()).sample()
    assert torch.equal(drawn, drawn.round())
    assert drawn.min() >= 0
    assert drawn.max() <= 255


def test_an_optimal_scale_is_fitted_while_it_trains_and_left_alone_by_an_evaluation(tmp_path):
    path, _ = read(tmp_path, data.REAL)
    folder = train_small(tmp_path / "run", replace(SMALL, dataset=path, likelihood="normal-optimal", batch_size=2))
    before = load(folder).likelihood.family.log_scale.clone()
    assert before != 0
    evaluate_run(
        Evaluate(str(folder), split="test", num_particles=5, images=None, device="cpu", seed=0), say=lambda line: None
    )
    assert torch.equal(before, load(folder).likelihood.family.log_scale)


def test_a_scale_in_closed_form_resumes_bit_for_bit(tmp_path):
    path, _ = read(tmp_path, data.REAL)
    options = replace(SMALL, dataset=path, likelihood="normal-optimal", batch_size=4, checkpoint_seconds=0.0)
    whole = train_small(tmp_path / "whole", options)
    with killed_at_save(15):
        train_small(tmp_path / "parts", options)
    resume_run(str(tmp_path / "parts"), epochs=None, say=silent)
    one, other = (runs.load_tensors(folder / runs.TRAINING_STATE)[0] for folder in (whole, tmp_path / "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("scaled", "hint"),
    [(ARRAYS[data.LEVELS] / 255, "uint8"), (ARRAYS[data.LEVELS].astype(float), "negative-binomial"), (None, None)],
    ids=["level / 255", "levels as floats", "continuous"],
)
def test_a_density_of_values_on_a_grid_is_warned_of(tmp_path, scaled, hint):
    np.save(tmp_path / "own.npy", ARRAYS[data.REAL] if scaled is None else scaled)
    said: list[str] = []
    options = replace(SMALL, dataset=str(tmp_path / "own.npy"), likelihood="normal")
    train_small(tmp_path / "run", options, say=said.append)
    warned = [line for line in said if "no upper bound" in line]
    assert len(warned) == (scaled is not None)
    assert all(hint in line for line in warned)
