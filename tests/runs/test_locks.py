"""One writer a run folder: a second process is refused in one line, a killed one leaves no lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbed_runs import KILL, SMALL, STATE, Running, Server, end, held_elsewhere, small_data, wait_for

from ppl_vae import runs

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="commands are forked")

TRAIN = "train_svi.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "bars.npz")


@pytest.fixture
def endless(server: Server, dataset: Path, tmp_path: Path) -> Iterator[tuple[Path, Running]]:
    """A run that is training."""
    folder = tmp_path / "run"
    running = server.start(TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL, "--epochs", "1000000")
    wait_for(folder / STATE, running)
    yield folder, running
    running.signal(KILL)
    running.wait()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words",
    [
        (TRAIN, "--resume"),
        ("evaluate_log_likelihood.py",),
        ("certify_log_likelihood.py",),
        ("make_figures.py",),
        ("diagnose.py",),
    ],
    ids=lambda words: words[0],
)
def test_a_run_that_is_training_is_refused_in_one_line_with_who_has_it(endless, server, words):
    folder, running = endless
    done = server.run(*words, folder)
    assert done.code == 1
    [line] = done.said
    assert line.startswith(f"error: {folder}: ")
    assert f"process {running.pid} on {socket.gethostname()}" in line
    assert not running.has_ended()


@pytest.mark.thorough
def test_a_killed_process_leaves_a_run_that_others_may_take(endless):
    folder, running = endless
    running.signal(KILL)
    while not running.has_ended():
        time.sleep(0.01)
    assert (folder / ".lock").exists()
    with runs.lock_folder(folder):
        pass
    assert not (folder / ".lock").exists()


@pytest.mark.thorough
def test_two_runs_in_one_new_folder_are_one(server, dataset, tmp_path):
    words = (TRAIN, "--dataset", dataset, "--run-dir", tmp_path / "run", *SMALL)
    both = [server.start(*words), server.start(*words)]
    codes = sorted(running.wait().code for running in both)
    assert codes == [0, 1]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["test"]["num_images"] == 25


def test_a_lock_of_another_process_is_refused(tmp_path):
    child = held_elsewhere(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"but process {child} on "), runs.lock_folder(tmp_path):
            pass
    finally:
        end(child)
    with runs.lock_folder(tmp_path):
        pass


def test_a_child_that_outlives_its_killed_parent_holds_no_lock(tmp_path):
    ready, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        with runs.lock_folder(tmp_path):
            if os.fork() == 0:  # it says itself that it is there: what it inherited is closed by then
                os.write(told, str(os.getpid()).encode())
            time.sleep(60)
        os._exit(0)
    child = int(os.read(ready, 100))
    end(parent)
    try:
        with runs.lock_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_killed_writes_left_goes_when_the_folder_is_taken(tmp_path):
    (tmp_path / "figures").mkdir()
    left = [tmp_path / ".model.safetensors.partial", tmp_path / "figures" / ".latents.png.partial"]
    for path in left:
        path.write_bytes(b"half")
    with runs.lock_folder(tmp_path):
        assert not any(path.exists() for path in left)
