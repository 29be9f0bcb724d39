"""The README tells the truth: its Python runs, its commands and options exist."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

from ppl_vae import load
from ppl_vae.experiment.evaluation import describe_evaluation
from ppl_vae.options import NETWORKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.S) if re.search(r"^(import|from) ", block, re.M)
]
COMMANDS = sorted(set(re.findall(r"python (scripts/\w+\.py)((?: [^\s`|#\]]+)*)", README)))


def test_the_python_of_the_readme_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    names: dict = {}
    assert len(PYTHON) >= 2
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].log_evidence.shape == (100,)
    before = names["vae"].likelihood.net.output.weight.detach().clone()
    assert load("runs/mine").likelihood.event_shape == (1, 28, 28)
    names["svi"].step(names["x"])
    assert not torch.equal(names["vae"].likelihood.net.output.weight, before)
    pyro.clear_param_store()


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_every_script_of_the_readme_answers_to_help(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "usage:" in done.stdout


def test_every_script_is_in_the_readme():
    assert {path.name for path in (ROOT / "scripts").glob("*.py")} == {Path(script).name for script, _ in COMMANDS}


def test_every_option_of_the_readme_exists():
    known = set()
    for script in (ROOT / "scripts").glob("*.py"):
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
        known |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= known


def test_the_readme_mentions_every_module_of_the_package():
    layout = README[README.index("## Layout") :]
    for path in (ROOT / "ppl_vae").iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            assert f"`{path.stem}`" in layout, path.stem


def test_the_benchmark_runs_and_writes_only_what_it_is_asked_to(tmp_path):
    before = (ROOT / "scripts" / "results" / "benchmark.json").read_bytes()
    words = [
        sys.executable,
        ROOT / "scripts" / "benchmark.py",
        "--images",
        "1",
        "--num-particles",
        "100",
        "--rounds",
        "1",
    ]
    subprocess.run(words, check=True, timeout=300)
    assert (ROOT / "scripts" / "results" / "benchmark.json").read_bytes() == before
    subprocess.run([*words, "--output", tmp_path / "result.json"], check=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ratio_of_medians"] == result["seconds"]["evaluation"][0] / result["seconds"]["matrix_products"][0]


def test_the_readmes_speed_is_the_stored_measurement():
    result = json.loads((ROOT / "scripts" / "results" / "benchmark.json").read_text())
    assert (result["images"], result["num_particles"], len(result["seconds"]["evaluation"])) == (1000, 5000, 3)
    ours, bare = (statistics.median(result["seconds"][name]) for name in ("evaluation", "matrix_products"))
    stated = [
        f"{ours:.1f} s",
        f"{bare:.1f} s",
        f"{result['ratio_of_medians']:.2f}",
        f"{result['peak_memory_gb']:.2f} GB",
    ]
    text = " ".join(README[README.index("## How fast") :].split())
    assert all(number in text for number in stated)


def test_the_readmes_log_likelihood_is_the_stored_measurement():
    entry = json.loads((ROOT / "scripts" / "results" / "default_run.json").read_text())["test"]
    for line in describe_evaluation(entry):
        assert line.strip() in README


def test_the_readmes_fifteen_minutes_are_the_stored_measurement():
    result = json.loads((ROOT / "scripts" / "results" / "fifteen_minutes.json").read_text())
    assert result.keys() == {"static-mnist", "fashion-mnist"}
    for dataset, found in result.items():
        for network, row in found["networks"].items():
            assert (row["test"]["num_images"], row["test"]["num_particles"]) == (10_000, 500)
            ll, elbo, floor = (row["test"][name] for name in ("log_likelihood", "elbo", "floor"))
            assert (
                f"| {dataset} | `{network}` | {row['epochs']} | {row['seconds'] / 60:.1f} | {ll['mean']:.2f} ± "
                f"{ll['stderr']:.2f} | {elbo['mean']:.2f} ± {elbo['stderr']:.2f} | {floor['mean']:.2f} |"
            ) in README
        paired = found["comparison"]["difference"]
        assert f"{paired['mean']:.2f} ± {paired['stderr']:.2f} nats" in README


def test_the_readmes_table_of_networks_is_the_stored_measurement():
    result = json.loads((ROOT / "scripts" / "results" / "networks.json").read_text())
    assert [row["network"] for row in result["rows"]] == list(NETWORKS)
    for row in result["rows"]:
        ll = row["log_likelihood"]
        assert (
            f"| `{row['network']}` | {row['weights']:,} | {row['seconds_an_epoch']:.1f} | {row['epochs']} | "
            f"{ll['mean']:.2f} ± {ll['stderr']:.2f} | {row['elbo']['mean']:.2f} |"
        ) in README


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert set(re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", README)) == {"PPL_VAE_DATA_DIR", "OMP_NUM_THREADS"}
