"""Diagnosing a run: small trainings broken on purpose get the right verdict, healthy ones none."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_runs import Runs
from small_run import SMALL, bars, train_small

from ppl_vae import load, runs
from ppl_vae.commands.cli import parse
from ppl_vae.commands.options import COMMANDS, Diagnose, Report
from ppl_vae.commands.report import diagnose_run, report_run
from ppl_vae.commands.train import train_run
from ppl_vae.diagnostics.measurement import measure
from ppl_vae.reports.text.diagnosis import describe_advice
from ppl_vae.runs.results import Diagnosis, read_diagnosis, to_json

pytestmark = pytest.mark.thorough

EXPECTED = {
    "digits": {"healthy"},
    "factors": {"healthy"},
    "beta 10": {"over-regularized"},
    "beta 0.1": {"under-regularized"},
    "beta 0.001": {"under-regularized", "holes"},
    "beta 1000 at once": {"decoder ignores z"},
    "mean over pixels": {"decoder ignores z"},
    "far too many latents": {"dead units"},
    "scale fixed too small": {"likelihood mismatch"},
    "scale fixed too large": {"likelihood mismatch"},
    "guide beside the posterior": {"unreliable estimate"},
    "autoencoder": {"autoencoder"},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="session")
def diagnosed(trained):
    """The diagnosis of a run by its name, made once."""
    made = {}

    def call(name):
        if name not in made:
            said = []
            images = 1000 if "holes" in EXPECTED[name] else 600
            made[name] = diagnose_run(Diagnose(str(trained.folder(name)), images=images), say=said.append), said
        return made[name]

    return call


# --- Broken on purpose ---


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_gets_the_verdicts_of_how_it_was_made_and_no_others(name, diagnosed):
    entry, _ = diagnosed(name)
    assert {verdict.word for verdict in entry.verdicts} == EXPECTED[name]


@pytest.mark.parametrize(("name", "beta"), [("factors", 1.0), ("far too many latents", 1.0), ("beta 10", 10.0)])
def test_the_beta_of_training_is_read_from_the_weights(name, beta, diagnosed):
    """Within a fifth: these trainings are short."""
    implied = diagnosed(name)[0].numbers.implied_beta
    assert implied.mean == pytest.approx(beta, rel=0.2)


def test_a_mean_over_pixels_is_told_from_a_collapse_by_noise(diagnosed):
    (by_mean,), (by_beta,) = (diagnosed(name)[0].verdicts for name in ("mean over pixels", "beta 1000 at once"))
    assert "look for a mean over pixels" in by_mean.evidence
    assert "the noise predicts it" in by_beta.evidence


def test_four_factors_are_four_directions_above_the_noise(diagnosed):
    """Of x = W z + 0.5 e at marginal scale s, four eigenvalues (|w|^2 + 0.25) / s^2 exceed 1, and 60 are 0.25 / s^2."""
    noise = diagnosed("factors")[0].numbers.noise
    assert (len(noise.eigenvalues), noise.live_by_sum, noise.live_by_mean) == (64, 4, 0)


# --- What is written and said ---


@pytest.mark.parametrize("name", ["digits", "autoencoder", "mean over pixels"])
def test_the_file_holds_what_is_returned(name, diagnosed, trained):
    entry, folder = diagnosed(name)[0], trained.folder(name)
    stored = read_diagnosis(folder)
    assert isinstance(stored, Diagnosis)
    assert json.dumps(to_json(stored)) == json.dumps(to_json(entry))
    assert entry.step == runs.load_step(folder / runs.MODEL)


@pytest.mark.parametrize("name", ["digits", "autoencoder", "beta 1000 at once"])
def test_every_figure_that_is_named_is_there(name, diagnosed, trained):
    entry, said = diagnosed(name)
    folder = trained.folder(name) / runs.FIGURES
    drawn = {path.name for path in folder.glob("diagnosis-*.png")}
    assert {verdict.figure for verdict in entry.verdicts} - {None} <= drawn
    assert drawn == {word.strip(",").split("/")[-1] for word in said[-1].split() if word.strip(",").endswith(".png")}


@pytest.mark.parametrize("name", [name for name, words in EXPECTED.items() if words != {"healthy"}])
def test_the_advised_options_are_options_of_the_command(name, diagnosed):
    for verdict in diagnosed(name)[0].verdicts:
        options = describe_advice(verdict).partition(": ")[2].split()
        if "--num-particles" in options:
            assert parse(COMMANDS["evaluate"], ["run", *options]).num_particles == verdict.change["num_particles"]
        else:
            asked = parse(COMMANDS["train"], options).options
            assert {option: getattr(asked, option) for option in verdict.change} == verdict.change


# --- Kinds of data ---


def test_dequantized_levels_are_measured_as_their_density(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, size=(200, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "levels.npz", train=x[:120], valid=x[120:150], test=x[150:])
    options = replace(SMALL, dataset=str(tmp_path / "levels.npz"), likelihood="normal", epochs=1)
    folder = train_small(tmp_path / "run", options)
    entry = diagnose_run(Diagnose(str(folder)), say=lambda line: None)
    assert entry.pixels == "dequantized"


CHECKERBOARD = np.indices((8, 8)).sum(0) % 2


@pytest.mark.parametrize(
    ("train", "valid", "unknown"),
    [
        ("bars", np.zeros((8, 8)), {"variation", "sharpness"}),  # nothing varies, and there are no edges
        ("bars", CHECKERBOARD, {"variation"}),  # nothing but edges, the same in all images
        (np.zeros((8, 8)), np.zeros((8, 8)), {"variation", "sharpness", "noise"}),
        ("pixels", "pixels", {"sharpness"}),  # one pixel has no edges
    ],
    ids=["blank", "checkerboard", "all blank", "one pixel"],
)
def test_a_measure_that_the_images_do_not_allow_is_unknown(tmp_path, train, valid, unknown):
    def images(kind, count):
        if isinstance(kind, str):
            return bars(count)[0] if kind == "bars" else (np.arange(count) % 2)[:, None, None]
        return np.broadcast_to(kind, (count, *kind.shape))

    splits = {"train": images(train, 100), "valid": images(valid, 20), "test": images(train, 40)}
    np.savez(tmp_path / "images.npz", **{name: x.astype(np.uint8) for name, x in splits.items()})
    options = replace(SMALL, dataset=str(tmp_path / "images.npz"), epochs=1)
    folder = train_run(options, str(tmp_path / "run"), say=lambda line: None)
    report_run(Report(str(folder)), say=lambda line: None)
    numbers = read_diagnosis(folder).numbers
    pictures = numbers.pictures
    assert math.isnan(pictures.variation.mean) == ("variation" in unknown)
    assert math.isnan(pictures.blur.at_mean.mean) == ("sharpness" in unknown)
    assert (numbers.noise is None) == ("noise" in unknown)
    if "variation" in unknown:  # all images have one code
        assert numbers.active.mean.tolist() == pytest.approx([0, 0], abs=1e-12)


# --- What it leaves as it was, and what it refuses ---


def test_measuring_moves_neither_weights_nor_generators(bars_run):
    vae, x = load(bars_run), torch.rand(30, 1, 8, 8).round()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, second = measure(vae, x), measure(vae, x)
    assert json.dumps(to_json(first)) == json.dumps(to_json(second))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_second_diagnosis_replaces_the_first(bars_run, tmp_path):
    small = Path(shutil.copytree(bars_run, tmp_path / "run"))
    first = diagnose_run(Diagnose(str(small), split="test", images=20), say=lambda line: None)
    stale = small / runs.FIGURES / "diagnosis-of-before.png"
    stale.touch()
    second = diagnose_run(Diagnose(str(small), split="test", images=25), say=lambda line: None)
    assert not stale.exists()
    assert (first.numbers.num_images, second.numbers.num_images) == (20, 25)
    assert read_diagnosis(small).numbers.num_images == 25
