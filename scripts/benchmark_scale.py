"""Time what large data, several ranks and resumed runs cost, each by turns with what it costs without.

ranks: log p(x) of the pretrained run's test images by one rank and by two, each of one thread. folder: the first start
of a training on a folder of PNGs, later ones, and those on embedded MNIST. streaming: a compiled step on images that
are resident, and on the same streamed from a mapped file, on one thread. resume: a start, and a resumption. A start is
a process of its own, from nothing to the end of its first training step.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.files import check_output
from ppl_vae.runs.options import NOT_EMPTY, PLAIN, POSITIVE_INTEGER, CheckedOptions, Options, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("ranks", "folder", "streaming", "resume")


@dataclass(frozen=True)
class Scale(CheckedOptions):
    """Time what large data, several processes and resumed runs cost, each in turn with what it costs without."""

    parts: tuple[str, ...] = option(PARTS, "what is timed", PARTS)
    rounds: int = option(5, "how often each is timed", POSITIVE_INTEGER)
    pictures: int = option(20_000, "PNG files of 64 x 64 in the part folder", POSITIVE_INTEGER)
    output: str | None = option(None, "JSON file of the results (default: printed only)", NOT_EMPTY)


HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

# train_svi.py, but that the process says the time and ends after so many steps, wherever it is by then.
START = """
import dataclasses, os, runpy, sys, time
num_steps, sys.argv = int(sys.argv[1]), sys.argv[2:]
import ppl_vae.commands.train
module = sys.modules["ppl_vae.commands.train"]
fit = module.fit
first = []
def and_end(*arguments, callbacks, **options):
    def step(state):
        callbacks.on_step(state)
        first.append(time.time())
        if len(first) == num_steps:
            if num_steps > 1:
                callbacks.on_checkpoint(state)
            print("FIRST STEP", first[0], flush=True)
            os._exit(0)
    return fit(*arguments, callbacks=dataclasses.replace(callbacks, on_step=step), **options)
module.fit = and_end
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def say(line: str) -> None:
    print(line, flush=True)


