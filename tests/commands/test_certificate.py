"""A certificate of a run: what it writes, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import quadrature_log_evidence
from safetensors.torch import load_file
from small_run import SMALL, contents, save_bars, train_small

from ppl_vae import data, load, runs
from ppl_vae.commands import certificate_stages as stages
from ppl_vae.commands import certify as certificate
from ppl_vae.commands.certify import certify_run
from ppl_vae.commands.options import Certify
from ppl_vae.evidence import ais
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.results import to_json

pytestmark = pytest.mark.thorough

ASKED: dict[str, Any] = {
    "split": "test",
    "images": 7,
    "simulated": 5,
    "temperatures": 24,
    "leapfrogs": 2,
    "chains": 8,
    "start": "guide",
    "num_particles": 200,
    "gap_images": 4,
    "simulations": 40,
    "draws": 9,
    "device": "cpu",
    "seed": 0,
    "compile": "off",
}
LITTLE = ASKED | {"temperatures": 3, "chains": 2, "num_particles": 20}
Certified = tuple[Path, dict[str, Any], list[str]]
UNKNOWN = {"pareto_k", "shape", "upper"}  # of few particles, of ranks with few draws, of chains that share a draw


def certify(folder: Path, **words: Any) -> dict[str, Any]:
    say = words.pop("say", lambda line: None)
    return to_json(certify_run(Certify(str(folder), **(ASKED | words)), say=say))


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of an entry that is no word, with the keys to it."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(each, f"{path}/{key}")
    elif not isinstance(value, str):
        yield path, value


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if "seconds" not in key}


@pytest.fixture(scope="module", autouse=True)
def short_refinement() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_REFINEMENT_STEPS", 20)
        patch.setattr(stages, "CHAIN_BLOCK", 3)
        yield


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of so small a certificate."""
    monkeypatch.setattr(certificate, "certificate_figures", lambda *words: {})


