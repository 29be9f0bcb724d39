"""Time training steps and log p(x) side by side with other programs that compute the same; print tables, store all.

The part ``training`` times one step, from a batch of resident data to new weights. Contestants take turns of about
0.3 s, round by round, after each has warmed up (compilation is not in the times, but in those of the first step, with
an empty cache and again with a filled one) and shown that it computes the same loss. ``evaluation`` times log p(x) of
all images, with its errors, without compilation. ``likelihoods`` times ppl_vae's own step, compiled and not, of a plain
VAE under each of them. ``start`` times the default run with one epoch, by stages, in a process of its own, twice.
Compilers begin with an empty cache, unless TORCHINDUCTOR_CACHE_DIR names one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.parts.registry import LIKELIHOODS
from ppl_vae.runs.files import check_output
from ppl_vae.runs.options import NOT_EMPTY, PLAIN, POSITIVE_INTEGER, CheckedOptions, Options, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    import torch
    from benchmark_contestants import Task
    from torch import Tensor

    from ppl_vae import VAE
    from ppl_vae.data import Splits

MODEL_NAMES = ("mlp128", "iwae20", "iwae100", "conv128", "resflow100", "default")
PARTS = ("training", "evaluation", "likelihoods", "start")


@dataclass(frozen=True)
class Benchmark(CheckedOptions):
    """Time training steps and log p(x) beside other programs that compute the same, in turn, and the first minute."""

    models: tuple[str, ...] = option(MODEL_NAMES, "which models; default is the network of train_svi.py", MODEL_NAMES)
    parts: tuple[str, ...] = option(PARTS, "what is timed", PARTS)
    likelihoods: tuple[str, ...] = option(
        tuple(LIKELIHOODS), "which ones in the part likelihoods, next to bernoulli (default: all)", LIKELIHOODS
    )
    rounds: int = option(7, "how often each is timed", POSITIVE_INTEGER)
    images: int = option(100, "test images whose log p(x) is estimated", POSITIVE_INTEGER)
    num_particles: int = option(5000, "importance samples per image", POSITIVE_INTEGER)
    device: str = option("cpu", "cpu, cuda, cuda:1, ...", NOT_EMPTY)
    output: str | None = option(None, "JSON file of the result (default: printed only)", NOT_EMPTY)


TURN_SECONDS = 0.3
CHECKED_STEPS, WARM_UP_STEPS = 20, 20
TOLERANCE = 0.05  # of the mean loss of 20 steps with fresh noise, relative; bf16 stays within it too
REFERENCE = "PyTorch, eager, default Adam"
FLOOR = "matrix products alone (sgemm floor)"
BARE = "decoder's matrix products alone"
EAGER, CAPTURED, COMPILED = "ppl_vae, eager", "ppl_vae, captured", "PyTorch, whole step compiled"
FIRST_LOSS_TOLERANCE = 1e-3  # of the first step's loss with the same noise, relative, and of a nat
LIKELIHOOD_REFERENCE = "bernoulli"
EVALUATED = ("mlp128", "iwae20", "default")
FIRST_MINUTE = """
import sys, time

def mark(stage):
    print(stage, time.time(), sep="\t")

def say(line):
    for beginning, stage in STAGES.items():
        if line.startswith(beginning):
            mark(stage)

# What each line of a training says is done.
STAGES = {
    "Compiling": "model", "Compiled": "compile", "Epoch 1": "first epoch", "log-l": "evaluation", "Figures": "figures"
}

from ppl_vae.commands import train
from ppl_vae.runs.options import Options

def load_splits(options, load=train.load_splits):
    mark("import")
    splits = load(options)
    mark("data")
    return splits

