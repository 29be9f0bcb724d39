"""The README tells the truth: its Python runs, its commands and options exist."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import pytest
import torch

from ppl_vae import load
from ppl_vae.commands.cli import parse
from ppl_vae.commands.options import COMMANDS as TABLE
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.text.diagnosis import describe_numbers, describe_verdicts
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.runs.options import LIKELIHOODS
from ppl_vae.runs.results import Diagnosis, Evaluation, from_json
from ppl_vae.study.tables import format_mean

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.S) if re.search(r"^(import|from) ", block, re.M)
]
COMMANDS = sorted(set(re.findall(r"python (scripts/\w+\.py)((?: [^\s`|#\]]+)*)", README)))


@pytest.mark.thorough
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
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == {Path(script).name for script, _ in COMMANDS}


def test_every_option_of_the_readme_exists():
    known = set()
    for script in (ROOT / "scripts").glob("*.py"):
        for flag in ("--help", "--help-all"):  # the second is refused where there is nothing more to show
            done = subprocess.run([sys.executable, script, flag], capture_output=True, text=True, timeout=60)
            known |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    known |= {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    known |= {"--logdir"}  # tensorboard's
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= known


def test_the_readme_mentions_every_module_of_the_package():
    layout = README[README.index("## Layout") :]
    for path in (ROOT / "ppl_vae").iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            assert f"`{path.name}`" in layout, path.name


@pytest.mark.thorough
def test_the_benchmark_runs_and_writes_only_what_it_is_asked_to(tmp_path):
    stored = ROOT / "scripts" / "results" / "benchmark.json"
    before = stored.read_bytes()
    words = ["--models", "mlp128", "--rounds", "1", "--images", "2", "--num-particles", "100"]
    words += ["--parts", "training", "evaluation", "--output", str(tmp_path / "result.json")]
    usual = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"  # filled, compilers take a third of it
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmark.py", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"TORCHINDUCTOR_CACHE_DIR": str(usual)} | os.environ,
        timeout=300,
    )
    assert stored.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    trained, evaluated = result["training"]["mlp128"], result["evaluation"]["mlp128"]
    assert {"PyTorch, whole step compiled", "ppl_vae, captured", "Pyro's example loop"} <= trained.keys()
    assert evaluated.keys() == {"decoder's matrix products alone", "ppl_vae, eager", "ppl_vae, captured"}
    reference, captured = trained["PyTorch, eager, default Adam"]["ms"], trained["ppl_vae, captured"]["ms"]
    assert (len(reference), len(captured)) == (1, 1)
    assert trained["ppl_vae, captured"]["ratio"] == captured[0] / reference[0]
    assert f"| ppl_vae, captured | {captured[0]:.3g} ({captured[0] / reference[0]:.2f}) |" in done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--models", "mlp"], "--models: expected one of mlp128"),
        (["--rounds", "0"], "--rounds: expected a whole number, at least 1"),
        (["--output", "nowhere/result.json"], "--output: expected a file in a folder that exists"),
        (["--device", "abacus"], "--device: expected a device of this machine"),
    ],
)
def test_the_benchmark_says_in_one_line_what_is_wrong(words, expected, tmp_path):
    script = ROOT / "scripts" / "benchmark.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert expected in line


def test_the_readmes_speed_is_the_stored_measurement():
    """Every row of a table in "How fast" that begins with a contestant: "ms (ratio)" for each model of its header."""
    result = json.loads((ROOT / "scripts" / "results" / "benchmark.json").read_text())
    if "training" not in result:
        pytest.skip("scripts/results/benchmark.json is of an earlier form of scripts/benchmark.py")
    section = README[README.index("## How fast") :].split("\n## ")[0]
    ratios = {"training": "ratio", "evaluation": "ratio_to_floor"}
    found = set()
    for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for name, *cells in rows:
            for model, cell in zip(header[1:], cells, strict=True):
                for part, ratio in ratios.items():
                    record = result[part].get(model, {}).get(name)
                    if record is not None and _title(part) == header[0]:
                        assert cell == f"{record['median_ms']:.3g} ({record[ratio]:.2f})", (part, name, model)
                        found.add((part, name, model))
    stored = {(part, name, model) for part in ratios for model, records in result[part].items() for name in records}
    assert found == stored


def _title(part: str) -> str:
    """The first cell of that part's table, as scripts/benchmark.py prints it."""
    return {"training": "training", "evaluation": "log p(x)"}[part]


