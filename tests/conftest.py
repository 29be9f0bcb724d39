"""Fixtures that every room's tests share. One thread per process: pytest-xdist starts one worker per core."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import pyro
import pytest
from browser import chromium  # noqa: F401, a fixture, of which one process can start one
from disturbed_runs import served
from oracles import LinearGaussian

from ppl_vae.runtime import capture

# The files that take longest, in that order. They come first: a worker that began one last would end alone.
LONGEST = (
    *("test_readme", "test_captured_step", "test_scripts", "test_kills", "test_minimal_vae", "test_estimator"),
    *("test_captured_evaluation", "test_importance_objectives", "test_training", "test_single_precision"),
    *("test_golden", "test_comparison", "test_study", "test_named_sets", "test_evidence", "test_study_measures"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure() -> None:
    """Ctrl-C is heard, also where the tests were started in the background, which ignores it, as children then do."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals():
    """As they were before the test: a script that ends leaves them ignored, and all later tests would be deaf."""
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in heard.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Images that tests read are kept with the tests' other files, and not in the folder of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPL_VAE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def oracle():
    """A linear Gaussian model, whose posterior and evidence are known."""
    return LinearGaussian.random()


@pytest.fixture(scope="session")
def bars_run(tmp_path_factory):
    """A small run on labelled images, with their file beside it. A test that changes it changes a copy."""
    from small_run import SMALL, save_bars, train_small  # it imports all commands

    place = tmp_path_factory.mktemp("bars")
    return train_small(place / "run", replace(SMALL, dataset=str(save_bars(place / "bars.npz"))))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts scripts in processes of their own, which it forks."""
    yield from served(tmp_path_factory.mktemp("server"))


@pytest.fixture
def clean_store():
    """Pyro's store of parameters, empty before and after."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is written down, which then runs as it is: no compiler is needed, nor its time."""
    seen = []

    def run_as_it_is(graph, inputs, **_):
        seen.append(graph)
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", run_as_it_is)  # imported only here: it is slow
    monkeypatch.setattr(capture, "capture_obstacle", lambda device: None)
    return seen
