"""Refresh the tables of README.md and docs/ from stored results, and build the manual as HTML pages."""

import importlib.util
import pkgutil
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.options import BOOLEAN, CheckedOptions, option
from ppl_vae.runtime.process import run_script

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "docs" / "_build"
EXTRAS = ("sphinx", "myst_nb", "furo", "latex2mathml")


@dataclass(frozen=True)
class Docs(CheckedOptions):
    """Refresh the tables of README.md and docs/ from scripts/results, and build the manual if Sphinx is there."""

    check: bool = option(False, "change nothing: fail if a table is not the one that would be made", BOOLEAN)
    html: bool = option(False, "fail, instead of leaving the pages out, if the extra docs is not installed", BOOLEAN)
    output: str = option("docs/_build/html", "folder of the HTML pages, from the project's folder")


def main() -> None:
    asked = parse(Command("", Docs))
    from docs_tables import pages, refresh

    stale = [path for path in pages() if refresh(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    if asked.check:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            raise ValueError(f"stale tables in {names}: python scripts/make_docs.py makes them anew")
        print("Every table is the one that would be made.")
        return
    for path in stale:
        path.write_text(refresh(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"Refreshed the tables of {path.relative_to(ROOT)}")
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if not missing:
        build(ROOT / asked.output)
    elif asked.html:
        raise ValueError(f"expected {', '.join(EXTRAS)}, got no {missing[0]}; pip install -e '.[docs]' brings them")
    else:
        print("No HTML pages: pip install -e '.[docs]' brings Sphinx, and what the manual needs")


def build(output: Path) -> None:
    """Builds the manual from a copy of docs/, with a page for every public module. A warning is an error."""
    from sphinx.cmd.build import build_main

    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for path in (*source.rglob("*.md"), *source.rglob("*.ipynb")):
        path.write_text(prepare(path.read_text(encoding="utf-8")), encoding="utf-8")
    (source / "minimal_vae.md").write_text(minimal_page((source / "minimal_vae.py").read_text(encoding="utf-8")))
    (source / "contributing.md").write_text((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_api(source / "api")
    write_table_of_contents(source / "index.md")
    sys.path.insert(0, str(ROOT))
    if build_main(["-q", "-W", "--keep-going", "-b", "html", "-d", str(BUILD / "doctrees"), str(source), str(output)]):
        raise ValueError("the HTML pages could not be built; the lines above say why")
    shutil.copytree(source / "pictures", output / "pictures", dirs_exist_ok=True)  # which pages name in plain HTML
    print(f"{len(list(output.rglob('*.html'))):,} pages in {output}; begin with {output / 'index.html'}")


def prepare(text: str) -> str:
    """Links to files that are no pages of the manual, as links to the pages made of them, and unbroken errors."""
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    text = re.sub(r"\]\((\.\./)*minimal_vae\.py\)", r"](/minimal_vae.md)", text)
    return re.sub(r"\]\((\.\./)+CONTRIBUTING\.md\)", r"](/contributing.md)", text)


def minimal_page(program: str) -> str:
    return f"# minimal_vae.py\n\nThe whole idea in one file.\n\n```python\n{program}```\n"


def write_api(folder: Path) -> None:
    """A page for each public module, which Sphinx fills with its docstrings."""
    import ppl_vae

    folder.mkdir()
    names = ["ppl_vae"]
    for module in pkgutil.walk_packages(ppl_vae.__path__, "ppl_vae."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            names.append(module.name)
    for name in names:
        title = f"{name}\n{'=' * len(name)}\n\n"
        if name == "ppl_vae":  # which imports its names at their first use
            links = "\n".join(f"- ``{word}``" for word in ppl_vae.__all__)
            body = f".. automodule:: ppl_vae\n   :no-members:\n\n{links}\n"
        else:
            body = f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n   :show-inheritance:\n"
        (folder / f"{name}.rst").write_text(title + body, encoding="utf-8")
    listed = "\n".join(f"   {name}" for name in names)
    text = f"API\n===\n\nEvery public module, with the docstrings of what it defines.\n\n.. toctree::\n\n{listed}\n"
    (folder / "index.rst").write_text(text, encoding="utf-8")


def write_table_of_contents(index: Path) -> None:
    """Adds Sphinx's hidden tables of contents: one for each bold heading of the index, with the pages below it."""
    text = index.read_text(encoding="utf-8")
    parts = re.split(r"^\*\*(.+)\*\*$", text, flags=re.M)
    trees = []
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        found = [link.lstrip("/") for link in re.findall(r"\]\(([^)]+\.(?:md|ipynb))\)", body)]
        found += ["api/index.rst", "contributing.md"] if heading == "Reference" else []
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *found, "```"]))
    index.write_text(text + "\n" + "\n\n".join(trees) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
