"""Diagnosing a run: small trainings broken on purpose get the right verdict, healthy ones none."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from broken_runs import Runs
from small_run import SMALL, bars, save_bars, train_small

from ppl_vae import load, runs
from ppl_vae.commands import diagnose as diagnosis
from ppl_vae.commands.cli import parse
from ppl_vae.commands.diagnose import describe_training, diagnose_run
from ppl_vae.commands.options import COMMANDS, Diagnose, Report
from ppl_vae.commands.report import report_run
from ppl_vae.commands.train import train_run
from ppl_vae.diagnostics.measurement import measure, summarize_estimate
from ppl_vae.diagnostics.noise import measure_noise
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance
from ppl_vae.parts import likelihoods
from ppl_vae.reports.text.diagnosis import SETTLED_RISE, describe_advice, describe_numbers
from ppl_vae.runs.evaluations import DIAGNOSIS, read_diagnosis
from ppl_vae.runs.open import open_run
from ppl_vae.runs.results import Diagnosis, to_json

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
OF_A_DENSITY = ("kl", "kl_by_latent", "implied_beta", "elbo_split", "calibration", "importance")


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run on 8 x 8 images that trains in a second."""
    place = tmp_path_factory.mktemp("small")
    return train_small(place / "run", replace(SMALL, dataset=str(save_bars(place / "bars.npz"))))


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


def test_an_autoencoder_has_no_measurement_of_a_density(diagnosed):
    numbers = diagnosed("autoencoder")[0].numbers
    assert [getattr(numbers, name) for name in OF_A_DENSITY] == [None] * len(OF_A_DENSITY)
    assert numbers.aggregate.holes is None


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


@pytest.mark.parametrize(("saturated", "said"), [(True, " (cap"), (False, " ± ")])
def test_an_information_at_its_cap_is_said_without_an_error(saturated, said, small):
    numbers = measure(load(small), torch.rand(8, 1, 8, 8).round(), num_particles=2)
    given = replace(numbers, elbo_split=replace(numbers.elbo_split, saturated=saturated))
    (line,) = [line for line in describe_numbers(given) if "mutual information" in line]
    assert re.search(r"mutual information -?[\d.]+" + re.escape(said), line)


def test_each_verdict_is_said_with_its_evidence_and_its_advice(diagnosed):
    entry, said = diagnosed("beta 0.001")
    text = "\n".join(said)
    for verdict in entry.verdicts:
        assert verdict.evidence in text
        assert describe_advice(verdict) in text


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


