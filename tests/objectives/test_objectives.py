"""Training objectives against closed forms: beta, both KLs, particles, free bits."""

from __future__ import annotations

from functools import partial

import numpy as np
import per_image
import pyro
import pyro.distributions as dist
import pytest
import torch
from fitting import fit
from oracles import LinearGaussian
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.testing import assert_close

from ppl_vae.parts.registry import PRIORS
from ppl_vae.runs.build import build_vae, resolve_parts
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import build_objective, check_objective

KLS = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}
BETAS = (0.0, 0.3, 1.0, 4.0)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("beta", [*BETAS, torch.tensor(4.0).double()])
def test_beta_weighs_the_kl_and_only_the_kl_in_the_loss_and_its_gradient(oracle, kl, beta):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(3)
    for parameter in vae.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(0)
    loss = per_image.elbo(vae.model, vae.guide, x, beta=beta, estimator=KLS[kl], num_particles=3)
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
    assert_close(loss, written_out.mean(), rtol=1e-12, atol=0)
    assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_pixels_are_summed_and_images_averaged(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    repeated = torch.cat([x, x, x])
    assert_close(
        per_image.elbo(vae.model, vae.guide, repeated), per_image.elbo(vae.model, vae.guide, x), rtol=1e-9, atol=0
    )
    wide = LinearGaussian(torch.cat([oracle.W] * 2), torch.cat([oracle.b] * 2), oracle.scale)
    wide_x = torch.cat([x, x], dim=1)
    loss = per_image.elbo(wide.vae().model, wide.vae().guide, wide_x)
    assert_close(loss, -wide.log_evidence(wide_x).mean(), rtol=1e-9, atol=0)


def test_particles_draw_no_random_numbers_beyond_their_own(oracle):
    """An estimator that guesses the plate nesting runs the guide once more at its first call, and breaks resuming."""
    vae, x = oracle.vae(widen=1.3), oracle.draw(3)
    torch.manual_seed(0)
    per_image.elbo(vae.model, vae.guide, x, num_particles=2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(2, 3, 3, dtype=torch.double)
    assert torch.equal(torch.get_rng_state(), after)


# --- A KL in closed form, or none ---


def _vae_of(posterior, prior):
    """A small VAE of these two words of the command line."""
    torch.manual_seed(0)
    asked = Options(
        posterior=posterior,
        prior=prior,
        latent_dim=4,
        hidden=(5,),
        posterior_hidden=(5,) if posterior == "flow" else Options().posterior_hidden,
        prior_components=3 if prior in ("mixture", "vamp") else Options().prior_components,
        prior_hidden=(5,) if prior == "flow" else Options().prior_hidden,
    )
    return build_vae(asked, (6,))


def _loss_of(vae, beta):
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    return per_image.elbo(vae.model, vae.guide, x, beta=beta, estimator=TraceMeanField_ELBO)


WITH_A_FORMULA = [("diagonal", "standard-normal"), ("full", "standard-normal")]
WITHOUT_A_FORMULA = [
    (posterior, prior)
    for posterior in ("diagonal", "full", "flow")
    for prior in PRIORS
    if (posterior, prior) not in WITH_A_FORMULA
]


@pytest.mark.parametrize("posterior", [posterior for posterior, _ in WITH_A_FORMULA])
def test_the_analytic_kl_is_the_formula_and_no_draw(posterior):
    """What beta = 1 adds to the loss, against (|T|^2 + |m|^2 - L) / 2 - log det T by numpy."""
    vae = _vae_of(posterior, "standard-normal")
    with torch.no_grad():
        found = _loss_of(vae, 1.0) - _loss_of(vae, 0.0)
        torch.manual_seed(0)
        q = vae.posterior(torch.bernoulli(torch.full((5, 6), 0.5)))
    loc = q.mean.double().numpy()
    T = (q.scale_tril if posterior == "full" else torch.diag_embed(q.stddev)).double().numpy()
    kl = ((T**2).sum((1, 2)) + (loc**2).sum(1) - 4) / 2 - np.log(np.diagonal(T, axis1=1, axis2=2)).sum(1)
    assert float(found) == pytest.approx(kl.mean(), rel=1e-4)


@pytest.mark.parametrize(("posterior", "prior"), WITHOUT_A_FORMULA)
def test_a_kl_without_a_formula_is_refused_and_not_sampled(posterior, prior):
    with pytest.raises(ValueError, match="site 'z': expected a guide and a prior whose KL has a formula"):
        _loss_of(_vae_of(posterior, prior), 1.0)


def test_a_kl_without_a_formula_is_refused_in_a_captured_step(graphs):
    """A graph, too, would hold draws in the place of the formula."""
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    analytic = partial(per_image.elbo, estimator=TraceMeanField_ELBO)
    with pytest.raises(ValueError, match="whose KL has a formula"):
        fit(_vae_of("diagonal", "mixture"), x, epochs=1, batch_size=5, objective=analytic, compile=True)


@pytest.mark.parametrize(("posterior", "prior"), WITH_A_FORMULA + WITHOUT_A_FORMULA)
def test_the_options_accept_the_pairs_that_the_objective_accepts(posterior, prior):
    options = resolve_parts(Options(posterior=posterior, prior=prior, kl="analytic"))
    before = torch.get_rng_state()
    if (posterior, prior) in WITH_A_FORMULA:
        check_objective(options)
    else:
        with pytest.raises(ValueError, match="--kl analytic: expected"):
            check_objective(options)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_analytic_kl_refuses_a_guide_that_is_not_reparametrized():
    """Its formula would have a gradient, and the reconstruction none for the guide."""

    def program(distribution):
        def run(x):
            with pyro.plate("images", len(x), dim=-1):
                z = pyro.sample("z", distribution(torch.zeros(3), 1.0).to_event(1))
                if distribution is dist.Normal:
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return run

    model, guide = program(dist.Normal), program(NonreparameterizedNormal)
    with pytest.raises(ValueError, match="is not reparametrized"):
        per_image.elbo(model, guide, torch.zeros(2, 3), estimator=TraceMeanField_ELBO)


# --- Free bits ---


def _kl_by_latent(oracle, x, *, widen, shift):
    """(L,) nats: mean_n (mu_l^2 + s_l^2 - 1 - log s_l^2) / 2, by numpy from the guide's own formula."""
    A, covariance = (values.numpy() for values in oracle.posterior_map())
    scales = np.sqrt(np.diag(covariance))
    loc = (x.numpy() - oracle.b.numpy()) @ A.T + shift * scales
    variance = (widen * scales) ** 2
    return ((loc**2 + variance - 1 - np.log(variance)) / 2).mean(0)


def _free_kl(vae, x, free_nats):
    """What the KL adds to the loss at beta = 1: the same draw with and without it."""
    losses = []
    for beta in (1.0, 0.0):
        torch.manual_seed(0)
        losses.append(per_image.free_bits(vae.model, vae.guide, x, beta=beta, free_nats=free_nats))
    return losses[0] - losses[1]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("beta", BETAS)
def test_free_bits_of_nothing_are_the_elbo_with_its_kl_in_closed_form(oracle, beta, num_particles):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    asked = {"beta": beta, "num_particles": num_particles}
    torch.manual_seed(0)
    expected = per_image.elbo(vae.model, vae.guide, x, estimator=TraceMeanField_ELBO, **asked)
    torch.manual_seed(0)
    assert_close(per_image.free_bits(vae.model, vae.guide, x, free_nats=0.0, **asked), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", [0.5, 1.5, 2.5, 3.5])
def test_each_latent_costs_its_mean_kl_or_what_is_free_if_that_is_more(oracle, place):
    """lambda below, between and above the three KLs, which are known of this guide in closed form."""
    x = oracle.draw(5)
    kl = np.sort(_kl_by_latent(oracle, x, widen=1.3, shift=0.4))
    edges = np.concatenate([[0.0], kl, [2 * kl[-1]]])
    free_nats = float(edges[int(place) : int(place) + 2].mean())
    assert (kl < free_nats).sum() == int(place)
    expected = np.maximum(kl, free_nats).sum()
    assert float(_free_kl(oracle.vae(widen=1.3, shift=0.4), x, free_nats)) == pytest.approx(expected, rel=1e-12)


def test_a_latent_below_its_free_bits_is_not_pushed(oracle):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    weight = vae.posterior.net.output.weight.requires_grad_(True)
    kl = _kl_by_latent(oracle, x, widen=1.3, shift=0.4)
    free_nats = float(np.sort(kl)[:2].mean())
    gradient = torch.autograd.grad(_free_kl(vae, x, free_nats), weight)[0].reshape(2, 3, -1).abs().amax((0, 2))
    assert [bool(g == 0) for g in gradient] == list(kl < free_nats)
    assert sorted(kl < free_nats) == [False, False, True]


def test_free_bits_are_of_the_mean_over_the_batch_and_not_of_single_images(oracle):
    """One image far above lambda pays for those below it."""
    vae, x = oracle.vae(widen=1.3), oracle.draw(5)
    x[0] += 10.0
    kl, of_others = (_kl_by_latent(oracle, part, widen=1.3, shift=0.0) for part in (x, x[1:]))
    free_nats = float((of_others.max() + kl.min()) / 2)
    assert (of_others < free_nats).all()
    assert (kl > free_nats).all()
    assert float(_free_kl(vae, x, free_nats)) == pytest.approx(kl.sum(), rel=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_captured_step_of_free_bits_ends_where_the_eager_one_does(graphs, num_particles):
    """lambda lies between the KLs of the latents, so that both branches are in the one graph."""
    x = torch.bernoulli(torch.full((9, 1, 4, 4), 0.4), generator=torch.Generator().manual_seed(0)).double()
    weights = {}
    for compile in (True, False):
        pyro.set_rng_seed(0)
        asked = Options(objective="free-bits", free_bits=0.5, num_particles=num_particles, hidden=(5,), latent_dim=3)
        vae = build_vae(asked, (1, 4, 4)).double()
        with torch.no_grad():
            vae.posterior.net.output.bias[0] = 2.0  # a mean that costs 2 nats, in one latent of the three
        fit(
            vae,
            x,
            epochs=4,
            batch_size=4,
            objective=build_objective(asked),
            transform=lambda values, generator: values,
            learning_rate=0.01,
            warmup_epochs=1,
            compile=compile,
        )
        weights[compile] = vae.state_dict()
        spread = vae.posterior(x)
        kl = torch.distributions.kl_divergence(spread.base_dist, torch.distributions.Normal(0, 1)).mean(0)
        assert kl.min() < 0.5 < kl.max()
    assert len(graphs) > 0
    for name, expected in weights[False].items():
        assert_close(weights[True][name], expected, rtol=1e-7, atol=1e-9)


def _guide(distribution):
    def guide(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", distribution(len(x)))

    return guide


GUIDES = {
    "correlated latents": (
        lambda B: dist.MultivariateNormal(torch.zeros(B, 3), torch.eye(3)),
        "expected independent latents whose KL has a formula, got MultivariateNormal and Normal",
    ),
    "no formula": (
        lambda B: dist.StudentT(5.0, torch.zeros(B, 3), 1.0).to_event(1),
        "expected independent latents whose KL has a formula, got StudentT and Normal",
    ),
    "not reparametrized": (
        lambda B: NonreparameterizedNormal(torch.zeros(B, 3), torch.ones(3)).to_event(1),
        "expected a reparametrized guide, got Independent",
    ),
    "deterministic": (lambda B: dist.Delta(torch.zeros(B, 3), event_dim=1), r"got a deterministic one \(Delta\)"),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_free_bits_refuse_a_guide_whose_latents_have_no_kl_of_their_own(oracle, guide):
    distribution, words = GUIDES[guide]
    vae, x = oracle.vae().float(), oracle.draw(4).float()
    with pytest.raises(ValueError, match=f"site 'z'.*{words}"):
        per_image.free_bits(vae.model, _guide(distribution), x, free_nats=0.1)
