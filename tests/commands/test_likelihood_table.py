"""The table of likelihoods: what it says is what its runs hold, on one scale; interrupted, it goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from small_run import SMALL, bars

from ppl_vae import runs
from ppl_vae.commands import run_series
from ppl_vae.commands import run_series as likelihood_table
from ppl_vae.commands.run_series import compare_likelihoods
from ppl_vae.parts.registry import LIKELIHOODS
from ppl_vae.runs.load import load
from ppl_vae.runs.resolve import load_splits
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.errors import NotFinite

pytestmark = pytest.mark.thorough

WORDS = ("binomial", "normal", "beta")
PIXELS = 64


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """8-bit images: bars of 200 on a ground of 20, each pixel a few levels off."""
    path = tmp_path_factory.mktemp("data") / "levels.npz"
    noise = np.random.default_rng(5)
    arrays = {}
    for seed, (split, count) in enumerate((("train", 100), ("valid", 20), ("test", 40))):
        images, _ = bars(count, seed=seed)
        arrays[split] = (20 + 180 * images + noise.integers(0, 20, images.shape)).astype(np.uint8)
    np.savez(path, **arrays)
    return replace(SMALL, dataset=str(path), dequantization_draws=4)


def compare(asked, folder, words=WORDS):
    said = []
    rows = compare_likelihoods(
        words, asked, run_dir=str(folder / "runs"), output=str(folder / "results" / "table.json"), say=said.append
    )
    return to_json(rows), said


@pytest.fixture(scope="module")
def table(levels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    rows, said = compare(levels, folder)
    return folder, rows, said


def weights_of(folder):
    return {path: path.read_bytes() for path in (folder / "runs").rglob("model.safetensors")}


def measured(rows):
    """What a run's row holds, but for its time: nothing that depends on the other rows."""
    compared = ("seconds", "rank", "verdict", "difference_nats", "difference_bits_per_dim", "ranks_log_likelihood")
    return {row["likelihood"]: {key: row[key] for key in row.keys() - {*compared}} for row in rows}


# --- What the table holds ---


def test_each_row_is_what_its_run_holds(table):
    folder, rows, _ = table
    assert sorted(row["likelihood"] for row in rows) == sorted(WORDS)
    for row in rows:
        run = folder / "runs" / row["likelihood"]
        entry = runs.read_evaluations(run)["test"]
        for key in ("bits_per_dim", "log_likelihood", "elbo", "reconstruction", "kl", "floor", "scale"):
            assert row[key] == entry[key]
        assert row["weights"] == sum(w.numel() for w in load(run).parameters())
        assert row["epochs"] == len(runs.read_metrics(run)) == 2
        assert row["likelihood"] == runs.read_json(run / runs.CONFIG)["options"]["likelihood"]


@pytest.mark.thorough
def test_rows_of_densities_say_that_their_masses_are_exact(table):
    kinds = {row["likelihood"]: row["kind"] for row in table[1]}
    assert kinds == {"binomial": "mass", "normal": "exact", "beta": "exact"}


def test_differences_from_the_best_are_paired_on_the_same_images(table):
    folder, rows, _ = table
    nats = {
        word: runs.load_tensors(folder / "runs" / word / runs.per_image_file("test"))[0]["log_evidence"].numpy()
        for word in WORDS
    }
    for row in rows[1:]:
        bits = (nats[rows[0]["likelihood"]] - nats[row["likelihood"]]) / (PIXELS * math.log(2))
        found = row["difference_bits_per_dim"]
        assert found["mean"] == pytest.approx(bits.mean())
        assert found["stderr"] == pytest.approx(bits.std(ddof=1) / math.sqrt(len(bits)))
        assert found["interval"][0] < found["mean"] < found["interval"][1]
        assert row["difference_nats"]["mean"] == pytest.approx(-bits.mean() * PIXELS * math.log(2))
        assert row["verdict"] == ("worse" if found["interval"][0] > 0 else "not distinguishable")


