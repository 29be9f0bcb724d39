"""The rooms of the package: a file imports only from rooms below its own, and nothing unpickles."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppl_vae"

# From the bottom to the top: a room may import from those before it. The core is the files at the top.
ROOMS = (
    *("runtime", "core", "data", "parts", "objectives", "evidence", "training"),
    *("diagnostics", "runs", "reports", "commands", "estimator", "study", "__main__"),
)
CORE = {
    *(
        "conditional",
        "enumeration",
        "hierarchy",
        "labels",
        "latent_model",
        "latent_sites",
        "protocols",
        "pyro_program",
        "support",
    ),
    *("vae", "weights"),
}

SOURCES = {str(path.relative_to(ROOT)): path for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
}
MODULES = {name: path for name, path in SOURCES.items() if path != PACKAGE / "__init__.py"}

# What would run a program that a file holds, or write such a file.
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("torch", "save")}
UNPICKLING_CLASSES = {"CIFAR10", "CIFAR100"}  # torchvision's, in whichever way they are called


def room_of(name: str) -> str:
    return "core" if name in CORE else name


def module_of(path: Path) -> str:
    """The room that a file is in."""
    return room_of(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a file imports, wherever in it: ``from a import b`` may be a.b, so both are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "ppl_vae" if node.level and not node.module else node.module or ""
            source = f"ppl_vae.{source}" if node.level and node.module else source
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST) -> set[str]:
    """The package's own files among them."""
    names = {room_of(name.split(".")[1]) for name in imports(tree) if name.startswith("ppl_vae.")}
    return names & set(ROOMS)


def packages_imported(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def imports_from_above(tree: ast.AST, room: str) -> set[str]:
    """The rooms above a file's own that it imports from."""
    below = ROOMS[: ROOMS.index(room)]
    return parts_imported(tree) - {*below, room}


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def at_import(tree: ast.Module) -> ast.Module:
    """The imports that run when the module is imported: not those in functions, nor those for types alone."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.append(child)
            elif not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types_alone(child)):
                waiting.append(child)
    return ast.Module(body=found, type_ignores=[])


def unpicklings(tree: ast.AST) -> list[str]:
    """Each place where a file could make the program run what it holds."""
    found = [f"import {name}" for name in packages_imported(tree) & UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "extractall":
            found.append(f"line {node.lineno}: extractall")  # unpacks files that nobody named
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADERS:
                found.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"line {node.value.lineno}: allow_pickle")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(f"line {node.lineno}: {node.func.id}")
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    words += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    words += [name.rsplit(".", 1)[-1] for name in imports(tree)]
    found += [f"torchvision's {word}" for word in words if isinstance(word, str) and word in UNPICKLING_CLASSES]
    return found + [name for name in imports(tree) if tuple(name.rsplit(".", 1)) in LOADERS]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# --- The rooms ---


def test_each_module_has_its_room() -> None:
    assert {module_of(path) for path in MODULES.values()} == set(ROOMS)


def test_a_module_imports_only_from_rooms_below_its_own() -> None:
    found = {name: imports_from_above(parse(path), module_of(path)) for name, path in MODULES.items()}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from ppl_vae import runs",
        "from ppl_vae import data, runs",
        "from ppl_vae.runs import options",
        "from ppl_vae.runs.options import Options",
        "import ppl_vae.runs",
        "import ppl_vae.runs as folder",
        "from . import runs",
        "from .runs import options",
        "def f():\n    from ppl_vae.runs import options",
    ],
)
def test_an_import_from_above_is_seen(line: str) -> None:
    assert imports_from_above(ast.parse(line), "parts") == {"runs"}


def test_an_import_from_below_is_allowed() -> None:
    line = "from ppl_vae import data\nfrom ppl_vae.vae import VAE\nfrom ppl_vae.runtime import numerics"
    assert imports_from_above(ast.parse(line), "parts") == set()


# --- What a room may import from outside ---


def test_figures_run_no_model_and_save_nothing() -> None:
    for path in (PACKAGE / "reports/figures").glob("*.py"):
        tree = parse(path)
        assert "pyro" not in packages_imported(tree)
        called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert called & {"savefig", "imsave", "open", "write_bytes", "write_text"} == set()
        assert called & {"prior", "likelihood", "posterior", "model", "guide"} == set()


def test_numerics_take_tensors_only() -> None:
    assert parts_imported(parse(PACKAGE / "runtime/numerics.py")) == set()


def test_scipy_is_imported_only_where_it_is_asked_for() -> None:
    assert [name for name, path in SOURCES.items() if "scipy" in packages_imported(at_import(parse(path)))] == []


@pytest.mark.parametrize("line", ["import scipy", "if x:\n    from scipy.io import loadmat"])
def test_an_import_that_runs_at_once_is_seen(line: str) -> None:
    assert "scipy" in packages_imported(at_import(ast.parse(line)))


@pytest.mark.parametrize("line", ["def f():\n    import scipy", "if TYPE_CHECKING:\n    import scipy", "import torch"])
def test_an_import_that_waits_is_let_pass(line: str) -> None:
    assert "scipy" not in packages_imported(at_import(ast.parse(line)))


def test_a_script_imports_no_package_before_its_command_line_is_read() -> None:
    found = {name: packages_imported(at_import(parse(path))) for name, path in SCRIPTS.items()}
    assert {name for name, packages in found.items() if packages - sys.stdlib_module_names - {"ppl_vae"}} == set()


# --- Safety ---


def test_nothing_unpickles() -> None:
    found = {name: unpicklings(parse(path)) for name, path in (SOURCES | SCRIPTS).items()}
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "eval(text)",
        "datasets.CIFAR10(root)",
        "getattr(datasets, 'CIFAR10')(root)",
        "from torchvision.datasets import CIFAR100",
        "tar.extractall(folder)",
    ],
)
def test_an_unpickling_is_seen(line: str) -> None:
    assert unpicklings(ast.parse(line)) != []


@pytest.mark.parametrize("line", ["np.load(path, allow_pickle=False)", "vae.eval()", "json.loads(text)"])
def test_safe_reading_is_allowed(line: str) -> None:
    assert unpicklings(ast.parse(line)) == []


def test_the_packages_list_of_names_is_that_of_its_tables():
    import ppl_vae

    assert set(ppl_vae.__all__) == {*ppl_vae._HOME, *ppl_vae._MODULES}
