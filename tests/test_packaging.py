"""The archives that an installer gets: the wheel works without the clone, and the sdist's tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

import ppl_vae

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
NAME = f"ppl_vae-{ppl_vae.__version__}"
PARTS = ("ppl_vae", "scripts", "tests", "docs", ".ci", ".github")  # what else a clone holds may be large


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, in an environment without this clone."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=ours | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """Builds an archive of a source folder without installing anything."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    folder.mkdir()
    run(sys.executable, "-c", code, str(folder), cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made of a copy: building writes into the source folder."""
    place = tmp_path_factory.mktemp("sdist")
    for part in PARTS:
        shutil.copytree(ROOT / part, place / "copy" / part, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, place / "copy")
    with tarfile.open(build("sdist", place / "copy", place / "built")) as archive:
        archive.extractall(place, filter="data")
    return place / NAME


@pytest.fixture(scope="module")
def bin_folder(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment with the wheel, which finds the packages of this one and downloads none."""
    place = tmp_path_factory.mktemp("installed")
    wheel = build("wheel", sdist, place / "built")
    venv.create(place / "venv", with_pip=True, symlinks=True)
    (theirs,) = (place / "venv").glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (theirs / "zz_outer.pth").write_text("".join(f"{path}\n" for path in packages))
    run(place / "venv" / "bin" / "pip", "install", "--no-index", "--no-deps", wheel, cwd=place)
    return place / "venv" / "bin"


# --- The wheel ---


def test_the_wheel_is_what_is_imported_and_it_says_its_version(bin_folder: Path, tmp_path: Path) -> None:
    assert run(bin_folder / "ppl-vae", "--version", cwd=tmp_path) == f"ppl-vae {ppl_vae.__version__}\n"
    assert run(bin_folder / "python", "-m", "ppl_vae", "--version", cwd=tmp_path) == f"ppl-vae {ppl_vae.__version__}\n"
    place = run(bin_folder / "python", "-c", "import ppl_vae; print(ppl_vae.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(bin_folder.parent)


def test_the_wheel_draws_from_the_pretrained_model(bin_folder: Path, tmp_path: Path) -> None:
    run(bin_folder / "ppl-vae", "sample", "mnist-best", "--num-samples", "4", cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/mnist-best/samples/images/*.png"))) == 4


def test_the_wheel_trains_and_makes_a_page_and_writes_nowhere_else(bin_folder: Path, tmp_path: Path) -> None:
    small = ["--network", "mlp", "--hidden", "8", "--latent-dim", "2", "--batch-size", "1000"]
    small += ["--evaluation-particles", "5", "--images", "50"]
    run(bin_folder / "ppl-vae", "train", "--quick", "--epochs", "1", *small, "--run-dir", "runs/a", cwd=tmp_path)
    run(bin_folder / "ppl-vae", "report", "runs/a", cwd=tmp_path)
    assert (tmp_path / "runs/a/report.html").stat().st_size > 10_000  # its style and script are in the wheel
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# --- The sdist ---


def test_every_file_of_the_repository_is_in_the_sdist(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert tracked - found == set()


def test_the_tests_of_the_sdist_are_all_found_and_those_of_the_core_pass(sdist: Path, bin_folder: Path) -> None:
    # Not by this Python, in which a module that the sdist lacks may be found in the clone.
    pytest_here = (bin_folder / "python", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")
    run(*pytest_here, "-m", "", "--collect-only", cwd=sdist, PYTHONPATH=str(sdist))
    assert " passed" in run(*pytest_here, "tests/core", cwd=sdist, PYTHONPATH=str(sdist))
