"""Missing pixels: log p of those that are observed and draws of the others, against closed forms and enumeration."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence
from pyro import poutine
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal

from ppl_vae import VAE, Conditional, importance, log_evidence, log_weights
from ppl_vae.evidence.missing import DefensiveMixture, Observed, impute
from ppl_vae.parts.likelihoods import DiscretizedLogisticMixture
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal

NAN = math.nan


def with_holes(x, *, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(x.shape, generator=generator) < share, NAN, x)


def completions(x):
    """(2^m, D) every binary image that agrees with the observed pixels of x (D,), the last missing pixel fastest."""
    holes = x.isnan().nonzero()[:, 0]
    filled = x.repeat(2 ** len(holes), 1)
    filled[:, holes] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * len(holes)).reshape(-1, len(holes))
    return filled


def enumerated(vae, x, *, latent_dim):
    """(2^m,) log p(x_observed, x_missing) of every completion, by quadrature: their sum is p(x_observed)."""
    return quadrature_log_evidence(vae, completions(x), latent_dim=latent_dim)


def binary_images(num_images, *, D=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(num_images, D, generator=generator) < 0.5).double()


def conditional(oracle, x):
    """The linear-Gaussian's log p(x_observed), and the mean and covariance of x_missing | x_observed, for x (D,)."""
    joint = oracle.W @ oracle.W.T + oracle.scale**2 * torch.eye(len(oracle.b), dtype=torch.double)
    o = ~x.isnan()
    gain = joint[~o][:, o] @ torch.linalg.inv(joint[o][:, o])
    mean = oracle.b[~o] + gain @ (x[o] - oracle.b[o])
    return (
        MultivariateNormal(oracle.b[o], joint[o][:, o]).log_prob(x[o]),
        mean,
        joint[~o][:, ~o] - gain @ joint[o][:, ~o],
    )


# --- log p of what is observed ---


@pytest.mark.parametrize("orthogonal", [True, False], ids=["orthogonal", "general"])
def test_log_p_of_the_observed_pixels_is_the_marginal_of_the_linear_gaussian(orthogonal):
    oracle = LinearGaussian.random(orthogonal=orthogonal)
    x = with_holes(oracle.draw(20), share=0.4)
    exact = torch.stack([conditional(oracle, image)[0] for image in x])
    observed = Observed(oracle.vae())
    torch.manual_seed(0)
    result = importance(observed.model, observed.guide, x, num_particles=2000)
    error = (result.log_evidence - exact) / result.monte_carlo_stderr
    assert error.abs().max() < 4
    assert abs(error.mean()) < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_log_p_of_observed_binary_pixels_is_the_sum_over_all_completions(latent_dim):
    vae = bernoulli_vae(latent_dim=latent_dim)
    x = with_holes(binary_images(5), share=0.3)
    exact = torch.stack([enumerated(vae, image, latent_dim=latent_dim).logsumexp(0) for image in x])
    observed = Observed(vae)
    torch.manual_seed(0)
    result = importance(observed.model, observed.guide, x, num_particles=4000)
    assert ((result.log_evidence - exact).abs() < 4 * result.monte_carlo_stderr).all()


def test_images_without_holes_get_the_vaes_own_numbers():
    vae = bernoulli_vae(latent_dim=2)
    x, observed = binary_images(6), Observed(vae)
    torch.manual_seed(0)
    bare = log_evidence(vae.model, vae.guide, x, num_particles=50)
    torch.manual_seed(0)
    assert torch.equal(log_evidence(observed.model, observed.guide, x, num_particles=50), bare)


@pytest.mark.parametrize("holes", ["one image", "all images"])
def test_log_p_of_nothing_is_zero(holes):
    vae = bernoulli_vae(latent_dim=2)
    x = binary_images(3)
    x[0 if holes == "one image" else slice(None)] = NAN
    observed = Observed(vae)
    result = log_evidence(observed.model, observed.guide, x, num_particles=20)[0]
    torch.testing.assert_close(result, torch.zeros((), dtype=torch.double), rtol=0, atol=1e-12)


