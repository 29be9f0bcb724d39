"""One run folder, in one process: what is kept, what is written again, and what is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SMALL as SMALL_RUN
from small_run import assert_same_numbers, killed_at_save, train_small

from ppl_vae import load, runs
from ppl_vae.commands.cli import parse
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.options import COMMANDS, Evaluate
from ppl_vae.commands.train import _check_dropout, resume_run, train_run
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import read_config
from ppl_vae.runs.options import MODEL_OPTIONS, Options
from ppl_vae.runs.resolve import initialize_output_bias
from ppl_vae.runs.results import to_json
from ppl_vae.runtime import ranks

pytestmark = pytest.mark.thorough

SMALL = replace(SMALL_RUN, batch_size=10, images=20)


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
        folder = train_small(tmp_path / "run", replace(SMALL, dataset=str(table), **changes), say=said.append)
        return folder, said

    return run


def _resume(folder, epochs=None):
    said = []
    resume_run(str(folder), epochs=epochs, say=said.append)
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


def test_an_evaluation_of_weights_that_are_gone_goes_with_them(train):
    folder, _ = train()
    options = {"num_particles": 5, "images": None, "device": "cpu", "seed": 0}
    evaluate_run(Evaluate(str(folder), split="validation", **options), say=lambda line: None)
    assert runs.read_evaluations(folder).keys() == {"test", "validation"}
    _resume(folder, epochs=6)
    step = runs.load_step(folder / runs.MODEL)
    assert step > 2 * 16
    assert {entry["step"] for entry in runs.read_evaluations(folder).values()} == {step}


def test_the_weights_of_a_finished_run_are_written_again_from_its_state(train):
    folder, _ = train()
    before = (folder / runs.MODEL).read_bytes()
    (folder / runs.MODEL).unlink()
    _resume(folder)
    assert (folder / runs.MODEL).read_bytes() == before


def test_the_written_evaluation_does_not_depend_on_the_beta_of_training(train):
    """The same weights under another beta in the config give the same numbers, bit for bit."""
    folder, _ = train()
    first = runs.read_evaluations(folder)["test"]
    config = runs.read_json(folder / runs.CONFIG)
    config["options"] |= {"beta": 7.0, "warmup_epochs": 1}
    runs.write_json(folder / runs.CONFIG, config)
    options = {"num_particles": 10, "images": 20, "device": "cpu", "seed": 0}
    again = evaluate_run(Evaluate(str(folder), split="test", **options), say=lambda line: None)
    assert json.dumps(to_json(again) | {"seconds": 0}) == json.dumps(first | {"seconds": 0})


def test_training_starts_from_the_marginals_of_the_pixels(table):
    options = replace(SMALL, dataset=str(table))
    vae = build_vae(options, (12,))
    x = torch.from_numpy(np.load(table)).float()
    initialize_output_bias(vae, x)
    with torch.no_grad():
        vae.likelihood.net.output.weight.zero_()
    rate = vae.likelihood(torch.zeros(2)).mean
    torch.testing.assert_close(rate, (x.sum(0) + 1) / (len(x) + 2))


# --- From another run's weights ---

FLOW = {"prior": "flow", "prior_layers": 2, "prior_hidden": (4,), "prior_flow": "spline"}
FURTHER = ["--objective", "dreg", "--num-particles", "3", "--epochs", "2", "--batch-size", "10", "--beta", "1"]
FURTHER += ["--average-decay", "0.9", "--images", "20", "--evaluation-particles", "10", "--learning-rate", "0.003"]


def from_run(folder, *words):
    """What a command asks for that starts from that run."""
    return parse(COMMANDS["train"], ["--start-from", str(folder), *FURTHER, *words]).options


def train_further(options, folder):
    """Without figures; what was said."""
    said = []
    train_run(options, str(folder), say=said.append, draw=False)
    return said


def records(folder):
    """What each epoch measured, without the time that it took."""
    lines = runs.read_metrics(folder)
    return [{k: v for k, v in line.items() if k not in ("seconds", "train_images_per_second")} for line in lines]


@pytest.fixture
def other(table, tmp_path):
    """A run with a flow prior whose kept weights are not its last."""
    changes = {"beta": 0.0, "learning_rate": 0.1, "epochs": 8, "keep": "best"}
    train_further(replace(SMALL, dataset=str(table), **FLOW, **changes), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_from_another_has_its_model_and_data_and_of_the_rest_what_is_given(other):
    options, theirs = from_run(other, "--seed", "3"), read_config(other)[0]
    assert all(getattr(options, name) == getattr(theirs, name) for name in MODEL_OPTIONS)
    assert (options.prior, options.prior_layers, options.latent_dim) == ("flow", 2, 2)
    assert (options.objective, options.num_particles, options.epochs, options.seed) == ("dreg", 3, 2, 3)
    rest = ("clip_norm", "checkpoint_seconds", "precision", "schedule", "warmup_epochs", "keep")
    assert all(getattr(options, name) == getattr(Options(), name) for name in rest)


def test_a_run_from_another_starts_at_the_elbo_of_its_kept_weights(other, tmp_path):
    """At a rate of next to nothing, and without a warm-up; its last weights are far from there."""
    said = train_further(from_run(other, "--learning-rate", "1e-12", "--num-particles", "1"), tmp_path / "further")
    elbos = [record["validation_elbo_nats_per_image"] for record in records(other)]
    assert max(elbos) - elbos[-1] > 0.1
    first = records(tmp_path / "further")[0]
    assert first["validation_elbo_nats_per_image"] == pytest.approx(max(elbos), abs=1e-4)
    assert first["beta"] == 1.0
    assert f"Starting from the weights of {other}." in said


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_run_from_another_goes_on_bit_for_bit_and_without_it(graphs, other, tmp_path, compile):
    """With a flow prior, DReG and moving averages; the training is killed at its last step but one."""
    options = from_run(other, "--compile", compile, "--checkpoint-seconds", "0")
    train_further(options, tmp_path / "undisturbed")
    with killed_at_save(2 * 16 - 1):
        train_further(options, tmp_path / "killed")
    assert runs.load_step(tmp_path / "killed" / runs.TRAINING_STATE) == 2 * 16 - 1
    shutil.rmtree(other)
    said = []
    resume_run(str(tmp_path / "killed"), epochs=None, say=said.append, draw=False)
    assert "Going on from step 31." in said
    for name in (runs.MODEL, runs.TRAINING_STATE):
        one, expected = (runs.load_tensors(tmp_path / run / name)[0] for run in ("killed", "undisturbed"))
        assert one.keys() == expected.keys()
        assert all(torch.equal(one[key], expected[key]) for key in expected), name
    assert any(key.startswith("average/prior.flow") for key in expected)
    assert records(tmp_path / "killed") == records(tmp_path / "undisturbed")
    assert_same_numbers(tmp_path / "killed", tmp_path / "undisturbed")


def test_dropout_is_refused_under_several_processes(monkeypatch):
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    with pytest.raises(ValueError, match="--dropout: expected one process, got 2"):
        _check_dropout(Options(dropout=0.3))
