"""Paired differences between runs of the study, from the numbers of each test image in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.evidence import Importance
from ppl_vae.experiment.evaluation import read_per_image
from ppl_vae.experiment.paired import INDISTINCT, PairedDifference, bound_difference, paired_difference

BOUNDS = ("log_likelihood", "elbo")


def per_image(folder: Path) -> tuple[Tensor, Importance] | None:
    """(n,) places in the test split, and the numbers of each; None of an autoencoder and of what was not evaluated."""
    stored = read_per_image(folder, "test") if (folder / runs.MODEL).exists() else None
    return None if stored is None else (stored.index, stored.result)


def difference(folder: Path, reference: Path, of: str, *, comparisons: int = 1) -> dict[str, Any] | None:
    """A run's number minus the reference's, on the same images.

    Args:
        folder, reference: of two runs.
        of: "log_likelihood" (L_S), "elbo", "kl" or "reconstruction".
        comparisons: how many are judged together.

    Returns:
        Nats an image; None where one of the two has no such number, or they are one run.

    Raises:
        ValueError: evaluations of other images.
    """
    a, b = per_image(reference), per_image(folder)
    if folder == reference or a is None or b is None:
        return None
    if not torch.equal(a[0], b[0]):
        raise ValueError(f"{folder}: expected an evaluation of the same images as {reference}, got others")
    if of == "log_likelihood":
        found = bound_difference(a[1], b[1], comparisons=comparisons)
        more = {"rise": found.rise, "ranks_log_likelihood": found.ranks_log_evidence}
        return as_json(found.bounds) | more
    return as_json(paired_difference(getattr(a[1], of), getattr(b[1], of), comparisons=comparisons))


def as_json(found: PairedDifference) -> dict[str, Any]:
    """As study.json holds it."""
    names = ("mean", "stderr", "lower", "upper", "word", "n")
    return {name: getattr(found, name) for name in names} | {"rise": None, "ranks_log_likelihood": None}


def differences(folder: Path, reference: Path, *, comparisons: int) -> dict[str, Any]:
    """Those of L_S and of the ELBO, as rows of a table hold them."""
    return {f"difference_{of}": difference(folder, reference, of, comparisons=max(1, comparisons)) for of in BOUNDS}


def peak(folders: Mapping[float, Path], values: Mapping[float, float], of: str) -> tuple[float, list[float]]:
    """Which key has the highest value, and all that cannot be told from it: 95% for all of them together.

    Args:
        folders: of the runs.
        values: the mean of each, nats.
        of: "log_likelihood" or "elbo".

    Reference: Hsu 1984, Constrained simultaneous confidence intervals for multiple comparisons with the best.
    """
    best = max(values, key=lambda key: values[key])
    alike = []
    for key in sorted(values):
        found = difference(folders[key], folders[best], of, comparisons=max(1, len(values) - 1))
        if found is None or found["word"] == INDISTINCT:
            alike.append(key)
    return best, alike


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds: the values, their mean, and their standard deviation."""
    each = torch.tensor(values, dtype=torch.double)
    return {"values": list(values), "mean": float(each.mean()), "spread": float(each.std()) if len(each) > 1 else None}