def test_the_readmes_log_likelihood_is_the_stored_measurement():
    entry = json.loads((ROOT / "scripts" / "results" / "default_run.json").read_text())["test"]
    for line in describe_evaluation(from_json(Evaluation, entry)):
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
    assert [row["network"] for row in result["rows"]] == list(parse(TABLE["compare-networks"], []).networks)
    for row in result["rows"]:
        ll = row["log_likelihood"]
        assert (
            f"| `{row['network']}` | {row['weights']:,} | {row['seconds_an_epoch']:.1f} | {row['epochs']} | "
            f"{ll['mean']:.2f} ± {ll['stderr']:.2f} | {row['elbo']['mean']:.2f} |"
        ) in README


def _likelihood_row(row):
    """A line of the README's table of likelihoods, from a row of scripts/results/likelihoods.json."""
    bits, behind, nats = row["bits_per_dim"], row["difference_bits_per_dim"], row["log_likelihood"]
    brighter = row["calibration"]["above_90_percent_quantile"]["mean"]
    lead = "" if behind is None else f"{behind['mean']:+.3f} ± {behind['stderr']:.3f}"
    return (
        f"| `{row['likelihood']}` | {row['kind']} | {bits['mean']:.3f} ± {bits['stderr']:.3f} | {lead} | "
        f"{nats['mean']:,.1f} ± {nats['stderr']:.1f} | {row['reconstruction']['mean']:,.1f} | "
        f"{row['kl']['mean']:.1f} | {row['floor_bits_per_dim']:.3f} | {brighter:.0%} | {row['seconds']:,.0f} |"
    )


def test_the_readmes_table_of_likelihoods_is_the_stored_measurement():
    result = json.loads((ROOT / "scripts" / "results" / "likelihoods.json").read_text())
    lines = [_likelihood_row(row) for row in result["rows"]]
    assert len(lines) >= 10
    assert "\n".join(lines) in README


def test_the_readmes_cost_of_a_likelihood_is_the_stored_measurement():
    result = json.loads((ROOT / "scripts" / "results" / "likelihood_steps.json").read_text())["likelihoods"]
    captured, eager = (result[f"ppl_vae, {how}"] for how in ("captured", "eager"))
    for word in LIKELIHOODS:
        assert (
            f"| `{word}` | {captured[word]['features_per_pixel']} | {captured[word]['median_ms']:.3g} "
            f"({captured[word]['ratio']:.2f}) | {eager[word]['median_ms']:.3g} ({eager[word]['ratio']:.2f}) |"
        ) in README