def test_missing_pixels_of_an_image_with_channels_leave_the_sum():
    """p(x | z) on (3, 2, 2) is that of its flat pixels: the same holes, the same number."""
    flat = bernoulli_vae(latent_dim=1)
    shaped = VAE(
        flat.prior,
        lambda z: dist.Bernoulli(logits=flat.likelihood.net(z).reshape(*z.shape[:-1], 3, 2, 2)).to_event(3),
        lambda x: flat.posterior(x.flatten(-3)),
    )
    x = with_holes(binary_images(4), share=0.3)
    exact = torch.stack([enumerated(flat, image, latent_dim=1).logsumexp(0) for image in x])
    observed = Observed(shaped)
    torch.manual_seed(0)
    result = importance(observed.model, observed.guide, x.reshape(4, 3, 2, 2), num_particles=4000)
    assert ((result.log_evidence - exact).abs() < 4 * result.monte_carlo_stderr).all()


# --- The model ---


def test_gradients_of_the_masked_likelihood_are_those_of_the_observed_pixels():
    vae = bernoulli_vae(latent_dim=2)
    x = with_holes(binary_images(3))
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    trace = poutine.trace(poutine.condition(Observed(vae).model, data={"z": z})).get_trace(x)
    weights = list(vae.likelihood.parameters())
    gradients = torch.autograd.grad(trace.nodes["x"]["fn"].log_prob(trace.nodes["x"]["value"]).sum(), weights)
    logits, seen = vae.likelihood.net(z), ~x.isnan()
    expected = torch.autograd.grad(
        -nn.functional.binary_cross_entropy_with_logits(logits[seen], x[seen], reduction="sum"), weights
    )
    torch.testing.assert_close(gradients, expected)


class _Positive(nn.Module):
    """Log-normal pixels: zero is off the support, and without validation its gradient is 0 * infinity."""

    event_shape, num_features = (3,), 3

    def forward(self, h):
        return dist.LogNormal(h, 1.0).to_event(1)


@pytest.mark.parametrize("validation", [True, False], ids=["validated", "not validated"])
def test_missing_pixels_take_a_value_of_the_support_where_zero_is_none(validation):
    torch.manual_seed(0)
    vae = VAE(
        StandardNormal(1),
        Conditional(MLP(1, 3, hidden=(4,)), _Positive()),
        Conditional(MLP(3, 2, hidden=(4,)), DiagonalNormal(1)),
    )
    x = torch.tensor([[0.3, NAN, 0.6], [NAN, NAN, 0.2]])
    observed = Observed(vae)
    with pyro.validation_enabled(validation):
        log_w = log_weights(observed.model, observed.guide, x, 10)
    log_w.sum().backward()
    assert log_w.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.likelihood.parameters())


# --- The guide ---


def test_no_weight_exceeds_the_likelihood_over_the_priors_share():
    """A mass is at most 1, so w = p(x | z) p(z) / q(z) <= p(z) / (a p(z)) = 1 / a: unbounded without the prior."""
    vae = bernoulli_vae(latent_dim=2)
    with torch.no_grad():
        vae.posterior.net.output.bias[2:] = -8.0  # an encoder much too sure of itself
    x = with_holes(binary_images(4), share=0.9)
    observed = Observed(vae, prior_share=0.25)
    torch.manual_seed(0)
    assert log_weights(observed.model, observed.guide, x, 5000).max() < math.log(4)


