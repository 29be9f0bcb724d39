"""Runs with --labels: a semi-supervised VAE is trained, resumed and evaluated, and what refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_run import SMALL, assert_same_numbers, killed_at_save, save_bars, silent, train_small

from ppl_vae import load, runs
from ppl_vae.commands.latents import sample_run
from ppl_vae.commands.options import Sample
from ppl_vae.commands.train import resume_run
from ppl_vae.runs.open import open_run
from ppl_vae.runs.results import LabelledEvaluation, read_evaluation

FEW = replace(SMALL, labels=40, objective=None, epochs=20, learning_rate=0.03)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    save_bars(folder / "bars.npz")
    return folder


@pytest.fixture(scope="module")
def run(place):
    return train_small(place / "run", replace(FEW, dataset=str(place / "bars.npz")), draw=True)


def test_a_classifier_that_saw_few_labels_tells_bars_that_lie_from_bars_that_stand(run):
    found = read_evaluation(run)
    assert isinstance(found, LabelledEvaluation)
    assert found.classifier_accuracy.mean > 0.8
    vae, tensors, splits = load(run), runs.load_tensors(run / runs.per_image_file("test"))[0], open_run(str(run)).splits
    guesses = vae.classifier(splits.test[tensors["index"]].float()).logits.argmax(-1)
    assert found.classifier_accuracy.mean == (guesses == tensors["labels"]).double().mean()


def test_only_the_kept_labels_reach_training(run):
    opened = open_run(str(run), say=silent)
    train, validation = (opened.known_labels(split) for split in ("train", "validation"))
    assert train[train >= 0].bincount().tolist() == [20, 20]
    assert (validation == -1).all()


def test_an_interrupted_run_goes_on_to_the_same_numbers(run, place):
    options = replace(FEW, dataset=str(place / "bars.npz"), checkpoint_seconds=0.0)
    with killed_at_save(7):
        train_small(place / "killed", options)
    resume_run(str(place / "killed"), say=silent, draw=False)
    assert_same_numbers(place / "killed", run)


def test_samples_come_by_class(run, tmp_path):
    folder = sample_run(Sample(str(run), num_samples=6, device="cpu", output=str(tmp_path / "out")), say=silent)
    assert (folder / "samples.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"labels": 1}, "at least one label for each of 2 classes, got 1"),
        ({"labels": 3000}, "expected at most one label for each image of a class, got 1500"),
        ({"objective": "elbo"}, "--objective elbo: expected semi-supervised with --labels"),
        ({"labels": None, "objective": "semi-supervised"}, "expected semi-supervised with --labels, and only there"),
        ({"labels": None, "label_weight": 3.0}, "--label-weight: expected --objective semi-supervised"),
    ],
)
def test_labels_that_are_not_there_and_other_objectives_are_refused(place, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train_small(tmp_path / "run", replace(FEW, dataset=str(place / "bars.npz"), **words))
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_compiled_training_has_the_weights_of_an_eager_one(place, tmp_path):
    eager, compiled = (
        load(
            train_small(tmp_path / word, replace(FEW, compile=word, epochs=2, dataset=str(place / "bars.npz")))
        ).state_dict()
        for word in ("off", "on")
    )
    assert all(torch.allclose(compiled[key], eager[key], rtol=1e-3, atol=1e-4) for key in eager)
