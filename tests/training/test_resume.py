"""SIGKILL at arbitrary moments, resume, and end bit for bit where the undisturbed run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppl_vae import data, runs

TRAIN = Path(__file__).parents[2] / "scripts" / "train_svi.py"
SMALL = """
    --epochs 3 --batch-size 16 --hidden 24 --latent-dim 4 --prior-layers 2 --prior-hidden 24 --num-particles 2
    --checkpoint-seconds 0
    --images 40 --evaluation-particles 20
""".split()  # noqa: SIM905 (read as it is typed)


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory):
    """A few hundred real images, in a file of one's own."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    mnist = data.load("mnist")
    np.savez(path, train=mnist.train[:600, 0], valid=mnist.validation[:60, 0], test=mnist.test[:60, 0])
    return path


def _start(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _finish(*words):
    process = _start(*words)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(small_mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    _finish("--dataset", small_mnist, "--run-dir", folder, *SMALL)
    return folder


def _kill_after(process, condition):
    """SIGKILL to the whole process group as soon as the condition holds; False where the process ended before."""
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def _same_run(folder, undisturbed):
    for name in ("model.safetensors", "training_state.safetensors"):
        one, other = load_file(folder / name), load_file(undisturbed / name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one), name
    timed = ("seconds", "train_images_per_second")
    one, other = (
        [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (folder, undisturbed)
    )
    assert one == other
    one, other = (json.loads((run / "evaluation.json").read_text())["test"] for run in (folder, undisturbed))
    assert one | {"seconds": 0} == other | {"seconds": 0}
    assert {p.name for p in (folder / "figures").iterdir()} == {p.name for p in (undisturbed / "figures").iterdir()}
    assert {path.name for path in folder.rglob(".*")} <= {runs.LOCK}, "half-written files are left"


@pytest.mark.thorough
@pytest.mark.parametrize("moment", ["config.json", "metrics.jsonl", "model.safetensors", "evaluation.json", "figures"])
def test_a_run_killed_when_a_file_appears_is_finished_by_resuming(moment, small_mnist, undisturbed, tmp_path):
    folder = tmp_path / "killed"
    process = _start("--dataset", small_mnist, "--run-dir", folder, *SMALL)
    assert _kill_after(process, lambda: (folder / moment).exists())
    _finish("--resume", folder)
    _same_run(folder, undisturbed)
    assert "is finished" in _finish("--resume", folder)


@pytest.mark.thorough
def test_a_run_interrupted_in_the_middle_of_an_epoch_goes_on_from_there(small_mnist, undisturbed, tmp_path):
    folder = tmp_path / "killed"
    process = _start("--dataset", small_mnist, "--run-dir", folder, *SMALL)
    assert _kill_after(process, (folder / "training_state.safetensors").exists)
    assert "Going on from step" in _finish("--resume", folder)
    _same_run(folder, undisturbed)
