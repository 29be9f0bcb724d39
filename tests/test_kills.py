"""SIGKILL at random moments: every run ends, bit for bit, where the undisturbed one does."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from disturbed_runs import SMALL, Server, left_behind, small_data
from killed_runs import TRAIN, Kills, kill_runs, killed_and_resumed
from small_study import save_gray_bars, without_times

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="commands are forked")


def test_a_few_kills_of_training_and_evaluation_change_nothing(server: Server, tmp_path: Path) -> None:
    assert kill_runs(server, tmp_path, num_kills=3, seed=0).count == 3


@pytest.mark.slow
def test_a_hundred_kills_of_training_and_evaluation_change_nothing(server: Server, tmp_path: Path) -> None:
    kills = kill_runs(server, tmp_path, num_kills=100, seed=1, compiles=("off", "off", "on"))
    assert kills.count == 100
    assert kills.moments.keys() >= {"start", "training", "evaluation, figures"}


CERTIFY = "certify_log_likelihood.py"
CERTIFICATE = """
    --images 16 --simulated 16 --temperatures 20 --leapfrogs 2 --chains 2 --num-particles 50 --gap-images 8
    --simulations 8 --draws 10 --compile off
""".split()  # noqa: SIM905 (read as it is typed)


def certificate_of(folder: Path) -> dict[str, Any]:
    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "second" not in k}
        return value

    return timeless(json.loads((folder / "evaluation.json").read_text())["certificate-test"])


@pytest.mark.slow
def test_kills_of_a_certificate_change_nothing(server: Server, tmp_path: Path) -> None:
    trained, whole = tmp_path / "trained", tmp_path / "whole"
    assert server.run(TRAIN, "--dataset", small_data(tmp_path / "bars.npz"), "--run-dir", trained, *SMALL).code == 0
    shutil.copytree(trained, whole)
    started = time.monotonic()
    done = server.run(CERTIFY, whole, *CERTIFICATE)
    longest = 0.7 * (time.monotonic() - started)
    assert done.code == 0, done
    kills, draw, number = Kills(), random.Random(0), 0
    while kills.count < 4:
        folder = shutil.copytree(trained, tmp_path / f"killed-{number}")
        words = (CERTIFY, folder, *CERTIFICATE)
        done = killed_and_resumed(server, words, words, folder, draw=draw, longest=longest, kills=kills, most=4)
        assert done.code == 0, done
        assert certificate_of(folder) == certificate_of(whole)
        assert left_behind(folder) == []
        number += 1


STUDY = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from ppl_vae.runtime.process import run_script
from small_study import run_tiny_study
run_script(lambda: run_tiny_study(Path({folder!r}), Path({dataset!r})))
"""


@pytest.mark.slow
def test_kills_of_a_study_change_nothing(server: Server, tmp_path: Path) -> None:
    dataset, folders = save_gray_bars(tmp_path / "bars.npz"), [tmp_path / "killed", tmp_path / "whole"]
    for folder in folders:
        folder.with_suffix(".py").write_text(
            STUDY.format(tests=str(Path(__file__).parent), folder=str(folder), dataset=str(dataset))
        )
    started = time.monotonic()
    whole = server.run(str(tmp_path / "whole.py"))
    longest = 0.3 * (time.monotonic() - started)
    assert whole.code == 0, whole
    kills, words, draw = Kills(), (str(tmp_path / "killed.py"),), random.Random(0)
    done = killed_and_resumed(server, words, words, folders[0], draw=draw, longest=longest, kills=kills, most=12)
    assert done.code == 0, done
    assert kills.count >= 4
    found, expected = ((folder / "study.json").read_text(encoding="utf-8") for folder in folders)
    assert without_times(json.loads(found)) == without_times(json.loads(expected))
    assert left_behind(folders[0]) == []
