"""Certificates of several runs in one file, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppl_vae import runs
from ppl_vae.reports.text.evaluation import format_number as number
from ppl_vae.reports.text.evaluation import plus_minus


def read_certificates(output: str) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is no file.

    Raises:
        ValueError: a folder, or a damaged file.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output: expected a file, got the folder {path}")
    if not path.exists():
        return []
    rows = runs.read_json(path).get("certificates")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "run" in row and "ais" in row for row in rows):
        raise ValueError(f"{path}: damaged: expected a list of certificates, each of a run")
    return rows


def check_output(output: str) -> None:
    """Raises ValueError where the file is damaged or cannot be written: before the work, not after it."""
    read_certificates(output)
    folder = Path(output).parent
    if not folder.is_dir():
        raise ValueError(f"--output: expected a file in a folder that is there, got {output}")
    runs.check_writable(folder)


def write_certificate(output: str, run: str, entry: dict[str, Any], device: str) -> None:
    """Adds the entry under the run's name, or replaces the one of the same run and split; the file as a whole."""
    made_with = {key: value for key, value in runs.describe_environment(device).items() if key != "argv"}
    row = {"run": run, **entry, "environment": made_with}
    kept = [old for old in read_certificates(output) if (old["run"], old["split"]) != (run, entry["split"])]
    runs.write_json(Path(output), {"certificates": sorted([*kept, row], key=lambda row: (row["run"], row["split"]))})


_HEADER = (
    "run",
    "images",
    "AIS, below log p(x)",
    "AIS - L_S of the guide",
    "AIS - L_S refined",
    "gap on simulated images",
    "log p(x) - ELBO = approximation + amortization",
    "minutes",
)


def certificate_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown; the gap of the guide is that of validation images."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (_HEADER, *map(_cells, rows)))
    return "\n".join([head, "|" + "---|" * len(_HEADER), *body])


def _cells(row: dict[str, Any]) -> list[str]:
    threads = row["environment"]["threads"]
    return [
        f"`{row['run']}`",
        f"{row['num_images']:,} of {row['split']}",
        f"{plus_minus(row['ais'])} (Monte Carlo {number(row['ais']['monte_carlo_stderr'], 3)})",
        _difference(row["ais_minus_importance"]),
        _difference(row["ais_minus_improved"]),
        "-" if row["simulated"] is None else _difference(row["simulated"]["gap"]),
        _split_gap((row["gaps"] or {}).get("validation")),
        f"{row['seconds'] / 60:.0f}, {threads} thread{'s' * (threads != 1)}",
    ]


def _difference(found: dict[str, float]) -> str:
    return f"{number(found['mean'], 3)} ± {number(found['stderr'], 3)}"


def _split_gap(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{plus_minus(found['total'])} = {plus_minus(found['approximation'])} + {plus_minus(found['amortization'])}"