def test_the_guide_is_a_function_of_the_image_alone():
    x = with_holes(binary_images(4))
    z = torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    observed = Observed(bernoulli_vae(latent_dim=2))
    together = observed.posterior(x).log_prob(z)
    torch.manual_seed(7)
    alone = [observed.posterior(x[i : i + 1]).log_prob(z[:, i : i + 1]) for i in (3, 2, 1, 0)][::-1]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_fillings_are_weighted_by_what_is_observed():
    """Where the encoder says nothing, q is the prior, and fillings are draws of x_missing | x_observed by weight."""
    vae = bernoulli_vae(latent_dim=1)
    with torch.no_grad():
        vae.posterior.net.output.weight.zero_()
    x = binary_images(1)
    x[0, 4:] = NAN
    conditional_mean = enumerated(vae, x[0], latent_dim=1).softmax(0) @ completions(x[0])
    observed, seen = Observed(vae, rounds=1, num_fillings=8000), []
    vae.posterior.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    observed.posterior(x)
    assert seen[-1].shape == (1, 8000, 12)
    torch.testing.assert_close(seen[-1].mean((0, 1)), conditional_mean, rtol=0, atol=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_defended_density_is_that_of_the_mixture(share):
    proposal, prior = dist.Normal(torch.tensor([1.5]).double(), 0.2).to_event(0), dist.Normal(0.0, 1.0)
    mixed = DefensiveMixture(proposal, prior, torch.tensor([share]).double())
    z = torch.linspace(-3, 3, 101, dtype=torch.double)
    expected = (1 - share) * stats.norm(1.5, 0.2).pdf(z) + share * stats.norm(0, 1).pdf(z)
    torch.testing.assert_close(mixed.log_prob(z[:, None])[:, 0].exp(), torch.as_tensor(expected))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_defended_draws_follow_the_density(share):
    proposal, prior = dist.Normal(torch.tensor([[1.5]]), 0.2).to_event(1), dist.Normal(torch.zeros(1), 1.0).to_event(1)
    mixed = DefensiveMixture(proposal, prior, torch.tensor([share])).expand((4, 1))
    torch.manual_seed(0)
    z = mixed.sample((500,))
    assert z.shape == (500, 4, 1, 1)
    cdf = stats.kstest(z.flatten(), lambda t: (1 - share) * stats.norm.cdf(t, 1.5, 0.2) + share * stats.norm.cdf(t))
    assert cdf.pvalue > 1e-3


# --- Imputation ---


@pytest.fixture(params=["one pass", "many passes"])
def passes(request, monkeypatch):
    """Particles are decoded at once, or seven at a time."""
    if request.param == "many passes":
        monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 7)


def test_the_mean_and_covariance_of_draws_are_those_of_the_conditional_normal(passes):
    oracle = LinearGaussian.random(orthogonal=False)
    x = with_holes(oracle.draw(1), share=0.5, seed=1)
    holes = x[0].isnan()
    torch.manual_seed(0)
    result = impute(Observed(oracle.vae()), x, num_particles=6000, num_draws=6000)
    log_p, mean, covariance = conditional(oracle, x[0])
    size = 1 / (1 / result.ess[0] + 1 / 6000)  # of an independent sample with the same error, about
    scales = covariance.diagonal().sqrt()
    draws = result.draws[:, 0, holes]
    assert ((result.mean[0, holes] - mean) / scales * result.ess[0].sqrt()).abs().max() < 4
    assert ((draws.mean(0) - mean) / scales * size.sqrt()).abs().max() < 4
    error = draws.T.cov() - covariance
    assert (error / (scales[:, None] * scales) * (size / 2).sqrt()).abs().max() < 4
    assert abs(result.log_evidence[0] - log_p) < 4 * (1 / result.ess[0]).sqrt()


