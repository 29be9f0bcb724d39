"""What a resumed run goes on from: its newest whole checkpoint, and what is written again from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.opening import Say

Saved = tuple[dict[str, Tensor], dict[str, Any]]


def newest_checkpoint(folder: Path, *, say: Say) -> Saved | None:
    """The newest of the last two training states that is whole, with its step; None where there is none yet.

    Raises:
        ValueError: whatever states there are, are damaged.
        OSError: one cannot be read now; an older one is not taken for that.
    """
    damaged: list[str] = []
    for name in (runs.TRAINING_STATE, runs.PREVIOUS_STATE):
        if not (folder / name).exists():
            continue
        try:
            saved = runs.load_tensors(folder / name)
            step = runs.step_of(folder / name, saved[1])
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            say(f"{damaged[0]}; the one before it is whole, of step {step:,}.")
        return saved
    if not damaged:
        return None
    both = f"; {runs.PREVIOUS_STATE} is damaged too" if len(damaged) > 1 else "; there is none before it"
    raise ValueError(f"{damaged[0]}{both}; {_of_the_weights(folder)}")


def mend_states(folder: Path) -> None:
    """Puts the state before the newest in its place, where the newest is damaged.

    Else the next checkpoint would keep the damaged one as the one before it, in the place of the whole one.

    Raises:
        ValueError: a folder is in the newest one's place.
        OSError: the newest one cannot be read now, and stays.
    """
    newest, previous = folder / runs.TRAINING_STATE, folder / runs.PREVIOUS_STATE
    if newest.is_dir():
        raise ValueError(f"{newest}: damaged: expected a file, got a folder; without it {previous.name} is taken")
    if newest.exists() and previous.exists():
        try:
            runs.load_step(newest)
        except ValueError:
            previous.replace(newest)


def _of_the_weights(folder: Path) -> str:
    try:
        step = runs.load_step(folder / runs.MODEL)
    except ValueError:
        return f"{runs.MODEL} is not whole either: nothing of the training is left"
    return f"{runs.MODEL}, of step {step:,}, is whole: it can be evaluated and drawn, and --start-from begins with it"


def mend_weights(folder: Path, saved: Saved, *, say: Say) -> None:
    """Writes the weights again from the best ones in a training state, where their file is missing or damaged."""
    path = folder / runs.MODEL
    try:
        runs.load_step(path)
    except ValueError as error:
        best = {name.removeprefix("best/"): w for name, w in saved[0].items() if name.startswith("best/")}
        if not best:
            return  # of the middle of the first epoch: training chooses them
        if path.exists():
            say(f"{error}; written again from the best weights of the training state.")
        runs.save_tensors(path, best, {"step": saved[1].get("best_step", 0)})


def mend_metrics(folder: Path, *, step: int, steps_an_epoch: int, say: Say) -> None:
    """Leaves out damaged records, and says which epochs up to the step have none."""
    damaged = runs.mend_metrics(folder)
    if damaged:
        say(f"{folder / runs.METRICS}: damaged: line {', '.join(map(str, damaged))}; left out.")
    there = {record["step"] for record in runs.read_metrics(folder)}
    lost = [e for e in range(1, step // steps_an_epoch + 1) if e * steps_an_epoch not in there]
    if lost:
        words = f"{lost[0]}" if len(lost) == 1 else f"{lost[0]} to {lost[-1]}, {len(lost)} in all"
        say(f"{folder / runs.METRICS} has no record of epoch {words}: the curves are without, the weights are whole.")
