"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

CONFIG, ENVIRONMENT, METRICS, EVALUATION = "config.json", "environment.json", "metrics.jsonl", "evaluation.json"
MODEL, TRAINING_STATE, FIGURES = "model.safetensors", "training_state.safetensors", "figures"


def per_image(split: str) -> str:
    """The file of one split's evaluation that has a number for each image."""
    return f"evaluation-{split}.safetensors"


def new_run_dir(run_dir: str | None, *, dataset: str, likelihood: str) -> Path:
    """Makes the folder of a new run: as asked for, or one under runs/ by data set, likelihood, date and time.

    Raises:
        ValueError: the folder exists and holds something.
    """
    if run_dir is None:
        return new_folder(f"{Path(dataset).stem}-{likelihood}")
    path = Path(run_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        saved_from_python = (path / MODEL).exists() and not (path / TRAINING_STATE).exists()
        trained = (path / CONFIG).exists() and not saved_from_python
        advice = f" (--resume {path} goes on with it)" if trained else ""
        raise ValueError(f"--run-dir: expected a new or empty folder, but {path} exists{advice}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir: {path} cannot be made: {error.strerror}") from None
    return path


def new_folder(stem: str) -> Path:
    """Makes runs/STEM-DATE-TIME, or runs/STEM-DATE-TIME-2 and so on.

    Making the folder is what takes the name, also beside other processes.
    """
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"{path}: expected a folder that can be made, got: {error.strerror}") from None
        return path
    raise ValueError(f"runs/{name}: expected a free name, but a thousand like it are taken; name a folder yourself")


def check_writable(folder: Path) -> None:
    """Raises ValueError where nothing can be written into the folder: before the work, not after it."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: expected a folder that can be written to, got one that is read-only")


# --- Bytes ---


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file as a whole or not at all, and returns when it is on disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- JSON ---


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, numbers that are not finite as null."""
    write_bytes(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except NotADirectoryError:
        raise ValueError(f"{path.parent}: expected a run folder, got a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object, got {type(value).__name__}")
    return value


def read_evaluations(run_dir: Path) -> dict[str, Any]:
    """evaluation.json, or nothing where there is none yet."""
    path = run_dir / EVALUATION
    evaluations = read_json(path) if path.exists() else {}
    for key, entry in evaluations.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: damaged: expected an object under {key!r}, got {type(entry).__name__}")
    return evaluations


# --- Metrics ---


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """One more line of metrics.jsonl, on disk when this returns."""
    with (run_dir / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return  # the line that was being written when the run was killed
            raise ValueError(f"{path}: damaged: line {number} is no record with a step") from None
        yield record


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a half-written last line is left out."""
    return list(_metrics(run_dir / METRICS))


def cut_metrics(run_dir: Path, step: int) -> None:
    """Removes every record after this step: those of work that a resumed run does again."""
    kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
    write_bytes(run_dir / METRICS, "".join(json.dumps(record) + "\n" for record in kept).encode())


# --- Tensors ---


def save_tensors(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Named tensors and a JSON object beside them, as one safetensors file."""
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(own, metadata={"json": json.dumps(scalars)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Back from ``save_tensors``. Raises ValueError where the file is missing or damaged."""
    return _read_tensors(path, headers_only=False)


def _read_tensors(path: Path, *, headers_only: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            scalars = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in ([] if headers_only else file.keys())}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; the run in {path.parent} has no weights yet") from None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object in its header, got {type(scalars).__name__}")
    return tensors, scalars


def load_step(path: Path) -> int:
    """The training step that a file by ``save_tensors`` was written at. Raises ValueError as ``load_tensors``."""
    step = _read_tensors(path, headers_only=True)[1].get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: damaged: expected the number of a step in its header, got {step!r}")
    return step


# --- Environment ---


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name and what of its vector instructions torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def environment(device: str) -> dict[str, Any]:
    """Versions, device, threads, git commit and whether dirty, argv, time."""
    commit = _git("rev-parse", "HEAD")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in ("ppl_vae", "torch", "pyro-ppl", "numpy", "safetensors")},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
    }


def record_environment(run_dir: Path, device: str) -> None:
    """environment.json at the start; each later start of the same run goes into its list "resumed"."""
    path = run_dir / ENVIRONMENT
    now = environment(device)
    if path.exists():
        first = read_json(path)
        now = first | {"resumed": [*first.get("resumed", []), now]}
    write_json(path, now)
