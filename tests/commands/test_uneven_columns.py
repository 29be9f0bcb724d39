"""The warning that one scale for all columns of a table fits none of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_wine
from small_run import SMALL, train_small

from ppl_vae.estimator import VAEDensity


def words_of_training(tmp_path, table: np.ndarray, likelihood: str) -> list[str]:
    np.save(tmp_path / "table.npy", table)
    said: list[str] = []
    options = replace(SMALL, dataset=str(tmp_path / "table.npy"), network="mlp", epochs=1, likelihood=likelihood)
    train_small(tmp_path / "run", options, say=said.append)
    return said


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", ["normal", "laplace"])
def test_uneven_columns_are_warned_of_with_both_cures(tmp_path, likelihood):
    said = words_of_training(tmp_path, load_wine().data, likelihood)
    (line,) = [line for line in said if line.startswith("Warning: the columns differ in spread")]
    assert "tandardize" in line
    assert "--likelihood normal-per-pixel" in line


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", ["normal", "normal-per-pixel"])
def test_nothing_is_warned_of_where_one_scale_does_or_each_column_has_its_own(tmp_path, likelihood):
    wine = load_wine().data
    table = (wine - wine.mean(0)) / wine.std(0) if likelihood == "normal" else wine
    said = words_of_training(tmp_path, table, likelihood)
    assert not any("differ in spread" in line for line in said)


@pytest.mark.thorough
@pytest.mark.parametrize("likelihood", ["normal", "normal-per-pixel"])
def test_a_column_of_one_value_is_warned_of_by_its_number(tmp_path, likelihood):
    """Its density rises without end as its scale falls: the other columns' nats drown in it."""
    wine = load_wine().data
    table = np.c_[wine[:, :2], np.full(len(wine), 3.0), wine[:, 2]]
    said = words_of_training(tmp_path, table, likelihood)
    (line,) = [line for line in said if "hold one value" in line]
    assert "(counted from 0: 2)" in line
    with pytest.warns(UserWarning, match=r"\(counted from 0: 2\) hold one value"):
        VAEDensity(likelihood=likelihood, epochs=1, hidden=8, latent_dim=2, random_state=0).fit(table)
