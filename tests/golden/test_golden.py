"""The program reproduces the golden numbers, each to the tolerance of its case."""

from __future__ import annotations

import pytest
from cases import CASES, mnist_evaluation, read_json
from write import NUMBERS, compute, differences, plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all cases, in which they share small runs and data files."""
    return tmp_path_factory.mktemp("golden")


def check(name, found):
    """Compare with the stored case; the message names every value that moved, up to twenty."""
    moved = list(differences(read_json(NUMBERS / f"{name}.json"), found, CASES[name]))
    assert not moved, "\n".join(
        [f"{len(moved)} golden values of {name} moved; where that is meant, run tests/golden/write.py:", *moved[:20]]
    )


THOROUGH = ("training_captured", "certificate", "run_folder_names")  # 5 to 40 seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in THOROUGH else name for name in CASES]
)
def test_the_program_reproduces_the_golden_numbers(name, folder):
    check(name, compute(name, folder))


def test_every_case_has_its_file():
    assert {path.stem for path in NUMBERS.glob("*.json")} == set(CASES)


@pytest.mark.slow  # compiling the graph of mnist-best takes most of a minute
def test_a_compiled_evaluation_reproduces_the_golden_numbers_of_an_eager_one(tmp_path):
    check("mnist_evaluation", plain(mnist_evaluation(tmp_path, compile="on")))
