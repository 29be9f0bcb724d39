"""What an evaluation writes beside the log-likelihood: its scale, and the numbers of each image."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from fitting import fit
from small_run import SMALL as SMALL_RUN
from small_run import train_small

from ppl_vae import data, load, runs, save
from ppl_vae.commands.evaluate import estimate_independent_pixels, evaluate_run
from ppl_vae.commands.options import Evaluate, Figures
from ppl_vae.commands.report import draw_run
from ppl_vae.commands.train import resume_run
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import initialize_output_bias
from ppl_vae.runs.results import read_per_image

DATA_DIR = os.environ.get("PPL_VAE_DATA_DIR")

# Test log-likelihood of independent pixels, nats, computed apart from this program on the verified files.
FLOORS = {"mnist": -205.81, "static-mnist": -205.79, "caltech-silhouettes": -380.05, "fashion-mnist": -385.02}


def unfitted_run(options: Options, splits: data.Splits) -> Run:
    return Run(Path(), replace(options, binarization=data.resolve_binarization(splits, None)), splits)


@pytest.mark.thorough
@pytest.mark.parametrize("dataset", FLOORS)
def test_the_floor_is_the_known_log_likelihood_of_independent_pixels(dataset):
    if dataset != "mnist" and DATA_DIR is None:
        pytest.skip(f"{dataset} is not embedded: set PPL_VAE_DATA_DIR to its folder")
    try:
        splits = data.load(dataset)
    except ValueError as error:
        pytest.skip(str(error))
    run = unfitted_run(Options(dataset=dataset), splits)
    found = estimate_independent_pixels(run, data.evaluation_images(splits, "test", run.binarization))
    assert found.mean == pytest.approx(FLOORS[dataset], abs=0.011)


def table(path: Path, array: np.ndarray) -> Path:
    np.save(path / "table.npy", array)
    return path / "table.npy"


SMALL = replace(SMALL_RUN, batch_size=50, images=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on real numbers under a normal likelihood: (folder, data, what was said)."""
    folder = tmp_path_factory.mktemp("real")
    generator = np.random.default_rng(0)
    array = (generator.normal(size=(400, 2)) @ generator.normal(size=(2, 6)) * 3 + 10).astype(np.float32)
    said: list[str] = []
    options = replace(SMALL, dataset=str(table(folder, array)), likelihood="normal")
    return train_small(folder / "run", options, say=said.append), array, said


def test_real_numbers_are_taken_as_they_are(run):
    folder, array, _ = run
    assert runs.read_json(folder / runs.CONFIG)["options"]["binarization"] == "none"
    seen = data.evaluation_images(data.load(str(folder.parent / "table.npy")), "test", "none")
    assert {tuple(row) for row in seen.tolist()} <= {tuple(row) for row in array.tolist()}


def test_the_floor_of_a_normal_is_that_of_scipy_with_a_scale_for_each_column(run):
    folder, _, _ = run
    splits = data.load(str(folder.parent / "table.npy"))
    train, test = splits.train.double().numpy(), splits.test.double().numpy()
    log_p = scipy.stats.norm(train.mean(0), train.std(0)).logpdf(test[data.subset(len(test), 20).numpy()]).sum(1)
    entry = runs.read_evaluations(folder)["test"]
    assert entry["floor"]["mean"] == pytest.approx(log_p.mean(), rel=1e-5)
    assert entry["floor"]["stderr"] == pytest.approx(log_p.std(ddof=1) / math.sqrt(20), rel=1e-4)


@pytest.mark.thorough
def test_training_beats_the_floor_of_a_normal_whose_scale_it_learned(run):
    """Six pixels of rank two: a trained decoder must explain what independent pixels cannot."""
    folder, _, _ = run
    folder_2 = folder.parent / "longer"
    options = replace(
        SMALL, dataset=str(folder.parent / "table.npy"), likelihood="normal", epochs=60, learning_rate=0.03
    )
    train_small(folder_2, options)
    entry = runs.read_evaluations(folder_2)["test"]
    assert entry["log_likelihood"]["mean"] > entry["floor"]["mean"] + 3
    assert load(folder_2).likelihood.family.log_scale < load(folder).likelihood.family.log_scale < 0.1


