"""One evaluation by several processes, or in several sittings: the same numbers."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_worker import CASES, all_cases, small_passes
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence

from ppl_vae import runs
from ppl_vae.commands.evaluate import evaluate_run, partial_path
from ppl_vae.commands.options import Evaluate
from ppl_vae.evidence import evaluation
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runs import checkpoints
from ppl_vae.runtime import batching
from ppl_vae.runtime.batching import images_per_group
from ppl_vae.runtime.errors import Interrupted

pytestmark = pytest.mark.thorough

TESTS = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
WORLDS = (2, 3)


# --- Ranks ---


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{(number of ranks, rank): (numbers by case, errors by how it should end)}."""
    folder = tmp_path_factory.mktemp("ranks")
    worlds = [word for size in WORLDS for word in (_free_port(), str(size))]
    started = [
        subprocess.Popen([sys.executable, TESTS / "evaluation_worker.py", folder, str(rank), *worlds], env=ONE_THREAD)
        for rank in range(max(WORLDS))
    ]
    codes = [process.wait(timeout=300) for process in started]
    assert codes == [0] * len(started)
    return {
        (size, rank): runs.load_tensors(folder / f"{size}-{rank}.safetensors")
        for size in WORLDS
        for rank in range(size)
    }


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(batching.PASS_BYTES, "cpu", 0)
        small_passes()
        return all_cases()


@pytest.mark.parametrize("case", [*CASES, "reconstruction"])
def test_every_rank_has_the_numbers_of_a_process_alone(ranks, alone, case):
    for numbers, _ in ranks.values():
        assert torch.equal(numbers[case].nan_to_num(7.5), alone[case].nan_to_num(7.5))


def test_a_number_that_is_not_finite_on_one_rank_ends_all_of_them(ranks):
    for (_, rank), (_, ends) in ranks.items():
        assert ends["not finite"] == ("NotFinite" if rank == 1 else "EndedElsewhere")


def test_a_stop_on_one_rank_stops_all_and_the_finished_blocks_are_taken_up(ranks):
    assert {ends["stopped"] for _, ends in ranks.values()} == {"Stopped"}


def test_a_block_that_cannot_be_kept_on_one_rank_ends_all_of_them(ranks):
    for (_, rank), (_, ends) in ranks.items():
        assert ends["not kept"] == ("OSError" if rank == 0 else "EndedElsewhere")


@pytest.mark.slow
def test_the_script_under_torchrun_writes_what_it_writes_alone(tmp_path):
    options = ("--images", "15", "--num-particles", "30", "--compile", "off")
    script = str(TESTS.parent / "scripts" / "evaluate_log_likelihood.py")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found, said = [], []
    for name, how in (("alone", (sys.executable,)), ("together", torchrun)):
        (tmp_path / name).mkdir()
        words = [*how, script, "mnist-best", *options]
        done = subprocess.run(words, capture_output=True, text=True, env=ONE_THREAD, cwd=tmp_path / name, timeout=300)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / name / "runs" / "mnist-best"
        entry = runs.read_evaluations(folder)["test"]
        found.append((entry | {"seconds": None}, (folder / runs.per_image_file("test")).read_bytes()))
        said.append(done.stdout)
    assert found[0] == found[1]
    assert said[0].splitlines() == said[1].splitlines()  # rank 0 alone speaks


# --- The numbers ---


def test_the_mean_over_groups_is_the_exact_evidence(monkeypatch):
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 40 * 8 * 6 * 12)
    vae = bernoulli_vae(latent_dim=1)
    x = torch.bernoulli(torch.full((23, 12), 0.5, dtype=torch.double), generator=torch.Generator().manual_seed(1))
    exact = quadrature_log_evidence(vae, x, latent_dim=1)
    unbiased = torch.stack(
        [(evaluate(vae, x, num_particles=20, seed=seed).log_evidence - exact).exp() for seed in range(30)]
    )
    assert ((unbiased.mean(0) - 1).abs() < 5 * unbiased.std(0) / math.sqrt(30)).all()


def test_groups_have_noise_of_their_own(monkeypatch):
    """The same image in three groups: with one seed for all its numbers would be equal."""
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 5 * 8 * 6 * 6)
    oracle = LinearGaussian.random()
    x = oracle.draw(1).expand(3, -1)
    assert images_per_group(x, 5) == 1
    bounds = evaluate(oracle.vae(widen=1.5), x, num_particles=5, seed=0).log_evidence
    assert len(set(bounds.tolist())) == 3


