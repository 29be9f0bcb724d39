"""Runs that are killed at random moments, again and again, each time resumed, until they are finished."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from disturbed_runs import KILL, SMALL, Done, Running, Server, left_behind, numbers_of, small_data

TRAIN, EVALUATE = "train_svi.py", "evaluate_log_likelihood.py"
ASKED = ("--num-particles", "300", "--images", "40", "--seed", "5")


class Kills:
    """Where the kills fell: by what was in the folder and on the screen."""

    def __init__(self) -> None:
        self.moments: Counter[str] = Counter()

    def add(self, folder: Path, running: Running) -> None:
        self.moments[_moment(folder, running.words_so_far())] += 1

    @property
    def count(self) -> int:
        return sum(self.moments.values())


def _moment(folder: Path, words: str) -> str:
    """What a process was at when it ended."""
    if folder.exists() and any(path.name.endswith(".partial") for path in folder.rglob(".*")):
        return "writing a file"
    for sign, moment in (("Figures", "end"), ("log p(x)", "evaluation, figures"), ("training", "training")):
        if sign in words:
            return moment
    return "start"


def killed_and_resumed(
    server: Server,
    first: Sequence[object],
    then: Sequence[object],
    folder: Path,
    *,
    draw: random.Random,
    longest: float,
    kills: Kills,
    most: int,
) -> Done:
    """Starts ``first``, kills it, starts ``then``, kills it, ... until it ends by itself or there were enough kills.

    Args:
        server: starts scripts.
        first, then: script and words.
        folder: the run's.
        draw: of the moments, uniform up to ``longest`` seconds after the start of each process.
        kills: is told of each.
        most: kills in all, after which the process is left alone.

    Returns:
        How the one ended that was not killed.
    """
    running = server.start(*_either(folder, first, then))
    while kills.count < most:
        if _ends_within(running, draw.uniform(0, longest)):
            break
        running.signal(KILL)
        kills.add(folder, running)
        running.wait()
        running = server.start(*_either(folder, first, then))
    return running.wait()


def _either(folder: Path, first: Sequence[object], then: Sequence[object]) -> tuple[str, ...]:
    """A run can be resumed from the moment that its config is there."""
    return tuple(map(str, then if (folder / "config.json").exists() else first))


def _ends_within(running: Running, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if running.has_ended():
            return True
        time.sleep(0.005)
    return running.has_ended()


def kill_runs(
    server: Server, place: Path, *, num_kills: int, seed: int, compiles: Sequence[str] = ("off",), say: Callable = print
) -> Kills:
    """As many random kills over training, evaluation and figures; every run must end as an undisturbed one.

    Args:
        server: starts scripts.
        place: a folder for data and runs.
        num_kills: in all.
        seed: of the moments.
        compiles: words of --compile, which the runs have in turn.

    Raises:
        AssertionError: a run ended with other numbers, an error, or files left behind.
    """
    dataset, draw, kills = small_data(place / "bars.npz"), random.Random(seed), Kills()
    whole: dict[str, tuple[dict, float, float]] = {}
    for word in sorted({*compiles}):
        whole[word] = _undisturbed(server, dataset, place / f"whole-{word}", word)
    number = 0
    while kills.count < num_kills:
        word = compiles[number % len(compiles)]
        numbers, seconds, seconds_evaluation = whole[word]
        folder = place / f"run-{number}"
        start = (TRAIN, "--dataset", dataset, "--run-dir", folder, *SMALL, "--compile", word)
        done = killed_and_resumed(
            server,
            start,
            (TRAIN, "--resume", folder),
            folder,
            draw=draw,
            longest=1.3 * seconds,
            kills=kills,
            most=min(num_kills, kills.count + 8),  # then the next run, so that none takes them all
        )
        assert (done.code, done.said) == (0, []), done
        evaluate = (EVALUATE, folder, *ASKED)
        done = killed_and_resumed(
            server,
            evaluate,
            evaluate,
            folder,
            draw=draw,
            longest=1.3 * seconds_evaluation,
            kills=kills,
            most=min(num_kills, kills.count + 8),  # then the next run, so that none takes them all
        )
        assert (done.code, done.said) == (0, []), done
        found = numbers_of(folder)
        for name, expected in numbers.items():
            assert found[name] == expected, f"{folder}: {name}"
        assert left_behind(folder) == []
        number += 1
        say(f"run {number}, --compile {word}: the same after {kills.count} kills in all; {dict(kills.moments)}")
    return kills


def _undisturbed(server: Server, dataset: Path, folder: Path, compile: str) -> tuple[dict, float, float]:
    """Its numbers, and how long training and evaluation take the second time, with graphs in the compiler's cache."""
    start = (TRAIN, "--dataset", dataset, *SMALL, "--compile", compile, "--run-dir")
    if compile != "off":
        server.run(*start, folder.with_name(f"{folder.name}-first"))
    began = time.monotonic()
    done = server.run(*start, folder)
    seconds = time.monotonic() - began
    assert done.code == 0, done
    began = time.monotonic()
    assert server.run(EVALUATE, folder, *ASKED).code == 0
    return numbers_of(folder), seconds, time.monotonic() - began
