"""Missing pixels of a run's images: what is hidden, what is written, and what is said."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SMALL, bars, contents, exact_log_p, train_small

from ppl_vae import load
from ppl_vae.commands.latents import encode_images, hide_half, impute_images, read_mask
from ppl_vae.commands.options import Encode, Impute
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.missing import Imputation
from ppl_vae.reports.figures.images import Display, draw_imputations

NAN = math.nan


@pytest.fixture
def impute(bars_run, tmp_path):
    """Imputes into a new folder; returns its arrays, its JSON, and what was said."""

    def call(
        images_path, *, run_dir=bars_run, mask=None, hide=None, num_particles=20, images=None, seed=0, output="out"
    ):
        said = []
        written = impute_images(
            Impute(
                str(run_dir),
                str(images_path),
                mask=None if mask is None else str(mask),
                hide=hide,
                num_particles=num_particles,
                num_draws=3,
                images=images,
                seed=seed,
                device="cpu",
                output=output and str(tmp_path / output),
            ),
            say=said.append,
        )
        with np.load(written / "imputed.npz", allow_pickle=False) as stored:
            return dict(stored), json.loads((written / "imputations.json").read_text()), "\n".join(said)

    return call


@pytest.fixture
def images(tmp_path):
    """Saves images as a file of one's own; returns its path."""

    def save(array, name="mine.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


# --- The numbers ---


def test_log_p_of_the_observed_pixels_is_their_integral(impute, images, bars_run):
    x = bars(8, seed=9)[0].astype(float)
    x[np.random.default_rng(0).random(x.shape) < 0.5] = NAN
    stored, _, _ = impute(images(x), num_particles=3000)
    error = stored["log_likelihood_observed"] - exact_log_p(bars_run, x)
    assert (np.abs(error) < 5 * np.sqrt(1 / stored["ess"]) + 1e-3).all()


@pytest.mark.thorough
def test_log_p_of_the_hidden_pixels_is_the_ratio_of_two_integrals(impute, images, bars_run):
    x = bars(8, seed=9)[0].astype(float)
    stored, _, _ = impute(images(x), hide="left", num_particles=3000)
    seen = x.copy()
    seen[:, :, :4] = NAN
    exact = exact_log_p(bars_run, x) - exact_log_p(bars_run, seen)
    whole = evaluate(load(bars_run), torch.from_numpy(x)[:, None].float(), num_particles=3000, seed=0)
    stderr = np.sqrt(1 / stored["ess"] + 1 / whole.ess.numpy())
    assert (np.abs(stored["log_likelihood_hidden"] - exact) < 5 * stderr + 1e-3).all()


def test_observed_pixels_are_written_as_they_were_given(impute, images):
    x = bars(6, seed=9)[0].astype(float)
    x[:, 2, 3:6] = NAN
    stored, _, _ = impute(images(x))
    mask = ~np.isnan(x[:, None])
    np.testing.assert_array_equal(stored["mask"], mask)
    for filled in (*stored["draws"], stored["mean"]):
        np.testing.assert_array_equal(filled[mask], x[:, None][mask])


@pytest.mark.thorough
def test_pictures_are_brought_to_a_runs_shape_by_its_own_fit_as_they_are_when_encoded(impute, tmp_path):
    """Bars drawn twice as wide, which --fit stretch undoes; a crop would lose their left and right quarters."""
    x = bars(40, seed=9)[0]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, image in enumerate(x):
        Image.fromarray(255 * image.repeat(2, axis=1)).save(pictures / f"{i:02d}.png")
    changes = {"fit": "stretch", "image_size": (8, 8), "binarization": "threshold", "images": 4, "epochs": 1}
    run = train_small(tmp_path / "run", replace(SMALL, dataset=str(pictures), **changes))
    stored, summary, said = impute(pictures, run_dir=run)
    seen = stored["mean"]
    words = {"num_particles": 2, "images": None, "seed": 0, "device": "cpu", "output": str(tmp_path / "encoded")}
    told: list[str] = []
    written = encode_images(Encode(str(run), str(pictures), **words), say=told.append)
    note, own = summary["notes"]
    assert "40 of 40 images are also in the run's data" in own  # bars repeat
    assert "40 of 40 images" in note
    assert "8x8, and were stretched" in note
    assert note in said
    assert note in told
    assert json.loads((written / "encoded.json").read_text())["notes"] == [note, own]
    np.testing.assert_array_equal(seen[:, 0], x)
    with torch.no_grad(), np.load(written / "encoded.npz", allow_pickle=False) as stored:
        mean = load(run).posterior(torch.from_numpy(x)[:, None].float()).mean
        np.testing.assert_allclose(stored["mean"], mean, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_draws_and_another_others(impute):
    first, again, other = (
        impute("test", hide="left", images=8, seed=seed, output=name)[0]["draws"]
        for seed, name in ((3, "a"), (3, "b"), (4, "c"))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# --- What is hidden ---


@pytest.mark.parametrize(
    ("side", "hidden"),
    [
        ("top", (slice(0, 2), slice(None))),
        ("bottom", (slice(3, 5), slice(None))),
        ("left", (slice(None), slice(0, 3))),
        ("right", (slice(None), slice(3, 6))),
    ],
)
def test_half_of_each_channel_is_hidden(side, hidden):
    expected = np.ones((1, 2, 5, 6), dtype=bool)
    expected[:, :, hidden[0], hidden[1]] = False
    np.testing.assert_array_equal(hide_half(side, (2, 5, 6)), expected)


@pytest.mark.parametrize(
    ("shape", "event_shape", "count"),
    [
        ((3, 4), (1, 3, 4), 1),
        ((1, 3, 4), (1, 3, 4), 1),
        ((7, 3, 4), (1, 3, 4), 7),
        ((7, 1, 3, 4), (1, 3, 4), 7),
        ((7, 3, 4, 1), (1, 3, 4), 7),
        ((3, 4), (3, 3, 4), 1),
        ((7, 3, 4), (3, 3, 4), 7),
        ((7, 3, 4, 3), (3, 3, 4), 7),
        ((12,), (12,), 1),
        ((7, 12), (12,), 7),
    ],
)
def test_a_mask_is_read_in_each_of_its_shapes(images, shape, event_shape, count):
    array = np.random.default_rng(0).integers(0, 2, shape)
    observed = read_mask(str(images(array, "mask.npy")), 7, event_shape)
    assert tuple(observed.shape) == (count, *event_shape)
    channels_last = shape[-1:] == event_shape[:1] and len(shape) == 4
    expected = np.moveaxis(array, -1, 1) if channels_last else array
    if len(event_shape) == 3 and shape in ((3, 4), (7, 3, 4)):
        expected = np.broadcast_to(array[..., None, :, :], (*shape[:-2], *event_shape))
    np.testing.assert_array_equal(observed, expected.reshape(observed.shape))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((5, 5)), r"expected the shape of an image \(1, 8, 8\) or of 40 images .* got \(5, 5\)"),
        (np.ones((7, 8, 8)), r"got \(7, 8, 8\)"),
        (np.full((8, 8), 0.5), "expected zeros .missing. and ones .observed. alone, got other values"),
        (np.full((8, 8), NAN), "expected zeros .missing. and ones .observed. alone, got other values"),
        (np.full((8, 8), "1"), "expected zeros .missing. and ones .observed. alone, got other values"),
    ],
    ids=["shape", "count", "gray", "nan", "words"],
)
def test_a_mask_that_is_none_is_refused(images, array, words):
    with pytest.raises(ValueError, match=words):
        read_mask(str(images(array, "mask.npy")), 40, (1, 8, 8))


