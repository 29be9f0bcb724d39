"""Damaged files: whatever the damage, a reader reads or says one line, and takes no more memory than its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import fuzzing
import pytest

NUM_FILES = 10_000
READERS = (
    *("npy", "npz", "large npy", "further images", "mask", *fuzzing.PICTURES),
    *("config", "a run by its config", "evaluation", "metrics", "mended metrics", "weights", "state", "per image"),
    *("partial evaluation", "results", "certificates"),
    *("amat", "mat"),
)
FAULTY = {read.__name__ for read in fuzzing.FAULTY}

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_DATA"),
    pytest.mark.thorough,
]


@cache
def found() -> dict[str, dict[str, Any]]:
    """What was found, by reader; of one process for them all, whose memory is limited."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "fuzzing.py"), str(NUM_FILES)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.thorough
def test_every_reader_is_tried() -> None:
    assert found().keys() == {*READERS, *FAULTY}


@pytest.mark.thorough
def test_ten_thousand_files_are_damaged() -> None:
    assert sum(of["files"] for name, of in found().items() if name in READERS) >= NUM_FILES


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line_within_the_memory_limit(name: str) -> None:
    assert found()[name]["faults"] == []


@pytest.mark.parametrize("name", sorted(FAULTY))
def test_a_reader_with_a_fault_is_found_out(name: str) -> None:
    assert len(found()[name]["faults"]) == 2
