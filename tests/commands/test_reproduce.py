"""A recipe made again: rows hold what the runs hold, an interruption changes nothing, and what is short is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from small_run import SMALL, save_bars

from ppl_vae import runs
from ppl_vae.commands import reproduce as reproduction
from ppl_vae.commands import run_series
from ppl_vae.commands.cli import parse
from ppl_vae.commands.encode import encode_images
from ppl_vae.commands.options import COMMANDS, Encode, Reproduce
from ppl_vae.commands.reproduce import (
    read_rows,
    read_validation_curve,
    reproduce_recipe,
    shorten_stages,
    write_row,
)
from ppl_vae.reports.text.reproduction import describe_reproduction, reproduction_table, seeds_table
from ppl_vae.runs import recipes
from ppl_vae.runs.open import load_evaluated_vae, open_run
from ppl_vae.runs.recipes import Recipe
from ppl_vae.runs.reproduction_results import Published, Reproduction
from ppl_vae.runs.results import from_json, to_json

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
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
    recipe = Recipe("bars", stages, published, "nothing", particles=10)
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: recipe)
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
        patch.setitem(recipes.RECIPES, "tiny", lambda: Recipe("bars", stages, (), "nothing", particles=10))
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
    metrics = runs.read_metrics(folder / "runs" / "2")
    elbos = {record["step"]: record["validation_elbo_nats_per_image"] for record in metrics}
    before = max(r["validation_elbo_nats_per_image"] for r in runs.read_metrics(folder / "runs" / "1"))
    best = max(elbos.values())
    assert row["validation"]["elbo"] == (best if best > before else None)  # none of the weights that it started from
    assert elbos.get(entry["step"], before) == max(best, before)
    assert row["budget"] == {"share": 1.0, "epochs": list(EPOCHS), "recipe_epochs": list(EPOCHS)}
    assert len(row["seconds"]["training"]) == 2


def test_a_row_is_written_and_says_with_what_it_was_made(undisturbed):
    folder, row, _ = undisturbed
    assert to_json(read_rows(str(folder / "results" / "rows.json"))) == [json.loads(json.dumps(row))]
    release = row["environment"]["packages"]["torch"].split("+")[0]  # torch itself adds how it was built
    assert release == torch.__version__.split("+")[0]
    assert row["environment"]["device"]
    assert len(row["commits"]) >= 1
    assert len(row["commits"][0].removesuffix("-dirty")) == 40


def test_a_rows_command_asks_for_the_same_again(tmp_path):
    row, _ = reproduced(tmp_path, epochs_share=0.1, seed=3)
    script, *words = row["command"].split()[1:]
    assert (ROOT / script).exists()
    asked = parse(COMMANDS["reproduce"], words)
    assert (asked.name, asked.epochs_share, asked.seed, asked.epochs) == ("tiny", 0.1, 3, None)


def test_a_later_stage_starts_from_the_weights_of_the_one_before(undisturbed):
    weights = weights_of(undisturbed[0])
    for name in (name for name in weights if name.startswith("2 ")):
        torch.testing.assert_close(weights[name], weights["1" + name[1:]], rtol=0, atol=1e-6)


def test_active_latents_are_those_whose_means_vary(undisturbed, tmp_path):
    """By numpy, from the means that encode.py writes."""
    folder, row, _ = undisturbed
    given = {"num_particles": 2, "images": None, "device": "cpu", "seed": 0, "output": str(tmp_path / "z")}
    encode_images(Encode(str(folder / "runs" / "2"), "test", **given), say=lambda line: None)
    means = np.load(tmp_path / "z" / "encoded.npz")["mean"]
    assert row["active_units"] == int((means.var(0, ddof=1) > 0.01).sum())


def test_active_latents_are_counted_in_variances_of_the_prior(undisturbed, tmp_path, monkeypatch):
    """Of a prior that is as wide as it takes for one latent to be just active, and for the other not to be."""
    run = open_run(str(undisturbed[0] / "runs" / "2"))
    vae = load_evaluated_vae(run)
    given = {"num_particles": 2, "images": None, "device": "cpu", "seed": 0, "output": str(tmp_path / "z")}
    encode_images(Encode(str(run.folder), "test", **given), say=lambda line: None)
    means = torch.as_tensor(np.load(tmp_path / "z" / "encoded.npz")["mean"])
    scale = (means.var(0) / 0.01).sqrt() * torch.tensor([0.9, 1.1])
    monkeypatch.setattr(type(vae.prior), "forward", lambda self: pyro.distributions.Normal(0, scale).to_event(1))
    assert reproduction._count_active_units(run, vae) == 1


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


def test_an_evaluation_with_other_particles_is_made_again(undisturbed, tiny, tmp_path, monkeypatch):
    shutil.copytree(undisturbed[0], tmp_path / "copy")
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: tiny._replace(particles=12))
    row, _ = reproduced(tmp_path / "copy")
    assert row["protocol"]["num_particles"] == 12


# --- Budgets ---


@pytest.mark.parametrize(
    ("share", "epochs", "warmups"),
    [(1.0, [10, 3], [4, 0]), (0.5, [5, 2], [2, 0]), (0.01, [1, 1], [0, 0]), (2.0, [20, 6], [8, 0])],
)
def test_a_share_is_of_each_stages_epochs_and_warmup(stages, share, epochs, warmups):
    found = shorten_stages(stages, share)
    assert [stage.epochs for stage in found] == epochs
    assert [stage.warmup_epochs for stage in found] == warmups


@pytest.mark.parametrize(
    ("elbos", "step", "expected"),
    [
        ([-9.0, -7.0, -8.0], 2, {"elbo": -7.0, "epoch": 2, "last_tenth_gains": [-1.0]}),
        ([-9.0, -8.0, -7.5], 3, {"elbo": -7.5, "epoch": 3, "last_tenth_gains": [0.5]}),
        ([float(e) for e in range(20)], 20, {"elbo": 19.0, "epoch": 20, "last_tenth_gains": [2.0]}),
        ([-9.0], 1, {"elbo": -9.0, "epoch": 1, "last_tenth_gains": [None]}),
    ],
)
def test_the_end_of_a_validation_curve_is_its_last_tenth_over_the_rest(elbos, step, expected):
    metrics = [
        {"step": epoch, "epoch": epoch, "validation_elbo_nats_per_image": elbo}
        for epoch, elbo in enumerate(elbos, start=1)
    ]
    assert to_json(read_validation_curve([metrics], step)) == expected


def test_of_weights_that_are_those_of_the_start_there_is_no_record():
    stages = [[{"step": 2, "epoch": 1, "validation_elbo_nats_per_image": elbo}] for elbo in (-3.0, -4.0)]
    assert to_json(read_validation_curve(stages, 0)) == {"elbo": None, "epoch": 0, "last_tenth_gains": [None, None]}


def test_without_validation_images_there_is_no_validation_curve():
    assert read_validation_curve([[{"step": 5, "epoch": 1}]], 5) is None


def test_each_stage_has_the_end_of_its_own_curve():
    elbo, bound = "validation_elbo_nats_per_image", "validation_bound_nats_per_image"
    first = [{"step": e, "epoch": e, elbo: float(e)} for e in range(1, 21)]
    second = [{"step": e, "epoch": e, elbo: -float(e), bound: value} for e, value in ((1, 30.0), (2, 30.25))]
    assert to_json(read_validation_curve([first, second], 2)) == {
        "elbo": -2.0,
        "epoch": 2,
        "last_tenth_gains": [2.0, 0.25],
    }


def test_the_end_of_each_stages_curve_is_told_and_in_the_table():
    seen = {"elbo": -88.0, "epoch": 30, "last_tenth_gains": [0.021, 0.0004]}
    budget = {"share": 1.0, "epochs": [300, 30], "recipe_epochs": [300, 30]}
    row = made_up(validation=seen, budget=budget)
    assert (
        "  the last tenth of each stage's epochs gained +0.02, +0.00 nats of validation bound"
        in describe_reproduction(row, "")
    )
    assert reproduction_table([row]).endswith("| +0.02, +0.00 |")
    short = made_up(validation={"elbo": -88.0, "epoch": 30, "last_tenth_gains": [0.021, None]}, budget=budget)
    assert reproduction_table([short]).endswith("| +0.02, - |")


# --- The results file ---


def made_up(**changes):
    budget = {"share": 1.0, "epochs": [400], "recipe_epochs": [400]} | changes.get("budget", {})
    row = {
        "recipe": "vae_gaussian",
        "seed": 0,
        "precision": "float32",
        "options": [{"epochs": n, "num_particles": 1, "seed": changes.get("seed", 0)} for n in budget["epochs"]],
        "rise": 0.2349,
        "budget": budget,
        "ours": {"mean": -84.404, "stderr": 0.221},
        "elbo": {"mean": -88.1, "stderr": 0.23},
        "kl": {"mean": 25.0, "stderr": 0.1},
        **{"model": "one layer", "differs": "", "weights": 7, "active_units": 2, "command": ""},
        **{"commits": [], "environment": {}},
        "published": [{"log_likelihood": -84.45, "stderr": 0.12, "source": "VAE: there"}],
        "protocol": {"dataset": "mnist", "protocol": "vampprior", "binarization": "dynamic", "split": "test"}
        | {"num_images": 10_000, "num_particles": 5000},
        "validation": {"elbo": -88.0, "epoch": 399, "last_tenth_gains": [0.0123]},
        "seconds": {"training": [3600.0], "evaluation": 240.0},
    }
    return from_json(Reproduction, row | changes)


SHORT = {"share": 0.5, "epochs": [200], "recipe_epochs": [400]}


@pytest.mark.parametrize("change", [{}, {"ours": {"mean": -1.0, "stderr": 0.1}}, {"published": []}])
def test_a_row_of_the_same_recipe_seed_budget_and_precision_is_replaced(tmp_path, change):
    path = str(tmp_path / "rows.json")
    write_row(path, made_up())
    write_row(path, made_up(**change))
    assert read_rows(path) == [made_up(**change)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"budget": SHORT}, {"precision": "bf16"}, {"recipe": "ladder"}])
def test_any_other_row_stands_beside_it(tmp_path, change):
    path = str(tmp_path / "rows.json")
    write_row(path, made_up())
    write_row(path, made_up(**change))
    assert read_rows(path) == [made_up(), made_up(**change)]


def test_rows_are_in_the_order_of_the_recipes_and_seeds(tmp_path):
    path = str(tmp_path / "rows.json")
    for change in ({"recipe": "ladder"}, {"seed": 2}, {"recipe": "iwae_1"}, {"seed": 1}):
        write_row(path, made_up(**change))
    assert [(row.recipe, row.seed) for row in read_rows(path)] == [
        ("iwae_1", 0),
        ("vae_gaussian", 1),
        ("vae_gaussian", 2),
        ("ladder", 0),
    ]


# --- In words ---


def test_the_table_has_a_line_a_row():
    head, rule, *lines = reproduction_table([made_up(), made_up(budget=SHORT, precision="bf16")]).splitlines()
    assert head.count("|") == rule.count("|") == lines[0].count("|") == lines[1].count("|")
    assert lines[0] == (
        "| `vae_gaussian` | mnist, dynamic | -84.40 ± 0.22 | +0.23 | -88.10 ± 0.23 | -84.45 ± 0.12 (VAE: there) "
        "| 400 | 64 | 0 | +0.01 |"
    )
    assert "| 200 (of 400), bf16 |" in lines[1]


def test_the_readmes_table_is_that_of_the_stored_rows():
    rows = read_rows(str(ROOT / "scripts" / "results" / "reproductions.json"))
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Published results\n")[1].split("\n## ")[0]
    tables = [table for table in (reproduction_table(rows), seeds_table(rows)) if table]
    for table in tables:
        assert f"\n\n{table}\n\n" in section
    assert section.count("\n|") == sum(len(table.splitlines()) for table in tables)


def test_seeds_of_one_recipe_are_told_together():
    rows = [made_up(seed=seed, ours={"mean": mean, "stderr": 0.2}) for seed, mean in enumerate((-84.4, -84.7, -84.1))]
    *_, line = seeds_table([*rows, made_up(seed=3, options=OTHER)]).splitlines()
    # 0.30 / sqrt(3) = 0.173, and sqrt(0.173^2 + 0.12^2) = 0.211
    assert line == "| `vae_gaussian` | 3 | -84.40 ± 0.17 | 0.30 | +0.05 ± 0.21 (VAE: there) |"
    *_, line = seeds_table(
        [replace(row, published=(Published(-84.45, None, "VAE: there"),)) for row in rows]
    ).splitlines()
    assert line.endswith("| +0.05 ± 0.17 (VAE: there) |")


def test_an_option_that_is_younger_than_a_row_or_of_the_machine_is_no_other_training():
    young = [{"epochs": 400, "num_particles": 1, "seed": 2, "stream": "on", "tensorboard": "on", "beta": 1.0}]
    assert "| `vae_gaussian` | 3 |" in seeds_table([made_up(), made_up(seed=1), made_up(seed=2, options=young)])


OTHER = [{"epochs": 400, "num_particles": 1, "seed": 3, "learning_rate": 1e-5}]


def test_two_seeds_or_rows_of_other_trainings_make_no_table():
    assert seeds_table([made_up(), made_up(seed=1), made_up(seed=2, options=OTHER)]) == ""


# --- What is refused, before any training ---


def refused(folder, match, **asked):
    before = {path for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=match):
        reproduced(folder, **asked)
    assert {path for path in folder.rglob("*") if path.is_file()} == before


def test_a_name_of_no_recipe_is_refused(tmp_path):
    refused(tmp_path, r"NAME: expected one of iwae_vae_1, .*, tiny, got 'vae_gauss'", name="vae_gauss")


def test_an_output_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "run", "--output: .*file cannot be made: ", output=str(tmp_path / "file" / "rows.json"))


@pytest.mark.parametrize(("asked", "what"), [({"seed": 1}, "seed"), ({"epochs": 1}, "epochs, warmup_epochs")])
def test_run_folders_of_another_training_are_refused(undisturbed, asked, what):
    refused(undisturbed[0], f"1: expected a run with the options that are asked for, got others in {what};", **asked)


def test_a_folder_of_something_else_in_a_later_stages_place_is_found_before_the_first(tmp_path):
    (tmp_path / "runs" / "2").mkdir(parents=True)
    (tmp_path / "runs" / "2" / "notes.txt").write_text("mine")
    refused(tmp_path, "2: expected a run, a new or an empty folder, got another; name another --run-dir")


def test_a_later_stage_that_cannot_be_trained_is_found_before_the_first(tiny, stages, tmp_path, monkeypatch):
    changed = tiny._replace(stages=(stages[0], replace(stages[1], free_bits=0.5)))
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: changed)
    refused(tmp_path, "--free-bits: expected --objective free-bits")


@pytest.mark.parametrize(
    ("content", "match"), [("{", "not JSON"), ('{"rows": [1]}', "Reproduction: expected Reproduction, got 1")]
)
def test_a_damaged_results_file_is_refused(tmp_path, content, match):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.json").write_text(content)
    refused(tmp_path, f"rows.json: damaged: .*{match}")


# --- The script ---


def script(*words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_the_script_lists_the_recipes():
    code, out, _ = script("--list")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines() if line[0] != " "] == [
        name for name in recipes.RECIPES if name != "tiny"
    ]
