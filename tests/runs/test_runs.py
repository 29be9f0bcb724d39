"""The run folder: atomic writes, strict JSON, damaged files, metrics, environment, new folders."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae import runs


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
def test_a_write_that_fails_leaves_the_old_content_and_no_partial_file(monkeypatch, tmp_path, failure):
    (tmp_path / "file").write_bytes(b"old")
    with monkeypatch.context() as patched:
        failure(patched)
        with pytest.raises(OSError, match=r"denied|Input/output|space"):
            runs.write_bytes(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_a_write_that_is_killed_before_the_replacement_leaves_the_old_content(monkeypatch, tmp_path):
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_write_replaces_the_old_content_and_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "file").write_bytes(b"a longer old content")
    runs.write_bytes(tmp_path / "file", b"new")
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"new", ["file"])


# --- JSON ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path, value):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    runs.write_json(tmp_path / "file.json", {"a": value, "b": [1.5, {"c": value}], "d": (value,)})
    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert read == {"a": None, "b": [1.5, {"c": None}], "d": [None]}


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
def test_damaged_json_is_named_and_refused(tmp_path, damage):
    content, message = DAMAGED_JSON[damage]
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        runs.read_json(tmp_path / "file.json")


# --- Metrics ---

RECORDS = [{"step": step, "epoch": step // 10, "loss_nats_per_image": 100.5 - step} for step in (10, 20, 30)]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    for record in RECORDS:
        runs.append_metrics(tmp_path, record)
    return tmp_path


def test_metrics_come_back_as_they_were(metrics):
    assert runs.read_metrics(metrics) == RECORDS


@pytest.mark.parametrize("kept", [1, 10, 40])
def test_a_half_written_last_line_is_left_out(metrics, kept):
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
def test_a_damaged_line_in_the_middle_is_named_and_refused(metrics, damage):
    path = metrics / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], DAMAGED_LINES[damage], lines[2]]) + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged"):
        runs.read_metrics(metrics)


@pytest.mark.parametrize("step", [0, 9, 10, 15, 20, 30, 31])
def test_mended_metrics_keep_what_lies_up_to_the_step(metrics, step):
    runs.mend_metrics(metrics, step)
    assert runs.read_metrics(metrics) == [record for record in RECORDS if record["step"] <= step]


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
def test_a_tensor_comes_back_bit_for_bit(tmp_path, name):
    runs.save_tensors(tmp_path / "file.safetensors", TENSORS, {})
    read = runs.load_tensors(tmp_path / "file.safetensors")[0][name]
    assert (read.dtype, read.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert torch.equal(read, TENSORS[name])


# --- New folders ---


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_go_on(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"--run-dir: expected a new or empty folder, but .* exists \(--resume"):
        runs.make_run_dir(str(tmp_path), dataset="mnist", likelihood="bernoulli")


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder in which the clock stands still."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20300102-030405")
    return tmp_path


@pytest.mark.parametrize("dataset", ["mnist", "/some/where/mnist.npz"])
def test_a_default_name_is_data_likelihood_date_and_time(one_second, dataset):
    made = runs.make_run_dir(None, dataset=dataset, likelihood="bernoulli")
    assert made == Path("runs/mnist-bernoulli-20300102-030405")
    assert made.is_dir()


def test_two_processes_that_take_a_default_name_at_once_get_two_folders(monkeypatch, one_second):
    """A folder may appear after its name was found to be free: as if none existed while names are looked at."""
    monkeypatch.setattr(Path, "exists", lambda path, **_: False)
    made = {runs.make_run_dir(None, dataset="mnist", likelihood="bernoulli") for _ in range(2)}
    assert len(made) == 2
