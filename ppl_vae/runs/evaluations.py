"""The evaluations in a run folder: evaluation.json, and the numbers of each image next to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ppl_vae import runs
from ppl_vae.evidence.importance import Importance
from ppl_vae.runs.results import Diagnosis, Evaluation, from_json

DIAGNOSIS = "diagnosis.json"


def read_evaluation(folder: Path, split: str = "test") -> Evaluation | None:
    """The evaluation of a split in evaluation.json; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    entry = runs.read_evaluations(folder).get(split)
    if entry is None:
        return None
    try:
        return from_json(Evaluation, entry)
    except ValueError as error:
        raise ValueError(f"{folder / runs.EVALUATION}: damaged: {error}") from None


def read_diagnosis(folder: Path) -> Diagnosis | None:
    """The diagnosis in diagnosis.json; None where there is none.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / DIAGNOSIS
    if not path.exists():
        return None
    try:
        return from_json(Diagnosis, runs.read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}; scripts/diagnose.py makes it again") from None


def is_evaluated(folder: Path) -> bool:
    """Whether the test split was evaluated with the run's present weights, and the numbers of each image are whole."""
    entry = runs.read_evaluations(folder).get("test", {})
    if entry.get("step") != runs.load_step(folder / runs.MODEL):
        return False
    try:
        runs.load_tensors(folder / runs.per_image_file("test"))
    except ValueError:  # lost or damaged: the split is evaluated again
        return False
    return True


@dataclass(frozen=True)
class PerImage:
    """The evaluation of each image of a split.

    Args:
        index: (n,) int64, the images' places in their split, ascending.
        result: ``Importance``, each field (n,) float64.
        num_particles: S.
        seed: The seed of the particles.
        step: The training step of the weights.
    """

    index: Tensor
    result: Importance
    num_particles: int
    seed: int
    step: int


def read_per_image(folder: Path, split: str) -> PerImage | None:
    """The numbers of each image of the evaluation in evaluation.json.

    None where there is no such evaluation, where it is an autoencoder's (it has only reconstructions), where the run
    has other weights by now, or where an interrupted write left the two files with different evaluations.

    Raises:
        ValueError: A file is damaged.
    """
    path, entry = folder / runs.per_image_file(split), runs.read_evaluations(folder).get(split)
    if entry is None or not path.exists() or ("log_likelihood" in entry and entry["log_likelihood"] is None):
        return None
    try:
        tensors, scalars = runs.load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; evaluate_log_likelihood.py {folder} --split {split} measures it again") from None
    try:
        result = Importance.from_tensors(tensors)
        stored = PerImage(tensors["index"], result, *(scalars[name] for name in ("num_particles", "seed", "step")))
    except KeyError as error:
        raise ValueError(f"{path}: damaged: no {error} in it") from None
    told = tuple(entry.get(key) for key in ("num_images", "num_particles", "seed", "step"))
    found = (len(stored.index), stored.num_particles, stored.seed, stored.step)
    return stored if told == found and stored.step == runs.load_step(folder / runs.MODEL) else None
