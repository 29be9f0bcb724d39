"""The aggregate posterior against the prior: exact samples, shifted ones, and holes made on purpose."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from oracles import LinearGaussian

from ppl_vae import VAE
from ppl_vae.diagnostics import classifier_test, holes, kolmogorov_smirnov, latent_moments
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime.global_state import seeded

CPU = torch.device("cpu")


def standard(L):
    return StandardNormal(L).double()()


def normal(N, L, seed=0):
    return torch.randn(N, L, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class OnlyDraws:
    """A prior with neither moments nor distribution function."""

    batch_shape = torch.Size()

    def __init__(self, L):
        self.L = L
        self.event_shape = torch.Size([L])

    @property
    def mean(self):
        raise NotImplementedError

    def sample(self, shape):
        return torch.randn(*shape, self.L, dtype=torch.double)


# --- Moments ---


def test_moments_are_in_units_of_the_prior():
    z = normal(500, 2)
    prior = dist.Normal(torch.tensor([1.0, -2.0]).double(), torch.tensor([2.0, 0.5]).double()).to_event(1)
    found = latent_moments(z, prior)
    exact = (z.numpy() - [1.0, -2.0]) / [2.0, 0.5]
    np.testing.assert_allclose(found.mean.mean, exact.mean(0))
    np.testing.assert_allclose(found.mean.stderr, scipy.stats.sem(exact))
    np.testing.assert_allclose(found.log_scale.mean, np.log(exact.std(0, ddof=1)))


def test_the_error_of_a_log_scale_is_that_of_repetitions():
    """Of a uniform law, whose fourth moment is not a normal's."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.empty(400, 500, 1, dtype=torch.double).uniform_(-2, 2, generator=generator)
    found = [latent_moments(z, standard(1)) for z in samples]
    spread = np.std([float(moments.log_scale.mean) for moments in found])
    assert np.mean([float(moments.log_scale.stderr) for moments in found]) == pytest.approx(spread, rel=0.1)


def test_a_prior_known_by_its_draws_has_their_moments():
    with seeded(0, CPU):
        found = latent_moments(normal(5000, 2) + 0.5, OnlyDraws(2))
    np.testing.assert_allclose(found.mean.mean, 0.5, atol=0.06)


# --- Kolmogorov-Smirnov ---


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_kolmogorov_smirnov_statistic_is_scipys(shift):
    z = normal(800, 3, seed=4) + shift
    found = kolmogorov_smirnov(z, standard(3)).statistic
    exact = [scipy.stats.kstest(z[:, latent].numpy(), "norm").statistic for latent in range(3)]
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_a_prior_known_by_its_draws_is_compared_with_them():
    with seeded(0, CPU):
        z, drawn = normal(700, 1, seed=2), torch.randn(20_000, 1, dtype=torch.double)
    with seeded(0, CPU):
        found = kolmogorov_smirnov(z, OnlyDraws(1))
    exact = scipy.stats.ks_2samp(z[:, 0].numpy(), drawn[:, 0].numpy())
    assert float(found.statistic) == pytest.approx(exact.statistic, abs=1e-12)


# --- The classifier ---


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_the_classifier_is_nearly_optimal_for_a_shift(shift):
    """The best accuracy between N(0, I) and N(shift, I) in one of three latents is Phi(shift / 2)."""
    best = scipy.stats.norm.cdf(shift / 2)
    z = normal(4000, 3, seed=1)
    z[:, 0] += shift
    found = classifier_test(z, normal(4000, 3, seed=2))
    assert 2 * best - 1 - 0.06 < found.effect.mean < 2 * best - 1 + 4 * found.effect.stderr


def test_a_difference_that_no_latent_shows_alone_is_seen():
    """A ring of the prior's own moments in two latents."""
    z = normal(4000, 2, seed=1)
    ring = z / z.norm(dim=1, keepdim=True) * math.sqrt(2)
    assert classifier_test(ring, normal(4000, 2, seed=2)).effect.mean > 0.5


# --- Holes ---


def images_and_draws(oracle, vae, N):
    """N reference images, and a draw of the posterior of each of N others."""
    return oracle.draw(N, seed=1), vae.posterior(oracle.draw(N, seed=2)).sample()


@pytest.mark.parametrize("L", [2, 10])
def test_an_aggregate_that_is_the_prior_has_a_hundredth_in_holes(L):
    """The exact posterior of images drawn from the model, also in ten dimensions of narrow posteriors."""
    oracle = LinearGaussian.random(D=12, L=L, scale=0.3)
    vae = oracle.vae()
    with seeded(0, CPU):
        x, held_out = images_and_draws(oracle, vae, 2000)
        found = holes(vae, x, held_out, vae.prior().sample((2000,)))
    assert abs(found.share.mean - 0.01) < 4 * found.share.stderr
    assert found.share.stderr < 0.006


def test_the_share_in_holes_of_a_wide_prior_is_exact():
    """Posteriors near 0 alone: the prior's draws beyond the radius that holds 99% of them are in holes."""
    N = 2000
    loc = normal(N, 1) * 0.2

    def posterior(x):
        return dist.Normal(loc[x[..., 0].long()], 0.1).to_event(1)

    vae = VAE(StandardNormal(1).double(), lambda z: dist.Normal(z, 1.0).to_event(1), posterior)
    with seeded(0, CPU):
        held_out = dist.Normal(torch.zeros(N, 1).double(), math.sqrt(0.05)).sample()
        found = holes(vae, torch.arange(N).double()[:, None], held_out, vae.prior().sample((N,)))
    outside = 2 * scipy.stats.norm.sf(2.576 * math.sqrt(0.05))
    assert abs(found.share.mean - outside) < 4 * found.share.stderr
    assert outside > 0.5


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_holes_are_seen_between_posteriors_that_miss_each_other(scale):
    """Means uniform on a ring about the prior's middle, in 6 more latents standard normal: its middle is a hole."""
    N, L = 2000, 8
    loc = normal(2 * N, L, seed=5)
    loc[:, :2] *= 3 / loc[:, :2].norm(dim=1, keepdim=True)

    def posterior(x):
        widths = scale * (1 + 9 * (x[..., :1] % 7) / 6)  # some ten times wider than others
        return dist.Normal(loc[x[..., 0].long()], widths).to_event(1)

    vae = VAE(StandardNormal(L).double(), lambda z: dist.Normal(z, 1.0).to_event(1), posterior)
    index = torch.arange(2 * N).double()[:, None]
    with seeded(0, CPU):
        held_out, z = vae.posterior(index[N:]).sample(), vae.prior().sample((N,))
        found = holes(vae, index[:N], held_out, z)
    assert found.bandwidth > 0
    assert found.share.mean > 0.5
    assert (torch.tensor(found.worst)[:, :2].norm(dim=1) < 2.5).all()


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_classifier_works_in_either_default_precision(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = classifier_test(normal(100, 2) + 20, normal(100, 2, seed=1))
    finally:
        torch.set_default_dtype(before)
    assert found.effect.mean == 1.0


def test_the_error_of_a_share_is_that_of_repetitions():
    oracle = LinearGaussian.random(L=2, scale=1.0)
    vae = oracle.vae()
    x = oracle.draw(500)
    with seeded(0, CPU):
        found = [
            holes(vae, x, vae.posterior(oracle.draw(500, seed=10 + seed)).sample(), vae.prior().sample((500,))).share
            for seed in range(60)
        ]
    spread = np.std([share.mean for share in found])
    assert np.sqrt(np.mean([share.stderr**2 for share in found])) == pytest.approx(spread, rel=0.4)