def ran(words: list[str], **more: Any) -> str:
    """What a process prints. Raises ValueError where it fails."""
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=900, env=ENVIRONMENT, **more)
    if done.returncode:
        raise ValueError(f"{words[1]}: ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def seconds_to_first_step(*words: str, num_steps: int = 1) -> float:
    """From the process's start to the end of its first training step."""
    started = time.time()
    printed = ran([sys.executable, "-c", START, str(num_steps), str(HERE / "train_svi.py"), *words])
    found = [line for line in printed.splitlines() if line.startswith("FIRST STEP")]
    if not found:
        raise ValueError(f"train_svi.py {' '.join(words)}: expected a training step, got none")
    return float(found[-1].split()[-1]) - started


def by_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each returns, round by round, the order reversed from round to round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in list(contestants) if i % 2 == 0 else reversed(contestants):
            found[name].append(contestants[name]())
            say(f"  {name}: {found[name][-1]:.4g}")
    return found


def medians(found: dict[str, list[float]]) -> dict[str, Any]:
    """With the single values."""
    return {name: {"median": statistics.median(values), "all": values} for name, values in found.items()}


# --- Evaluation by two ranks ---


def ranks(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of log p(x), without the start."""
    from ppl_vae import runs
    from ppl_vae.runs.load import find_run_folder

    run = folder / "run"
    shutil.copytree(find_run_folder("mnist-best"), run)
    words = [str(HERE / "evaluate_log_likelihood.py"), str(run), "--images", "600", "--num-particles", "500"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def evaluation(*how: str) -> float:
        ran([sys.executable, *how, *words])
        return float(runs.read_evaluations(run)["test"]["seconds"])

    evaluation(), evaluation(*several)  # the compiler's cache is filled
    found = by_turns({"one rank": evaluation, "two ranks": lambda: evaluation(*several)}, rounds)
    ratio = statistics.median(found["one rank"]) / statistics.median(found["two ranks"])
    return {"seconds": medians(found), "times_as_fast": ratio}


# --- A folder of images ---


def make_pictures(folder: Path, count: int) -> None:
    """PNGs of 64 x 64 in color, smooth as photos are, in ten folders."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(count):
        if i < 10:
            (folder / str(i)).mkdir(parents=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / str(i % 10) / f"{i}.png")


def pictures(folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """Seconds to the first step: the first start on the folder, later ones, and those on embedded MNIST.

    Both with the same words. A likelihood's marginals are fitted before the first step, which takes time by the pixels
    of an image: one likelihood without such a fit, and one of 8-bit levels.
    """
    make_pictures(folder / "pictures", count)
    ENVIRONMENT["PPL_VAE_CACHE_DIR"] = str(folder / "cache")
    number = iter(range(10**6))

    def start(*words: str) -> float:
        run = folder / f"run{next(number)}"
        found = seconds_to_first_step("--compile", "off", "--epochs", "1", "--run-dir", str(run), *words)
        shutil.rmtree(run)
        return found

    own = ("--dataset", str(folder / "pictures"))
    start()  # the interpreter's own files are in memory
    first = start(*own)
    say(f"  first start on {count:,} PNGs: {first:.4g}")
    result: dict[str, Any] = {"pictures": count, "first_seconds": first, "seconds": {}, "later_than_mnist_seconds": {}}
    for likelihood in ("bernoulli", "discretized-logistic"):
        words = ("--likelihood", likelihood)
        say(f"  {likelihood}")
        found = by_turns(
            {"later starts": lambda w=words: start(*own, *w), "embedded MNIST": lambda w=words: start(*w)},  # type: ignore[misc]
            rounds,
        )
        later = statistics.median(found["later starts"]) - statistics.median(found["embedded MNIST"])
        result["seconds"][likelihood] = medians(found)
        result["later_than_mnist_seconds"][likelihood] = later
    return result


# --- Streaming ---


def streaming(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds a compiled step, resident and streamed, and their ratios."""
    import numpy as np
    import torch

    from ppl_vae import data

    torch.set_num_threads(1)
    mnist = data.load("mnist").train
    floats = torch.rand(6000, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = {}
    for name, images, likelihood, transform, num_steps in (
        ("MNIST", mnist, "bernoulli", data.sample_bernoulli, 200),
        ("float32 3x64x64", floats, "continuous-bernoulli", data.convert_to_float, 40),
    ):
        path = folder / "images.npy"
        np.save(path, images.numpy())
        mapped = torch.from_numpy(np.load(path, mmap_mode="c"))  # as pages of the file; nobody writes to them
        mapped.sum(dtype=torch.float64)  # they are in memory
        for network in ("mlp", "gated"):
            options = Options(**PLAIN | {"network": network, "likelihood": likelihood})
            say(f"  {name}, {network}, ms a step")
            steps = {
                "resident": steps_on(options, images, transform, num_steps, streamed=False),
                "streamed": steps_on(options, mapped, transform, num_steps, streamed=True),
            }
            found = by_turns(steps, 2 * rounds)
            ratio = statistics.median(found["streamed"]) / statistics.median(found["resident"])
            result[f"{name}, {network}"] = {"milliseconds": medians(found), "ratio": ratio}
    return result


def steps_on(
    options: Options, images: Tensor, transform: Callable[..., Tensor], num_steps: int, *, streamed: bool
) -> Callable[[], float]:
    """What takes so many compiled steps on other batches each time, and returns milliseconds a step."""
    import pyro
    import torch

    from ppl_vae import objectives
    from ppl_vae.runs.build import build_vae
    from ppl_vae.training import CapturedSteps, Optimizer, Resident, Streamed, TrainingState

    device, size = torch.device("cpu"), options.batch_size
    pyro.set_rng_seed(0)
    state = TrainingState(build_vae(options, tuple(images.shape[1:])))
    source = Streamed(images, device, size) if streamed else Resident(images, device)
    optimizer = Optimizer(clip_norm=options.clip_norm)
    loss = partial(objectives.loss_per_image, objectives.elbo())
    stepper = CapturedSteps(state, loss, source, transform, optimizer=optimizer, batch_size=size)
    generator = torch.Generator().manual_seed(1)

    def take(count: int) -> float:
        batches = torch.randperm(len(images), generator=generator).split(size)[:count]
        started = time.perf_counter()
        for _ in stepper.epoch(batches, [(1.0, 1e-4, 0.0)] * len(batches), validate=False):
            pass
        stepper.settle()
        return 1000 * (time.perf_counter() - started) / len(batches)

    take(10)
    return lambda: take(num_steps)


# --- Resumption ---


def resume(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to the first step of the default training: of a new run, and of one that goes on; compiled before."""
    number = iter(range(10**6))
    whole = folder / "whole"
    seconds_to_first_step("--run-dir", str(whole), num_steps=50)

    def start() -> float:
        return seconds_to_first_step("--run-dir", str(folder / f"run{next(number)}"))

    def resumption() -> float:
        run = folder / f"run{next(number)}"
        shutil.copytree(whole, run)
        return seconds_to_first_step("--resume", str(run))

    found = by_turns({"start": start, "resume": resumption}, rounds)
    more = statistics.median(found["resume"]) - statistics.median(found["start"])
    return {"seconds": medians(found), "more_than_a_start_seconds": more}


# --- All of it ---


def report(result: dict[str, Any]) -> Iterator[str]:
    """What is printed, line by line."""
    if "ranks" in result:
        yield f"Evaluation by two ranks: {result['ranks']['times_as_fast']:.2f} times as fast as by one"
    if "folder" in result:
        of = result["folder"]
        yield f"{of['pictures']:,} PNGs: {of['first_seconds']:.1f} s to the first step at first,"
        for likelihood, later in of["later_than_mnist_seconds"].items():
            yield f"  then {later:+.1f} s beside embedded MNIST, {likelihood}"
    for name, of in result.get("streaming", {}).items():
        yield f"Streamed, {name}: {of['ratio']:.3f} of a resident step"
    if "resume" in result:
        yield f"Resumption: {result['resume']['more_than_a_start_seconds']:+.1f} s beside a start"


def main() -> None:
    asked = parse(Command("", Scale))
    if asked.output is not None:
        check_output(Path(asked.output))
    from ppl_vae import runs

    made_with = {key: value for key, value in runs.describe_environment("cpu").items() if key != "argv"}
    result: dict[str, Any] = {"rounds": asked.rounds, "environment": made_with}
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ranks": lambda folder: ranks(folder, asked.rounds),
        "folder": lambda folder: pictures(folder, asked.rounds, asked.pictures),
        "streaming": lambda folder: streaming(folder, asked.rounds),
        "resume": lambda folder: resume(folder, asked.rounds),
    }
    for part in asked.parts:
        say(f"{part}:")
        with tempfile.TemporaryDirectory() as folder:
            result[part] = parts[part](Path(folder))
        if asked.output is not None:
            runs.write_json(Path(asked.output), result)
    for line in report(result):
        say(line)


if __name__ == "__main__":
    run_script(main)
