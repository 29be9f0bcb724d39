"""Files of compressed images: written and decoded by commands, in another process, and refused where they must be."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import silent, train_small

from ppl_vae import runs
from ppl_vae.commands import compress as commands
from ppl_vae.commands.options import Compress, Decompress
from ppl_vae.runs.coded_file import read_coded_file
from ppl_vae.runs.load import load
from ppl_vae.runs.options import Options

pytest.importorskip("constriction")


@pytest.fixture(scope="module")
def coded(bars_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coded") / "bars.bits"
    commands.compress_run(Compress(str(bars_run), output=str(path)), say=silent)
    return path


def images(bars_run: Path) -> np.ndarray:
    return np.load(bars_run.parent / "bars.npz")["test"][:, None]


def decompress_refused(path: Path, tmp_path: Path, match: str, **options: str) -> None:
    output = tmp_path / "refused.npy"
    with pytest.raises(ValueError, match=match) as caught:
        commands.decompress_file(Decompress(str(path), output=str(output), **options), say=silent)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("*.npy"), *tmp_path.glob(".*")]


def test_images_come_back_in_another_process(bars_run, coded, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "decompress.py"
    words = [sys.executable, str(script), str(coded), "--output", str(tmp_path / "images.npy")]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "40 images" in done.stdout
    assert np.array_equal(np.load(tmp_path / "images.npy"), images(bars_run))


def test_the_rate_counts_every_byte_of_the_file(coded):
    found = runs.read_json(coded.with_name("bars.bits.json"))
    assert found["num_bytes"] == coded.stat().st_size
    expected = 8 * (coded.stat().st_size - found["initial_bytes"]) / (40 * 64)
    assert found["bits_per_dim"] == pytest.approx(expected)
    in_words = 40 * found["coded_nats"] / math.log(2) / 8 + found["initial_bytes"]
    assert found["num_bytes"] - in_words - len(read_coded_file(coded).run) < 130  # the header
    assert found["coded_nats"] == pytest.approx(-found["coded_bound"]["mean"], abs=64 / 40 + 0.05)


@pytest.mark.parametrize("place", [0, 20, 60, 200, -1])
def test_a_damaged_file_is_refused(coded, tmp_path, place):
    content = bytearray(coded.read_bytes())
    content[place] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    decompress_refused(tmp_path / "damaged", tmp_path, "damaged" if place else "expected a file of compressed images")


@pytest.mark.parametrize("size", [0, 10, 40, -4])
def test_a_file_that_is_cut_off_is_refused(coded, tmp_path, size):
    (tmp_path / "cut").write_bytes(coded.read_bytes()[:size])
    decompress_refused(tmp_path / "cut", tmp_path, "cut off|expected a file of compressed images")


def test_other_weights_are_refused(bars_run, coded, tmp_path):
    other = shutil.copytree(bars_run, tmp_path / "other")
    weights = {name: w + 1 if w.is_floating_point() else w for name, w in load(bars_run).state_dict().items()}
    runs.save_tensors(other / runs.MODEL, weights, {"step": 1})
    with pytest.raises(ValueError, match="expected the weights that it was compressed with"):
        commands.decompress_file(Decompress(str(coded), run_dir=str(other)), say=silent)


def test_a_machine_that_computes_other_numbers_is_detected(coded, tmp_path, monkeypatch):
    """As a processor would whose networks differ in the last bit."""
    before = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: before(*args) * (1 + 2**-22))
    decompress_refused(coded, tmp_path, "computes other numbers from the same weights")


def test_a_density_is_refused(tmp_path):
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    table = Options(dataset=str(tmp_path / "table.npy"), likelihood="normal", hidden=(4,), latent_dim=2, epochs=1)
    small = replace(table, images=5, evaluation_particles=5, batch_size=20)
    density = train_small(tmp_path / "density", small)
    with pytest.raises(ValueError, match="expected a likelihood that is a mass, got normal, a density"):
        commands.compress_run(Compress(str(density), output=str(tmp_path / "x")), say=silent)
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(bars_run, coded, tmp_path):
    for output in (str(tmp_path / "missing" / "x"), str(tmp_path)):
        with pytest.raises(ValueError, match="--output: expected a file in a folder that exists"):
            commands.compress_run(Compress(str(bars_run), output=output), say=silent)
        with pytest.raises(ValueError, match="--output: expected a file in a folder that exists"):
            commands.decompress_file(Decompress(str(coded), output=output), say=silent)


def test_one_image_comes_back(bars_run, tmp_path):
    commands.compress_run(Compress(str(bars_run), images=1, num_particles=4, output=str(tmp_path / "one")), say=silent)
    commands.decompress_file(Decompress(str(tmp_path / "one")), say=silent)
    found = np.load(tmp_path / "one.npy")
    assert any(np.array_equal(found[0], image) for image in images(bars_run))


def test_other_formats_hold_the_same_images(tmp_path):
    """A constant image takes next to nothing, and noise takes at least its entropy."""
    noise = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, size in commands.measure_other_formats(noise).items():
        assert 6400 <= size < 8000, name
    for name, size in commands.measure_other_formats(torch.full((100, 3, 8, 8), 7, dtype=torch.uint8)).items():
        assert size < 200, name
    bits = torch.randint(0, 2, (1500, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, size in commands.measure_other_formats(bits).items():
        assert 12_000 <= size < 17_000, name
