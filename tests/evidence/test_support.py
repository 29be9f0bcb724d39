"""Every function that scores images refuses those that p(x | z) has no probability for."""

from __future__ import annotations

import inspect
import math
from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from entry_points import OTHERS, SCORES
from oracles import bernoulli_vae

from ppl_vae import VAE, Conditional, dequantized, importance
from ppl_vae.evidence.missing import Observed
from ppl_vae.parts import likelihoods
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.support import check_support

MODULES = [f"evidence.{name}" for name in ("ais", "chains", "evaluation", "guide_calibration", "importance", "missing")]
MODULES += [f"evidence.{name}" for name in ("moments", "proposals", "refinement")]
MODULES += [f"diagnostics.{name}" for name in ("aggregate", "latents", "likelihood")]
MODULES += ["weights", "objectives", "commands.latents"]


# What other functions call, and what takes no images.
HELPERS = {"count_branches", "evaluating", "measure_group", "mix_prior_into_guide", "replace_guide", "sample_classes"}
HELPERS |= {"autocast", "loss_of_batch", "loss_per_image", "trace_guide", "trace_programs"}


def _binary(num_images=4):
    return torch.bernoulli(
        torch.full((num_images, 12), 0.5, dtype=torch.double), generator=torch.Generator().manual_seed(0)
    )


def test_every_public_function_of_a_vae_is_in_one_of_the_two_lists():
    """A new one is then held against the tests that go through them."""
    listed = {name.rsplit(".", 1)[-1] for name in [*SCORES, *OTHERS]}
    found = set()
    for name in MODULES:
        module = import_module(f"ppl_vae.{name}")
        for function, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__.startswith(module.__name__) and function[0] != "_":
                takes = inspect.signature(value).parameters.keys()
                if takes & {"vae", "model", "guide", "observed"}:
                    found.add(function)
    assert found <= listed | HELPERS


# A NaN is a missing pixel where ``impute`` meets it.
OFF = [(name, value) for name in SCORES for value in (0.5, -1.0)]
OFF += [(name, math.nan) for name in SCORES if name != "missing.impute"]


@pytest.mark.parametrize(("name", "value"), OFF)
def test_one_pixel_off_the_support_is_refused_wherever_it_is(name, value):
    x = _binary()
    x[3, 5] = value
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="got at least 1 outside") as caught:
        SCORES[name](bernoulli_vae(latent_dim=2), x)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", SCORES)
def test_images_on_the_support_are_scored(name):
    with pyro.validation_enabled(False):
        SCORES[name](bernoulli_vae(latent_dim=2), _binary())


def _vae(family, **options):
    torch.manual_seed(0)
    family = getattr(likelihoods, family)((4,), **options)
    return VAE(
        StandardNormal(2),
        Conditional(MLP(2, family.num_features, hidden=()), family),
        Conditional(MLP(4, 4, hidden=()), DiagonalNormal(2)),
    )


# A family: values that it has a probability for, and values that it has none for.
FAMILIES = {
    "Bernoulli": ([0, 1], [0.5, -1, 2]),
    "Categorical": ([0, 255], [0.5, -1, 256]),
    "DiscretizedLogistic": ([0, 255], [0.5, -1, 256]),
    "DiscretizedLogisticMixture": ([0, 255], [0.5, -1, 256]),
    "Binomial": ([0, 255], [0.5, -1, 256]),
    "ContinuousBernoulli": ([0, 0.3, 1], [-0.1, 1.1]),
    "Beta": ([0.1, 0.9], [0, 1, 1.1]),
    "LogitNormal": ([0.1, 0.9], [0, 1, 1.1]),
    "Normal": ([-3, 0, 1e3], [math.nan]),
    "Laplace": ([-3, 0, 1e3], [math.nan]),
    "StudentT": ([-3, 0, 1e3], [math.nan]),
    "Poisson": ([0, 7, 1e4], [0.5, -1]),
    "NegativeBinomial": ([0, 7, 1e4], [0.5, -1]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_takes_the_values_that_it_has_a_probability_for_and_no_others(name):
    vae, (good, bad) = _vae(name), FAMILIES[name]
    x = torch.full((3, 4), float(good[0]))
    for value in good:
        x[1, 2] = value
        check_support(vae.model, x)
    for value in bad:
        x[1, 2] = value
        with pytest.raises(ValueError, match=r"site 'x': expected images within the support .* got at least 1 outside"):
            check_support(vae.model, x)


def test_a_mass_of_dequantized_levels_takes_levels():
    vae = dequantized(_vae("Beta"), num_draws=2)
    check_support(vae.model, torch.tensor([[0.0, 255.0, 3.0, 4.0]]))
    with pytest.raises(ValueError, match="got at least 1 outside"):
        check_support(vae.model, torch.tensor([[0.0, 255.5, 3.0, 4.0]]))


def test_missing_pixels_are_no_values_off_the_support_where_a_program_knows_of_them():
    observed = Observed(bernoulli_vae(latent_dim=2), rounds=1, num_fillings=2)
    x = _binary()
    x[1, :7], x[3] = math.nan, math.nan
    check_support(observed.model, x)
    x[1, 9] = 0.5
    with pytest.raises(ValueError, match="got at least 1 outside"):
        check_support(observed.model, x)
    with pytest.raises(ValueError, match="got at least 1 outside"):
        importance(observed.model, observed.guide, x, num_particles=2)


def test_a_support_that_depends_on_the_image_says_nothing_of_others():
    """Uniform(0, z): what is on the support of one draw of z is off that of another."""

    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Uniform(torch.zeros_like(z), z).to_event(1), obs=x)

    check_support(model, torch.full((3, 2), 0.9))


def test_the_check_draws_from_no_global_generator_and_leaves_the_modules_as_they_were():
    vae = bernoulli_vae(latent_dim=2).train()
    before = torch.get_rng_state()
    check_support(vae.model, _binary())
    assert vae.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SCORES)
def test_a_numpy_array_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match="expected a tensor") as caught:
        SCORES[name](bernoulli_vae(latent_dim=2), _binary().numpy())
    assert "\n" not in str(caught.value)
