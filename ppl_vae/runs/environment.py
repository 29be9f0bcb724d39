"""environment.json: what a run was made with."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ppl_vae.runs.files import ENVIRONMENT, JsonObject, read_json, write_json
from ppl_vae.runtime import ranks as distributed


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of the repository that tracks the package's files, not of a project whose .venv they are in."""
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    return _git("rev-parse", "HEAD") if is_tracked else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name, and the vector instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def describe_environment(device: str) -> JsonObject:
    """Versions, device, threads, git commit and whether dirty, argv, time."""
    commit = _commit()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in ("ppl_vae", "torch", "pyro-ppl", "numpy", "safetensors")},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "ranks": distributed.num_ranks(),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
    }


def record_environment(run_dir: Path, device: str) -> None:
    """Writes environment.json at the first start, and again if it is damaged; later starts go into its "resumed"."""
    path, now = run_dir / ENVIRONMENT, describe_environment(device)
    if path.exists():
        with suppress(ValueError, TypeError):
            first = read_json(path)
            now = first | {"resumed": [*first.get("resumed", []), now]}
    write_json(path, now)
