"""The table of networks: what it says is what its runs hold, and it takes no run that is another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ppl_vae import load, runs
from ppl_vae.commands import run_series as network_table
from ppl_vae.commands.run_series import compare_networks
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.results import to_json

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, (300, 6, 5), dtype=np.uint8))
    return Options(
        **PLAIN,
        dataset=str(path),
        hidden=(5,),
        channels=(2,),
        latent_dim=2,
        images=20,
        evaluation_particles=10,
        batch_size=50,
    )


def compare(options, folder, *, networks=("mlp", "conv"), **changes):
    said = []
    asked = {"minutes": 0.01, "run_dir": str(folder / "runs"), "output": str(folder / "table.json")} | changes
    return to_json(compare_networks(networks, options, say=said.append, **asked)), said


@pytest.fixture(scope="module")
def table(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    rows, said = compare(options, folder)
    return folder, rows, said


def test_each_row_is_what_its_run_holds(table):
    folder, rows, _ = table
    for row, network in zip(rows, ("mlp", "conv"), strict=True):
        run = folder / "runs" / network
        assert row["network"] == network == runs.read_json(run / runs.CONFIG)["options"]["network"]
        assert row["log_likelihood"] == runs.read_evaluations(run)["test"]["log_likelihood"]
        assert row["weights"] == sum(w.numel() for w in load(run).parameters())
        assert row["epochs"] == len(runs.read_metrics(run))


@pytest.mark.parametrize(("seconds", "epochs"), [(0.19, 3), (0.31, 1), (50.0, 1)])
def test_epochs_fill_the_minutes_that_were_asked_for(options, tmp_path, monkeypatch, seconds, epochs):
    monkeypatch.setattr(network_table, "seconds_per_epoch", lambda options: seconds)
    rows, _ = compare(options, tmp_path, networks=("mlp",), minutes=0.01)
    assert rows[0]["epochs"] == epochs


def test_a_table_that_is_asked_for_again_takes_its_runs_as_they_are(table, options):
    folder, rows, _ = table
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*.safetensors")}
    again, said = compare(options, folder)
    assert again == rows
    assert sum("is finished" in line for line in said) == 2
    assert {path: path.read_bytes() for path in (folder / "runs").rglob("*.safetensors")} == before


def test_a_table_leaves_convolutional_networks_out_and_refuses_them_alone(options, tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 2, (300, 6), dtype=np.uint8))
    rows_of_data = replace(options, dataset=str(tmp_path / "rows.npy"))
    found, said = compare(rows_of_data, tmp_path)
    assert [row["network"] for row in found] == ["mlp"]
    assert any("convolutional networks are left out" in line for line in said)
    with pytest.raises(ValueError, match=r"--networks: expected one of mlp, .* for a table"):
        compare(rows_of_data, tmp_path / "other", networks=("conv",))


def test_a_folder_in_the_place_of_the_table_is_refused_before_any_training(options, tmp_path):
    with pytest.raises(ValueError, match="--output: expected a file, got the folder"):
        compare(options, tmp_path, output=str(tmp_path))
    assert not (tmp_path / "runs").exists()
