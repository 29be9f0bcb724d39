"""The run folder: atomic writes, strict JSON, damaged files, metrics, environment, new folders."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ppl_vae import runs
from ppl_vae.runs import checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Bytes ---


def fail_to_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)


def fail_to_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", replace)


def fail_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after the file was opened."""
    genuine = Path.open

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        if "x" not in mode:
            return genuine(path, mode, **options)
        path.touch()
        return genuine(Path("/dev/full"), "wb", buffering=0)

    monkeypatch.setattr(Path, "open", opened)


FAILURES: dict[str, Any] = {
    "write": pytest.param(
        fail_to_write, marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    ),
    "fsync": fail_to_sync,
    "replace": fail_to_replace,
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_write_that_fails_leaves_the_old_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Callable[[pytest.MonkeyPatch], None]
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with monkeypatch.context() as patched:
        failure(patched)
        with pytest.raises(OSError, match=r"denied|Input/output|space"):
            runs.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_write_that_fails_leaves_no_partial_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as patched:
        failure(patched)
        with pytest.raises(OSError, match=r"denied|Input/output|space"):
            runs.write_bytes(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_write_that_is_killed_before_the_replacement_leaves_the_old_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_write_replaces_the_old_content_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a longer old content")
    runs.write_bytes(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"new", ["file"])


@pytest.mark.parametrize("refused", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_takes_a_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: str
) -> None:
    """As on some network and FUSE file systems."""
    genuine = getattr(os, refused)

    def refuse(what: Any, *words: Any) -> Any:
        is_folder = os.path.isdir(what) if refused == "open" else stat.S_ISDIR(os.fstat(what).st_mode)
        if is_folder:
            raise OSError(22, "Invalid argument")
        return genuine(what, *words)

    monkeypatch.setattr(os, refused, refuse)
    runs.write_bytes(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"new", ["file"])


def test_a_write_takes_the_place_of_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_bytes(b"half of something that was lon")
    runs.write_bytes(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"new", ["file"])


# --- JSON ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path, value: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    runs.write_json(tmp_path / "file.json", {"a": value, "b": [1.5, {"c": value}], "d": (value,)})
    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, {"c": None}], "d": [None]}


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"name": "gr\u00fcn \u00b1", "number": 0.1, "whole": 3, "none": None, "list": [True, "x"], "empty": {}}
    runs.write_json(tmp_path / "file.json", value)
    assert runs.read_json(tmp_path / "file.json") == value


DAMAGED_JSON = {
    "empty": (b"", "file.json: damaged: not JSON"),
    "half": (b'{"a": 1, "b"', "file.json: damaged: not JSON"),
    "text": (b"hello", "file.json: damaged: not JSON"),
    "bytes": (b"\xff\xfe\x00{}", "file.json: damaged: not JSON"),
    "too deep": (b"[" * 200_000, "file.json: damaged: not JSON"),
    "list": (b"[]", "file.json: damaged: expected a JSON object, got list"),
    "number": (b"3", "file.json: damaged: expected a JSON object, got int"),
    "null": (b"null", "file.json: damaged: expected a JSON object, got NoneType"),
}


@pytest.mark.parametrize("damage", DAMAGED_JSON)
def test_damaged_json_is_named_and_refused(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGED_JSON[damage]
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        runs.read_json(tmp_path / "file.json")


def test_missing_json_asks_whether_this_is_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file; is .* a run folder\?"):
        runs.read_json(tmp_path / "config.json")


def test_damaged_evaluations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json: damaged"):
        runs.read_evaluations(tmp_path)


# --- Metrics ---

RECORDS = [{"step": step, "epoch": step // 10, "loss_nats_per_image": 100.5 - step} for step in (10, 20, 30)]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    for record in RECORDS:
        runs.append_metrics(tmp_path, record)
    return tmp_path


def test_metrics_are_one_json_object_a_line(metrics: Path) -> None:
    lines = [json.loads(line) for line in (metrics / "metrics.jsonl").read_text().splitlines()]
    assert lines == RECORDS


def test_metrics_come_back_as_they_were(metrics: Path) -> None:
    assert runs.read_metrics(metrics) == RECORDS


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_a_half_written_last_line_is_left_out(metrics: Path, kept: int) -> None:
    """Whatever part of the line reached the disk."""
    path = metrics / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:kept])
    assert runs.read_metrics(metrics) == RECORDS[:-1]


DAMAGED_LINES = {
    "half a line": b'{"step": 20, "epo',
    "an empty line": b"",
    "a number": b"20",
    "a list": b"[20]",
    "null": b"null",
    "no step": b'{"epoch": 2}',
    "a step that is no number": b'{"step": "20"}',
    "no text": b"\xff\xfe\x00\x80",
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_a_damaged_line_in_the_middle_is_named_and_refused(metrics: Path, damage: str) -> None:
    path = metrics / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], DAMAGED_LINES[damage], lines[2]]) + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged"):
        runs.read_metrics(metrics)