@pytest.mark.parametrize("num_particles", [1, 7, 50, 200])
def test_two_models_have_the_same_seeds_for_the_same_images(num_particles, monkeypatch):
    """Also where one of them holds so much of a pixel that its passes are smaller: noise is matched by images."""
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 8 * 6 * 12 * 100)
    seeds: list[list[tuple[int, int]]] = []
    block_seed = evaluation.block_seed
    monkeypatch.setattr(evaluation, "block_seed", lambda *places: seeds[-1].append(places) or block_seed(*places))
    for numbers in (6, 60):
        vae = bernoulli_vae(latent_dim=2)
        vae.likelihood.family.floats_per_pixel = numbers
        seeds.append([])
        evaluate(vae, torch.zeros(30, 12, dtype=torch.double), num_particles=num_particles, seed=0)
    assert seeds[0] == seeds[1]
    assert len(seeds[0]) == {1: 1, 7: 3, 50: 15, 200: 30}[num_particles]


# --- Interruptions ---


@pytest.fixture
def folder(bars_run, tmp_path, monkeypatch):
    """A trained run; groups of 3 images at S = 30, and a write after each."""
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 100 * 4 * 6 * 64)
    return Path(shutil.copytree(bars_run, tmp_path / "run"))


ASKED = {"split": "test", "num_particles": 30, "images": None, "device": "cpu", "seed": 3}


def _evaluate(folder: Path, **asked) -> list[str]:
    said: list[str] = []
    evaluate_run(Evaluate(str(folder), **{**ASKED, **asked}), say=said.append)
    return said


def _numbers(folder: Path) -> tuple[dict, bytes]:
    entry = runs.read_evaluations(folder)["test"]
    return {**entry, "seconds": None}, (folder / runs.per_image_file("test")).read_bytes()


def _stop_after(monkeypatch, groups: int, number: int = signal.SIGINT) -> None:
    """The signal comes while a group is computed."""
    add, seen = checkpoints.BlockStore.add, []

    def add_and_signal(self, first, rows):
        add(self, first, rows)
        seen.append(first)
        if len(seen) == groups:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoints.BlockStore, "add", add_and_signal)


@pytest.fixture
def undisturbed(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "undisturbed"))
    _evaluate(other)
    return _numbers(other)


_KILLED = """
import os, signal, sys
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.options import Evaluate
from ppl_vae.evidence import evaluation
from ppl_vae.runtime import batching
from ppl_vae.runs import checkpoints
checkpoints._SECONDS_BETWEEN_WRITES = 0.0
batching.PASS_BYTES["cpu"] = 100 * 4 * 6 * 64
add, seen = checkpoints.BlockStore.add, []
def add_and_die(self, first, rows):
    add(self, first, rows)
    seen.append(first)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.BlockStore.add = add_and_die
evaluate_run(Evaluate(sys.argv[1], num_particles=30, seed=3), say=print)
"""


def test_a_killed_evaluation_goes_on_to_the_numbers_of_an_undisturbed_one(folder, undisturbed):
    for _ in range(2):
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, folder], capture_output=True, env=ONE_THREAD, timeout=300
        )
        assert killed.returncode == -signal.SIGKILL
    said = _evaluate(folder)
    assert any("holds 8 finished blocks" in line for line in said)
    assert _numbers(folder) == undisturbed
    assert not partial_path(folder, "test").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done_and_ends_with_its_number(folder, undisturbed, monkeypatch, number):
    before = runs.read_evaluations(folder)
    with monkeypatch.context() as patch:
        _stop_after(patch, 5, number)
        with pytest.raises(Interrupted, match="15 of 40 images are done and kept") as caught:
            _evaluate(folder)
    assert caught.value.number == number
    assert runs.read_evaluations(folder) == before
    assert any("holds 5 finished blocks" in line for line in _evaluate(folder))
    assert _numbers(folder) == undisturbed


@pytest.mark.parametrize("other", [{"seed": 4}, {"num_particles": 31}, {"images": 39}], ids=str)
def test_what_was_done_of_another_evaluation_is_not_taken(folder, undisturbed, monkeypatch, other):
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        with pytest.raises(Interrupted):
            _evaluate(folder, **other)
    said = _evaluate(folder)
    assert [line for line in said if "was begun with other" in line]
    assert _numbers(folder) == undisturbed


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("damage", [_cut, _flip, lambda content: b""])
def test_a_damaged_file_of_what_is_done_is_said_and_the_evaluation_starts_over(
    folder, undisturbed, monkeypatch, damage
):
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        with pytest.raises(Interrupted):
            _evaluate(folder)
    path = partial_path(folder, "test")
    path.write_bytes(damage(path.read_bytes()))
    said = _evaluate(folder)
    assert sum("damaged" in line and "computed again" in line for line in said) == 1
    assert _numbers(folder) == undisturbed
