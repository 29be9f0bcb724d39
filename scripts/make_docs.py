"""Render the docstrings of every public module as HTML, by pdoc: pip install -e ".[docs]" brings it."""

import pkgutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.fields import CheckedOptions, option
from ppl_vae.runtime.process import run_script


@dataclass(frozen=True)
class Docs(CheckedOptions):
    """Render the docstrings of every public module as HTML pages."""

    output: str = option("docs-html", "folder of the pages")


def main() -> None:
    asked = parse(Command("", Docs))
    try:
        import pdoc
    except ImportError:
        raise ValueError(
            "expected the package pdoc, which is not installed; pip install -e '.[docs]' brings it"
        ) from None
    import ppl_vae

    for name in ppl_vae.__all__:  # which pdoc looks for where each is put at its first use
        setattr(ppl_vae, name, getattr(ppl_vae, name))
    folder = Path(asked.output)
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what pdoc says of a module that it cannot import
        # Annotations of a class that a package passes on are looked for there, and stay as they are written.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc(*specs(pdoc.extract.walk_specs, "ppl_vae"), output_directory=folder)
    print(f"{len(list(folder.rglob('*.html'))):,} pages in {folder}; begin with {folder / 'index.html'}")


def specs(walk: Any, package: str) -> list[str]:
    """The package, and each public module that pdoc does not find from there: those that no __all__ names."""
    found, reached = [package], set(walk([package]))
    for module in pkgutil.walk_packages([str(Path(__file__).parents[1] / package)], f"{package}."):
        if module.name not in reached and not any(part.startswith("_") for part in module.name.split(".")):
            found.append(module.name)
            reached |= set(walk([module.name]))
    return found


if __name__ == "__main__":
    run_script(main)
