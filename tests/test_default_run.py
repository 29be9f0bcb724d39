"""The README's headline, from the command that it names: minutes long, so left out by default (pytest -m slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parent.parent / "scripts" / "train_svi.py"


@pytest.mark.slow
def test_the_default_run_is_better_than_89_nats(tmp_path):
    subprocess.run([sys.executable, TRAIN, "--run-dir", tmp_path / "run"], check=True, timeout=3600)
    entry = json.loads((tmp_path / "run" / "evaluation.json").read_text())["test"]
    assert (entry["num_images"], entry["num_particles"], entry["binarization"]) == (5000, 200, "dynamic")
    bound = entry["log_likelihood"]
    assert bound["mean"] - 2 * bound["stderr"] > -89
    assert bound["mean"] < -45.53  # the entropy of the binarization itself: no model can be better in expectation
