"""Training objectives against closed forms: beta, both KLs, particles."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from oracles import LinearGaussian
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.testing import assert_close

from ppl_vae import objectives
from ppl_vae.objectives import Temper

KLS = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}
BETAS = (0.0, 0.3, 1.0, 4.0)


@pytest.fixture
def oracle():
    return LinearGaussian.random()


def _mean_and_error(vae, x, *, repeats=60, **options):
    torch.manual_seed(0)
    losses = torch.stack([objectives.elbo(vae.model, vae.guide, x, **options).detach() for _ in range(repeats)])
    return float(losses.mean()), float(losses.std()) / math.sqrt(repeats)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_beta_weighs_the_kl_and_only_the_kl(oracle, kl, beta, as_tensor):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    exact = -oracle.reconstruction(x, widen=1.3, shift=0.4) + beta * oracle.kl(x, widen=1.3, shift=0.4)
    weight = torch.tensor(beta, dtype=torch.double) if as_tensor else beta
    mean, error = _mean_and_error(vae, x, beta=weight, estimator=KLS[kl], num_particles=100)
    assert abs(mean - float(exact.mean())) < 5 * error
    assert error < 0.05


@pytest.mark.parametrize("kl", KLS)
def test_beta_in_only_one_program_would_be_another_objective(oracle, kl):
    """Why the messenger goes around both: the same estimators, with it around one of them, miss the closed form."""
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    exact = float((-oracle.reconstruction(x, widen=1.3, shift=0.4) + 4 * oracle.kl(x, widen=1.3, shift=0.4)).mean())
    estimator = KLS[kl](num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(0)
    model_only = float(estimator.differentiable_loss(Temper(4.0)(vae.model), vae.guide, x)) / 5
    assert abs(model_only - exact) > 1.0


@pytest.mark.parametrize("kl", KLS)
def test_beta_zero_leaves_the_reconstruction(oracle, kl):
    vae, x = oracle.vae(widen=1.3), oracle.draw(5)
    mean, error = _mean_and_error(vae, x, beta=0.0, estimator=KLS[kl], num_particles=100)
    assert abs(mean + float(oracle.reconstruction(x, widen=1.3).mean())) < 5 * error


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_the_messenger_scales_latent_sites_and_never_the_observed_one(oracle, scale):
    vae, x = oracle.vae(), oracle.draw(5)
    trace = poutine.trace(Temper(scale)(vae.model)).get_trace(x)
    assert trace.nodes["z"]["scale"] == scale
    assert trace.nodes["x"]["scale"] == 1.0


def test_pyros_own_scale_refuses_the_zero_from_which_a_warm_up_starts(oracle):
    with pytest.raises(ValueError, match="scale > 0"):
        poutine.scale(oracle.vae().model, 0.0)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_beta_enters_the_gradient_as_it_enters_the_loss(oracle, kl, beta):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(3)
    for parameter in vae.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(0)
    loss = objectives.elbo(vae.model, vae.guide, x, beta=beta, estimator=KLS[kl], num_particles=3)
    gradients = torch.autograd.grad(loss, vae.posterior.net.output.weight)[0]
    torch.manual_seed(0)
    q = vae.posterior(x)
    z = q.rsample((3,))
    divergence = (
        (q.log_prob(z) - vae.prior().log_prob(z)).mean(0)
        if kl == "sampled"
        else torch.distributions.kl_divergence(q, vae.prior().expand((3,)))
    )
    written_out = -vae.likelihood(z).log_prob(x).mean(0) + beta * divergence
    expected = torch.autograd.grad(written_out.mean(), vae.posterior.net.output.weight)[0]
    assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_with_the_exact_guide_the_loss_is_minus_the_evidence(oracle):
    vae, x = oracle.vae(), oracle.draw(5)
    for num_particles in (1, 4):
        loss = objectives.elbo(vae.model, vae.guide, x, num_particles=num_particles)
        assert_close(loss, -oracle.log_evidence(x).mean(), rtol=1e-9, atol=0)


def test_pixels_are_summed_and_images_averaged(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    repeated = torch.cat([x, x, x])
    assert_close(
        objectives.elbo(vae.model, vae.guide, repeated), objectives.elbo(vae.model, vae.guide, x), rtol=1e-9, atol=0
    )
    wide = LinearGaussian(torch.cat([oracle.W] * 2), torch.cat([oracle.b] * 2), oracle.scale)
    wide_x = torch.cat([x, x], dim=1)
    loss = objectives.elbo(wide.vae().model, wide.vae().guide, wide_x)
    assert_close(loss, -wide.log_evidence(wide_x).mean(), rtol=1e-9, atol=0)


def test_particles_draw_no_random_numbers_beyond_their_own(oracle):
    """An estimator that guesses the plate nesting runs the guide once more at its first call, and breaks resuming."""
    vae, x = oracle.vae(widen=1.3), oracle.draw(3)
    torch.manual_seed(0)
    objectives.elbo(vae.model, vae.guide, x, num_particles=2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(2, 3, 3, dtype=torch.double)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kl", KLS)
def test_the_global_parameter_store_stays_empty(oracle, kl):
    pyro.clear_param_store()
    objectives.elbo(oracle.vae().model, oracle.vae().guide, oracle.draw(3), estimator=KLS[kl])
    assert len(pyro.get_param_store()) == 0