@pytest.fixture
def copy(bars_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bars_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def other_bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, which a model of bars finds improbable."""
    path = tmp_path_factory.mktemp("other") / "noise.npy"
    np.save(path, np.random.default_rng(5).integers(0, 2, (100, 8, 8)).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def certified(bars_run: Path, other_bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Certified:
    """A run with its certificate, the entry that came back, and what was said."""
    folder = Path(shutil.copytree(bars_run, tmp_path_factory.mktemp("certified") / "run"))
    said: list[str] = []
    return folder, certify(folder, against=str(other_bars), say=said.append), said


# --- What is written ---


def test_every_number_of_the_entry_is_known(certified):
    stored = runs.read_evaluations(certified[0])["certificate-test"]
    unknown = [path for path, value in numbers(stored) if value is None and not UNKNOWN & set(path.split("/"))]
    assert unknown == []


def test_the_bounds_agree_with_the_integral_over_z(certified):
    folder, entry, _ = certified
    vae = load(folder).double()
    x = data.evaluation_images(data.load(runs.read_json(folder / runs.CONFIG)["options"]["dataset"]), "test", "none")
    index = load_file(folder / "certificate-test.safetensors")["index"]
    exact = float(quadrature_log_evidence(vae, x[index].double().flatten(1), latent_dim=2).mean())
    for name in ("ais", "importance", "improved"):
        found = entry[name]
        assert abs(found["mean"] - exact) < 4 * found["monte_carlo_stderr"] + 2 * found["bias"], name


def test_the_upper_bound_is_above_the_lower_one_within_their_errors(certified):
    found = certified[1]["simulated"]
    error = found["lower"]["monte_carlo_stderr"] + found["gap"]["stderr"]
    assert -4 * error < found["gap"]["mean"] < 4 * error + 0.5


def test_the_total_gap_is_the_bound_minus_the_elbo(certified):
    """Also of one of several layers, whose gap is not split in two."""
    entry = certified[1]
    expected = entry["ais"]["mean"] - entry["importance"]["elbo"]["mean"]
    assert entry["total_gap"]["mean"] == pytest.approx(expected)


def test_the_parts_of_the_gap_sum_to_it(certified):
    for found in certified[1]["gaps"].values():
        total = found["approximation"]["mean"] + found["amortization"]["mean"]
        assert total == pytest.approx(found["log_evidence"]["mean"] - found["elbo"]["mean"])


def test_noise_is_scored_lower_than_the_runs_own_images(certified):
    found = certified[1]["against"]
    assert found["auroc_of_density"]["mean"] > 0.9
    assert found["other"]["mean"] < found["own"]["mean"]


def test_the_evaluations_and_the_weights_stay_as_they_were(bars_run, certified):
    before, after = runs.read_evaluations(bars_run), runs.read_evaluations(certified[0])
    assert after.keys() - before.keys() == {"certificate-test"}
    assert before.items() <= after.items()
    assert (certified[0] / runs.MODEL).read_bytes() == (bars_run / runs.MODEL).read_bytes()


# --- Interrupted, and gone on ---


class Interrupted(Exception):
    """Ctrl-C, which pytest would take for its own."""


def interrupted_after(folder: Path, calls: int, name: str, monkeypatch: pytest.MonkeyPatch, **words: Any) -> None:
    """A certificate that stops at the call after so many of a function of ais.py."""
    whole, seen = getattr(ais, name), []

    def counted(*args: Any, **options: Any) -> Any:
        seen.append(name)
        if len(seen) > calls:
            raise Interrupted
        return whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ais, name, counted)
        with pytest.raises(Interrupted):
            certify(folder, **(LITTLE | words))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("calls", "name"), [(2, "lower"), (1, "upper"), (8, "lower")])
def test_an_interrupted_certificate_ends_with_the_numbers_of_an_undisturbed_one(
    copy, tmp_path, calls, name, monkeypatch
):
    undisturbed = Path(shutil.copytree(copy, tmp_path / "undisturbed"))
    expected = certify(undisturbed, **LITTLE)
    interrupted_after(copy, calls, name, monkeypatch)
    torch.rand(3)  # the generator is elsewhere when it goes on
    said: list[str] = []
    found = certify(copy, **LITTLE, say=said.append)
    assert any(re.match(r"Goes on: .* holds \d+ finished blocks?\.", line) for line in said)
    assert without_times(found) == without_times(expected)
    one, other = (load_file(folder / "certificate-test.safetensors") for folder in (copy, undisturbed))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("no_figures")
def test_finished_blocks_are_not_measured_again(copy, monkeypatch):
    """7 images in blocks of 3 are 3 blocks, of which 2 are done."""
    interrupted_after(copy, 2, "lower", monkeypatch)
    whole, sizes = ais.lower, []

    def counted(vae: Any, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(x))
        return whole(vae, x, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ais, "lower", counted)
        certify(copy, **(LITTLE | {"simulated": 0, "gap_images": 0}))
    assert sizes[0] == 1
    assert len(sizes) == 1 + 3  # and 7 images again with one temperature


# --- Compiled ---

BRIEF = LITTLE | {"images": 3, "simulated": 2, "gap_images": 0, "simulations": 0}


@pytest.mark.usefixtures("no_figures")
def test_a_compiled_certificate_has_the_same_numbers(copy, tmp_path, graphs):
    eager = certify(Path(shutil.copytree(copy, tmp_path / "eager")), **BRIEF)
    assert graphs == []
    compiled = certify(copy, **(BRIEF | {"compile": "on"}))
    assert graphs != []
    for key in ("ais", "importance", "improved"):
        assert compiled[key]["mean"] == pytest.approx(eager[key]["mean"], abs=1e-3), key
    assert compiled["simulated"]["gap"]["mean"] == pytest.approx(eager["simulated"]["gap"]["mean"], abs=1e-3)


# --- What is refused, before the work ---


def refused(folder: Path, words: str, **options: Any) -> None:
    """In one line, without a trace."""
    before = contents(folder)
    with pytest.raises(ValueError, match=words) as caught:
        certify(folder, **(LITTLE | options))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_another_data_set_of_another_shape_is_refused(copy):
    refused(copy, r"--against mnist: expected images of shape \(1, 8, 8\), got \(1, 28, 28\)", against="mnist")


def test_an_autoencoder_is_refused(tmp_path):
    options = replace(SMALL, dataset=str(save_bars(tmp_path / "bars.npz")), posterior="delta", beta=0.0)
    refused(train_small(tmp_path / "run", options), "got an autoencoder")


# --- Other runs ---


@pytest.mark.parametrize("words", [{"prior": "flow"}, {"upper_latents": (2,)}, {"posterior": "full"}], ids=str)
def test_runs_of_other_parts_are_certified(tmp_path, words):
    dataset = str(save_bars(tmp_path / "bars.npz"))
    options = Options(
        **(PLAIN | {"hidden": (8,), "latent_dim": 2, "epochs": 1, "network": "mlp", "images": 10} | words)
    )
    few = {"prior_layers": 2, "prior_hidden": (4,)} if "prior" in words else {}
    folder = train_small(tmp_path / "run", replace(options, dataset=dataset, evaluation_particles=10, **few))
    entry = certify(folder, **(LITTLE | {"images": 3, "simulated": 2, "gap_images": 2}))
    assert math.isfinite(entry["improved"]["mean"])
