"""Paired differences between runs of the study, from the numbers of each test image in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppl_vae import runs
from ppl_vae.evidence.paired import INDISTINCT, PairedDifference, bound_difference, paired_difference
from ppl_vae.runs.evaluations import PerImage, read_per_image

BOUNDS = ("log_likelihood", "elbo")


def per_image(folder: Path) -> PerImage | None:
    """The numbers of each test image; None of an autoencoder and of what was not evaluated."""
    return read_per_image(folder, "test") if (folder / runs.MODEL).exists() else None


def difference(folder: Path, reference: Path, of: str, *, comparisons: int = 1) -> dict[str, Any] | None:
    """A run's number minus the reference's, on the same images.

    Args:
        folder, reference: of two runs.
        of: "log_likelihood" (L_S), "elbo", "kl" or "reconstruction".
        comparisons: how many are judged together.

    Returns:
        Nats an image; None where one of the two has no such number, or they are one run.

    Raises:
        ValueError: evaluations of other images, or with another S or seed, so that more than the weights differs.
    """
    a, b = per_image(reference), per_image(folder)
    if folder == reference or a is None or b is None:
        return None
    _check_alike(folder, b, reference, a)
    if of == "log_likelihood":
        found = bound_difference(a.result, b.result, comparisons=comparisons)
        more = {"rise": found.tenfold_gain, "ranks_log_likelihood": found.ranks_log_evidence}
        return as_json(found.bounds) | more
    return as_json(paired_difference(getattr(a.result, of), getattr(b.result, of), comparisons=comparisons))


def _check_alike(folder: Path, found: PerImage, reference: Path, other: PerImage) -> None:
    hint = "; evaluate it again as that one was"
    if not torch.equal(found.index, other.index):
        raise ValueError(f"{folder}: expected an evaluation of the same images as {reference}, got others{hint}")
    for name in ("num_particles", "seed"):  # another S is another bound
        expected, got = getattr(other, name), getattr(found, name)
        if expected != got:
            raise ValueError(
                f"{folder}: expected an evaluation with {name} {expected}, as {reference}, got {got}{hint}"
            )


def as_json(found: PairedDifference) -> dict[str, Any]:
    """As study.json holds it."""
    names = ("mean", "stderr", "lower", "upper", "word", "n")
    return {name: getattr(found, name) for name in names} | {"rise": None, "ranks_log_likelihood": None}


def differences(folder: Path, reference: Path, *, comparisons: int) -> dict[str, Any]:
    """Those of L_S and of the ELBO, as rows of a table hold them."""
    return {f"difference_{of}": difference(folder, reference, of, comparisons=max(1, comparisons)) for of in BOUNDS}


@dataclass(frozen=True)
class Peak:
    """Where a number is highest among runs, and what the others may still be.

    Args:
        best: the key of the highest mean.
        alike: keys of the runs that chance over images cannot tell from it, the best included, ascending.
        unranked: of L_S, the keys of runs whose L_S is lower beyond chance, while their log p(x) may be as high: the
            interval of the difference is not wholly beyond the larger rise of the two.
    """

    best: float
    alike: list[float]
    unranked: list[float]


def peak(folders: Mapping[float, Path], values: Mapping[float, float], of: str) -> Peak:
    """The highest mean, and every other one against it: 95% for all of them together.

    Args:
        folders: of the runs.
        values: the mean of each, nats.
        of: "log_likelihood" or "elbo".

    Reference: Hsu 1984, Constrained simultaneous confidence intervals for multiple comparisons with the best; when a
    difference in L_S ranks log p(x), see ``evidence.paired.BoundDifference``.
    """
    best = max(values, key=lambda key: values[key])
    alike, unranked = [], []
    for key in sorted(values):
        found = difference(folders[key], folders[best], of, comparisons=max(1, len(values) - 1))
        if found is None or found["word"] == INDISTINCT:
            alike.append(key)
        elif found["ranks_log_likelihood"] is False:
            unranked.append(key)
    return Peak(best, alike, unranked)


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Over seeds: the values, their mean, and their standard deviation."""
    each = torch.tensor(values, dtype=torch.double)
    return {"values": list(values), "mean": float(each.mean()), "spread": float(each.std()) if len(each) > 1 else None}