@pytest.mark.parametrize("step", [0, 9, 10, 15, 20, 30, 31])
def test_cut_metrics_keeps_what_lies_up_to_the_step(metrics: Path, step: int) -> None:
    runs.cut_metrics(metrics, step)
    assert runs.read_metrics(metrics) == [record for record in RECORDS if record["step"] <= step]


def test_cut_metrics_makes_a_half_written_file_whole(metrics: Path) -> None:
    path = metrics / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    runs.cut_metrics(metrics, 30)
    runs.append_metrics(metrics, RECORDS[2])
    assert runs.read_metrics(metrics) == RECORDS


# --- Tensors ---

TENSORS = {
    "float": torch.linspace(-1, 1, 5),
    "double": torch.tensor([[math.pi]], dtype=torch.double),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "number": torch.tensor(7, dtype=torch.int64),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    runs.save_tensors(tmp_path / "file.safetensors", TENSORS, {})
    read = runs.load_tensors(tmp_path / "file.safetensors")[0][name]
    assert (read.dtype, read.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert torch.equal(read, TENSORS[name])


def test_scalars_come_back_beside_the_tensors(tmp_path: Path) -> None:
    scalars = {"step": 3, "best_elbo": -101.25, "none": None}
    runs.save_tensors(tmp_path / "file.safetensors", {"w": torch.ones(2)}, scalars)
    assert runs.load_tensors(tmp_path / "file.safetensors")[1] == scalars


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    runs.save_tensors(tmp_path / "file.safetensors", {"a": weight, "b": weight}, {})
    read, _ = runs.load_tensors(tmp_path / "file.safetensors")
    assert torch.equal(read["a"], read["b"])


@pytest.mark.parametrize("metadata", ["{", "[]", "3"])
def test_scalars_that_are_no_json_object_are_refused(tmp_path: Path, metadata: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "file.safetensors", metadata={"json": metadata})
    with pytest.raises(ValueError, match=r"file\.safetensors: damaged"):
        runs.load_tensors(tmp_path / "file.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_tensor_file_is_named_and_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "file.safetensors"
    runs.save_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"file\.safetensors: damaged"):
        runs.load_tensors(path)


def test_a_tensor_file_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    runs.save_tensors(path, TENSORS, {})
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"x" * 20 + content[28:])
    with pytest.raises(ValueError, match=r"file\.safetensors: damaged"):
        runs.load_tensors(path)


def test_a_folder_in_the_place_of_a_tensor_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"file\.safetensors: damaged"):
        runs.load_tensors(tmp_path / "file.safetensors")


def fail_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Path, "open", opened)


def fail_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an error has no file's name."""

    def chunks(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "_read_with_zeros", chunks)