def test_intervals_hold_for_all_rows_at_once(table):
    """Student's at 1 - 0.05 / 2 each, as two rows are compared with the first."""
    for row in table[1][1:]:
        found = row["difference_bits_per_dim"]
        half = stats.t.ppf(1 - 0.05 / 2 / 2, row["num_images"] - 1) * found["stderr"]
        assert found["interval"] == pytest.approx([found["mean"] - half, found["mean"] + half])


# --- Going on ---


def test_an_interrupted_table_goes_on_with_what_is_left(table, levels, tmp_path, monkeypatch):
    """Killed before the second training: the first is not trained again, and rows are those of no interruption."""
    trained = []
    train = run_series.train_run

    def interrupted(asked, folder, *, say, draw):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(asked.likelihood)
        return train(asked, folder, say=say)

    monkeypatch.setattr(run_series, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(levels, tmp_path, WORDS[:2])
    monkeypatch.undo()
    assert trained == [WORDS[0]]
    before = weights_of(tmp_path)
    rows, _ = compare(levels, tmp_path, WORDS[:2])
    assert before.items() <= weights_of(tmp_path).items()
    assert measured(rows).items() <= measured(table[1]).items()


def test_a_likelihood_whose_training_meets_a_nan_is_left_out_and_told_of(levels, tmp_path, monkeypatch):
    train = run_series.train_run

    def broken(asked, folder, *, say, draw):
        if asked.likelihood == "normal":
            raise NotFinite("loss: expected a number, got NaN")
        return train(asked, folder, say=say)

    monkeypatch.setattr(run_series, "train_run", broken)
    rows, said = compare(levels, tmp_path, ("normal", "binomial"))
    assert [row["likelihood"] for row in rows] == ["binomial"]
    assert any(line.startswith("normal is left out: loss") for line in said)
    assert "normal" in json.loads((tmp_path / "results" / "table.json").read_text())["failed"]


# --- What is refused, before anything is written ---


def refused(asked, folder, words, match):
    with pytest.raises(ValueError, match=match):
        compare(asked, folder, words)
    assert not (folder / "runs").exists()
    assert not (folder / "results").exists()


def test_scales_are_never_mixed(levels, tmp_path):
    match = "mass of 8-bit levels for binomial, normal; mass of binary pixels for bernoulli"
    refused(levels, tmp_path, ("binomial", "bernoulli", "normal"), match)


@pytest.mark.parametrize("name", ["images", "latent_dim", "evaluation_particles", "epochs", "seed"])
def test_a_folder_with_other_options_is_refused(table, levels, name):
    folder, _, _ = table
    before = weights_of(folder)
    with pytest.raises(ValueError, match=f"expected a run with the options that are asked for, got others in {name};"):
        compare(replace(levels, **{name: 3}), folder)
    assert weights_of(folder) == before


# --- Which likelihoods ---


def fitting(folder, array, **changes):
    np.save(folder / "data.npy", array)
    asked = replace(SMALL, dataset=str(folder / "data.npy"), **changes)
    return likelihood_table.fitting_likelihoods(asked, load_splits(asked))


def test_levels_are_compared_under_all_likelihoods_but_bernoulli(tmp_path):
    found = fitting(tmp_path, np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    assert found == [word for word in LIKELIHOODS if word != "bernoulli"]


def test_real_values_are_compared_under_densities_of_real_numbers(tmp_path):
    found = fitting(tmp_path, np.random.default_rng(0).normal(size=(60, 5)))
    assert found == [word for word in LIKELIHOODS if word.startswith("normal") or word in ("laplace", "student-t")]


def test_zeros_and_ones_are_a_bernoullis_alone(tmp_path):
    """Counts would take them too, and densities; neither is meant."""
    found = fitting(tmp_path, np.random.default_rng(0).integers(0, 2, (60, 4, 4), dtype=np.uint8))
    assert found == ["bernoulli"]