@pytest.mark.thorough
def test_draws_of_binary_pixels_have_the_frequencies_of_the_enumerated_posterior(passes):
    vae = bernoulli_vae(latent_dim=1)
    x = binary_images(1)
    x[0, [2, 5, 11]] = NAN
    exact = enumerated(vae, x[0], latent_dim=1).softmax(0)
    torch.manual_seed(0)
    result = impute(Observed(vae), x, num_particles=6000, num_draws=6000)
    patterns = (result.draws[:, 0, [2, 5, 11]] @ torch.tensor([4.0, 2.0, 1.0]).double()).long()
    share = patterns.bincount(minlength=8) / 6000
    stderr = (exact * (1 - exact) * (1 / result.ess[0] + 1 / 6000)).sqrt()
    assert ((share - exact) / stderr).abs().max() < 4
    mean = exact @ completions(x[0])
    torch.testing.assert_close(result.mean[0], mean, rtol=0, atol=4 * float(0.5 / result.ess[0].sqrt()))


def test_an_image_of_holes_alone_is_imputed_by_draws_of_the_model():
    oracle = LinearGaussian.random()
    x = torch.full((1, 6), NAN, dtype=torch.double)
    torch.manual_seed(0)
    result = impute(Observed(oracle.vae()), x, num_particles=5000, num_draws=5000)
    covariance = oracle.W @ oracle.W.T + oracle.scale**2 * torch.eye(6, dtype=torch.double)
    assert result.ess[0] == pytest.approx(5000)
    scales = covariance.diagonal().sqrt()
    assert ((result.draws[:, 0].mean(0) - oracle.b) / scales).abs().max() < 4 / math.sqrt(2500)
    error = result.draws[:, 0].T.cov() - covariance
    assert (error / (scales[:, None] * scales)).abs().max() < 4 * math.sqrt(2 / 2500)


# --- What is refused ---


def test_pixels_that_are_not_independent_are_refused():
    torch.manual_seed(0)
    vae = VAE(
        StandardNormal(2),
        lambda z: dist.MultivariateNormal(z, torch.eye(2)),
        Conditional(MLP(2, 4, hidden=()), DiagonalNormal(2)),
    )
    observed = Observed(vae)
    with pytest.raises(ValueError, match="likelihood: expected pixels that are independent given z"):
        log_evidence(observed.model, observed.guide, torch.tensor([[0.0, NAN]]), num_particles=2)


def color_vae(event_shape=(3, 4, 4)):
    torch.manual_seed(0)
    family = DiscretizedLogisticMixture(event_shape)
    decoder = Conditional(MLP(2, family.num_features, hidden=(4,)), family)
    return VAE(StandardNormal(2), decoder, Conditional(MLP(event_shape, 4, hidden=(4,)), DiagonalNormal(2)))


def test_a_mixture_of_colors_leaves_out_positions_that_are_missing_in_all_colors():
    """log p(x_observed | z) is that of an image which has only the observed positions, by its own features."""
    features = torch.randn(4, 10 * 5 * 6, generator=torch.Generator().manual_seed(0))
    x = torch.randint(0, 256, (4, 3, 2, 3), generator=torch.Generator().manual_seed(1)).float()
    x[:, :, :, 2] = NAN
    kept = features.unflatten(-1, (50, 2, 3))[..., :2].flatten(1)
    exact = DiscretizedLogisticMixture((3, 2, 2))(kept).log_prob(x[..., :2])
    p_x = DiscretizedLogisticMixture((3, 2, 3))(features).mask_missing(x).expand((2, 4))
    torch.testing.assert_close(p_x.log_prob(x.nan_to_num(0.0)), exact.expand(2, 4))


def test_colors_of_a_mixture_are_imputed_where_all_three_are_missing():
    x = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    x[0, :, :2] = NAN
    observed = Observed(color_vae())
    found = impute(observed, x, num_particles=20, num_draws=3)
    assert torch.equal(found.draws[:, :, :, 2:], x[:, :, 2:].expand(3, 2, 3, 2, 4))
    assert observed.vae.likelihood.family.support.check(found.draws).all()
    assert found.log_evidence.isfinite().all()
    x[0, 1, :2] = 7.0
    with pytest.raises(ValueError, match="expected all three colors of a pixel to be missing or none"):
        impute(observed, x, num_particles=20, num_draws=3)
