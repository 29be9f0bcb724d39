"""The notebooks of docs/tutorials: whole, with outputs, and with the numbers that their text states."""

from __future__ import annotations

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "tutorials"

# By notebook: an expression in its kernel -> its value as the stored outputs have it, and how far another machine's may
# be from it. The text states the same tolerances.
STATED: dict[str, dict[str, tuple[float, float]]] = {
    "elbo-to-likelihood": {
        "elbo.mean": (-170.42, 2.0),
        "exact.mean()": (-168.91, 2.0),
        "lacking['ELBO']": (1.51, 1.0),
        "lacking['L_1000']": (0.11, 1.0),
    },
    "collapse": {
        "numbers['mean over pixels'].kl.mean": (0.0, 0.05),
        "numbers['mean over pixels'].active.count": (0, 0),
        "numbers['sum over pixels'].kl.mean": (21.59, 3.0),
        "numbers['sum over pixels'].active.count": (20, 3),
        "-numbers['sum over pixels'].reconstruction.mean": (97.92, 3.0),
        "-table[784].reconstruction.mean": (200.6, 3.0),
        "table[4].kl.mean": (6.88, 3.0),
    },
    "your-images": {
        "bits['discretized-logistic'].mean()": (4.136, 0.1),
        "bits['beta'].mean()": (4.073, 0.1),
        "bits['normal'].mean()": (4.408, 0.1),
        "differences['normal'].mean": (0.272, 0.1),
        "nats['normal'].mean": (637.0, 20.0),
        "floor": (3.860, 0.001),
    },
    "your-program": {
        "log_evidence(plain.model, plain.guide, x_test, num_particles=1000).mean().item()": (-13.44, 0.3),
        "joint.logsumexp(1).mean().item()": (-12.12, 0.3),
        "bound.mean().item()": (-11.04, 0.3),
        "annealed.mean().item()": (-12.23, 0.3),
        "gaps.amortization.mean().item()": (0.03, 0.05),
        "found.kl.mean": (4.86, 0.3),
    },
}


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def outputs(name: str) -> list[dict[str, Any]]:
    return [output for cell in cells(name, "code") for output in cell["outputs"]]


def printed(name: str) -> str:
    return "".join("".join(output.get("text", "")) for output in outputs(name))


def test_every_notebook_has_stated_numbers_and_is_in_the_index():
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert names == set(STATED) == set(re.findall(r"\]\(tutorials/([\w-]+)\.ipynb\)", index))


@pytest.mark.parametrize("name", STATED)
def test_a_notebook_is_short_and_begins_with_what_its_reader_can_do(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert 10 <= len(kinds) <= 18
    assert all(kinds[k - 1] == "markdown" for k, kind in enumerate(kinds) if kind == "code")
    assert re.match(r"# .+\n\nAfter this page you can .+ CPU\s+cores\.", text_of(notebook["cells"][0]), re.S)


@pytest.mark.parametrize("name", STATED)
def test_a_notebook_holds_its_outputs_without_errors_warnings_or_places(name):
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in outputs(name):
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name") != "stderr"
    assert all(cell["outputs"] for cell in code if "print(" in text_of(cell) or "plt.show()" in text_of(cell))
    content = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.)])/(home|root|tmp|work|usr|Users|opt|var)\b|Warning:|\\u001b", content)
    pictures = [base64.b64decode(found["data"]["image/png"]) for found in outputs(name) if "data" in found]
    assert pictures
    assert sum(map(len, pictures)) < 150_000


@pytest.mark.parametrize("name", STATED)
def test_a_notebook_has_the_format_of_notebooks(name):
    nbformat.validate(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", STATED)
def test_what_a_notebook_imports_exists_and_is_public(name):
    nodes = [node for cell in cells(name, "code") for node in ast.walk(ast.parse(text_of(cell)))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ppl_vae")]
    assert imports
    for node in imports:
        for word in (*str(node.module).split("."), *(alias.name for alias in node.names)):
            assert not word.startswith("_")
        exec(ast.unparse(node), {})  # also loads submodules, which no attribute shows before


@pytest.mark.parametrize("name", STATED)
def test_the_numbers_of_a_notebooks_text_are_printed_in_it(name):
    text = "\n".join(map(text_of, cells(name, "markdown")[1:]))
    text = re.sub(r"\$\$.*?\$\$|`[^`]*`", "", text, flags=re.S)
    numbers = re.findall(r"(?<![\w.])[-+]?\d[\d,]*\.\d+", text)
    assert len(numbers) >= 2
    assert [number for number in numbers if number not in printed(name)] == []


@pytest.mark.parametrize("name", STATED)
def test_the_links_of_a_notebook_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(map(text_of, cells(name, "markdown")))):
        path, _, anchor = target.partition("#")
        page = (FOLDER / path).resolve()
        assert page.exists(), target
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, target


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_a_notebook_runs_from_a_clean_kernel_and_has_its_stated_numbers(name, tmp_path, monkeypatch):
    """A cell that fails raises here."""
    nbclient = pytest.importorskip("nbclient", reason="the extra tutorials is not installed")
    pytest.importorskip("ipykernel", reason="the extra tutorials is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the extra tutorials is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    asked = f"import json; print(json.dumps([float(v) for v in ({', '.join(STATED[name])},)]))"
    notebook.cells.append(nbformat.v4.new_code_cell(asked))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *before, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = json.loads(last.outputs[0].text)
    for (expression, (value, tolerance)), number in zip(STATED[name].items(), found, strict=True):
        assert number == pytest.approx(value, abs=tolerance), expression
    assert [output for cell in before for output in cell.outputs if output.get("name") == "stderr"] == []
    assert list(tmp_path.iterdir()) == []
