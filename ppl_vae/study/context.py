"""What the study's sections are made from: the records of its runs, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppl_vae.study.material import StudyData
from ppl_vae.study.plan import Planned, Size

STUDY, RUNS, PICTURES = "study.json", "runs", "pictures"


@dataclass(frozen=True)
class Study:
    """A study whose runs are trained and measured.

    Args:
        folder: of the study.
        size: how much.
        planned: every run, by its name.
        records: the measurement of each, by its name.
        materials: the data sets, by their words, the one with all parts first.
    """

    folder: Path
    size: Size
    planned: Mapping[str, Planned]
    records: Mapping[str, dict[str, Any]]
    materials: Mapping[str, StudyData]

    @property
    def first(self) -> str:
        """The data set that has all parts."""
        return next(iter(self.materials))

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / RUNS / name

    def betas(self, dataset: str) -> list[float]:
        """Of the sweep, ascending."""
        return sorted(self.size.betas_of(dataset))

    def ended(self, name: str) -> dict[str, Any] | None:
        """The record of a run that was planned and ended with finite numbers, else None."""
        record = self.records.get(name)
        return None if record is None or record["failed"] is not None else record