def fail_in_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors have no number, and whatever it cannot open is missing."""

    def opened(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("No such file or directory: file.safetensors")

    monkeypatch.setattr(checkpoints, "safe_open", opened)


UNREADABLE = {"open": fail_to_open, "read": fail_to_read, "safetensors": fail_in_safetensors}


@pytest.mark.parametrize("failure", UNREADABLE)
def test_tensors_that_cannot_be_read_now_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    path = tmp_path / "file.safetensors"
    runs.save_tensors(path, TENSORS, {})
    UNREADABLE[failure](monkeypatch)
    with pytest.raises(OSError, match=r"Too many|Input/output|No such file") as caught:
        runs.load_tensors(path)
    assert caught.value.filename == str(path)


def test_missing_weights_say_that_the_run_has_none_yet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file; the run in .* has no weights yet"):
        runs.load_tensors(tmp_path / "model.safetensors")


# --- Environment ---


@pytest.mark.parametrize("package", ["torch", "numpy", "pyro-ppl", "safetensors"])
def test_the_environment_holds_each_packages_version(package: str) -> None:
    module = __import__(package.removesuffix("-ppl"))
    assert runs.describe_environment("cpu")["packages"][package].split("+")[0] == module.__version__.split("+")[0]


def test_the_environment_holds_the_commit() -> None:
    folder = Path(runs.__file__).parent
    asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert runs.describe_environment("cpu")["git_commit"] == (asked.stdout.strip() if asked.returncode == 0 else None)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("is_tracked", [True, False])
def test_the_commit_of_a_project_around_the_package_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_tracked: bool
) -> None:
    def git(*words: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", str(tmp_path), *own, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / ".venv" / "ppl_vae" / "runs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "theirs.py").touch()
    git("init")
    git("add", *(["."] if is_tracked else ["theirs.py"]))
    git("commit", "-m", "theirs")
    monkeypatch.setattr(sys.modules["ppl_vae.runs.environment"], "__file__", str(package / "environment.py"))
    found = runs.describe_environment("cpu")
    assert (found["git_commit"], found["git_dirty"]) == (
        (git("rev-parse", "HEAD"), False) if is_tracked else (None, None)
    )


def test_the_environment_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = runs.describe_environment("cpu")
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_each_later_start_is_recorded_as_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for word in ("first", "second", "third"):
        monkeypatch.setattr(sys, "argv", [word])
        runs.record_environment(tmp_path, "cpu")
    recorded = runs.read_json(tmp_path / "environment.json")
    assert recorded["argv"] == ["first"]
    assert [start["argv"] for start in recorded["resumed"]] == [["second"], ["third"]]


# --- New folders ---


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    made = runs.make_run_dir(str(tmp_path / "a" / "b"), dataset="mnist", likelihood="bernoulli")
    assert made == tmp_path / "a" / "b"
    assert made.is_dir()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"--run-dir: expected a new or empty folder, but .* exists$"):
        runs.make_run_dir(str(tmp_path), dataset="mnist", likelihood="bernoulli")


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"--run-dir: expected a new or empty folder, but .* exists \(--resume"):
        runs.make_run_dir(str(tmp_path), dataset="mnist", likelihood="bernoulli")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--run-dir: expected a new or empty folder, but .*file exists"):
        runs.make_run_dir(str(tmp_path / "file"), dataset="mnist", likelihood="bernoulli")


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder in which the clock stands still."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20300102-030405")
    return tmp_path


@pytest.mark.parametrize("dataset", ["mnist", "/some/where/mnist.npz"])
def test_a_default_name_is_data_likelihood_date_and_time(one_second: Path, dataset: str) -> None:
    made = runs.make_run_dir(None, dataset=dataset, likelihood="bernoulli")
    assert made == Path("runs/mnist-bernoulli-20300102-030405")
    assert made.is_dir()


def test_default_names_in_one_second_differ(one_second: Path) -> None:
    made = {runs.make_run_dir(None, dataset="mnist", likelihood="bernoulli") for _ in range(5)}
    assert len(made) == 5


def test_two_processes_that_take_a_default_name_at_once_get_two_folders(
    monkeypatch: pytest.MonkeyPatch, one_second: Path
) -> None:
    """A folder may appear after its name was found to be free: as if none existed while names are looked at."""
    monkeypatch.setattr(Path, "exists", lambda path, **_: False)
    made = {runs.make_run_dir(None, dataset="mnist", likelihood="bernoulli") for _ in range(2)}
    assert len(made) == 2
