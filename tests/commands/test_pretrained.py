"""Pretrained runs: a name gives the model, every script takes it, and nothing is written into the package."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import contents, silent

from ppl_vae import data, load, runs, save
from ppl_vae.commands.cli import parse
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.options import COMMANDS, Evaluate
from ppl_vae.reports.page.run import make_page
from ppl_vae.runs import load as stored
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import load_starting_weights, read_config
from ppl_vae.runs.open import open_run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import resolve
from ppl_vae.runs.results import to_json

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
OPTIONS = Options(network="mlp", hidden=(8,), latent_dim=2)
ASKED = {"split": "test", "num_particles": 10, "images": 30, "device": "cpu", "seed": 0}
SHIPPED = sorted(path.parent for path in (ROOT / "ppl_vae" / "pretrained").glob("*/config.json"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on MNIST, evaluated on a few images, whose config knows a place."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    torch.manual_seed(0)
    save(build_vae(OPTIONS, (1, 28, 28)), folder, replace(OPTIONS, data_dir="somewhere"))
    evaluate_run(Evaluate(str(folder), **ASKED), say=silent)
    return folder


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch):
    """The run as the pretrained run "small", in a package of its own; the folder of work is another, and empty."""
    monkeypatch.setattr(stored, "PRETRAINED", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / "package" / "small"
    folder.mkdir(parents=True)
    for name in (runs.MODEL, runs.EVALUATION):
        (folder / name).write_bytes((trained / name).read_bytes())
    config = runs.read_json(trained / runs.CONFIG)
    config["options"]["data_dir"] = None
    runs.write_json(folder / runs.CONFIG, config | {"trained": "shipped"})
    return folder


# --- What takes it ---


def test_a_name_gives_the_model(trained, shipped):
    expected = load(trained).state_dict()
    found = load("small").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_its_evaluation_makes_the_number_again_beside_the_package(trained, shipped):
    before = contents(shipped)
    entry = evaluate_run(Evaluate("small", **ASKED), say=silent)
    assert to_json(entry.log_likelihood) == runs.read_evaluations(trained)["test"]["log_likelihood"]
    assert runs.read_evaluations(Path("runs/small"))["test"]["seconds"] == entry.seconds
    assert contents(shipped) == before


def test_a_copy_that_was_interrupted_is_made_whole(shipped, monkeypatch):
    genuine = runs.write_bytes

    def interrupted(path, content):
        if path.name == runs.CONFIG:
            raise KeyboardInterrupt
        genuine(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_run("small", say=silent)
    assert open_run("small", say=silent).folder == Path("runs/small")
    assert contents(Path("runs/small")) == contents(shipped)


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_a_training_starts_from_its_name_or_from_a_folder_of_that_name(shipped, monkeypatch, folder_of_that_name):
    """The command line, the weights and what config.json records mean one run."""
    expected = shipped
    if folder_of_that_name:
        save(build_vae(replace(OPTIONS, latent_dim=3), (1, 28, 28)), "small", replace(OPTIONS, latent_dim=3))
        expected = Path("small").resolve()
    options = parse(COMMANDS["train"], ["--start-from", "small"]).options
    assert options.latent_dim == (3 if folder_of_that_name else 2)
    options = resolve(options, data.load("mnist"))
    assert options.start_from == str(expected)
    vae = build_vae(options, (1, 28, 28))
    load_starting_weights(vae, options.start_from)
    theirs = load("small").state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in vae.state_dict().items())


def test_its_weights_are_taken_by_its_name_from_python(shipped):
    vae = build_vae(OPTIONS, (1, 28, 28))
    load_starting_weights(vae, "small")
    assert all(torch.equal(w, load("small").state_dict()[name]) for name, w in vae.state_dict().items())


# --- What is in the package now ---


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_run_is_whole_and_evaluated_on_the_whole_test_set(folder):
    assert sorted(contents(folder)) == ["config.json", "evaluation.json", "model.safetensors"]
    entry = json.loads((folder / runs.EVALUATION).read_text())["test"]
    options, _ = read_config(folder)
    assert (entry["num_images"], entry["num_particles"]) == (10_000, 5000)
    assert entry["step"] == runs.load_step(folder / runs.MODEL)
    assert (options.data_dir, options.start_from) == (None, None)
    assert options.dataset in data.DATASETS
    assert all(weight.dtype == torch.float32 for weight in load(folder).parameters())


def test_the_page_of_a_shipped_run_has_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run("mnist-best")
    page = make_page(run, runs.load_step(run.folder / "model.safetensors"), None, split="validation")
    mean = json.loads((run.folder / "evaluation.json").read_text())["test"]["log_likelihood"]["mean"]
    assert f"{-mean:.2f}" in page


def test_the_package_takes_the_files_of_pretrained_runs_along(shipped):
    patterns = re.findall(r'"(pretrained/.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in contents(shipped):
        assert any((Path("pretrained") / "small" / name).match(pattern) for pattern in patterns)
