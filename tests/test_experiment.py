"""One run folder, in one process: what is kept, what is written again, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppl_vae import build, experiment, load, runs
from ppl_vae.options import Options

SMALL = Options(
    network="mlp",
    hidden=(8,),
    latent_dim=2,
    epochs=2,
    batch_size=10,
    images=20,
    evaluation_particles=10,
    checkpoint_seconds=1e6,
)


@pytest.fixture
def table(tmp_path):
    """Binary (N, D) data in which pixels go together, so that there is something to learn."""
    generator = np.random.default_rng(0)
    halves = generator.integers(0, 2, (200, 2), dtype=np.uint8)
    path = tmp_path / "table.npy"
    np.save(path, np.repeat(halves, 6, axis=1))
    return path


@pytest.fixture
def train(table, tmp_path):
    """Trains a small run with these options changed; returns its folder and what was said."""

    def run(**changes):
        said = []
        folder = experiment.train(replace(SMALL, dataset=str(table), **changes), str(tmp_path / "run"), say=said.append)
        return folder, said

    return run


def _resume(folder, epochs=None):
    said = []
    experiment.resume(str(folder), epochs=epochs, say=said.append)
    return said


def test_the_state_holds_the_last_weights_where_the_best_are_others(train):
    """At beta = 0 the ELBO at beta = 1 falls while training succeeds: the first weights are kept, and it is said."""
    folder, said = train(beta=0.0, learning_rate=0.1, epochs=12, keep="best")
    tensors, scalars = runs.load_tensors(folder / runs.TRAINING_STATE)
    assert scalars["best_step"] < scalars["step"]
    name = "likelihood.net.output.weight"
    assert not torch.equal(tensors[f"weights/{name}"], tensors[f"best/{name}"])
    assert torch.equal(load(folder).state_dict()[name], tensors[f"best/{name}"])
    assert any("are kept" in line and "beta = 0.0" in line for line in said)


def test_a_run_that_was_extended_starts_from_its_last_weights(train):
    folder, _ = train(beta=0.0, learning_rate=0.1, epochs=12, keep="best")
    before, _ = runs.load_tensors(folder / runs.TRAINING_STATE)
    config = runs.read_json(folder / runs.CONFIG)
    # A rate of next to nothing: what it ends with is what it started from.
    config["options"] |= {"learning_rate": 1e-12}
    runs.write_json(folder / runs.CONFIG, config)
    _resume(folder, epochs=13)
    after, _ = runs.load_tensors(folder / runs.TRAINING_STATE)
    name = "weights/likelihood.net.output.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_an_evaluation_of_weights_that_are_gone_goes_with_them(train):
    folder, _ = train()
    options = {"num_particles": 5, "images": None, "device": "cpu", "seed": 0, "say": lambda line: None}
    experiment.evaluate_run(str(folder), split="validation", **options)
    assert runs.read_evaluations(folder).keys() == {"test", "validation"}
    _resume(folder, epochs=6)
    step = runs.load_step(folder / runs.MODEL)
    assert step > 2 * 16
    assert {entry["step"] for entry in runs.read_evaluations(folder).values()} == {step}


def test_an_evaluation_that_replaces_another_says_what_it_replaces(train):
    folder, _ = train()
    said = []
    experiment.evaluate_run(str(folder), split="test", num_particles=3, images=7, device="cpu", seed=0, say=said.append)
    assert "Replaces the test split's estimate of 20 images with S = 10." in said


def test_the_weights_of_a_finished_run_are_written_again_from_its_state(train):
    folder, _ = train()
    before = (folder / runs.MODEL).read_bytes()
    (folder / runs.MODEL).unlink()
    _resume(folder)
    assert (folder / runs.MODEL).read_bytes() == before


def test_a_lost_record_of_the_training_is_said(train):
    folder, _ = train()
    (folder / runs.METRICS).unlink()
    (folder / runs.FIGURES / "training_curves.png").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected the record of at least one epoch"):
        _resume(folder)


def test_what_cannot_be_built_leaves_no_folder(train, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(build, "vae", too_large)
    with pytest.raises(RuntimeError, match="memory"):
        train()
    assert not (tmp_path / "run").exists()


def test_one_importance_sample_claims_no_reliability(train):
    folder, _ = train(evaluation_particles=1)
    entry = runs.read_evaluations(folder)["test"]
    assert entry["unreliable_images"] is entry["monte_carlo_stderr"] is entry["bias"] is None


def test_the_written_evaluation_does_not_depend_on_the_beta_of_training(train):
    """The same weights under another beta in the config give the same numbers, bit for bit."""
    folder, _ = train()
    first = runs.read_evaluations(folder)["test"]
    config = runs.read_json(folder / runs.CONFIG)
    config["options"] |= {"beta": 7.0, "warmup_epochs": 1}
    runs.write_json(folder / runs.CONFIG, config)
    options = {"num_particles": 10, "images": 20, "device": "cpu", "seed": 0, "say": lambda line: None}
    again = experiment.evaluate_run(str(folder), split="test", **options)
    assert json.dumps(again | {"seconds": 0}) == json.dumps(first | {"seconds": 0})


def test_a_warm_up_that_outlasts_the_training_is_said(train):
    _, said = train(warmup_epochs=5)
    assert any("beta never reaches 1.0" in line for line in said)


def test_training_starts_from_the_marginals_of_the_pixels(table):
    options = replace(SMALL, dataset=str(table))
    vae = build.vae(options, (12,))
    x = torch.from_numpy(np.load(table)).float()
    build.start_from_marginals(vae, x)
    with torch.no_grad():
        vae.likelihood.net.output.weight.zero_()
    rate = vae.likelihood(torch.zeros(2)).mean
    torch.testing.assert_close(rate, (x.sum(0) + 1) / (len(x) + 2))
