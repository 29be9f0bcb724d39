"""Images under a run: the latents and log p(x) that are written are those of the model, and are said in words."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SMALL, bars, exact_log_p, nothing_changes, train_small

from ppl_vae import load, runs
from ppl_vae.commands.latents import encode_images
from ppl_vae.commands.options import Encode


@pytest.fixture
def encode(bars_run, tmp_path):
    """Encodes into a new folder; returns its arrays, its summary, and what was said."""

    def call(images_path, *, run_dir=bars_run, num_particles=10, images=None, seed=0, output=tmp_path / "out"):
        said = []
        words = {"device": "cpu", "output": None if output is None else str(output)}
        written = encode_images(
            Encode(str(run_dir), str(images_path), num_particles=num_particles, images=images, seed=seed, **words),
            say=said.append,
        )
        with np.load(written / "encoded.npz", allow_pickle=False) as stored:
            return dict(stored), json.loads((written / "encoded.json").read_text()), said

    return call


# --- The numbers ---


@pytest.mark.thorough
def test_log_p_of_an_image_is_its_integral(encode, bars_run, tmp_path):
    images, _ = bars(12, seed=9)
    np.save(tmp_path / "mine.npy", images)
    stored, _, _ = encode(tmp_path / "mine.npy", num_particles=3000)
    exact = exact_log_p(bars_run, images)
    stderr = np.sqrt(1 / stored["ess"])
    assert (np.abs(stored["log_likelihood"] - exact) < 5 * stderr + 1e-3).all()


def test_latents_are_the_runs_own_posterior(encode, bars_run, tmp_path):
    images, _ = bars(12, seed=9)
    np.save(tmp_path / "mine.npy", images)
    stored, _, _ = encode(tmp_path / "mine.npy")
    with torch.no_grad():
        q = load(bars_run).posterior(torch.from_numpy(images)[:, None].float())
    np.testing.assert_allclose(stored["mean"], q.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored["scale"], q.variance.sqrt(), rtol=1e-5)


def test_a_split_gives_the_numbers_of_the_runs_evaluation(encode, bars_run):
    """The same images, particles and seed: the file that training's own evaluation wrote."""
    evaluated, _ = runs.load_tensors(bars_run / runs.per_image_file("test"))
    stored, _, _ = encode("test", images=25, num_particles=10, seed=0)
    assert stored["names"].tolist() == [str(i) for i in evaluated["index"].tolist()]
    np.testing.assert_array_equal(stored["log_likelihood"], evaluated["log_evidence"])
    np.testing.assert_array_equal(stored["ess"], evaluated["ess"])


def test_labels_stand_beside_their_images(encode, tmp_path):
    _, labels = bars(40, seed=2)
    np.testing.assert_array_equal(encode("test", output=tmp_path / "a")[0]["labels"], labels)


def test_a_subset_keeps_names_beside_their_images(encode, bars_run, tmp_path):
    every, _, _ = encode("train", output=tmp_path / "all")
    some, _, _ = encode("train", images=10, output=tmp_path / "some")
    places = some["names"].astype(int)
    assert len(places) == 10
    np.testing.assert_allclose(some["mean"], every["mean"][places], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(some["labels"], every["labels"][places])


def test_a_folders_images_have_the_names_of_their_files_and_their_split(encode, tmp_path):
    images, _ = bars(40, seed=3)
    for i, image in enumerate(images):
        image[0] = i  # all differ
        Image.fromarray(image * 6).save(make(tmp_path / "photos") / f"{i:02}.png")
    options = replace(SMALL, dataset=str(tmp_path / "photos"), likelihood="discretized-logistic", epochs=1)
    run = train_small(tmp_path / "run", replace(options, binarization="none"))
    _, scalars = runs.load_tensors(run / runs.per_image_file("test"))
    test, _, _ = encode("test", run_dir=run, output=tmp_path / "test")
    assert test["names"].tolist() == scalars["names"]
    stored, _, said = encode(tmp_path / "photos", run_dir=run, output=tmp_path / "all")
    assert stored["names"][stored["split"] == "test"].tolist() == scalars["names"]
    assert [np.sum(stored["split"] == split) for split in ("train", "validation", "test")] == [32, 4, 4]
    assert "36 of 40 images are also in the run's data" in "\n".join(said)


def make(folder):
    folder.mkdir(exist_ok=True)
    return folder


# --- The files ---


def test_encoding_leaves_the_random_state_and_the_run(encode, bars_run):
    with nothing_changes(bars_run):
        encode("test")
