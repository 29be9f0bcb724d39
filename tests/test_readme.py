"""README and the manual tell the truth: their Python runs, their commands, options, links and numbers exist."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from PIL import Image

import ppl_vae
from ppl_vae.commands.cli import build_parser
from ppl_vae.commands.options import COMMANDS
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.parts.registry import LIKELIHOODS
from ppl_vae.reports.text.evaluation import describe_evaluation
from ppl_vae.runs.results import Evaluation, from_json
from ppl_vae.study.questions import format_mean

ROOT = Path(__file__).parent.parent
MANUAL = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *MANUAL]}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
THIN = {path for path in (ROOT / "scripts").glob("*.py") if "import main" in path.read_text(encoding="utf-8")}
WRITTEN = re.findall(r"python (scripts/\w+\.py)((?: [^\s`|#\]]+)*)", ALL)


def python_of(page: str) -> list[str]:
    """The page's blocks of Python, without those that only show a class.

    Nor those of trackers, which ``training/test_trackers.py`` runs where they are installed.
    """
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.S)
    blocks = [block for block in blocks if not re.search(r"^import (wandb|mlflow)", block, re.M)]
    return [block for block in blocks if re.search(r"^(import|from) ", block, re.M)]


# --- Python ---


@pytest.mark.thorough
@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)])
def test_the_python_of_a_page_runs_as_it_stands(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    names: dict = {}
    for block in python_of(page):
        exec(compile(block, page, "exec"), names)
    if "result" in names:
        assert names["result"].log_evidence.shape == (100,)
    if "again" in names:
        assert names["again"].likelihood.event_shape == (1, 28, 28)
    if "svi" in names:
        before = names["vae"].likelihood.net.output.weight.detach().clone()
        names["svi"].step(names["x"])
        assert not torch.equal(names["vae"].likelihood.net.output.weight, before)
    pyro.clear_param_store()


# --- Commands ---


def test_every_script_is_in_the_manual():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == {Path(script).name for script, _ in WRITTEN}


def test_readme_names_the_script_of_every_command():
    assert len(THIN) == len(COMMANDS)
    assert {path.name for path in THIN} <= {Path(script).name for script in re.findall(r"scripts/\w+\.py", README)}


def test_every_option_of_the_manual_exists():
    known = {flag for asked in COMMANDS.values() for flag in build_parser(asked, show_all=True)._option_string_actions}
    for script in set((ROOT / "scripts").glob("*.py")) - THIN:
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=60)
        known |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    known |= {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun's
    known |= {"--logdir", "--torch-backend"}  # tensorboard's and uv's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ALL)) <= known


def test_every_option_file_of_the_manual_is_accepted(tmp_path):
    from ppl_vae.commands.cli import read_config_file

    blocks = re.findall(r"```toml\n(.*?)```", ALL, re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "options.toml").write_text(block)
        assert read_config_file(tmp_path / "options.toml", COMMANDS["train"].options)


# --- Form ---


def test_readme_is_one_page():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in MANUAL])
def test_a_page_begins_with_what_its_reader_can_do(page):
    assert re.match(r"# .+\n\nAfter this page you .+", PAGES[page])


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_somewhere(page):
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in ("".join(pair) for pair in targets):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_the_manual_is_in_its_index():
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", PAGES["docs/index.md"]))
    assert linked | {"index.md"} == {str(path.relative_to(ROOT / "docs")) for path in MANUAL}


def test_the_manual_mentions_every_module_of_the_package():
    layout = PAGES["docs/concepts/program.md"]
    for path in (ROOT / "ppl_vae").iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists():
            assert f"`{path.name}`" in layout, path.name


def test_the_manual_has_a_row_for_every_likelihood():
    for word in LIKELIHOODS:
        assert f"\n| `{word}` |" in PAGES["docs/guides/likelihoods.md"], word


def test_nothing_in_the_manual_waits_to_be_filled_in():
    assert set(re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", ALL)) <= {
        *("PPL_VAE_DATA_DIR", "PPL_VAE_CACHE_DIR", "XDG_CACHE_HOME", "THP_MEM_ALLOC_ENABLE"),
        *("OMP_NUM_THREADS", "WANDB_MODE"),
    }


def test_every_file_that_names_the_version_names_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [project["project"]["version"]] == [ppl_vae.__version__]


def test_a_commit_is_checked_by_the_same_ruff_as_the_tests():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    wanted = re.search(r'"(ruff==[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert wanted is not None
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {wanted[1]}


# --- Numbers ---


def test_no_table_is_stale():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_docs.py", "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_table_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_tables

    page = PAGES["docs/results/networks.md"]
    assert docs_tables.refresh(page) == page
    changed = page.replace("-89.68", "-88.68")
    assert changed != page
    assert docs_tables.refresh(changed) == page
    for name in ("docs_tables", "benchmark"):
        sys.modules.pop(name, None)


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


def test_the_numbers_of_the_study_are_those_of_the_stored_study():
    study = json.loads((ROOT / "scripts" / "results" / "study.json").read_text())
    page = PAGES["docs/results/study.md"]
    numbers = re.findall(r"[+-]?[\d.,]*\d ± [\d.]*\d%?", " ".join(page.split()))
    assert len(numbers) > 20
    assert set(numbers) <= find_means(study)
    assert f"# {len(study['runs']) + len(study['labelled'])} trainings" in page
    for part in ("training", "evaluation", "measuring"):
        assert f"{study['seconds'][part] / 60:.0f}" in page.split("Training took")[1].split("each run")[0]


# Log-likelihoods that are in print and in no generated table, by their source.
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
    """Every number of a stored result, and every mean with its standard error."""
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


@pytest.mark.parametrize("page", PAGES)
def test_every_log_likelihood_of_a_page_is_stored_or_in_print(page):
    assert unmeasured(PAGES[page]) == []


def test_the_first_run_that_pages_show_is_the_stored_one():
    stored = json.loads((ROOT / "scripts" / "results" / "first_run.json").read_text())
    lines = describe_evaluation(from_json(Evaluation, stored["test"]))
    assert "\n".join(lines) in PAGES["docs/getting-started.md"]
    block = next(
        block for block in re.findall(r"```text\n(.*?)```", PAGES["README.md"], re.S) if "log-likelihood" in block
    )
    for line in block.splitlines()[1:]:  # the first is about the training; README shortens one line
        assert any(whole.startswith(line.removesuffix(", ...").removesuffix(" ...")) for whole in lines), line


def test_a_number_that_nobody_stored_is_found():
    made_up = "Trained longer it has -81.23 ± 0.21, and -79.876 at last; Rolfe has -80.15.\n| -77.77 ± 0.11 |\n"
    assert unmeasured(made_up) == ["-81.23 ± 0.21", "-79.876"]


# --- The benchmark ---


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


# --- Pictures ---


def test_every_picture_is_small_and_there_for_light_and_dark_pages():
    pictures = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert max(pictures.values()) < 100_000
    assert {name.replace("-dark", "-light") for name in pictures if "-dark" in name} == {
        name for name in pictures if "-light" in name
    }
    assert {name for name in pictures if name not in ALL} == set()


@pytest.mark.thorough
def test_the_pictures_that_need_no_training_are_drawn_again(tmp_path):
    script = ROOT / "scripts" / "make_pictures.py"
    words = ["--output", str(tmp_path / "pictures"), "--runs", str(tmp_path / "runs")]
    subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=True, timeout=120)
    drawn = {path.name for path in (tmp_path / "pictures").iterdir() if not path.name.startswith("explorer")}
    kept = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn == {name for name in kept if name.startswith(("samples", "reconstructions", "recipes", "study"))}
    for name in drawn:
        new, old = (Image.open(folder / name) for folder in (tmp_path / "pictures", ROOT / "docs" / "pictures"))
        assert new.size == old.size
        new, old = (np.asarray(picture.convert("RGBA"), dtype=int) for picture in (new, old))
        assert np.abs(new - old).mean() < 4  # of 255 levels
