"""TensorBoard's events of a run: the numbers of metrics.jsonl, each once, whatever happened in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import silent

from ppl_vae import runs
from ppl_vae.commands.train import resume_run, train_run
from ppl_vae.runs import outputs as tensorboard
from ppl_vae.runs.options import Options

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Options]:
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, np.random.RandomState(0).randint(0, 2, (60, 6)).astype(np.uint8))
    small: dict[str, Any] = {"hidden": (8,), "latent_dim": 2, "prior": "standard-normal", "tensorboard": "on"}
    fast: dict[str, Any] = {"epochs": 3, "batch_size": 20, "images": 5, "evaluation_particles": 10}
    return lambda **words: Options(dataset=str(path), **(small | fast | words))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} as TensorBoard itself reads them; a step that is there twice is an error."""
    events = EventAccumulator(str(folder / tensorboard.EVENTS), purge_orphaned_data=True)
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps))
        found[name] = {event.step: event.value for event in events.Scalars(name)}
    return found


def records(folder: Path, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in runs.read_metrics(folder)}


@pytest.fixture(scope="module")
def run(asked: Callable[..., Options], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(asked(), str(tmp_path_factory.mktemp("runs") / "a"), say=silent, draw=False)


@pytest.mark.thorough
def test_the_figures_of_a_run_are_pictures_among_its_events(asked, tmp_path):
    folder = train_run(asked(epochs=1), str(tmp_path / "a"), say=silent)
    events = EventAccumulator(str(folder / tensorboard.EVENTS))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"figures/{path.stem}" for path in (folder / "figures").glob("*.png")}
    assert events.Images("figures/latents")[0].step == runs.load_step(folder / runs.MODEL)


@pytest.mark.parametrize("name", ["train_loss_nats_per_image", "validation_elbo_nats_per_image", "beta", "seconds"])
def test_events_are_the_records_of_the_metrics(run, name):
    assert scalars(run)[name] == pytest.approx(records(run, name), rel=1e-6)


def test_a_resumed_run_has_each_step_once(asked, tmp_path):
    folder = train_run(asked(), str(tmp_path / "a"), say=silent, draw=False)
    with tensorboard.open_events(folder, asked(), step=9) as log:  # of a process that was killed before its checkpoint
        log({"step": 12, "train_loss_nats_per_image": 1e6, "beta": 1.0})
    resume_run(str(folder), epochs=5, say=silent, draw=False)
    name = "train_loss_nats_per_image"
    assert len(records(folder, name)) == 5
    assert scalars(folder)[name] == pytest.approx(records(folder, name), rel=1e-6)


def test_events_change_no_weight(run, asked, tmp_path):
    other = train_run(asked(tensorboard="off"), str(tmp_path / "a"), say=silent, draw=False)
    assert (other / runs.MODEL).read_bytes() == (run / runs.MODEL).read_bytes()


def test_without_the_package_nothing_is_written(asked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"--tensorboard on: expected the package tensorboard.*pip install"):
        train_run(asked(), str(tmp_path / "a"), say=silent)
    assert list(tmp_path.iterdir()) == []
