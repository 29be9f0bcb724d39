"""log w = log p(x, z) - log q(z | x), against exact answers and Pyro's own programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from grids import LIKELIHOODS_AND_NETWORKS, images_for
from pyro import poutine
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, log_weights
from ppl_vae.objectives import Temper
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.weights import log_weight_terms


@pytest.mark.parametrize("num_particles", [1, 2, 7])
@pytest.mark.parametrize("num_images", [1, 5])
def test_weights_of_the_exact_posterior_are_the_evidence_with_zero_variance(oracle, num_particles, num_images):
    vae, x = oracle.vae(), oracle.draw(num_images)
    log_w = log_weights(vae.model, vae.guide, x, num_particles)
    assert_close(log_w, oracle.log_evidence(x).expand(num_particles, num_images), rtol=1e-9, atol=0)


def test_weights_are_the_densities_of_the_draws_written_out(oracle):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(4)
    torch.manual_seed(0)
    log_w = log_weights(vae.model, vae.guide, x, 5)
    A, _ = oracle.posterior_map()
    loc = (x - oracle.b) @ A.T + 0.4 * oracle.guide_scale()
    scale = 1.3 * oracle.guide_scale()
    torch.manual_seed(0)
    z = loc + scale * torch.randn(5, 4, 3, dtype=torch.double)
    normal = torch.distributions.Normal
    written_out = (
        normal(z @ oracle.W.T + oracle.b, oracle.scale).log_prob(x).sum(-1)
        + normal(0.0, 1.0).log_prob(z).sum(-1)
        - normal(loc, scale).log_prob(z).sum(-1)
    )
    assert_close(log_w, written_out, rtol=1e-10, atol=1e-10)


def test_terms_sum_to_the_weights_and_split_at_the_observed_site(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    torch.manual_seed(3)
    log_p_x_given_z, log_p_z_over_q_z = log_weight_terms(vae.model, vae.guide, x, 2000)
    error = log_p_x_given_z.std(0) / 2000**0.5
    assert ((log_p_x_given_z.mean(0) - oracle.reconstruction(x)).abs() < 5 * error).all()
    assert_close(log_p_x_given_z + log_p_z_over_q_z, oracle.log_evidence(x).expand(2000, 4), rtol=1e-9, atol=0)


def test_the_encoder_runs_once_an_image_and_not_once_a_particle(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    seen = []
    vae.posterior.net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    log_weights(vae.model, vae.guide, x, 50)
    assert seen == [x.shape]


@pytest.mark.parametrize("beta", [0.0, 4.0])
def test_a_training_beta_around_the_programs_does_not_enter_a_weight(oracle, beta):
    vae, x = oracle.vae(), oracle.draw(4)
    log_w = log_weights(Temper(beta)(vae.model), Temper(beta)(vae.guide), x, 3)
    assert_close(log_w, oracle.log_evidence(x).expand(3, 4), rtol=1e-9, atol=0)


def test_a_scaled_program_has_the_weights_of_the_bare_one(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    log_w = log_weights(poutine.scale(vae.model, 7.0), poutine.scale(vae.guide, 7.0), x, 3)
    assert_close(log_w, oracle.log_evidence(x).expand(3, 4), rtol=1e-9, atol=0)


def test_the_scale_of_a_subsampled_plate_does_not_enter_a_weight(oracle):
    vae, x = oracle.vae(), oracle.draw(8)
    N = 80

    def model(x):
        with pyro.plate("images", N, subsample_size=len(x), dim=-1):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("images", N, subsample_size=len(x), dim=-1):
            pyro.sample("z", vae.posterior(x))

    log_w = log_weights(model, guide, x, 3)
    exact = oracle.log_evidence(x)
    assert_close(log_w, exact.expand(3, 8), rtol=1e-9, atol=0)
    assert_close(N / 8 * (log_w.logsumexp(0) - math.log(3)).sum(), N / 8 * exact.sum(), rtol=1e-9, atol=0)


def test_a_mask_in_the_program_leaves_its_images_out(oracle):
    vae, x = oracle.vae(), oracle.draw(4)
    kept = torch.tensor([True, False, True, False])
    log_w = log_weights(poutine.mask(vae.model, kept), poutine.mask(vae.guide, kept), x, 3)
    assert_close(log_w, torch.where(kept, oracle.log_evidence(x), 0.0).expand(3, 4), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_a_site_of_the_whole_batch_is_refused_for_a_batch_of_one_too(oracle, num_images):
    """With one image the shapes agree: only the plate tells."""
    vae, x = oracle.vae(), oracle.draw(num_images)

    def with_global(program):
        def longer(x):
            pyro.sample("u", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
            program(x)

        return longer

    with pytest.raises(ValueError, match="site 'u': expected it in the images' plate"):
        log_weights(with_global(vae.model), with_global(vae.guide), x, 3)


@pytest.mark.parametrize("kind", ["factor", "observation"])
def test_a_density_in_the_guide_that_is_no_sample_is_refused(oracle, kind):
    vae, x = oracle.vae(), oracle.draw(4)

    def guide(x):
        vae.guide(x)
        with pyro.plate("more", len(x), dim=-1):
            if kind == "factor":
                pyro.factor("f", torch.full((len(x),), 3.0), has_rsample=False)
            else:
                pyro.sample("f", dist.Normal(0.0, 1.0), obs=torch.zeros(len(x)))

    with pytest.raises(ValueError, match=r"guide: expected sampled sites only, got observed sites or factors \['f'\]"):
        log_weights(vae.model, guide, x, 3)


def test_a_factor_in_the_model_is_part_of_its_joint(oracle):
    vae, x = oracle.vae(), oracle.draw(4)

    def model(x):
        vae.model(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.factor("f", torch.full((len(x),), 3.0))

    assert_close(log_weights(model, vae.guide, x, 3), (oracle.log_evidence(x) + 3).expand(3, 4), rtol=1e-9, atol=0)


def test_a_deterministic_site_has_no_density(oracle):
    vae, x = oracle.vae(), oracle.draw(4)

    def model(x):
        pyro.deterministic("constant", torch.ones(7))
        vae.model(x)

    assert_close(log_weights(model, vae.guide, x, 3), oracle.log_evidence(x).expand(3, 4), rtol=1e-9, atol=0)


def test_pixels_that_are_not_in_the_event_are_refused(oracle):
    vae, x = oracle.vae(), oracle.draw(4)

    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", vae.prior())
            with pyro.plate("pixels", 6, dim=-3):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.T[:, None])

    with pytest.raises(ValueError, match=r"site 'x': expected the images' plate alone, got the plate 'pixels' too"):
        log_weights(model, vae.guide, x, 3)


@pytest.mark.parametrize("extra_in", ["model", "guide"])
def test_a_latent_of_only_one_program_is_refused(oracle, extra_in):
    vae, x = oracle.vae(), oracle.draw(4)

    def with_extra(program):
        def longer(x):
            program(x)
            with pyro.plate("more", len(x), dim=-1):
                pyro.sample("extra", dist.Normal(0.0, 1.0))

        return longer

    programs = {"model": vae.model, "guide": vae.guide}
    programs[extra_in] = with_extra(programs[extra_in])
    with pytest.raises(ValueError, match=r"guide: expected the model's latent sites .*extra"):
        log_weights(programs["model"], programs["guide"], x, 3)


@pytest.mark.parametrize(("likelihood", "network"), LIKELIHOODS_AND_NETWORKS)
def test_vectorized_particles_are_those_of_a_loop_for_every_network(network, likelihood):
    """The same draws, decoded one particle and one image at a time, with each density written out."""
    torch.manual_seed(0)
    options = Options(**PLAIN, network=network, likelihood=likelihood, channels=(2, 3), hidden=(4,), latent_dim=2)
    vae = build_vae(options, (3, 5, 4)).double()
    x = images_for(vae.likelihood.family, 2)
    drawn = []

    def guide(x):
        with pyro.plate("images", len(x), dim=-1):
            drawn.append(pyro.sample("z", vae.posterior(x)))

    with torch.no_grad():
        log_w = log_weights(vae.model, guide, x, 4)
        for b, image in enumerate(x):
            loc, scale = (getattr(vae.posterior(image).base_dist, name) for name in ("loc", "scale"))
            for s, z in enumerate(drawn[0][:, b]):
                log_q = torch.distributions.Normal(loc, scale).log_prob(z).sum()
                log_p_z = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
                log_p_x = vae.likelihood(z).log_prob(image)
                assert_close(log_w[s, b], log_p_x + log_p_z - log_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_pixels", [1, 6])
def test_a_value_that_the_density_would_broadcast_is_refused(num_pixels):
    """Pixels (D, 1) under logits (1, D) have a log-probability of D x D numbers, each pixel counted D times."""

    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = z[..., None, None] * torch.ones(1, 6)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match=r"site 'x': expected values of the event shape \(1, 6\)"):
        log_weights(model, guide, torch.ones(4, num_pixels, 1), 3)


def test_a_parameter_that_all_pixels_share_counts_every_pixel_once():
    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 2.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))

    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    z = torch.randn(2, 5)
    expected = torch.distributions.Normal(z[..., None], 2.0).log_prob(x).sum(-1)
    torch.manual_seed(1)
    assert_close(log_weights(model, guide, x, 2), expected)


def test_latents_that_do_not_fit_the_prior_are_refused_in_one_line():
    posterior = Conditional(MLP((6,), 8, hidden=()), DiagonalNormal(4))
    vae = VAE(
        lambda: dist.Normal(torch.zeros(5), 1.0).to_event(1),
        lambda z: dist.Normal(z.mean(-1, keepdim=True) + torch.zeros(6), 1.0).to_event(1),
        posterior,
    )
    with pytest.raises(ValueError, match=r"site 'z': expected values of the event shape \(5,\)"):
        log_weights(vae.model, vae.guide, torch.zeros(10, 6), 3)
