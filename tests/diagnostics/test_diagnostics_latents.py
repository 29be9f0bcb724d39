"""Latents and the ELBO's parts, on linear Gaussian models and on guides whose information is known."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from oracles import LinearGaussian
from torch.testing import assert_close

from ppl_vae import VAE
from ppl_vae.diagnostics import AggregatePosterior, active_units, elbo_split, implied_beta, latent_kl
from ppl_vae.evidence.moments import PosteriorMoments
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime.global_state import seeded

CPU = torch.device("cpu")


def guided(loc, scale, *, posterior=None, prior=None):
    """A VAE whose guide puts image n, x = (n), at loc[n] with scale[n], and whose decoder ignores z."""
    loc, scale = torch.as_tensor(loc).double(), torch.as_tensor(scale).double()
    family = posterior or (lambda m, s: dist.Normal(m, s).to_event(1))

    def likelihood(z):
        return dist.Normal(torch.zeros(*z.shape[:-1], 1, dtype=z.dtype), 1.0).to_event(1)

    def encoder(x):
        index = x[..., 0].long()
        return family(loc[index], scale[index])

    return VAE(prior or StandardNormal(loc.shape[1]).double(), likelihood, encoder)


def indices(N):
    return torch.arange(N, dtype=torch.double)[:, None]


def full(m, s):
    """The same normal, of which nobody can see that it is a product."""
    return dist.MultivariateNormal(m, covariance_matrix=torch.diag_embed(s.square()))


def assert_within(value, exact, *, stderrs=4.0):
    assert abs(value.mean - exact) < stderrs * value.stderr, f"{value}, expected {exact}"


# --- KL a latent ---


def test_the_kl_of_each_latent_is_that_of_the_exact_posterior(oracle):
    x = oracle.draw(50)
    A, C = oracle.posterior_map()
    loc, variance = (x - oracle.b) @ A.T, C.diagonal()
    exact = (loc.square() + variance - 1 - variance.log()) / 2
    found = latent_kl(oracle.vae(), x)
    assert_close(found.mean, exact.mean(0))
    assert_close(found.stderr, torch.from_numpy(scipy.stats.sem(exact.numpy())))


def test_the_kl_of_a_latent_without_closed_form_is_by_draws():
    student = lambda m, s: dist.StudentT(5.0, m, s).to_event(1)  # noqa: E731
    vae = guided([[0.5, -1.0]] * 200, [[0.5, 2.0]] * 200, posterior=student)
    with seeded(0, CPU):
        found = latent_kl(vae, indices(200))
    for latent, (m, s) in enumerate(((0.5, 0.5), (-1.0, 2.0))):
        q, p = scipy.stats.t(5, m, s), scipy.stats.norm()
        exact = q.expect(lambda z, q=q, p=p: q.logpdf(z) - p.logpdf(z), lb=-200, ub=200)
        assert abs(float(found.mean[latent]) - exact) < 4 * float(found.stderr[latent])


# --- Active units ---


def test_a_latent_is_active_where_its_means_vary_by_more_than_a_hundredth():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 0.105, 0.095, 0.0]).double()
    unit = torch.randn(4000, 4, generator=generator, dtype=torch.double)
    mean = (unit - unit.mean(0)) / unit.std(0) * scales
    found = active_units(PosteriorMoments(mean, torch.ones(4000, 4)))
    assert_close(found.mean, scales.square())
    assert found.count == 2


def test_the_error_of_a_variance_is_that_of_repetitions():
    generator = torch.Generator().manual_seed(0)  # a skewed law, whose fourth moment is not a normal's
    means = torch.empty(400, 500, 1, dtype=torch.double).exponential_(generator=generator)
    found = [active_units(PosteriorMoments(mean, mean)) for mean in means]
    spread = np.std([float(units.mean) for units in found])
    assert np.mean([float(units.stderr) for units in found]) == pytest.approx(spread, rel=0.1)


# --- The ELBO's parts ---


def test_the_parts_sum_to_the_kl(oracle):
    vae = oracle.vae(widen=1.3, shift=0.4)
    split = elbo_split(vae, oracle.draw(100))
    assert split.kl.mean == pytest.approx(split.mutual_information.mean + split.marginal_kl.mean, abs=1e-12)
    assert split.marginal_kl.mean == pytest.approx(
        split.total_correlation.mean + float(split.dimension_kl.mean.sum()), abs=1e-12
    )
    assert split.sum_of_dimension_kl.mean == pytest.approx(float(split.dimension_kl.mean.sum()), abs=1e-12)


def test_the_kl_is_the_closed_one(oracle):
    x = oracle.draw(100)
    kl = oracle.kl(x, widen=1.3, shift=0.4)
    found = elbo_split(oracle.vae(widen=1.3, shift=0.4), x).kl
    assert found.mean == pytest.approx(float(kl.mean()))
    assert found.stderr == pytest.approx(scipy.stats.sem(kl.numpy()))


def test_the_reconstruction_is_the_closed_one(oracle):
    x = oracle.draw(2000)
    with seeded(0, CPU):
        found = elbo_split(oracle.vae(widen=1.3), x).reconstruction
    assert_within(found, float(oracle.reconstruction(x, widen=1.3).mean()))


def test_a_guide_that_is_the_prior_carries_nothing():
    split = elbo_split(guided(torch.zeros(50, 3), torch.ones(50, 3)), indices(50))
    for value in (split.kl, split.mutual_information, split.marginal_kl, split.total_correlation):
        assert value.mean == pytest.approx(0.0, abs=1e-12)
    assert_close(split.dimension_kl.mean, torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_images_of_a_linear_gaussian_model_carry_what_its_channel_carries():
    """I(z; x) = -sum_l log s_l for the exact posterior of images drawn from the model; the aggregate is the prior."""
    oracle = LinearGaussian.random(L=2, scale=2.0)
    exact = -float(oracle.guide_scale().log().sum())
    with seeded(0, CPU):
        split = elbo_split(oracle.vae(), oracle.draw(4000))
    assert_within(split.mutual_information, exact)
    assert abs(split.marginal_kl.mean) < 0.02


def test_separate_posteriors_sit_at_the_cap():
    split = elbo_split(guided(10 * torch.arange(20)[:, None], torch.full((20, 1), 0.1)), indices(20))
    assert split.mutual_information.mean == pytest.approx(math.log(20), abs=1e-9)
    assert split.cap == pytest.approx(math.log(20))
    assert split.saturated


@pytest.mark.thorough
@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_the_total_correlation_of_a_correlated_normal_is_found(rho):
    """Means N(0, C - s^2 I) and posteriors of scale s: the aggregate is N(0, C), TC = -log(1 - rho^2) / 2."""
    N, s = 4000, 0.3
    C = np.array([[1.0, rho], [rho, 1.0]])
    if np.linalg.eigvalsh(C)[0] <= s**2:
        C = C + 0.2 * np.eye(2)
    loc = np.random.default_rng(0).multivariate_normal(np.zeros(2), C - s**2 * np.eye(2), size=N)
    with seeded(0, CPU):
        split = elbo_split(guided(loc, np.full((N, 2), s)), indices(N))
    exact = -math.log(np.linalg.det(C) / (C[0, 0] * C[1, 1])) / 2
    assert abs(split.total_correlation.mean - exact) < 4 * split.total_correlation.stderr + 0.01


def test_a_shifted_latent_has_the_marginal_kl_of_its_shift():
    """Means N(1, 1 - s^2): that latent's aggregate is N(1, 1), 1/2 nats from the prior; the other's is the prior."""
    N, s = 3000, 0.5
    loc = torch.randn(N, 2, generator=torch.Generator().manual_seed(0)) * math.sqrt(1 - s**2) + torch.tensor([1.0, 0.0])
    with seeded(0, CPU):
        split = elbo_split(guided(loc, np.full((N, 2), s)), indices(N))
    for latent, exact in enumerate((0.5, 0.0)):
        assert abs(float(split.dimension_kl.mean[latent]) - exact) < 4 * float(split.dimension_kl.stderr[latent]) + 0.01


def test_the_aggregate_posterior_is_the_mixture_of_all_images(monkeypatch):
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 3)
    rng = np.random.default_rng(0)
    loc, scale, z = rng.normal(size=(7, 2)), rng.uniform(0.01, 2, size=(7, 2)), rng.normal(size=(9, 2))
    q = AggregatePosterior.encode(guided(loc, scale), indices(7))
    by_latent = scipy.stats.norm.logpdf(z[:, None], loc, scale)
    exact = scipy.special.logsumexp(by_latent.sum(-1), axis=1) - math.log(7)
    np.testing.assert_allclose(q.log_prob(torch.from_numpy(z)), exact, rtol=1e-9)
    exact_by_latent = scipy.special.logsumexp(by_latent, axis=1) - math.log(7)
    np.testing.assert_allclose(q.log_prob_by_latent(torch.from_numpy(z)), exact_by_latent, rtol=1e-9)


def test_a_guide_that_is_no_product_has_the_same_information_and_nothing_by_latent():
    loc, scale = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.full((40, 2), 0.5)
    splits = []
    for posterior in (None, full):
        with seeded(0, CPU):
            splits.append(elbo_split(guided(loc, scale, posterior=posterior), indices(40)))
    assert splits[1].mutual_information.mean == pytest.approx(splits[0].mutual_information.mean)
    assert splits[1].total_correlation is None
    assert splits[1].dimension_kl is None


# --- The beta that weights imply ---


def tempered(oracle, beta, *, widen=1.0):
    """The decoder of the oracle with the diagonal guide that is best for reconstruction - beta KL."""
    hot = LinearGaussian(oracle.W, oracle.b, oracle.scale * math.sqrt(beta)).vae(widen=widen)
    return VAE(hot.prior, oracle.vae().likelihood, hot.posterior)


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0, 4.0, 10.0])
def test_the_best_guide_for_beta_implies_that_beta(oracle, beta):
    with seeded(0, CPU):
        found = implied_beta(tempered(oracle, beta), oracle.draw(2000))
    assert found.stderr < 0.02 * beta
    assert_within(found, beta)


def test_a_guide_that_is_too_wide_implies_more(oracle):
    """Widened by c, with s^2 the exact variance: sum w^2 s^2 c^2 / sigma^2 over sum (1 - s^2 c^2)."""
    c, s2, w2 = 1.2, oracle.guide_scale().square(), oracle.W.square().sum(0)
    exact = float((w2 * s2).sum() * c**2 / oracle.scale**2 / (1 - s2 * c**2).sum())
    with seeded(0, CPU):
        found = implied_beta(oracle.vae(widen=c), oracle.draw(2000))
    assert exact > 1.4
    assert_within(found, exact)


@pytest.mark.parametrize("posterior", [None, full])
def test_a_collapsed_guide_implies_nothing_however_much_its_widths_cost(posterior):
    """Three latents of scale 0.9 about the prior's mean: KL 0.03 nats, of slope -0.57 with no error at all."""
    vae = guided(torch.zeros(50, 3), torch.full((50, 3), 0.9), posterior=posterior)
    with seeded(0, CPU):
        assert implied_beta(vae, indices(50)) is None