def find_means(value) -> set[str]:
    """Every mean ± stderr in a JSON value, as the tables print it, also as a percentage and without its sign."""
    if isinstance(value, list):
        return set().union(*map(find_means, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(find_means, value.values()))
    if value.get("mean") is not None and value.get("stderr"):
        estimate = Estimate(value["mean"], value["stderr"])
        found |= {format_mean(estimate), format_mean(estimate, scale=-1), format_mean(estimate, signed=True)}
        found.add(f"{format_mean(estimate, scale=100)}%")
    return found


def test_the_readmes_study_numbers_are_those_of_the_stored_study():
    study = json.loads((ROOT / "scripts" / "results" / "study.json").read_text())
    section = README.split("## What a VAE does, and why: the study")[1].split("\n## ")[0]
    numbers = re.findall(r"[+-]?[\d.,]*\d ± [\d.]*\d%?", " ".join(section.split()))
    assert len(numbers) > 20
    assert set(numbers) <= find_means(study)
    assert f"# {len(study['runs'])} trainings" in README
    for part in ("training", "evaluation", "measuring"):
        assert f"{study['seconds'][part] / 60:.0f}" in README.split("Training took")[1].split("each run")[0]


def test_the_readmes_diagnosis_is_the_stored_one():
    stored = json.loads((ROOT / "scripts" / "results" / "diagnosis.json").read_text())
    diagnosis = from_json(Diagnosis, stored)
    lines = [*describe_numbers(diagnosis.numbers), *describe_verdicts(diagnosis.verdicts)]
    assert len(lines) >= 10
    for line in lines:
        assert line.strip() in README


# Log-likelihoods that are in print and in no table of the README, by their source.
PRINTED = {
    "-88.71": "Burda et al. 2016, arXiv 1509.00519, table 3",
    "-87.10": "Burda et al. 2016, arXiv 1509.00519, table 3",
    "-89.78": "Pythae",
    "-79.24": "addtt/ladder-vae-pytorch",
    "-80.15": "Rolfe 2017, arXiv 1609.02200",
    "-81.01": "Rolfe 2017, arXiv 1609.02200",
    "-228.70": "Norouzi et al. 2020, arXiv 2004.04795",
    "-225.38": "Norouzi et al. 2020, arXiv 2004.04795",
}


def _numbers_and_pairs(found, numbers, pairs):
    """Every number of a stored result, and every mean beside its standard error."""
    if isinstance(found, dict):
        if isinstance(found.get("mean"), float) and isinstance(found.get("stderr"), float):
            pairs.append((found["mean"], found["stderr"]))
        found = list(found.values())
    if isinstance(found, list):
        for part in found:
            _numbers_and_pairs(part, numbers, pairs)
    elif isinstance(found, float):
        numbers.append(found)


def _as_printed(number, digits):
    return f"{abs(number):.{len(digits.partition('.')[2])}f}" == digits.lstrip("+-").replace(",", "")


def unmeasured(text):
    """Log-likelihoods and numbers with an error in paragraphs of text that are in no stored result, and not in print.

    Tables and the program's own output are held to their files by other tests.
    """
    numbers, pairs = [], []
    for path in sorted((ROOT / "scripts" / "results").glob("*.json")):
        _numbers_and_pairs(json.loads(path.read_text()), numbers, pairs)
    lines = re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
    prose = "\n".join(line for line in lines if not line.startswith(("|", "    ")))
    with_errors = re.findall(r"([-+]?\d[\d,]*\.\d+)\s±\s(\d+\.\d+)(?![\d%])", prose)  # shares: see the study
    found = [
        f"{mean} ± {error}"
        for mean, error in with_errors
        if mean not in PRINTED and not any(_as_printed(m, mean) and _as_printed(e, error) for m, e in pairs)
    ]
    alone = re.findall(r"(?<![\w.])-\d{2,}[\d,]*\.\d+(?!\s±|[\d.])", prose)
    return found + [n for n in alone if n not in PRINTED and not any(_as_printed(m, n) for m in numbers)]


def test_every_log_likelihood_of_the_readme_is_stored_or_in_print():
    assert unmeasured(README) == []


def test_a_number_that_nobody_stored_is_found():
    made_up = "Trained longer it has -81.23 ± 0.21, and -79.876 at last; Rolfe has -80.15.\n| -77.77 ± 0.11 |\n"
    assert unmeasured(made_up) == ["-81.23 ± 0.21", "-79.876"]


def test_nothing_in_the_readme_waits_to_be_filled_in():
    assert set(re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", README)) == {
        *("PPL_VAE_DATA_DIR", "PPL_VAE_CACHE_DIR", "XDG_CACHE_HOME"),
        "OMP_NUM_THREADS",
    }


def test_the_readmes_cost_of_scale_is_the_stored_measurement():
    stored = json.loads((ROOT / "scripts/results/scale.json").read_text())
    later = stored["folder"]["later_than_mnist_seconds"]
    for words in (
        f"as by one | {stored['ranks']['times_as_fast']:.2f} |",
        f"to the first training step | {stored['folder']['first_seconds']:.0f} s |",
        f"| {later['bernoulli']:+.1f} s; {later['discretized-logistic']:+.1f} s |",
        f"| {stored['resume']['more_than_a_start_seconds']:+.1f} s |",
    ):
        assert words in README
    assert {f"{of['ratio']:.2f}" for of in stored["streaming"].values()} == {"1.00"}