# --- The numbers of each image ---


def test_the_stored_numbers_of_the_images_give_the_stored_means(run):
    folder, _, _ = run
    stored, entry = read_per_image(folder, "test"), runs.read_evaluations(folder)["test"]
    for name, key in (("log_evidence", "log_likelihood"), ("elbo", "elbo"), ("kl", "kl")):
        values = getattr(stored.result, name).numpy()
        assert entry[key]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert entry[key]["stderr"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=1e-9)
    assert (stored.num_particles, stored.seed, stored.step) == (10, 0, entry["step"])


def test_numbers_of_other_weights_are_not_given(run, tmp_path):
    folder, _, _ = run
    stale = tmp_path / "run"
    stale.mkdir()
    for path in folder.glob("*.*"):
        (stale / path.name).write_bytes(path.read_bytes())
    weights, _ = runs.load_tensors(stale / runs.MODEL)
    assert read_per_image(stale, "test") is not None
    runs.save_tensors(stale / runs.MODEL, weights, {"step": 3})
    assert read_per_image(stale, "test") is None


# --- A VAE that was trained from Python ---


@pytest.fixture
def from_python(run, tmp_path):
    """A run folder by ``save``, and the VAE in it."""
    folder, _, _ = run
    options = replace(SMALL, dataset=str(folder.parent / "table.npy"), likelihood="normal")
    splits, records = data.load(options.dataset), []
    torch.manual_seed(0)
    vae = build_vae(options, splits.event_shape)
    initialize_output_bias(vae, splits.train)
    fit(vae, splits.train, splits.validation, epochs=3, on_epoch=records.append)
    return save(vae, tmp_path / "saved", options, metrics=records), vae


def test_what_python_saved_can_be_evaluated_and_drawn(from_python):
    folder, vae = from_python
    entry = evaluate_run(
        Evaluate(str(folder), split="test", num_particles=5, images=None, device="cpu", seed=3), say=lambda line: None
    )
    x = data.load(_dataset(folder)).test
    expected = Estimate.mean_of(evaluate(vae, x, num_particles=5, seed=3).log_evidence, 5)
    assert entry.log_likelihood.mean == pytest.approx(expected.mean, rel=1e-9)
    draw_run(Figures(str(folder)), say=lambda line: None)
    assert (folder / runs.FIGURES / "training_curves.png").exists()


def _dataset(folder: Path) -> str:
    return runs.read_json(folder / runs.CONFIG)["options"]["dataset"]


def test_what_python_saved_cannot_be_resumed_and_stays(from_python):
    folder, _ = from_python
    before = (folder / runs.MODEL).read_bytes()
    with pytest.raises(ValueError, match=r"--resume: expected a run of ppl-vae train, but .* was saved from Python"):
        resume_run(str(folder), epochs=10, say=print)
    assert (folder / runs.MODEL).read_bytes() == before


def test_loading_draws_nothing_from_the_global_generator(run):
    before = torch.get_rng_state()
    load(run[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_damaged_evaluation_is_replaced_by_a_new_one_with_a_line(from_python):
    folder, _ = from_python
    step = runs.load_step(folder / "model.safetensors")
    runs.write_json(folder / "evaluation.json", {"test": {"step": step, "num_images": 40}})
    said = []
    found = evaluate_run(Evaluate(str(folder), num_particles=10), say=said.append)
    assert "images 40" in said[0]
    assert runs.read_evaluations(folder)["test"]["num_images"] == found.num_images


def test_an_evaluation_waits_for_no_library_that_it_does_not_use():
    code = "import sys, torch, ppl_vae.commands.evaluate; from ppl_vae.runs.build import build_meta_vae; "
    code += "from ppl_vae.runs.options import Options; build_meta_vae(Options(), (1, 28, 28)); "
    code += "print(sorted({'matplotlib', 'torch._dynamo'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
