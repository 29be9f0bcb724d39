"""A recipe made again: rows hold what the runs hold, an interruption changes nothing, and what is short is said."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from small_run import SMALL, save_bars

from ppl_vae import runs
from ppl_vae.commands import reproduce as reproduction
from ppl_vae.commands import run_series
from ppl_vae.commands.options import Reproduce
from ppl_vae.commands.reproduce import reproduce_recipe, shorten_stages
from ppl_vae.runs import recipes
from ppl_vae.runs.recipes import Published, Recipe
from ppl_vae.runs.results import to_json

pytestmark = pytest.mark.thorough

EPOCHS = (10, 3)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    path = save_bars(tmp_path_factory.mktemp("data") / "bars.npz")
    first = replace(SMALL, dataset=str(path), epochs=EPOCHS[0], warmup_epochs=4, checkpoint_seconds=0.0)
    return first, replace(first, epochs=EPOCHS[1], warmup_epochs=0, learning_rate=1e-12)


@pytest.fixture(autouse=True)
def tiny(stages, monkeypatch):
    """A recipe of bars in two stages, the second of which can hardly move the weights; its figures take no time."""
    monkeypatch.setattr(reproduction, "write_figures", lambda run, say: None)
    published = (Published(-20.0, 0.5, "bars: nobody"),)
    recipe = Recipe("bars", stages, published, particles=10)
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)
    return recipe


def reproduced(folder, **asked):
    """The row, and what was said."""
    said: list[str] = []
    places = {"run_dir": str(folder / "runs"), "output": str(folder / "results" / "rows.json")}
    row = reproduce_recipe(Reproduce(asked.pop("name", "tiny"), **places | asked), say=said.append)
    return to_json(row), said


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "tiny", Recipe("bars", stages, (), particles=10))
        row, said = reproduced(folder)
    return folder, row, said


def weights_of(folder):
    return {
        f"{path.parent.name} {name}": tensor
        for path in sorted((folder / "runs").glob("*/model.safetensors"))
        for name, tensor in runs.load_tensors(path)[0].items()
    }


def measured(row):
    """What does not depend on time, place and interruptions."""
    timed = ("seconds", "environment", "commits", "published")
    return {key: value for key, value in row.items() if key not in timed}


# --- What a row holds ---


def test_a_row_is_what_the_last_stages_run_holds(undisturbed):
    folder, row, _ = undisturbed
    entry = runs.read_evaluations(folder / "runs" / "2")["test"]
    assert row["ours"] == entry["log_likelihood"]
    assert row["elbo"] == entry["elbo"]
    assert row["seconds"]["evaluation"] == entry["seconds"]
    assert (entry["num_images"], entry["num_particles"], entry["split"]) == (40, 10, "test")
    assert row["protocol"].items() <= entry.items()
    for stage, gain in zip("12", row["validation"]["last_tenth_gains"], strict=True):
        *before, last = (r["validation_elbo_nats_per_image"] for r in runs.read_metrics(folder / "runs" / stage))
        assert gain == last - max(before)
    assert row["budget"] == {"share": 1.0, "epochs": list(EPOCHS), "recipe_epochs": list(EPOCHS)}
    assert len(row["seconds"]["training"]) == 2


def test_a_later_stage_starts_from_the_weights_of_the_one_before(undisturbed):
    weights = weights_of(undisturbed[0])
    for name in (name for name in weights if name.startswith("2 ")):
        torch.testing.assert_close(weights[name], weights["1" + name[1:]], rtol=0, atol=1e-6)


# --- Going on ---


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("ppl_vae.runs.append_metrics", 4),
        ("ppl_vae.runs.append_metrics", EPOCHS[0] + 1),
        ("ppl_vae.commands.run_series.train_run", 1),
        ("ppl_vae.commands.reproduce.write_evaluation", 0),
        ("ppl_vae.commands.reproduce.write_row", 0),
    ],
    ids=["in stage 1", "in stage 2", "between the stages", "before the evaluation", "before the row"],
)
def test_an_interrupted_recipe_goes_on_and_ends_as_if_it_had_not_been(undisturbed, tmp_path, monkeypatch, where, calls):
    module, _, name = where.rpartition(".")
    genuine, left = getattr(sys.modules[module], name), calls

    def interrupted(*words, **named):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return genuine(*words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduced(tmp_path)
    assert not (tmp_path / "results" / "rows.json").exists()
    row, _ = reproduced(tmp_path)
    weights, expected = weights_of(tmp_path), weights_of(undisturbed[0])
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    assert measured(row) == measured(undisturbed[1])


def test_a_finished_recipe_is_taken_as_it_is(undisturbed, monkeypatch):
    folder, row, _ = undisturbed
    files = {path: path.read_bytes() for path in (folder / "runs").rglob("*.safetensors")}
    monkeypatch.setattr(run_series, "train_run", None)
    monkeypatch.setattr(reproduction, "write_evaluation", None)
    again, said = reproduced(folder)
    assert measured(again) == measured(row)
    assert again["seconds"] == row["seconds"]
    assert sum("is finished" in line for line in said) == 2
    assert {path: path.read_bytes() for path in (folder / "runs").rglob("*.safetensors")} == files


# --- Budgets ---


@pytest.mark.parametrize(
    ("share", "epochs", "warmups"),
    [(1.0, [10, 3], [4, 0]), (0.5, [5, 2], [2, 0]), (0.01, [1, 1], [0, 0]), (2.0, [20, 6], [8, 0])],
)
def test_a_share_is_of_each_stages_epochs_and_warmup(stages, share, epochs, warmups):
    found = shorten_stages(stages, share)
    assert [stage.epochs for stage in found] == epochs
    assert [stage.warmup_epochs for stage in found] == warmups


# --- What is refused, before any training ---


def refused(folder, match, **asked):
    before = {path for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=match):
        reproduced(folder, **asked)
    assert {path for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("asked", "what"), [({"seed": 1}, "seed"), ({"epochs": 1}, "epochs, warmup_epochs")])
def test_run_folders_of_another_training_are_refused(undisturbed, asked, what):
    refused(undisturbed[0], f"1: expected a run with the options that are asked for, got others in {what};", **asked)
