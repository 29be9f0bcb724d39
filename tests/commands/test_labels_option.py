"""Runs with --condition labels: trained, resumed, evaluated, sampled, drawn and shared, and what refuses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SMALL, assert_same_numbers, bars, killed_at_save, save_bars, silent, train_small
from torch.testing import assert_close

from ppl_vae import load, log_evidence, runs
from ppl_vae.commands.certify import certify_run
from ppl_vae.commands.compare_runs import compare_runs
from ppl_vae.commands.compress import compress_run
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.latents import encode_images, impute_images, sample_run
from ppl_vae.commands.options import (
    Certify,
    CompareRuns,
    Compress,
    Diagnose,
    Encode,
    Evaluate,
    Export,
    Impute,
    Report,
    Sample,
)
from ppl_vae.commands.report import diagnose_run, export_run, report_run
from ppl_vae.commands.train import resume_run
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options
from ppl_vae.runs.results import LabelledEvaluation, read_evaluation, read_per_image
from ppl_vae.runtime.records import Records

LABELLED = replace(SMALL, condition="labels", epochs=60, learning_rate=0.01)
SHORT = replace(LABELLED, epochs=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    save_bars(folder / "bars.npz")
    return folder


@pytest.fixture(scope="module")
def run(place):
    return train_small(place / "run", replace(LABELLED, dataset=str(place / "bars.npz")), draw=True)


@pytest.fixture(scope="module")
def short(place):
    return train_small(place / "short", replace(SHORT, dataset=str(place / "bars.npz")))


# --- What a run finds ---


def test_the_classifier_tells_bars_that_lie_from_bars_that_stand(run):
    found = read_evaluation(run)
    assert isinstance(found, LabelledEvaluation)
    assert found.accuracy.mean > 0.8
    assert sum(map(sum, found.confusion)) == found.num_images == 25
    assert sum(found.confusion[k][k] for k in range(2)) == round(25 * found.accuracy.mean)
    assert_close(torch.tensor(found.class_probs), torch.tensor(bars(100)[1]).bincount().div(100).float())
    assert found.log_likelihood_given_label.mean > found.log_likelihood.mean


def test_the_stored_log_p_x_is_the_sum_over_the_stored_classes(run):
    found, tensors = read_evaluation(run), runs.load_tensors(run / runs.per_image_file("test"))[0]
    joint = torch.tensor(found.class_probs).double().log() + tensors["log_evidence_by_class"]
    assert_close(read_per_image(run, "test").result.log_evidence, joint.logsumexp(1))
    assert found.accuracy.mean == (joint.argmax(1) == tensors["labels"]).double().mean()
    own = joint.log_softmax(1)[torch.arange(25), tensors["labels"]]
    assert found.log_prob_label.mean == pytest.approx(own.mean().item())


def test_log_p_x_given_y_is_that_of_the_loaded_model(run, place):
    """Another draw of 2,000 particles, within the errors of both."""
    vae, tensors = load(run), runs.load_tensors(run / runs.per_image_file("test"))[0]
    with np.load(place / "bars.npz") as stored:
        x, y = (torch.tensor(stored[name])[tensors["index"]] for name in ("test", "test_labels"))
    again = log_evidence(vae.model, vae.guide, Records(x[:, None].float(), y), num_particles=2000)
    given = tensors["log_evidence_by_class"][torch.arange(25), y]
    assert abs(float((again - given).mean())) < 0.3


def test_evaluated_again_every_number_is_the_same(run):
    before = runs.read_json(run / runs.EVALUATION)["test"]
    evaluate_run(Evaluate(str(run), num_particles=10, images=25, device="cpu"), say=silent)
    assert runs.read_json(run / runs.EVALUATION)["test"] | {"seconds": 0} == before | {"seconds": 0}


def test_an_interrupted_run_goes_on_to_the_same_numbers(short, place):
    options = replace(SHORT, dataset=str(place / "bars.npz"), checkpoint_seconds=0.0)
    with killed_at_save(7):
        train_small(place / "killed", options)
    resume_run(str(place / "killed"), say=silent, draw=False)
    assert_same_numbers(place / "killed", short)


def test_levels_under_a_density_are_evaluated_by_their_mass(tmp_path):
    generator = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = np.clip(generator.normal(60 + 120 * y[:, None, None], 10, (60, 4, 4)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "gray.npz", train=x, train_labels=y)
    options = replace(LABELLED, dataset=str(tmp_path / "gray.npz"), likelihood="normal-per-pixel", epochs=60)
    found = read_evaluation(train_small(tmp_path / "run", options))
    assert found.scale == "mass of 8-bit levels"
    assert found.accuracy.mean == 1


# --- What is made of a run ---


def test_samples_come_by_class_with_their_labels(run, tmp_path):
    folder = sample_run(Sample(str(run), num_samples=7, device="cpu", output=str(tmp_path / "out")), say=silent)
    with np.load(folder / "samples.npz") as stored:
        assert stored["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert stored["mean"].shape == (7, 1, 8, 8)
    assert (folder / "samples.png").exists()


def test_figures_and_the_page_show_classes(run):
    names = {path.name for path in (run / runs.FIGURES).iterdir()}
    assert {"reconstructions.png", "prior_samples.png", "classes.png", "confusion.png"} <= names
    assert names.isdisjoint({"interpolations.png", "traversals.png", "latents.png", "manifold.png"})
    page = report_run(Report(str(run)), say=silent).read_text()
    assert "log p(x | y)" in page
    assert "An image has no code here without its label." in page


def test_an_export_is_the_same_model(run, tmp_path):
    folder = export_run(Export(str(run), output=str(tmp_path / "export")), say=silent)
    one, expected = load(folder).state_dict(), load(run).state_dict()
    assert one.keys() == expected.keys()
    assert all(torch.equal(one[key], expected[key]) for key in expected)
    assert "p(y | x)" in (folder / "README.md").read_text()


def test_a_run_is_compared_with_one_without_labels(run, place, tmp_path):
    plain = train_small(place / "plain", replace(SMALL, dataset=str(place / "bars.npz")))
    said = []
    compare_runs(CompareRuns((str(run), str(plain)), num_particles=10, device="cpu"), say=said.append)
    assert any("mass of binary pixels" in line or "nats" in line for line in said)


# --- What is refused ---


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (certify_run, lambda run: Certify(run)),
        (compress_run, lambda run: Compress(run)),
        (diagnose_run, lambda run: Diagnose(run)),
        (encode_images, lambda run: Encode(run, "test")),
        (impute_images, lambda run: Impute(run, "test", hide="bottom")),
    ],
)
def test_commands_that_need_a_model_of_images_alone_refuse_a_run_with_labels(run, command, options):
    with pytest.raises(ValueError, match="expected a model of images alone, got --condition labels"):
        command(options(str(run)), say=silent)


def labels_of(train, test):
    """Bars with these labels, as arrays of an .npz file."""
    images = {"train": bars(len(train))[0], "test": bars(len(test))[0]}
    return images | {"train_labels": np.array(train), "test_labels": np.array(test)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"train": bars(20)[0]}, "expected a label of each image, got none"),
        (labels_of([0, 2] * 10, [0] * 5), "training images of each class from 0 to 1, got 2 labels from 0 to 2"),
        (labels_of([0, 1] * 10, [2] * 5), "expected classes from 0 to 1, got 2 in test"),
        (labels_of([-1, 1] * 10, [1] * 5), "training images of each class"),
    ],
)
def test_data_without_a_training_image_of_each_label_is_refused_before_a_folder_is_made(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        train_small(tmp_path / "run", replace(LABELLED, dataset=str(tmp_path / "set.npz")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prior": "vamp", "prior_components": 3}, "expected another --prior, got vamp"),
        ({"posterior": "delta", "beta": 0.0}, "expected another --posterior, got delta"),
        ({"missing": "train"}, "expected another --missing, got train"),
        ({"upper_latents": (2,)}, "expected one layer of latents"),
        ({"condition": "none"}, "--classes: expected it together with --condition labels"),
        ({"classes": None}, "expected --classes, the number of classes"),
    ],
)
def test_parts_that_take_no_label_are_refused(words, message):
    asked = {"condition": "labels", "classes": 2, "hidden": (5,), "latent_dim": 2, "prior": "standard-normal"}
    with pytest.raises(ValueError, match=message):
        build_vae(Options(**(asked | words)), (1, 4, 4))


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg"])
def test_a_compiled_training_has_the_weights_of_an_eager_one(place, objective, tmp_path):
    words = {
        "objective": objective,
        "epochs": 2,
        "dataset": str(place / "bars.npz"),
        "prior": "flow",
        "prior_layers": 2,
    }
    eager, compiled = (
        load(train_small(tmp_path / word, replace(LABELLED, compile=word, **words))).state_dict()
        for word in ("off", "on")
    )
    assert all(torch.allclose(compiled[key], eager[key], rtol=1e-3, atol=1e-4) for key in eager)
