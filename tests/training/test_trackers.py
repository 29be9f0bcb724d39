"""The lines of the manual for other trackers, run as they stand, without a connection."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import bernoulli_vae
from small_run import train_small

from ppl_vae import fit, runs
from ppl_vae.runs.options import Options
from ppl_vae.training import Callbacks

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
LOSS = "train_loss_nats_per_image"


def blocks_of(package: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [block for block in blocks if f"import {package}\n" in block]


@pytest.fixture
def names():
    """What the page has defined before: fit, a VAE and its images. Also the records of the same training."""
    vae = bernoulli_vae(latent_dim=2, D=12)
    x = torch.bernoulli(torch.full((20, 12), 0.3, dtype=torch.double), generator=torch.Generator().manual_seed(0))
    records: list[dict[str, float]] = []
    torch.manual_seed(0)
    fit(copy.deepcopy(vae), x, epochs=2, callbacks=Callbacks(on_epoch=records.append))
    torch.manual_seed(0)
    return {"fit": fit, "vae": vae, "x": x, "records": records}


def test_weights_and_biases_has_the_record_of_every_epoch(names, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (block,) = blocks_of("wandb")
    exec(block, names)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert len(names["records"]) == 2
    for record in names["records"]:
        assert repr(record[LOSS]).encode() in content


def test_mlflow_has_the_record_of_every_epoch(names, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    live, afterwards = blocks_of("mlflow")
    exec(live, names)
    assert histories(mlflow) == [{record["step"]: record[LOSS] for record in names["records"]}]

    np.save("rows.npy", np.random.RandomState(0).randint(0, 2, (60, 6)).astype(np.uint8))
    asked = Options(dataset="rows.npy", hidden=(8,), latent_dim=2, prior="standard-normal", epochs=3, images=5)
    folder = train_small(Path("runs/NAME"), asked, draw=True)
    exec(afterwards, names)
    expected = {record["step"]: record[LOSS] for record in runs.read_metrics(folder)}
    assert len(expected) == 3
    assert histories(mlflow)[0] == expected
    artifacts = mlflow.MlflowClient().list_artifacts(mlflow.last_active_run().info.run_id)
    assert {item.path for item in artifacts} == {path.name for path in (folder / "figures").iterdir()}


def histories(mlflow) -> list[dict[int, float]]:
    """The losses of every run by step, the newest run first."""
    client = mlflow.MlflowClient()
    found = [client.get_metric_history(run_id, LOSS) for run_id in mlflow.search_runs()["run_id"]]
    return [{metric.step: metric.value for metric in history} for history in found]