train.load_splits = load_splits
train.train_run(Options(epochs=1, compile="on", device=sys.argv[1]), sys.argv[2], say=say)
"""


def say(line: str) -> None:
    print(line, flush=True)


# --- Training ---


def contestants(task: Task) -> Iterator[tuple[str, Callable[[], Callable[[int], Any]]]]:
    """Names, and what makes each ready to take steps."""
    import benchmark_contestants as by

    yield REFERENCE, lambda: by.pytorch_eager(task, fused=False)
    yield "PyTorch, eager, fused Adam", lambda: by.pytorch_eager(task, fused=True)
    yield COMPILED, lambda: by.pytorch_whole_step(task)
    yield EAGER, lambda: by.ppl_vae(task, captured=False)
    yield CAPTURED, lambda: by.ppl_vae(task, captured=True)
    yield "Pyro's example loop", lambda: by.pyro_example(task)
    if why_no_numpyro(task.device) is None and task.model.is_translated:
        yield "NumPyro, fori_loop", lambda: by.numpyro_steps(task, as_loop=True)
        yield "NumPyro, jitted steps", lambda: by.numpyro_steps(task, as_loop=False)
        yield "JAX and optax, one scan", lambda: by.jax_steps(task)
    if has_bf16(task.device):
        yield f"{COMPILED}, bf16", lambda: by.pytorch_whole_step(task, bf16=True)
        yield f"{CAPTURED}, bf16", lambda: by.ppl_vae(task, captured=True, bf16=True)
    yield FLOOR, lambda: by.matrix_products(task)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16."""
    from ppl_vae.runs.resolve import check_precision

    try:
        check_precision(Options(precision="bf16", device=str(device)))
    except ValueError:
        return False
    return True


def why_no_numpyro(device: torch.device) -> str | None:
    """Why NumPyro is left out; None where it takes part."""
    if find_spec("numpyro") is None or find_spec("optax") is None:
        return 'NumPyro or optax is not installed, so both are left out; pip install -e ".[benchmark]" brings them.'
    import jax

    if (jax.default_backend() == "gpu") != (device.type == "cuda"):
        return f"NumPyro is left out: its arrays are on {jax.default_backend()}, the others' on {device.type}."
    return None


def checked_losses(steps: Callable[[int], Any], first: float) -> list[float]:
    """The mean losses of the first steps and of as many some steps later; the first of all has been taken."""
    beginning = (first + (CHECKED_STEPS - 1) * steps(CHECKED_STEPS - 1)) / CHECKED_STEPS
    steps(WARM_UP_STEPS)
    return [beginning, steps(CHECKED_STEPS)]


