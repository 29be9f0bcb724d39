"""A person's own data from its files to numbers, through the scripts: color PNGs, a file beyond memory, a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppl_vae import runs

pytestmark = pytest.mark.thorough

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["--network", "mlp", "--hidden", "8", "--latent-dim", "2", "--prior", "standard-normal", "--epochs", "2"]
SMALL += ["--batch-size", "20", "--evaluation-particles", "5", "--images", "30", "--compile", "off"]

# Runs scripts one after the other, held to what the process has by then and ``limit`` bytes where there is one. What
# the system counts is what programs ask for and write to; files that are mapped to be read are not part of it.
DRIVER = """
import json, resource, runpy, sys
import numpy, torch
from ppl_vae.data import storage

def run(words):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise

asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
for words in asked["before"]:  # libraries take their own share
    run(words)
if asked["large"]:
    storage.LARGE = asked["large"]
if asked["limit"]:
    now = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(now.split()[1]) + asked["limit"],) * 2)
    try:
        numpy.load(asked["whole"])
        print("the whole file fits")
    except MemoryError:
        print("the whole file does not fit")
for words in asked["commands"]:
    run(words)
"""


def run(*commands: list[str], folder: Path, **more: Any) -> str:
    """What the scripts print, one after the other in one process; ``more`` is for DRIVER."""

    def placed(words: list[str]) -> list[str]:
        return [str(SCRIPTS / words[0]), *words[1:]]

    asked = {"before": [], "large": 0, "limit": 0} | more | {"commands": [placed(words) for words in commands]}
    asked["before"] = [placed(words) for words in asked["before"]]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(asked)],
        cwd=folder,
        # What is freed goes back to the system at once: else what counts depends on how its pieces lie by chance.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PPL_VAE_CACHE_DIR": str(folder / "cache")}
        | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"},
        capture_output=True,
        encoding="utf-8",
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def evaluation(folder: Path) -> dict[str, Any]:
    return runs.read_evaluations(folder)["test"]


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 reddish and bluish PNGs in two folders, trained on, evaluated, encoded and drawn from."""
    folder = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 60, (12, 10, 3), np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    train = [
        "train_svi.py",
        "--dataset",
        "pictures",
        "--likelihood",
        "discretized-logistic",
        "--run-dir",
        "run",
        *SMALL,
    ]
    evaluate = ["evaluate_log_likelihood.py", "run", "--num-particles", "7"]
    sample = ["sample.py", "run", "--num-samples", "9"]
    encode = ["encode.py", "run", "pictures/red/3.png", "--num-particles", "5"]
    run(train, evaluate, sample, encode, folder=folder)
    return folder


def test_a_folder_of_color_images_is_trained_on_as_levels(colors: Path) -> None:
    config = json.loads((colors / "run" / runs.CONFIG).read_text())
    assert config["data"]["kind"] == "8-bit levels"
    assert config["data"]["event_shape"] == [3, 12, 10]


def test_a_folder_of_color_images_is_evaluated_in_bits_per_dim(colors: Path) -> None:
    entry = evaluation(colors / "run")
    nats = entry["log_likelihood"]["mean"]
    assert entry["num_particles"] == 7
    assert entry["num_images"] == 6  # a tenth
    assert entry["bits_per_dim"]["mean"] == pytest.approx(-nats / (3 * 12 * 10 * np.log(2)), rel=1e-6)
    assert 0 < entry["bits_per_dim"]["mean"] < 8.5  # 8 for pixels that are anything


def test_samples_have_the_shape_of_the_images(colors: Path) -> None:
    with np.load(colors / "run" / "samples" / "samples.npz", allow_pickle=False) as stored:
        shapes = {stored[name].shape for name in stored.files}
    assert any(shape[0] == 9 and sorted(shape[1:]) == [3, 10, 12] for shape in shapes)


def test_an_image_of_the_folder_is_encoded(colors: Path) -> None:
    (encoded,) = (colors / "run" / "encodings").rglob("*.npz")
    with np.load(encoded, allow_pickle=False) as stored:
        assert any(stored[name].shape == (1, 2) for name in stored.files)


def test_a_table_of_zeros_and_ones_is_trained_evaluated_and_encoded(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    rates = generator.uniform(0.05, 0.95, 17)
    np.save(tmp_path / "table.npy", (generator.random((300, 17)) < rates).astype(np.uint8))
    train = ["train_svi.py", "--dataset", "table.npy", "--run-dir", "run", *SMALL]
    evaluate = ["evaluate_log_likelihood.py", "run", "--num-particles", "20"]
    run(train, evaluate, ["encode.py", "run", "table.npy", "--num-particles", "3"], folder=tmp_path)
    entry = evaluation(tmp_path / "run")
    independent = float((rates * np.log(rates) + (1 - rates) * np.log(1 - rates)).sum())  # nats a row, of the truth
    assert entry["num_images"] == 30
    assert entry["log_likelihood"]["mean"] == pytest.approx(independent, abs=5 * entry["log_likelihood"]["stderr"] + 1)
    (encoded,) = (tmp_path / "run" / "encodings").rglob("*.npz")
    with np.load(encoded, allow_pickle=False) as stored:
        assert any(stored[name].shape == (300, 2) for name in stored.files)


# --- A file that is larger than memory ---


def save_floats(path: Path, num_images: int) -> None:
    """Real values (N, 1024), written by blocks."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (num_images, 1024))
    generator = np.random.default_rng(2)
    for first in range(0, num_images, 1000):
        block = generator.normal(3.0, 2.0, (min(1000, num_images - first), 1024)).astype(np.float32)
        file[first : first + len(block)] = block
    file.flush()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA")
def test_a_file_larger_than_the_memory_limit_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    """With the size from which on files are mapped lowered, so that the test is short."""
    save_floats(tmp_path / "floats.npy", 64_000)
    save_floats(tmp_path / "few.npy", 400)

    def commands(file: str, to: str) -> list[list[str]]:
        train = ["train_svi.py", "--dataset", file, "--likelihood", "normal", "--run-dir", to, *SMALL]
        train += ["--stream", "on", "--epochs", "1", "--batch-size", "200", "--learning-rate", "1e-4"]
        return [train, ["evaluate_log_likelihood.py", to, "--num-particles", "3", "--images", "500"]]

    more = {"before": commands("few.npy", "few"), "whole": str(tmp_path / "floats.npy")}
    said = run(*commands("floats.npy", "run"), folder=tmp_path, limit=215 * 2**20, large=2**23, **more)
    assert "the whole file does not fit" in said
    assert "are not held on the device" in said
    assert evaluation(tmp_path / "run")["num_images"] == 500
    assert runs.load_tensors(tmp_path / "run" / runs.TRAINING_STATE)[1]["step"] == (64_000 - 2 * 6400) // 200
    assert all(w.isfinite().all() for w in runs.load_tensors(tmp_path / "run" / runs.MODEL)[0].values())
    assert np.isfinite(evaluation(tmp_path / "run")["log_likelihood"]["mean"])
