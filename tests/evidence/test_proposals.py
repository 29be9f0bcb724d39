"""Refined and defended proposals against exact posteriors and evidences, and bounds that stay bounds."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, importance, log_weights
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.proposals import DefensiveFamily, Proposal, defend_proposal, replace_guide
from ppl_vae.evidence.refinement import refine_proposal
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, HierarchicalVAE, LayeredPrior
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import Delta, DiagonalNormal, FullNormal, exponential_log_scale, spline_flow
from ppl_vae.parts.priors import StandardNormal, VampPrior


def _correlated():
    return LinearGaussian.random(orthogonal=False)


def _log_evidence(vae, q, num_particles=1000):
    """L_S with q, float64, whose particles are drawn after q."""
    proposed = replace_guide(vae, q)
    return importance(proposed.model, proposed.guide, q.x, num_particles=num_particles)


# --- Refined ---


@pytest.fixture(scope="module")
def full():
    """A full normal for each of eight images, from a guide that is shifted and too wide."""
    oracle = _correlated()
    vae, x = oracle.vae(widen=1.5, shift=1.0), oracle.draw(8)
    torch.manual_seed(0)
    return oracle, vae, x, refine_proposal(vae, x, steps=300, family=FullNormal(3).double(), learning_rate=0.1)


def test_a_full_normals_refined_elbo_is_log_evidence(full):
    oracle, vae, x, q = full
    torch.manual_seed(1)
    assert_close(_log_evidence(vae, q).elbo, oracle.log_evidence(x), rtol=0, atol=1e-4)


def test_the_bound_of_a_refined_guide_is_unbiased_as_an_evidence():
    """E[w] = p(x), against quadrature, for each image."""
    vae = bernoulli_vae(latent_dim=2)
    x = torch.bernoulli(torch.full((10, 12), 0.5, dtype=torch.double), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    result = _log_evidence(vae, defend_proposal(refine_proposal(vae, x, steps=100)), 20_000)
    error = result.log_evidence - quadrature_log_evidence(vae, x, latent_dim=2)
    assert (error.abs() < 5 * result.monte_carlo_stderr).all()


def test_refining_too_fast_never_makes_an_image_worse():
    """At a rate of 30 the features are thrown far away, and each image keeps its start."""
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(widen=1.1), oracle.draw(5)
    torch.manual_seed(0)
    q = refine_proposal(vae, x, steps=3, learning_rate=30.0)
    assert torch.equal(q.h, vae.posterior.net(x).detach())


def test_the_vae_and_its_gradients_are_left_as_they_were():
    oracle = _correlated()
    vae, x = oracle.vae(widen=1.5), oracle.draw(4)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.train()
    refine_proposal(vae, x, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert vae.training
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.thorough
def test_a_captured_step_computes_what_the_plain_one_does(graphs):
    oracle = _correlated()
    vae, x = oracle.vae(widen=1.5, shift=1.0), oracle.draw(4)
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        found.append(refine_proposal(vae, x, steps=30, family=FullNormal(3).double(), compile=compile))
    assert len(graphs) == 1
    assert_close(found[1].h, found[0].h, rtol=0, atol=1e-9)


def test_a_flow_guides_features_are_refined_and_its_layers_are_not():
    torch.manual_seed(0)
    vae = bernoulli_vae(latent_dim=2)
    family = spline_flow(2, context_dim=3, num_layers=2, hidden=(8,))
    vae.posterior = Conditional(MLP(12, family.num_features, hidden=()), family).double()
    x = torch.bernoulli(torch.full((5, 12), 0.5, dtype=torch.double))
    layers = {name: value.clone() for name, value in family.state_dict().items()}
    q = refine_proposal(vae, x, steps=60, num_particles=4, learning_rate=0.1)
    assert all(torch.equal(value, layers[name]) for name, value in family.state_dict().items())
    before = importance(vae.model, vae.guide, x, num_particles=2000).elbo
    exact = quadrature_log_evidence(vae, x, latent_dim=2)
    assert ((exact - _log_evidence(vae, q, 2000).elbo) < (exact - before) / 2).all()


def _hierarchical():
    torch.manual_seed(0)
    prior = LayeredPrior(StandardNormal(2), [Conditional(MLP(2, 6, hidden=(4,)), DiagonalNormal(3))])
    posterior = BottomUp(
        [Conditional(MLP(6, 6, hidden=(4,)), DiagonalNormal(3)), Conditional(MLP(3, 4, hidden=(4,)), DiagonalNormal(2))]
    )
    decoder = Conditional(BottomLayerOnly(MLP(3, 6, hidden=(4,)), prior.latent_dims), Bernoulli((6,)))
    return HierarchicalVAE(prior, decoder, posterior).double()


def test_a_normal_over_all_layers_bounds_the_same_evidence():
    """Against the mean of p(x | z) over 100,000 draws of the prior."""
    vae = _hierarchical()
    x = torch.bernoulli(torch.full((4, 6), 0.5, dtype=torch.double))
    q = refine_proposal(vae, x, steps=60, family=FullNormal(5).double())
    with torch.no_grad():
        p = vae.likelihood(vae.prior().sample((100_000, 1))).log_prob(x).exp()
    result = _log_evidence(vae, q, 5000)
    error = torch.hypot(result.monte_carlo_stderr, p.std(0) / p.mean(0) / math.sqrt(100_000))
    assert ((result.log_evidence - p.mean(0).log()).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"num_particles": 0}, "num_particles: expected at least 1, got 0"),
        ({"family": FullNormal(4)}, "family: expected 3 latents, as the guide has, got 4"),
        ({"family": Delta(3)}, "family: expected DiagonalNormal or FullNormal"),
    ],
)
def test_what_cannot_be_refined_is_refused(arguments, message):
    oracle = _correlated()
    with pytest.raises(ValueError, match=message):
        refine_proposal(oracle.vae(), oracle.draw(2), **arguments)


def test_images_may_come_in_any_order_and_groups(full):
    _, vae, x, q = full
    posterior = replace_guide(vae, q).posterior
    order = torch.tensor([5, 0, 0, 7, 2])
    assert torch.equal(posterior(x[order]).loc, q.family(q.h).loc[order])


def test_another_image_is_refused(full):
    _, vae, x, q = full
    others = torch.cat([x[:2], x[:3] + 1e-9])
    with pytest.raises(ValueError, match="got 3 of 5 that are not among its 8"):
        replace_guide(vae, q).guide(others)


# --- For its images only ---


def test_a_captured_evaluation_finds_the_same(full, graphs):
    oracle, vae, x, q = full
    proposed = replace_guide(vae, q)
    results = [evaluate(proposed, x, num_particles=100, seed=0, compile=compile) for compile in (False, True)]
    assert len(graphs) == 1
    assert_close(results[1].log_evidence, results[0].log_evidence)
    assert_close(results[1].log_evidence, oracle.log_evidence(x), rtol=0, atol=1e-4)


@pytest.mark.thorough
def test_a_prior_of_the_guides_own_posteriors_stays_what_it_was(graphs):
    """A VampPrior holds the guide that the proposal takes the place of, in a captured evaluation too."""
    vae = bernoulli_vae(latent_dim=2)
    vae = VAE(VampPrior(vae.posterior, (12,), components=3), vae.likelihood, vae.posterior).double()
    x = torch.bernoulli(torch.full((4, 12), 0.5, dtype=torch.double))
    torch.manual_seed(0)
    q = refine_proposal(vae, x, steps=20, compile=True)
    own = evaluate(vae, x, num_particles=20_000, seed=0)
    other = evaluate(replace_guide(vae, q), x, num_particles=20_000, seed=1, compile=True)
    error = torch.hypot(own.monte_carlo_stderr, other.monte_carlo_stderr)
    assert ((own.log_evidence - other.log_evidence).abs() < 5 * error).all()


# --- Defended ---


FAMILIES = {
    "diagonal": lambda: DiagonalNormal(1, log_scale=exponential_log_scale),
    "full": lambda: FullNormal(1, log_scale=exponential_log_scale),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_of_a_defended_proposal_have_its_density(name):
    """E_q'[f / q'] = 1 for a known density f: the draws and the density are of one distribution."""
    torch.manual_seed(0)
    family = DefensiveFamily(FAMILIES[name](), share=0.3, widen=3.0).double()
    q = family(0.3 * torch.randn(3, family.num_features, dtype=torch.double))
    f = dist.Normal(torch.zeros(1, dtype=torch.double), 1.0).to_event(1)
    with torch.no_grad():
        z = q.sample((40_000,))
        ratio = (f.log_prob(z) - q.log_prob(z)).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 200).all()


def test_weights_of_a_narrow_guide_are_bounded_once_it_is_defended():
    """c = 0.5: sup p / q' in closed form, where p / q has none. Each of the 100,000 weights is below it."""
    oracle = LinearGaussian.random(D=4, L=1)
    vae, x = oracle.vae(widen=0.5), oracle.draw(3)
    q = Proposal(vae.posterior.family, vae.posterior.net(x).detach(), x)
    proposed = replace_guide(vae, defend_proposal(q, share=0.1, widen=4.0))  # as wide as two posteriors
    torch.manual_seed(0)
    with torch.no_grad():
        defended, plain = (log_weights(v.model, v.guide, x, 100_000) for v in (proposed, vae))
    most = oracle.log_evidence(x) + math.log(2 / 0.1)  # p(z | x) <= 2 N(z; mean, (2 s)^2)
    assert (defended < most).all()
    assert (plain.max(0).values > most).any()
