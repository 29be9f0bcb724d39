"""Small runs in processes of their own, killed or broken, and what they are compared with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from small_run import bars

from ppl_vae import runs

SCRIPTS = Path(__file__).parent.parent / "scripts"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PPL_VAE_TRACEBACK"} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
}
SMALL = """
    --epochs 2 --batch-size 20 --network mlp --hidden 8 --latent-dim 2 --images 25 --evaluation-particles 200
    --prior standard-normal --warmup-epochs 1 --checkpoint-seconds 0 --compile off
""".split()  # noqa: SIM905 (read as it is typed)

CONFIG, METRICS, MODEL = "config.json", "metrics.jsonl", "model.safetensors"
STATE, PREVIOUS = "training_state.safetensors", "training_state.previous.safetensors"
EVALUATION, PER_IMAGE, ENVIRONMENT_FILE = "evaluation.json", "evaluation-test.safetensors", "environment.json"


def small_data(path: Path, *, images: int = 100) -> Path:
    """An .npz file of 8 x 8 images, bars, as rows of a table: of those there are few figures to draw."""
    counts = {"train": images, "valid": 20, "test": 40}
    rows = {split: bars(n, seed=seed)[0].reshape(n, 64) for seed, (split, n) in enumerate(counts.items())}
    np.savez(path, **rows)
    return path


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines of stderr without those of progress bars."""
        parts = [part.strip() for part in re.split(r"[\r\n]+", self.err)]
        return [part for part in parts if part and not re.search(r"\d+%\||\[00:", part)]


# Most of a short command is the import of torch. This process has done it, and forks for each command. A child leads a
# group of its own, so that it can be killed with whatever it started.
SERVER = """
import json, os, resource, runpy, signal, sys, traceback
import matplotlib.backends.backend_agg, torch._dynamo, ppl_vae.commands, ppl_vae.study
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, path in ((1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if asked["most_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["most_bytes"], resource.RLIM_INFINITY))
        replace, left = os.replace, asked["dies_after"]

        def replace_and_count(*paths):
            global left
            replace(*paths)
            left -= 1
            if left == 0:
                os._exit(9)

        os.replace = replace_and_count
        os.chdir(asked["cwd"])
        sys.argv = asked["argv"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


class Running:
    """A script that runs."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
        self.pid, self._server, self._out, self._err = pid, server, out, err

    def signal(self, number: int) -> None:
        """To it and to whatever it started; nothing where it has ended."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # not the leader of a group yet, or gone
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """With all its threads, of which the last one closes its files; also while nobody has waited for it."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
            threads = os.listdir(f"/proc/{self.pid}/task")
        except FileNotFoundError:
            return True
        return status.rpartition(")")[2].split()[0] == "Z" and len(threads) == 1

    def words_so_far(self) -> str:
        return "".join(map(_words, (self._out, self._err)))

    def wait(self) -> Done:
        code = int(self._server.ask({"wait": self.pid}))
        return Done(code, _words(self._out), _words(self._err))


def wait_for(path: Path, running: Running) -> None:
    """Until a script has written that file."""
    patience = time.monotonic() + 120
    while not path.exists():
        assert not running.has_ended()
        assert time.monotonic() < patience
        time.sleep(0.002)


def _words(path: Path) -> str:
    """Nothing of a process that was killed before it could say anything."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


class Server:
    """Starts scripts in processes of their own, fast."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], env=ENVIRONMENT, encoding="utf-8", **pipes)

    def ask(self, asked: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def start(
        self, script: str, *words: object, cwd: Path | None = None, most_bytes: int = 0, dies_after: int = 0
    ) -> Running:
        """Start a script.

        Args:
            most_bytes: A write beyond it in any file fails, as on a full disk; 0 for no limit.
            dies_after: It dies at once when so many files are in place; 0 for never.
        """
        self._count += 1
        out, err = self._folder / f"out-{self._count}", self._folder / f"err-{self._count}"
        asked = {
            "argv": [str(SCRIPTS / script), *map(str, words)],
            "cwd": str(cwd or self._folder),
            "out": str(out),
            "err": str(err),
            "most_bytes": most_bytes,
            "dies_after": dies_after,
        }
        return Running(self, int(self.ask(asked)), out, err)

    def run(self, script: str, *words: object, **how: Any) -> Done:
        return self.start(script, *words, **how).wait()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.end()


# --- What two runs have in common ---


def numbers_of(folder: Path) -> dict[str, Any]:
    """Every number of a finished run, without times: bytes of the weights, of the last state's tensors, records, ..."""
    return {
        MODEL: (folder / MODEL).read_bytes(),
        STATE: tensors_of(folder / STATE),
        METRICS: [without_times(record) for record in runs.read_metrics(folder)],
        EVALUATION: without_times(json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["test"]),
        PER_IMAGE: tensors_of(folder / PER_IMAGE),
        "figures": sorted(path.name for path in (folder / "figures").iterdir()),
    }


def tensors_of(path: Path) -> bytes:
    """What follows the header, in which there are times: all tensors in their order."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in value.items() if "second" not in key}


def left_behind(folder: Path) -> list[str]:
    """Half-written files and locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


# --- Damage ---


def flip(path: Path, place: float, bit: int = 3) -> None:
    """Turns one bit, at a place from 0, the first byte, to 1, the last."""
    content = bytearray(path.read_bytes())
    content[round(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path, place: float) -> None:
    """Keeps that part of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))])


def remove(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Path], None]


def damages(places: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)) -> dict[str, Damage]:
    """By name, what may happen to a file."""

    def at(damage: Callable[[Path, float], None], place: float) -> Damage:
        return lambda path: damage(path, place)

    found: dict[str, Damage] = {f"a bit at {place}": at(flip, place) for place in places}
    found |= {f"cut at {place}": at(truncate, place) for place in places if place < 1}
    return (
        found
        | {"cut at its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1])}
        | {"gone": remove, "a folder": become_a_folder}
    )


KILL = signal.SIGKILL


def held_elsewhere(folder: Path) -> int:
    """A process that has the lock and sleeps; returns its number once it has it."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with runs.lock_folder(folder):
            os.write(told, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
