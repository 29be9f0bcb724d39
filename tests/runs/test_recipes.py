"""The recipes: each can be built and trained as it says, and is held against the number that its source prints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyro.infer import ELBO

from ppl_vae import data
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import MODEL_OPTIONS
from ppl_vae.runs.recipes import RECIPES, find_recipe
from ppl_vae.runs.resolve import build_objective, fit_arguments, resolve

# Read in the papers' tables, in nats and negative there.
PRINTED = {
    "iwae_vae_1": [(86.76, None)],
    "iwae_1": [(85.54, None), (84.78, None)],
    "vae_gaussian": [(84.45, 0.12)],
    "vae_flow": [(82.43, 0.06), (82.09, 0.18), (78.61, None)],
    "conv_flow": [(78.61, None), (79.58, 0.07)],
    "vae_flow_wide": [(82.43, 0.06), (82.09, 0.18), (78.61, None)],
    "ladder": [(81.22, 0.05), (81.20, None)],
    "static_flow": [(85.57, None), (80.09, None)],
    "caltech_conv": [(97.6, None)],
    "fashion_gaussian": [(228.70, 0.15)],
    "fashion_flow": [(227.35, 0.05), (226.75, 0.07)],
}

# p(z), and what each stage maximizes.
_LEARNED = [("flow", "stl"), ("flow", "dreg")]
TRAINED = {
    "iwae_vae_1": [("standard-normal", "stl")],
    "iwae_1": [("standard-normal", "stl"), ("standard-normal", "dreg")],
    "vae_gaussian": [("standard-normal", "stl")],
    "vae_flow": _LEARNED,
    "conv_flow": _LEARNED,
    "vae_flow_wide": _LEARNED,
    "ladder": [("flow", "stl"), ("flow", "iwae")],
    "static_flow": _LEARNED,
    "caltech_conv": _LEARNED,
    "fashion_gaussian": [("standard-normal", "stl")],
    "fashion_flow": _LEARNED,
}


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist")


@pytest.mark.parametrize("name", RECIPES)
def test_each_published_number_is_the_printed_one(name):
    assert [(-found.log_likelihood, found.stderr) for found in RECIPES[name].published] == PRINTED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_the_prior_and_the_objectives_of_its_model_whatever_the_defaults_are(name):
    assert [(stage.prior, stage.objective) for stage in RECIPES[name].stages] == TRAINED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_stages_of_a_recipe_train_one_model(name):
    first, *later = RECIPES[name].stages
    for stage in later:
        assert [getattr(stage, option) for option in MODEL_OPTIONS] == [getattr(first, o) for o in MODEL_OPTIONS]


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_can_be_built_and_has_an_objective_at_beta_one(name, digits):
    for stage in RECIPES[name].stages:
        options = resolve(replace(stage, dataset="mnist"), digits)
        with torch.device("meta"):
            vae = build_vae(options, digits.event_shape)
        assert sum(w.numel() for w in vae.parameters()) > 100_000
        assert isinstance(build_objective(options), ELBO)
        assert (options.beta, fit_arguments(options, None)["epochs"]) == (1, stage.epochs)


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_chooses_its_weights_by_test_images(name):
    """Kept weights are the best by validation, of a protocol that has validation images."""
    for stage in RECIPES[name].stages:
        assert (stage.protocol, stage.keep, stage.start_from) == ("vampprior", None, None)


def test_a_recipe_that_is_not_there_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(ValueError, match=rf"NAME: expected one of {', '.join(RECIPES)}, got 'vae'"):
        find_recipe("vae")
