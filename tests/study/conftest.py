"""One study of small runs, which the tests of this room share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_study import Killed, run_tiny_study, save_gray_bars

from ppl_vae.study import run
from ppl_vae.study.results import StudyNumbers


@pytest.fixture(scope="session")
def bars_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gray_bars(tmp_path_factory.mktemp("data") / "bars.npz")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, bars_file: Path) -> tuple[Path, StudyNumbers]:
    """A whole study that was killed in the middle and continued."""
    folder = tmp_path_factory.mktemp("study") / "tiny"
    trained = []

    def train_five(*args: Any, **kwargs: Any) -> None:
        train(*args, **kwargs)
        trained.append(args)
        if len(trained) == 5:
            raise Killed

    train = run.train_or_resume
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train_or_resume", train_five)
        with pytest.raises(Killed):
            run_tiny_study(folder, bars_file)
    return folder, run_tiny_study(folder, bars_file)


@pytest.fixture(scope="session")
def numbers(study: tuple[Path, StudyNumbers]) -> StudyNumbers:
    return study[1]
