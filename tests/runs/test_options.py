"""Options of a run: defaults, checks, and the round trip through config.json."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from ppl_vae import data
from ppl_vae.runs.load import read_options
from ppl_vae.runs.options import PLAIN, Options, format_flag
from ppl_vae.runs.resolve import resolve
from ppl_vae.runs.results import to_json
from ppl_vae.training.settings import default_warmup


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0), (2, 1), (3, 1), (4, 1), (10, 3), (49, 14), (50, 15), (100, 15), (2000, 15)]
)
def test_default_warmup_is_three_tenths_of_the_epochs(epochs: int, warmup: int) -> None:
    assert default_warmup(epochs) == warmup


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("asked", "prior", "objective"),
    [
        ({}, "flow", "stl"),
        ({"latent_dim": 2}, "flow", "stl"),
        ({"latent_dim": 1}, "standard-normal", "stl"),
        ({"latent_dim": 1, "upper_latents": (2,)}, "flow", "stl"),
        ({"upper_latents": (5, 1)}, "standard-normal", "stl"),
        ({"posterior": "full"}, "flow", "stl"),
        ({"posterior": "delta", "beta": 0.0}, "standard-normal", "elbo"),
        ({"kl": "analytic"}, "standard-normal", "elbo"),
        ({"objective": "free-bits"}, "standard-normal", "free-bits"),
        ({"objective": "iwae", "num_particles": 5}, "flow", "iwae"),
        ({"prior": "vamp"}, "vamp", "stl"),
        (PLAIN, "standard-normal", "elbo"),
    ],
    ids=str,
)
def test_default_prior_and_objective_suit_the_other_options(asked: dict[str, Any], prior: str, objective: str) -> None:
    resolved = resolve(Options(**asked), data.load("mnist"))
    assert (resolved.prior, resolved.objective) == (prior, objective)
    assert resolve(resolved, data.load("mnist")) == resolved


# Of each type of value, others than the defaults: none, words, whole numbers, floats, one and several numbers.
OTHER = Options(
    dataset="own.npz",
    image_size=(28, 20),
    channels=(3, 4, 5),
    prior_hidden=(9, 8),
    upper_latents=(5, 2),
    decay_start=0.25,
    binarization="threshold",
    learning_rate=1e-5,
    warmup_epochs=0,
    seed=2**31 - 1,
)


@pytest.mark.parametrize("asked", [Options(), OTHER], ids=["defaults", "others"])
def test_options_survive_json(asked: Options) -> None:
    assert read_options({"options": json.loads(json.dumps(to_json(asked)))}) == asked


def test_an_option_that_is_newer_than_a_run_has_its_default() -> None:
    for name in to_json(Options()):
        older = {other: value for other, value in to_json(OTHER).items() if other != name}
        assert read_options({"options": older}) == replace(OTHER, **{name: getattr(Options(), name)})


def test_an_unknown_option_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"unknown ones: sparkle$"):
        read_options({"options": to_json(Options()) | {"sparkle": 1}})


BAD_JSON = [
    *[("hidden", value) for value in (5, [], "300", [[300]], [300.0])],
    *[("epochs", value) for value in (2.0, "2", True, None, [2], 0)],
    *[("learning_rate", value) for value in ("1", math.nan, math.inf)],
    *[("likelihood", value) for value in ("gaussian", 3, [])],
    *[("channels", None), ("dataset", ""), ("device", 0), ("free_bits", -0.1)],
]


@pytest.mark.parametrize(("name", "value"), BAD_JSON, ids=str)
def test_a_field_of_json_of_the_wrong_type_or_range_is_refused(name: str, value: Any) -> None:
    values = to_json(Options()) | {name: value}
    with pytest.raises(ValueError, match=f"{format_flag(name)}: expected .*, got "):
        read_options({"options": values})
