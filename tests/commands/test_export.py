"""An export: one folder that loads without the training, with a card that says no more than the run's files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import silent

from ppl_vae import load, runs
from ppl_vae.commands.cli import parse
from ppl_vae.commands.latents import encode_images, sample_run
from ppl_vae.commands.options import COMMANDS, Encode, Export, Sample
from ppl_vae.commands.report import export_run
from ppl_vae.commands.train import train_run
from ppl_vae.reports.text import run as model_card
from ppl_vae.runs.open import open_without_data
from ppl_vae.runs.options import Options

SMALL: dict[str, Any] = {"hidden": (8,), "latent_dim": 2, "prior": "standard-normal"}
HOSTILE = "x`](javascript:alert(1))\n---\n<script>evil()</script>| # title"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret-place") / "digits.npy"
    np.save(path, np.random.RandomState(0).randint(0, 2, (60, 5, 4)).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def run(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    asked = Options(dataset=str(data_file), epochs=2, batch_size=20, images=5, evaluation_particles=20, **SMALL)
    return train_run(asked, str(folder), say=silent, draw=False)


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    return export_run(Export(str(run), output=str(tmp_path / "out")), say=silent)


def ran(script: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = Path(__file__).parents[2] / "scripts" / script
    return subprocess.run(
        [sys.executable, str(path), *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- The folder ---


def test_an_export_loads_as_the_same_density(run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    weights, same = load(run).state_dict(), load("./out").state_dict()
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_an_export_holds_these_files_and_no_others(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "evaluation.json",
        "model.safetensors",
        "README.md",
    }


def test_no_path_of_the_machine_is_in_an_export(data_file: Path, exported: Path) -> None:
    for path in exported.rglob("*"):
        content = path.read_bytes()
        assert data_file.parent.name.encode() not in content
        assert str(exported.parent).encode() not in content


def test_an_export_of_an_export_is_the_same_model(exported: Path, tmp_path: Path) -> None:
    again = export_run(Export(str(exported), output=str(tmp_path / "again")), say=silent)
    for name in ("config.json", "model.safetensors", "evaluation.json"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()
    assert "Not in the files of an export" in (again / "README.md").read_text()


def test_evaluations_of_other_weights_are_left_out(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    entries = runs.read_evaluations(copy)
    old = entries["test"] | {"step": entries["test"]["step"] + 1, "split": "validation"}
    runs.write_json(copy / runs.EVALUATION, entries | {"validation": old})
    folder = export_run(Export(str(copy), output=str(tmp_path / "out")), say=silent)
    assert runs.read_evaluations(folder).keys() == {"test"}


# --- Whole or not at all ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "ppl_vae model 2"}, "another version wrote it"),
        ({"model": 3}, "expected an object of options, got int"),
        ({"model": {"latent_dim": 2}}, "expected binarization as it was resolved"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(exported: Path, change: dict[str, Any], words: str) -> None:
    config = runs.read_json(exported / "config.json")
    runs.write_json(exported / "config.json", config | change)
    with pytest.raises(ValueError, match=words) as caught:
        load(exported)
    assert len(str(caught.value).splitlines()) == 1


# --- What works on it ---


@pytest.mark.thorough
def test_the_scripts_take_an_export_from_any_directory(exported: Path, data_file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = ran("evaluate_log_likelihood.py", str(exported), "--num-particles", "3", cwd=elsewhere)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("digits.npy, is not there; --dataset says where it is now")
    words = ("--num-particles", "20", "--images", "5", "--dataset", str(data_file))
    told = runs.read_evaluations(exported)["test"]["log_likelihood"]
    done = ran("evaluate_log_likelihood.py", str(exported), *words, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert runs.read_evaluations(exported)["test"]["log_likelihood"] == told


def test_samples_and_codes_of_an_export_need_no_data(exported: Path, data_file: Path, tmp_path: Path) -> None:
    images = tmp_path / "mine.npy"
    np.save(images, np.load(data_file)[:6])
    common: dict[str, Any] = {"seed": 0, "device": "cpu"}
    samples = sample_run(Sample(str(exported), num_samples=3, output=str(tmp_path / "s"), **common), say=silent)
    with np.load(samples / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (3, 1, 5, 4)
    codes = encode_images(
        Encode(str(exported), str(images), num_particles=5, images=None, output=str(tmp_path / "c"), **common),
        say=silent,
    )
    with np.load(codes / "encoded.npz", allow_pickle=False) as arrays:
        assert arrays["mean"].shape == (6, 2)


def test_training_starts_from_an_export(exported: Path, data_file: Path) -> None:
    asked = parse(
        COMMANDS["train"], ["--start-from", str(exported), "--dataset", str(data_file), "--epochs", "1"]
    ).options
    assert asked is not None
    assert (asked.hidden, asked.latent_dim, asked.prior, asked.dataset) == ((8,), 2, "standard-normal", str(data_file))


# --- The card ---


def test_a_hostile_name_stays_in_its_code_span(run: Path) -> None:
    opened = open_without_data(run)
    hostile = opened._replace(splits=replace(opened.splits, name=HOSTILE), options=replace(opened.options))
    card = model_card.make_card(hostile, {}, step=0)
    body = re.sub(r"`[^`\n]*`", "", card.split("```")[0])
    assert "evil" not in body
    assert "javascript" not in body
    assert len(re.findall("^---$", card, flags=re.MULTILINE)) == 2


@pytest.mark.thorough
def test_the_python_of_a_card_runs(exported: Path, data_file: Path) -> None:
    card = (exported / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(exported))
    x = f"import numpy, torch\nx = torch.from_numpy(numpy.load({str(data_file)!r})[:3, None]).float()\n"
    done = subprocess.run(
        [sys.executable, "-c", x + lines + "print(nats.shape, images.shape)"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() == "torch.Size([3]) torch.Size([16, 1, 5, 4])"