def test_a_table_has_no_figures_of_images(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    np.savez(tmp_path / "table.npz", train=x[:120], valid=x[120:150], test=x[150:])
    options = replace(SMALL, dataset=str(tmp_path / "table.npz"), likelihood="normal", epochs=1)
    folder = train_run(options, str(tmp_path / "run"), say=lambda line: None, draw=False)
    entry = diagnose_run(Diagnose(str(folder)), say=lambda line: None)
    assert entry.numbers.pictures.blur is None
    assert not (folder / runs.FIGURES / "diagnosis-holes.png").exists()


def test_dequantized_levels_are_measured_as_their_density(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, size=(200, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "levels.npz", train=x[:120], valid=x[120:150], test=x[150:])
    options = replace(SMALL, dataset=str(tmp_path / "levels.npz"), likelihood="normal", epochs=1)
    folder = train_run(options, str(tmp_path / "run"), say=lambda line: None, draw=False)
    entry = diagnose_run(Diagnose(str(folder)), say=lambda line: None)
    assert entry.pixels == "dequantized"
    assert entry.numbers.noise.gaussian_variance == pytest.approx(1 / 12, rel=0.1)


# --- Measures that the images do not allow ---

CHECKERBOARD = np.indices((8, 8)).sum(0) % 2


@pytest.mark.parametrize(
    ("train", "valid", "left_out"),
    [
        ("bars", np.zeros((8, 8)), {"variation", "blur"}),  # nothing varies, and there are no edges
        ("bars", CHECKERBOARD, {"variation"}),  # nothing but edges, the same in all images
        (np.zeros((8, 8)), np.zeros((8, 8)), {"variation", "blur", "noise"}),
        ("pixels", "pixels", {"blur"}),  # one pixel has no edges
    ],
    ids=["blank", "checkerboard", "all blank", "one pixel"],
)
def test_a_measure_that_the_images_do_not_allow_is_left_out_with_its_reason(tmp_path, train, valid, left_out):
    def images(kind, count):
        if isinstance(kind, str):
            return bars(count)[0] if kind == "bars" else (np.arange(count) % 2)[:, None, None]
        return np.broadcast_to(kind, (count, *kind.shape))

    splits = {"train": images(train, 100), "valid": images(valid, 20), "test": images(train, 40)}
    np.savez(tmp_path / "images.npz", **{name: x.astype(np.uint8) for name, x in splits.items()})
    options = replace(SMALL, dataset=str(tmp_path / "images.npz"), epochs=1)
    folder = train_run(options, str(tmp_path / "run"), say=lambda line: None)
    said = []
    page = report_run(Report(str(folder)), say=said.append).read_text(encoding="utf-8")
    numbers = read_diagnosis(folder).numbers
    assert set(numbers.left_out) == left_out
    found = vars(numbers.pictures) | {"noise": numbers.noise}
    assert {name for name, value in found.items() if value is None} == left_out
    for reason in numbers.left_out.values():
        assert [line for line in said if reason in line]
        assert reason in page
    if "variation" in left_out:  # all images have one code
        assert numbers.active.mean.tolist() == pytest.approx([0, 0], abs=1e-12)
    pictures = (folder / runs.FIGURES / "diagnosis-pictures.png").exists()
    assert pictures == (not {"variation", "blur"} <= left_out)


# --- What it leaves as it was, and what it refuses ---


def test_measuring_moves_neither_weights_nor_generators(small):
    vae, x = load(small), torch.rand(30, 1, 8, 8).round()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    state = torch.get_rng_state()
    first, second = measure(vae, x), measure(vae, x)
    assert json.dumps(to_json(first)) == json.dumps(to_json(second))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())


def test_the_noise_is_measured_without_moving_the_likelihood():
    family = likelihoods.Normal((6,))
    before = {name: tensor.clone() for name, tensor in family.state_dict().items()}
    noise = measure_noise(family, torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    assert len(noise.eigenvalues) == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in family.state_dict().items())


def test_chance_directions_of_independent_pixels_are_not_counted():
    x = torch.bernoulli(torch.full((500, 50), 0.5), generator=torch.Generator().manual_seed(0))
    noise = measure_noise(likelihoods.Bernoulli((50,)), x)
    assert (noise.eigenvalues > 1).sum() > 15
    assert noise.live_by_sum <= 2
    assert noise.edge > 1


def test_a_likelihood_without_a_location_has_no_noise():
    assert measure_noise(likelihoods.Categorical((6,)), torch.zeros(50, 6)) is None


def test_an_estimate_of_one_particle_is_unreliable(small):
    vae, x = load(small), torch.rand(30, 1, 8, 8).round()
    assert measure(vae, x, num_particles=1).importance.unreliable.mean == 1


def test_an_estimate_is_summarized_by_its_images():
    values = torch.arange(4, dtype=torch.double)
    result = Importance(*[values] * len(IMPORTANCE_NAMES))
    found = summarize_estimate(result, 100)
    assert (found.rise.mean, found.rise.stderr) == (1.5, pytest.approx(values.std().item() / 2))
    assert found.unreliable.mean == 0.75  # a bias of 1, 2 and 3 nats


def test_validation_is_measured_unless_another_split_is_asked_for(small):
    assert diagnose_run(Diagnose(str(small), images=4), say=lambda line: None).split == "validation"


def test_where_there_are_no_validation_images_test_is_measured_and_said(small, monkeypatch):
    run, said = open_run(str(small)), []
    splits = replace(run.splits, validation=run.splits.validation[:0])
    monkeypatch.setattr(diagnosis, "open_run", lambda *_, **__: run._replace(splits=splits))
    assert diagnose_run(Diagnose(str(small), images=4), say=said.append).split == "test"
    assert "which has no validation split" in said[0]


def test_a_second_diagnosis_replaces_the_first(small):
    first = diagnose_run(Diagnose(str(small), split="test", images=20), say=lambda line: None)
    stale = small / runs.FIGURES / "diagnosis-of-before.png"
    stale.touch()
    second = diagnose_run(Diagnose(str(small), split="test", images=25), say=lambda line: None)
    assert not stale.exists()
    assert (first.numbers.num_images, second.numbers.num_images) == (20, 25)
    assert read_diagnosis(small).numbers.num_images == 25


def test_too_few_images_are_refused_and_nothing_is_written(small):
    before = (small / DIAGNOSIS).read_bytes() if (small / DIAGNOSIS).exists() else None
    with pytest.raises(ValueError, match="--images: expected at least 4"):
        diagnose_run(Diagnose(str(small), images=3), say=lambda line: None)
    assert ((small / DIAGNOSIS).read_bytes() if (small / DIAGNOSIS).exists() else None) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; is .* a run folder"):
        diagnose_run(Diagnose(str(tmp_path)), say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


# --- A training that had not settled ---


@pytest.fixture
def own_run(tmp_path):
    return train_small(tmp_path / "run", replace(SMALL, dataset=str(save_bars(tmp_path / "bars.npz"))))


def write_validation(folder, *values):
    """The run, with these validation ELBOs in its metrics."""
    (folder / runs.METRICS).unlink()
    for epoch, value in enumerate(values, 1):
        runs.append_metrics(folder, {"step": 5 * epoch, "epoch": epoch, "validation_elbo_nats_per_image": value})
    return folder


def diagnose(folder, images=20):
    said = []
    diagnose_run(Diagnose(str(folder), images=images), say=said.append)
    return said


@pytest.mark.parametrize(("values", "rise"), [((-50.0, -40.0, -32.5), 7.5), ((-50.0,), None)])
def test_the_last_epochs_gain_is_taken_from_the_metrics(own_run, values, rise):
    assert describe_training(open_run(str(write_validation(own_run, *values)))).last_rise == rise


@pytest.mark.parametrize(("rise", "settled"), [(SETTLED_RISE - 0.1, True), (SETTLED_RISE + 0.1, False)])
def test_a_training_that_had_not_settled_is_reported(own_run, rise, settled):
    said = diagnose(write_validation(own_run, -50.0, -50.0 + rise))
    assert any("training had not settled" in line for line in said) != settled


def test_a_replaced_diagnosis_is_reported(own_run):
    assert not any("Replaces" in line for line in diagnose(own_run))
    assert "Replaces the diagnosis of 20 images." in diagnose(own_run, images=10)
