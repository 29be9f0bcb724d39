"""Damaged files, full disks, hostile configs, signals: a run goes on right, or one line says what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed_runs import (
    CONFIG,
    ENVIRONMENT_FILE,
    EVALUATION,
    METRICS,
    MODEL,
    PER_IMAGE,
    PREVIOUS,
    SMALL,
    STATE,
    Done,
    Server,
    damages,
    flip,
    left_behind,
    numbers_of,
    small_data,
    truncate,
    wait_for,
    without_times,
)
from small_run import contents

from ppl_vae import load, runs

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="commands are forked"),
    pytest.mark.thorough,
]

TRAIN, EVALUATE, FIGURES = "train_svi.py", "evaluate_log_likelihood.py", "make_figures.py"
FILES = (CONFIG, ENVIRONMENT_FILE, METRICS, MODEL, STATE, PREVIOUS, EVALUATION, PER_IMAGE)
HAS_DIGEST = (MODEL, STATE, PREVIOUS, PER_IMAGE)  # in the other files, people may change a number


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data") / "bars.npz")


@pytest.fixture(scope="module")
def whole(server: Server, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, finished."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = server.run(TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL)
    assert done.code == 0, done
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def one_line(done: Done, name: str) -> None:
    """It ended with an error in one line that names the file."""
    assert (done.code, len(done.said)) == (1, 1), done
    assert done.said[0].startswith("error: "), done
    assert name in done.said[0], done


# --- Every file, damaged in every way ---

QUICK = {(name, "a bit at 0.5") for name in HAS_DIGEST} | {(MODEL, "gone"), (METRICS, "cut at 0.5"), (STATE, "gone")}
SWEEP = [
    pytest.param(name, damage, id=f"{name}, {damage}", marks=[] if (name, damage) in QUICK else pytest.mark.slow)
    for name in FILES
    for damage in damages()
    if name in HAS_DIGEST or not damage.startswith("a bit")
]


@pytest.mark.parametrize(("name", "damage"), SWEEP)
def test_a_damaged_run_is_resumed_to_the_same_end_or_refused(server, whole, copy, name, damage):
    damages()[damage](copy / name)
    done = server.run(TRAIN, "--resume", copy)
    if done.code:
        one_line(done, name)
        return
    found, expected = numbers_of_what_is_there(copy), numbers_of(whole)
    said_to_be_lost = {METRICS} if name == METRICS else set()
    if "no evaluation of single test images" in done.out:
        said_to_be_lost |= {PER_IMAGE, "figures"}
    for part in expected.keys() - said_to_be_lost:
        assert found.get(part) == expected[part], part
    assert left_behind(copy) == []


def numbers_of_what_is_there(folder: Path) -> dict[str, Any]:
    (folder / METRICS).touch()
    if not (folder / PER_IMAGE).exists():
        shutil.copy(folder / STATE, folder / PER_IMAGE)
    return numbers_of(folder)


OTHER_COMMANDS = [
    pytest.param(script, name, damage, id=f"{script}, {name}, {damage}", marks=pytest.mark.slow)
    for script in (EVALUATE, FIGURES)
    for name in FILES
    for damage in damages((0.0, 0.1, 0.5, 1.0))
    if name in HAS_DIGEST or not damage.startswith("a bit")
]


@pytest.mark.parametrize(("script", "name", "damage"), OTHER_COMMANDS)
def test_a_damaged_run_is_evaluated_and_drawn_right_or_refused(server, whole, copy, script, name, damage):
    words = ("--images", "25", "--num-particles", "200", "--seed", "0") if script == EVALUATE else ()
    damages()[damage](copy / name)
    done = server.run(script, copy, *words)
    if done.code:
        one_line(done, name)
    elif script == EVALUATE:
        expected, found = numbers_of(whole), numbers_of(copy) if name not in (METRICS, STATE) else None
        entry = found[EVALUATION] if found else without_times(json.loads((copy / EVALUATION).read_text())["test"])
        assert entry == expected[EVALUATION]


WEIGHTS = [
    pytest.param(name, damage, id=f"{name}, {damage}")
    for name in (CONFIG, MODEL)
    for damage in damages((0.0, 0.5, 1.0))
]


@pytest.mark.parametrize(("name", "damage"), WEIGHTS)
def test_damaged_weights_are_loaded_right_or_refused(whole, copy, name, damage):
    damages()[damage](copy / name)
    expected = load(whole).state_dict()
    try:
        found = load(copy).state_dict()
    except ValueError as error:
        assert name in str(error)  # noqa: PT017 (either is right)
        return
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("place", [i / 10 for i in range(11)])
def test_a_bit_that_turns_in_the_weights_is_noticed(copy, place):
    flip(copy / MODEL, place)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        load(copy)


# --- Two checkpoints ---


def test_a_damaged_state_is_said_and_gives_way_to_the_one_before_it(server, copy):
    truncate(copy / STATE, 0.5)
    done = server.run(TRAIN, "--resume", copy)
    assert f"{STATE}: damaged" in done.out
    assert "Going on from step 9." in done.out  # of 10


def test_two_damaged_states_are_refused_with_what_is_still_good(server, copy):
    for name in (STATE, PREVIOUS):
        truncate(copy / name, 0.5)
    done = server.run(TRAIN, "--resume", copy)
    one_line(done, STATE)
    assert MODEL in done.said[0]
    assert server.run(EVALUATE, copy, "--num-particles", "3").code == 0


# --- No room ---


def test_a_full_disk_leaves_the_old_files_and_a_run_that_goes_on_as_if_it_had_not_been(server, copy, tmp_path):
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    before = {name: (copy / name).read_bytes() for name in (STATE, PREVIOUS)}
    done = server.run(TRAIN, "--resume", copy, "--epochs", "3", most_bytes=len(before[STATE]) - 100)
    one_line(done, STATE)
    assert "the run is kept as of step 10" in done.said[0]
    assert f"--resume {copy} goes on" in done.said[0]
    assert {name: (copy / name).read_bytes() for name in before} == before
    assert left_behind(copy) == []
    for folder, words in ((copy, ()), (other, ("--epochs", "3"))):
        assert server.run(TRAIN, "--resume", folder, *words).code == 0
    assert numbers_of(copy) == numbers_of(other)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("needs to be root, to mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """Takes all that is left of a disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def test_a_disk_without_room_ends_in_one_line_and_is_gone_on_with_when_there_is(server, copy, whole, disk):
    folder = Path(shutil.copytree(copy, disk / "run"))
    for name in (EVALUATION, PER_IMAGE):
        (folder / name).unlink()
    shutil.rmtree(folder / "figures")
    filler = disk / "filler"
    fill(filler)
    one_line(server.run(TRAIN, "--resume", folder), "No space left on device")
    filler.unlink()
    done = server.run(TRAIN, "--resume", folder)
    assert done.code == 0, done
    assert numbers_of(folder) == numbers_of(whole)
    assert left_behind(folder) == []


