"""What every public name says of itself: a docstring, the shapes of tensors, what it raises, where it is from."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ppl_vae

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppl_vae"
SOURCES = {str(path.relative_to(ROOT)): path for path in sorted(PACKAGE.rglob("*.py"))}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# What a base class of torch or Pyro, ``VAE`` or ``Pixels`` documents, and every part defines in the same sense.
OF_A_BASE = {
    *("forward", "log_prob", "sample", "rsample", "expand", "has_rsample", "mean", "variance", "mode", "icdf", "cdf"),
    *("support", "arg_constraints", "event_shape", "batch_shape", "check", "error", "entropy", "enumerate_support"),
    *("model", "guide", "has_enumerate_support", "domain", "codomain", "log_abs_det_jacobian", "inv", "sign", "pixel"),
}

# (N, *E), (S, B), (..., L), (n,), (2, 3), (len(sizes), B); or that any shape will do, or one number.
SHAPE = re.compile(r"\((?:\d+,|\*|\.\.\.|[A-Za-z]+(?: \+ \d)?,|len\()|\bshapes?\b|\bpixel by pixel\b|one number")


class Public(NamedTuple):
    """A public definition, the class that it is in, and what says more of it: the docstrings around it."""

    name: str
    node: Documented
    owner: ast.ClassDef | None
    around: str


def public(path: Path) -> Iterator[Public]:
    """The module, and every class, function, method and property in it that does not start with _."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = ast.get_docstring(tree) or ""
    yield Public("the module", tree, None, "")
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield Public(node.name, node, None, words)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = words + (ast.get_docstring(node) or "")
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield Public(f"{node.name}.{inner.name}", inner, node, about)


def inherits(found: Public) -> bool:
    """A method in the sense of the base class's, which documents it."""
    return found.owner is not None and bool(found.owner.bases) and found.name.split(".")[-1] in OF_A_BASE


def tensors_of(node: Function) -> bool:
    """Whether an argument or the result is a Tensor by its annotation, by itself."""
    named = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)]
    return any(note is not None and ast.unparse(note) in ("Tensor", "torch.Tensor") for note in (*named, node.returns))


def raised(node: Function) -> set[str]:
    """The exceptions that the body itself raises, but for those that it catches again or a function in it raises."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        child = waiting.pop()
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call) and isinstance(child.exc.func, ast.Name):
            found.add(child.exc.func.id)
        waiting += ast.iter_child_nodes(child)
    return found


def lacking_docstring(path: Path) -> list[str]:
    return [each.name for each in public(path) if not ast.get_docstring(each.node) and not inherits(each)]


def lacking_shapes(path: Path) -> list[str]:
    """Functions of tensors whose docstring, or that of their class, names no shape."""
    return [
        each.name
        for each in public(path)
        if isinstance(each.node, Function) and not inherits(each) and tensors_of(each.node)
        if not SHAPE.search((ast.get_docstring(each.node) or "") + (each.around if each.owner else ""))
    ]


REFUSES = re.compile(r"\braises?\b|refus", re.IGNORECASE)


def lacking_raises(path: Path) -> list[str]:
    """Functions that raise a ValueError of their own and do not say so, nor their class."""
    return [
        each.name
        for each in public(path)
        if isinstance(each.node, Function) and not inherits(each) and "ValueError" in raised(each.node)
        if not REFUSES.search((ast.get_docstring(each.node) or "") + (each.around if each.owner else ""))
    ]


@pytest.mark.parametrize("name", SOURCES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert lacking_docstring(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_every_function_of_tensors_names_a_shape(name: str) -> None:
    assert lacking_shapes(SOURCES[name]) == []


@pytest.mark.parametrize("name", SOURCES)
def test_every_function_that_raises_a_value_error_says_so(name: str) -> None:
    assert lacking_raises(SOURCES[name]) == []


@pytest.mark.parametrize(
    ("lacking", "source"),
    [
        (lacking_docstring, '"""A module."""\ndef f(): ...'),
        (lacking_docstring, "x = 1"),
        (lacking_docstring, '"""A module."""\nclass A:\n    """A."""\n    def f(self): ...'),
        (lacking_docstring, '"""A module."""\nclass A:\n    """A."""\n    @property\n    def f(self): ...'),
        (lacking_shapes, 'def f(x: Tensor):\n    """Squares."""'),
        (lacking_shapes, 'def f(x) -> Tensor:\n    """Squares."""'),
        (lacking_raises, 'def f():\n    """Squares."""\n    if x:\n        raise ValueError("no")'),
    ],
)
def test_what_is_lacking_is_seen(tmp_path: Path, lacking: object, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    assert callable(lacking)
    assert len(lacking(path)) == 1


@pytest.mark.parametrize("name", ["importance", "log_evidence", "log_weights", "dequantized", "fit"])
def test_a_formula_of_the_package_says_where_it_is_from(name: str) -> None:
    function = getattr(ppl_vae, name)
    home = sys.modules[function.__module__]
    assert re.search(r"Reference|Source|arXiv|ours", function.__doc__ + (home.__doc__ or ""))


# --- The pages ---


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo", "latex2mathml")),
    reason="needs the extra docs",
)
def test_the_manual_is_built_without_a_warning_and_has_a_page_for_every_module(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_docs.py"
    subprocess.run(
        [sys.executable, str(script), "--html", "--output", str(tmp_path / "html")],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    made = {path.stem for path in (tmp_path / "html" / "api").glob("*.html")}
    assert {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.glob("[a-z]*.py")} <= made
    assert 'id="ppl_vae.vae.VAE.guide"' in (tmp_path / "html" / "api" / "ppl_vae.vae.html").read_text(encoding="utf-8")
    assert (tmp_path / "html" / "guides" / "your-data.html").exists()
    tutorial = (tmp_path / "html" / "tutorials" / "elbo-to-likelihood.html").read_text(encoding="utf-8")
    assert "<math" in tutorial
    assert not re.search(r"<(script|link)[^>]* (src|href)=.https?:", tutorial)  # nothing from a network