def training(name: str, images: Tensor, *, rounds: int) -> dict[str, Any]:
    """Times the training steps of one model by all contestants: a record of each, by name."""
    from benchmark_contestants import MODELS, Task

    task = Task(MODELS[name], images)
    ready: dict[str, Callable[[int], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    for contestant, prepare in contestants(task):
        started = time.perf_counter()
        steps = prepare()
        first = steps(1)
        record: dict[str, Any] = {"first_seconds": time.perf_counter() - started}
        if contestant == FLOOR:
            steps(WARM_UP_STEPS)
        else:
            losses = record["checked_losses"] = checked_losses(steps, first)
            expected = records[REFERENCE]["checked_losses"] if records else losses
            if any(not abs(a - b) <= TOLERANCE * b for a, b in zip(losses, expected, strict=True)):
                say(f"  {contestant} is left out of {name}: expected losses {expected}, got {losses}")
                continue
        ready[contestant], records[contestant] = steps, record
        say(f"  {name}: {contestant} is ready ({record['first_seconds']:.1f} s to the end of its first step)")
    take_turns([(steps, records[contestant]) for contestant, steps in ready.items()], rounds=rounds)
    for contestant, prepare in contestants(task):
        if contestant in (COMPILED, CAPTURED) and contestant in records:
            records[contestant]["first_again_seconds"] = timed(lambda: prepare()(1))  # noqa: B023, called at once
    return summarized(records, reference=REFERENCE, floor=FLOOR)


def take_turns(contestants: list[tuple[Callable[[int], Any], dict[str, Any]]], *, rounds: int) -> None:
    """Times steps, each for ``TURN_SECONDS`` a round: the milliseconds of one step, round by round, in its record."""
    for steps, record in contestants:
        probe = 3
        steps(probe)  # a scan is compiled for each number of steps
        seconds = timed(partial(steps, probe))
        record |= {"steps_a_turn": max(1, round(TURN_SECONDS * probe / seconds)), "ms": []}
        steps(record["steps_a_turn"])
    for _ in range(rounds):
        for steps, record in contestants:
            n = record["steps_a_turn"]
            record["ms"].append(timed(partial(steps, n)) * 1e3 / n)


def timed(work: Callable[[], Any]) -> float:
    """Seconds. The work returns when it is done, on a GPU too."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summarized(records: dict[str, dict[str, Any]], *, reference: str, floor: str | None) -> dict[str, Any]:
    """The records with the median of the rounds, and its ratio to that of the reference and of the floor."""
    for record in records.values():
        record["median_ms"] = statistics.median(record["ms"])
    for record in records.values():
        record["ratio"] = record["median_ms"] / records[reference]["median_ms"]
        if floor is not None:
            record["ratio_to_floor"] = record["median_ms"] / records[floor]["median_ms"]
    return records


# --- Evaluation ---


def matrix_products(vae: VAE, x: Tensor, *, num_particles: int) -> Callable[[], None]:
    """The decoder's matrix products alone, for as many pairs of image and particle, as many at a time."""
    import torch

    from ppl_vae.runtime.batching import images_per_pass

    total = len(x) * num_particles
    pairs = min(images_per_pass(x), total)
    weights = [layer.weight.detach() for layer in vae.likelihood.modules() if isinstance(layer, torch.nn.Linear)]  # type: ignore[attr-defined]
    inputs = [torch.randn(pairs, weight.shape[1], device=x.device) for weight in weights]
    outputs = [torch.empty(pairs, weight.shape[0], device=x.device) for weight in weights]

    def run() -> None:
        for start in range(0, total, pairs):
            n = min(pairs, total - start)
            for h, weight, output in zip(inputs, weights, outputs, strict=True):
                torch.mm(h[:n], weight.T, out=output[:n])
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def evaluation(name: str, x: Tensor, *, num_particles: int, rounds: int) -> dict[str, Any]:
    """Times log p(x) of the images, with all its errors, under one model with fresh weights."""
    import torch
    from benchmark_contestants import MODELS, Task

    from ppl_vae.evidence.evaluation import evaluate
    from ppl_vae.runs.build import build_vae

    torch.manual_seed(0)
    vae = Task(MODELS[name], x.to(torch.uint8)).vae() if name in MODELS else build_vae(Options(**PLAIN), x.shape[1:])
    vae = vae.to(x.device).eval()
    estimates: dict[str, float] = {}

    def estimate(contestant: str, compile: bool) -> float:
        """Seconds without compilation, which every call begins with; its own seconds are in ``compile_seconds``."""
        compile_seconds[contestant] = []
        started = time.perf_counter()
        result = evaluate(
            vae, x, num_particles=num_particles, seed=0, compile=compile, on_compiled=compile_seconds[contestant].append
        )
        estimates[contestant] = result.log_evidence.mean().item()
        return time.perf_counter() - started - sum(compile_seconds[contestant])

    compile_seconds: dict[str, list[float]] = {}
    work: dict[str, Callable[[], float]] = {
        BARE: partial(timed, matrix_products(vae, x, num_particles=num_particles)),
        EAGER: partial(estimate, EAGER, False),
        CAPTURED: partial(estimate, CAPTURED, True),
    }
    records: dict[str, dict[str, Any]] = {}
    for contestant, run in work.items():
        records[contestant] = {"first_seconds": timed(run), "ms": []}
    if compile_seconds[CAPTURED]:
        records[CAPTURED]["compile_seconds"] = sum(compile_seconds[CAPTURED])
    eager, captured = estimates[EAGER], estimates[CAPTURED]
    if not abs(eager - captured) <= TOLERANCE * abs(eager):
        say(f"  {CAPTURED} is left out of {name}: expected log p(x) = {eager:.2f} nats per image, got {captured:.2f}")
        del work[CAPTURED], records[CAPTURED]
    for _ in range(rounds):
        for contestant, run in work.items():
            records[contestant]["ms"].append(run() * 1e3)
    if compile_seconds[CAPTURED] and CAPTURED in records:
        records[CAPTURED]["compile_again_seconds"] = sum(compile_seconds[CAPTURED])
    return summarized(records, reference=EAGER, floor=BARE)


# --- Likelihoods ---


def under_likelihoods(words: Sequence[str], splits: Splits, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Times ppl_vae's training steps of the default network under each likelihood: a record of each, by way and word.

    All of them, captured and eager, take turns. Ratios are to the reference, which takes part whatever is asked for.
    """
    import torch
    from benchmark_contestants import Setting

    results: dict[str, dict[str, Any]] = {CAPTURED: {}, EAGER: {}}
    contestants = []
    for word in dict.fromkeys([LIKELIHOOD_REFERENCE, *words]):
        setting = Setting(word, splits, device=device)
        for name, records in results.items():
            torch.manual_seed(0)  # the same noise for both: their first losses differ by rounding alone
            started = time.perf_counter()
            steps = setting.steps(captured=name == CAPTURED)
            first = steps(1)
            records[word] = {
                "first_seconds": time.perf_counter() - started,
                "first_loss": first,
                "features_per_pixel": setting.features_per_pixel,
            }
            contestants.append((steps, records[word]))
        a, b = (records[word]["first_loss"] for records in results.values())
        if not abs(a - b) <= FIRST_LOSS_TOLERANCE * (abs(b) + 1):
            raise ValueError(f"{word}: expected the same first loss captured and eager, got {a} and {b}")
        for steps, _ in contestants[-2:]:
            steps(WARM_UP_STEPS)
        seconds = results[CAPTURED][word]["first_seconds"]
        say(f"  {word} is ready ({seconds:.1f} s to the end of its first captured step)")
    take_turns(contestants, rounds=rounds)
    return {name: summarized(r, reference=LIKELIHOOD_REFERENCE, floor=None) for name, r in results.items()}


# --- The first minute ---


def first_minute(device: str) -> list[dict[str, float]]:
    """Seconds of each stage of the default run with one epoch, in a new process: an empty cache, then a filled one.

    The stages are import, data, model, compile, first epoch, evaluation (5,000 images, S = 200) and figures.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
        for run in ("empty", "filled"):
            words = [sys.executable, "-c", FIRST_MINUTE, device, str(Path(folder) / run)]
            before = time.time()
            said = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
            seconds = {}
            for stage, now in (line.split("\t") for line in said.splitlines()):
                seconds[stage] = float(now) - before
                before = float(now)
            found.append(seconds)
    return found


# --- Tables ---


def table(title: str, results: dict[str, Any], ratio: str) -> list[str]:
    """Contestants as rows, models as columns: the median in ms, and a ratio."""
    names = list(dict.fromkeys(name for records in results.values() for name in records))
    lines = [f"| {title} | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = [cell(records[name], ratio) if name in records else "–" for records in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def likelihood_table(results: dict[str, Any]) -> list[str]:
    """Likelihoods as rows: the features per pixel, and for a step captured and eager the median in ms and a ratio."""
    lines = [f"| likelihood | features per pixel | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for word, record in results[CAPTURED].items():
        cells = [cell(records[word], "ratio") for records in results.values()]
        lines.append(f"| `{word}` | {record['features_per_pixel']} | {' | '.join(cells)} |")
    return lines


def cell(record: dict[str, Any], ratio: str) -> str:
    """The median and a ratio of medians."""
    return f"{record['median_ms']:.3g} ({record[ratio]:.2f})"


def ranges(results: dict[str, Any]) -> list[str]:
    """The rounds' range for each, in ms, its ratio to the floor, and the seconds of its first time, compilation too."""
    lines: list[str] = []
    for model, records in results.items():
        for name, record in records.items():
            to_floor = f"{record['ratio_to_floor']:6.2f} times the floor, " if "ratio_to_floor" in record else ""
            lines.append(
                f"  {model:8} {name:36} {min(record['ms']):9.3f} to {max(record['ms']):9.3f} ms, "
                f"{to_floor}first {record['first_seconds']:5.1f} s"
                + (f", again {record['first_again_seconds']:.1f} s" if "first_again_seconds" in record else "")
            )
    return lines


# --- All of it ---


def environment(device: str) -> dict[str, Any]:
    """``runs.outputs``, with the other programs' versions."""
    from ppl_vae import runs

    found = runs.describe_environment(device)
    for name in ("jax", "jaxlib", "numpyro", "optax"):
        try:
            found["packages"][name] = version(name)
        except PackageNotFoundError:
            found["packages"][name] = None
    return found | {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def measure(asked: Benchmark) -> dict[str, Any]:
    """Everything that was asked for, as the JSON file holds it."""
    import torch

    from ppl_vae import data
    from ppl_vae.runs.resolve import find_device

    device = find_device(asked.device)
    left_out = why_no_numpyro(device) if "training" in asked.parts else None
    if left_out:
        say(left_out)
    digits = data.load("mnist")
    result: dict[str, Any] = {"rounds": asked.rounds, "training": {}, "evaluation": {}, "likelihoods": {}}
    result["first_minute"] = []
    result |= {"images": asked.images, "num_particles": asked.num_particles, "left_out": left_out}
    if "training" in asked.parts:
        images = data.training_images(digits, "fixed")[0].to(device)
        for name in asked.models:
            if name != "default":
                result["training"][name] = training(name, images, rounds=asked.rounds)
    if "evaluation" in asked.parts:
        x = data.evaluation_images(digits, "test", "dynamic")
        x = x[data.subset(len(x), asked.images)].to(device)
        result["images"] = len(x)
        for name in asked.models:
            if name in EVALUATED:
                say(f"  {name}: log p(x)")
                result["evaluation"][name] = evaluation(name, x, num_particles=asked.num_particles, rounds=asked.rounds)
    if "likelihoods" in asked.parts:
        result["likelihoods"] = under_likelihoods(asked.likelihoods, digits, device, rounds=asked.rounds)
    if "start" in asked.parts:
        say("  the first minute")
        result["first_minute"] = first_minute(asked.device)
    return result | {"threads": torch.get_num_threads(), "environment": environment(asked.device)}


def report(result: dict[str, Any]) -> Iterator[str]:
    """What is printed, line by line."""
    rounds = f"{result['rounds']} rounds, {result['threads']} threads"
    if result["training"]:
        yield f"\nA training step, ms, median of {rounds} (ratio to {REFERENCE})\n"
        yield from table("training", result["training"], "ratio")
        yield ""
        yield from ranges(result["training"])
    if result["evaluation"]:
        S, n = result["num_particles"], result["images"]
        yield f"\nlog p(x), S = {S:,}, {n:,} images, ms, median of {rounds} (ratio to the matrix products)\n"
        yield from table("log p(x)", result["evaluation"], "ratio_to_floor")
        yield ""
        yield from ranges(result["evaluation"])
    if result["likelihoods"]:
        yield f"\nA training step of the default network, ms, median of {rounds} (ratio to {LIKELIHOOD_REFERENCE})\n"
        yield from likelihood_table(result["likelihoods"])
        yield ""
        yield from ranges(result["likelihoods"])
    if result["first_minute"]:
        yield "\nThe default run with one epoch, seconds of each stage; in brackets with the compiler's cache filled:"
        empty, filled = result["first_minute"]
        for stage, seconds in empty.items():
            yield f"  {stage:12} {seconds:6.1f} ({filled[stage]:.1f})"
        yield f"  {'together':12} {sum(empty.values()):6.1f} ({sum(filled.values()):.1f})"


def main() -> None:
    asked = parse(Command("", Benchmark))
    if asked.output is not None:
        check_output(Path(asked.output))
    if not asked.device.startswith("cuda"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as cache:  # so that what compilation takes does not depend on earlier runs
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        result = measure(asked)
    if asked.output is not None:
        from ppl_vae import runs

        runs.write_json(Path(asked.output), result)
    for line in report(result):
        print(line)


if __name__ == "__main__":
    run_script(main)