# --- Signals ---


SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_ends_it_after_the_step_and_loses_nothing(server, dataset, whole, tmp_path, number):
    folder, (code, word) = tmp_path / "run", SIGNALS[number]
    running = server.start(TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL, "--epochs", "100000")
    wait_for(folder / STATE, running)
    running.signal(number)
    done = running.wait()
    assert done.code == code, done
    step = runs.load_step(folder / STATE)
    assert done.said == [f"{word}: stopped at step {step:,}; --resume {folder} goes on"]
    assert left_behind(folder) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_was_signaled_ends_as_if_it_was_not(server, dataset, whole, tmp_path, number):
    folder = tmp_path / "run"
    running = server.start(TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL, "--checkpoint-seconds", "1000")
    wait_for(folder / METRICS, running)
    running.signal(number)
    running.wait()
    done = server.run(TRAIN, "--resume", folder)
    assert done.code == 0, done
    found, expected = numbers_of(folder), numbers_of(whole)
    assert found == expected


def test_a_second_signal_ends_at_once(server, dataset, tmp_path):
    folder = tmp_path / "run"
    running = server.start(TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL, "--epochs", "100000")
    wait_for(folder / STATE, running)
    for _ in range(50):
        running.signal(signal.SIGINT)
    done = running.wait()
    assert (done.code, "Traceback" in done.err) == (130, False)
    assert runs.load_step(folder / STATE) > 0


# --- Hostile configs ---


def hostile(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["options"].update(options)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name",
    [MODEL, METRICS, *(pytest.param(name, marks=pytest.mark.slow) for name in FILES if name not in (MODEL, METRICS))],
)
@pytest.mark.parametrize("sign", ["", ".partial"])
def test_a_link_out_of_the_folder_is_replaced_and_not_followed(server, copy, tmp_path, name, sign):
    """The name itself, or that of the half-written file beside it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes((copy / name).read_bytes())
    before = contents(outside)
    link = copy / (f".{name}.partial" if sign else name)
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "precious")
    done = server.run(TRAIN, "--resume", copy, "--epochs", "3")
    assert done.code == 0, done
    assert contents(outside) == before
    assert not (copy / name).is_symlink() or name == CONFIG
