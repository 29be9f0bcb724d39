"""metrics.jsonl: one JSON record per epoch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppl_vae.runs.files import METRICS, append_line, replace_non_finite, write_bytes


def append_metrics(run_dir: Path, record: dict[str, Any]) -> None:
    """Appends a record to metrics.jsonl, on disk when this returns. A failure leaves the file unchanged."""
    append_line(run_dir / METRICS, _line(replace_non_finite(record)))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without a half-written last line.

    Raises:
        ValueError: another line is damaged.
    """
    path, records = run_dir / METRICS, []
    for number, record in _lines(path):
        if record is None:
            raise ValueError(
                f"{path}: damaged: line {number} is no record of an epoch; weights and training state are "
                f"not touched by that, and --resume {run_dir} goes on without the line"
            )
        records.append(record)
    return records


def mend_metrics(run_dir: Path) -> list[int]:
    """Removes damaged lines from the file, and returns their numbers."""
    path = run_dir / METRICS
    lines = list(_lines(path))
    damaged = [number for number, record in lines if record is None]
    if damaged:
        _write(path, [record for _, record in lines if record is not None])
    return damaged


def cut_metrics(run_dir: Path, step: int) -> None:
    """Removes every record after this step, since a resumed run trains these epochs again."""
    _write(run_dir / METRICS, [record for record in read_metrics(run_dir) if record["step"] <= step])


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    write_bytes(path, "".join(f"{_line(record)}\n" for record in records).encode())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of each line, from 1, and its record; None for a damaged line."""
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None and number == len(lines) and not line.endswith(b"\n"):
            return  # the line that was being written when the run was killed
        yield number, record


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        record["step"] + 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record
