"""Options of a run: defaults, checks, and the round trip through config.json."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from ppl_vae import data
from ppl_vae.runs.fields import format_flag
from ppl_vae.runs.options import PLAIN, Options, from_json, to_json
from ppl_vae.runs.resolve import resolve
from ppl_vae.training.schedules import default_warmup


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


OTHER = Options(
    dataset="own.npz",
    data_dir="elsewhere",
    protocol="iwae",
    image_size=(28, 20),
    fit="stretch",
    color="rgb",
    channels=(3, 4, 5),
    stream="on",
    tensorboard="on",
    prior="mixture",
    prior_components=7,
    prior_flow="spline",
    prior_layers=3,
    prior_hidden=(9, 8),
    posterior="full",
    posterior_flow="spline",
    posterior_layers=4,
    posterior_hidden=(6,),
    upper_latents=(5, 2),
    upper_hidden=(4,),
    inference="bottom-up",
    decoder_input="all",
    initialization="shrinking",
    schedule="stages",
    decay_start=0.25,
    binarization="threshold",
    dequantization="uniform",
    dequantization_draws=3,
    likelihood_scale=0.25,
    likelihood_components=2,
    transform="logit",
    network="mlp",
    hidden=(7, 5, 3),
    scale_map="softplus",
    objective="free-bits",
    free_bits=0.5,
    kl="analytic",
    beta=0.1,
    warmup_epochs=0,
    latent_dim=2,
    epochs=3,
    batch_size=11,
    learning_rate=1e-5,
    clip_norm=0.5,
    num_particles=4,
    seed=2**31 - 1,
    device="cuda:1",
    checkpoint_seconds=0.25,
    images=8,
    evaluation_particles=9,
)


@pytest.mark.parametrize("asked", [Options(), OTHER], ids=["defaults", "others"])
def test_options_survive_json(asked: Options) -> None:
    assert from_json(json.loads(json.dumps(to_json(asked)))) == asked


@pytest.mark.parametrize("name", [spec.name for spec in fields(Options)])
def test_a_missing_field_of_json_is_named_and_refused(name: str) -> None:
    values = to_json(Options())
    del values[name]
    with pytest.raises(ValueError, match=f"missing or unknown: {name}$"):
        from_json(values)


BAD_JSON = [
    ("hidden", 5),
    ("hidden", []),
    ("hidden", "300"),
    ("hidden", [[300]]),
    ("hidden", [300.0]),
    ("channels", []),
    ("channels", None),
    ("image_size", [28.5]),
    ("epochs", 2.0),
    ("epochs", "2"),
    ("epochs", True),
    ("epochs", None),
    ("epochs", [2]),
    ("epochs", 0),
    ("scale_map", "log"),
    ("free_bits", -0.1),
    ("keep", "first"),
    ("beta", "1"),
    ("beta", math.nan),
    ("learning_rate", math.inf),
    ("likelihood", "gaussian"),
    ("likelihood", 3),
    ("binarization", ""),
    ("warmup_epochs", -1),
    ("device", 0),
    ("dataset", ""),
]


@pytest.mark.parametrize(("name", "value"), BAD_JSON, ids=str)
def test_a_field_of_json_of_the_wrong_type_or_range_is_refused(name: str, value: Any) -> None:
    values = to_json(Options()) | {name: value}
    with pytest.raises(ValueError, match=f"{format_flag(name)}: expected .*, got "):
        from_json(values)