# --- What is said ---


def test_hidden_pixels_have_no_score_where_an_image_has_other_holes(impute, images):
    x = bars(4, seed=9)[0].astype(float)
    x[1, 7, 7] = NAN
    stored, summary, _ = impute(images(x), hide="top")
    np.testing.assert_array_equal(np.isnan(stored["log_likelihood_hidden"]), [False, True, False, False])
    assert summary["per_image"][1]["log_likelihood_hidden"] is None
    assert summary["log_likelihood_hidden"]["num_images"] == 3


@pytest.mark.parametrize("largest", [0.0, 0.1])
def test_a_mass_above_one_is_called_impossible(impute, images, monkeypatch, largest):
    hidden = torch.tensor([-3.0, largest, -1.0, largest], dtype=torch.double)
    monkeypatch.setattr("ppl_vae.commands.latents._estimate_hidden", lambda *_: hidden)
    _, _, said = impute(images(bars(4, seed=9)[0].astype(float)), hide="top")
    assert ("Do not use this mean: 2 of 4 images are above 0" in said) == (largest > 0)


def test_images_whose_draws_are_one_guess_are_counted(impute, images):
    stored, entry, said = impute(images(bars(12, seed=9)[0].astype(float)), hide="top", num_particles=3)
    single = int((stored["ess"] < 1.5).sum())
    assert 0 < single < entry["few_particles"] == 12
    assert f"In {single} of them, most draws come from a single code" in said


# --- What is written ---


def test_nothing_of_the_run_changes_but_its_folder_imputations(impute, bars_run, tmp_path):
    copy = Path(shutil.copytree(bars_run, tmp_path / "run"))
    impute("test", run_dir=copy, hide="left", images=3, output=None)
    assert (copy / "imputations" / "imputed.npz").exists()
    shutil.rmtree(copy / "imputations")
    assert contents(copy) == contents(bars_run)


# --- The figure ---


def test_the_truth_is_drawn_where_it_is_known():
    truth, zero = torch.zeros(2, 1, 4, 4), torch.zeros(2).double()
    x = truth.clone()
    x[:, :, :2] = NAN
    for seen in (x, truth):
        figure = draw_imputations(
            Display(), seen, truth, Imputation(truth.expand(4, 2, 1, 4, 4), truth, zero, zero + 1)
        )
        assert ("truth" in [label.get_text() for label in figure.axes[0].get_yticklabels()]) == (seen is x)
