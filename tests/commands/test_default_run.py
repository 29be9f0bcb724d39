"""The default run: what its parts are, on few images; and the README's headline, minutes long (pytest -m slow)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import save_bars

from ppl_vae import load, log_weights, runs
from ppl_vae.commands.options import Diagnose
from ppl_vae.commands.report import diagnose_run
from ppl_vae.commands.train import train_run
from ppl_vae.parts.priors import Pushforward
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import read_config
from ppl_vae.runs.options import Options

pytestmark = pytest.mark.thorough

TRAIN = Path(__file__).parents[2] / "scripts" / "train_svi.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of the default recipe, on few images: sizes are smaller, and all parts as they come."""
    place = tmp_path_factory.mktemp("default")
    small = Options(
        dataset=str(save_bars(place / "bars.npz")),
        hidden=(16,),
        latent_dim=4,
        prior_hidden=(16,),
        epochs=4,
        batch_size=20,
        images=25,
        evaluation_particles=10,
        checkpoint_seconds=1e6,
    )
    return train_run(small, str(place / "run"), say=lambda line: None)


def test_config_holds_the_prior_and_the_objective_that_were_decided(run):
    options = runs.read_json(run / runs.CONFIG)["options"]
    assert (options["prior"], options["objective"]) == ("flow", "stl")


def test_a_vae_of_open_words_is_that_of_decided_ones(run):
    seen, x = read_config(run), torch.rand(3, 1, 8, 8).round()
    torch.manual_seed(0)
    fresh = build_vae(Options(hidden=(16,), latent_dim=4, prior_hidden=(16,)), (1, 8, 8))
    assert isinstance(fresh.prior(), Pushforward)
    torch.manual_seed(0)
    decided = build_vae(seen[0], (1, 8, 8))
    torch.manual_seed(1)
    log_w = log_weights(fresh.model, fresh.guide, x, 2)
    torch.manual_seed(1)
    torch.testing.assert_close(log_w, log_weights(decided.model, decided.guide, x, 2))


def test_the_average_of_the_weights_is_what_is_evaluated(run):
    tensors, _ = runs.load_tensors(run / runs.TRAINING_STATE)
    last = {name.removeprefix("weights/"): w for name, w in tensors.items() if name.startswith("weights/")}
    averages = [name.removeprefix("average/") for name in tensors if name.startswith("average/")]
    loaded = load(run).state_dict()
    assert any(not torch.equal(loaded[name], last[name]) for name in averages)


def test_it_is_evaluated_drawn_and_diagnosed(run):
    entry = json.loads((run / "evaluation.json").read_text())["test"]
    assert math.isfinite(entry["log_likelihood"]["mean"])
    assert any((run / runs.FIGURES).iterdir())
    assert diagnose_run(Diagnose(str(run), images=20), say=lambda line: None).numbers.kl.mean > 0


@pytest.mark.slow
def test_the_default_run_is_better_than_84_nats(tmp_path):
    subprocess.run([sys.executable, TRAIN, "--run-dir", tmp_path / "run"], check=True, timeout=3600)
    entry = json.loads((tmp_path / "run" / "evaluation.json").read_text())["test"]
    assert (entry["num_images"], entry["num_particles"], entry["binarization"]) == (5000, 200, "dynamic")
    bound = entry["log_likelihood"]
    assert bound["mean"] - 2 * bound["stderr"] > -84
    assert bound["mean"] < -45.53  # the entropy of the binarization itself: no model can be better in expectation
