"""Simulation-based calibration, against guides that are exact and guides whose error is known."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from scipy import stats
from torch.testing import assert_close

from ppl_vae import VAE
from ppl_vae.evidence import guide_calibration
from ppl_vae.evidence.guide_calibration import (
    Ranks,
    adjust_p_values,
    bin_edges,
    cumulative_band,
    estimate_shape,
    judge,
    rank_p_values,
)
from ppl_vae.runtime.global_state import seeded

CPU = torch.device("cpu")


def ranked(vae, *, seed=0, num_simulations=1000, num_draws=99, **options):
    with seeded(seed, CPU):
        return guide_calibration.compute_ranks(vae, num_simulations=num_simulations, num_draws=num_draws, **options)


def uniform_ranks(num_simulations, num_draws, *, latents=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_draws + 1, (num_simulations, latents + 1), generator=generator)
    return Ranks(drawn[:, :-1], drawn[:, -1], num_draws)


def prior_as_guide():
    """q(z | x) = p(z), which knows nothing of x."""
    vae = LinearGaussian.random().vae()
    return VAE(vae.prior, vae.likelihood, lambda x: vae.prior().expand((len(x),)))


# --- Ranks ---


def test_ranks_are_counts_of_draws_below_the_truth():
    oracle = LinearGaussian.random()
    vae, N, M = oracle.vae(widen=1.3), 40, 7
    found = ranked(vae, num_simulations=N, num_draws=M)
    with seeded(0, CPU), torch.no_grad():  # the same draws, in the order of the program
        z_true = vae.prior().sample((N,))
        first = z_true[:1] @ oracle.W.T + oracle.b
        torch.normal(first, oracle.scale)  # an image that says how large images are, and the guide's draw for it
        vae.posterior(first).sample((1,))
        x = torch.normal(z_true @ oracle.W.T + oracle.b, oracle.scale)
        z = vae.posterior(x).sample((M,)).numpy()
    z_true, x, W, b = z_true.numpy(), x.numpy(), oracle.W.numpy(), oracle.b.numpy()

    def log_joint(z):
        return stats.norm.logpdf(z).sum(-1) + stats.norm.logpdf(x, z @ W.T + b, oracle.scale).sum(-1)

    np.testing.assert_array_equal(found.latents, (z < z_true).sum(0))
    np.testing.assert_array_equal(found.log_joint, (log_joint(z) < log_joint(z_true)).sum(0))


def test_ties_are_broken_at_random():
    """Of a z that is one of three vectors, ranks would pile up if ties did not."""

    def prior():
        return dist.OneHotCategorical(logits=torch.zeros(3, dtype=torch.double))

    def likelihood(z):
        return dist.Bernoulli(logits=z @ torch.tensor([[2.0, -1.0], [-2.0, 0.5], [0.0, 1.0]]).double()).to_event(1)

    def posterior(x):
        each = torch.stack([likelihood(one).log_prob(x) for one in torch.eye(3, dtype=torch.double)], dim=-1)
        return dist.OneHotCategorical(logits=each)

    assert judge(ranked(VAE(prior, likelihood, posterior), num_simulations=2000)).p_value > 0.01


# --- p-values ---


@pytest.fixture(scope="module")
def p_values_of_the_exact_guide():
    """(100, 4): of a hundred small calibrations of the linear VAE whose guide is its posterior."""
    vae = LinearGaussian.random().vae()
    return torch.stack(
        [rank_p_values(ranked(vae, seed=seed, num_simulations=400, num_draws=63)) for seed in range(100)]
    )


def test_an_exact_guide_is_seldom_called_wrong(p_values_of_the_exact_guide):
    """At 5%: 100 calibrations would be called wrong more than 13 times once in a thousand seeds."""
    overall = torch.stack([adjust_p_values(p).min() for p in p_values_of_the_exact_guide])
    assert int((overall < 0.05).sum()) <= 13


@pytest.mark.parametrize("num_draws", [99, 100, 63, 10])
def test_the_p_value_is_chi_squares(num_draws):
    """Bins hold as many ranks as they do, whether or not their number divides M + 1."""
    found = uniform_ranks(700, num_draws)
    at = bin_edges(700, num_draws).numpy()
    expected = 700 * np.diff(at) / (num_draws + 1)
    right = [stats.chisquare(np.histogram(of_one, bins=at - 0.5)[0], expected).pvalue for of_one in found.all.numpy().T]
    assert_close(rank_p_values(found), torch.tensor(right, dtype=torch.double))


def test_adjusted_p_values_are_holms():
    """By hand: 4 x 0.01, then 3 x 0.02 = 0.06, then 2 x 0.025 = 0.05, raised to the one before, then 0.9."""
    p = torch.tensor([0.025, 0.01, 0.9, 0.02], dtype=torch.double)
    assert_close(adjust_p_values(p), torch.tensor([0.06, 0.04, 0.9, 0.06], dtype=torch.double))


# --- Guides that are wrong ---


@pytest.mark.parametrize("options", [{"widen": 0.7}, {"widen": 1.4}, {"shift": 0.5}, {"shift": -0.5}], ids=str)
def test_a_wrong_guide_is_caught(options):
    found = judge(ranked(LinearGaussian.random().vae(**options)))
    assert found.p_value < 1e-3
    assert "3 of 3 latents are off" in found.verdict


@pytest.mark.parametrize("widen", [0.5, 0.7, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("shift", [0.0, -0.8])
@pytest.mark.parametrize("num_draws", [3, 99])
def test_the_scale_is_that_of_the_guide(widen, shift, num_draws):
    """Exactly so for normals, shifted or not; of 60 numbers none is off by more than 4.5 errors."""
    found = estimate_shape(
        ranked(LinearGaussian.random().vae(widen=widen, shift=shift), num_draws=num_draws).latents, num_draws
    )
    assert (((found.scale - widen) / found.scale_stderr).abs() < 4.5).all(), found


@pytest.mark.thorough
def test_the_errors_of_scales_are_those_of_repeated_calibrations():
    """The standard deviation of 150 has an error of 6%."""
    vae = LinearGaussian.random().vae(widen=0.8, shift=0.4)
    shapes = [
        estimate_shape(ranked(vae, seed=seed, num_simulations=300, num_draws=19).latents, 19) for seed in range(150)
    ]
    spread = torch.stack([each.scale for each in shapes]).std(0)
    claimed = torch.stack([each.scale_stderr for each in shapes]).mean(0)
    assert_close(claimed / spread, torch.ones(3, dtype=torch.double), atol=0.2, rtol=0)


def test_the_error_of_the_mean_scale_knows_what_latents_have_to_do_with_each_other():
    """Of the same latent twice it is that of one."""
    found = ranked(LinearGaussian.random().vae(widen=0.8)).latents[:, :1]
    one, two = estimate_shape(found, 99), estimate_shape(found.repeat(1, 2), 99)
    assert two.mean_scale == pytest.approx(float(one.scale[0]))
    assert two.mean_scale_stderr == pytest.approx(float(one.scale_stderr[0]))


def test_the_prior_as_guide_is_found_out_by_the_joint_density():
    """The blind spot of ranks of z, which are calibrated: (z*, x) and (z, x) have the same marginals."""
    found = judge(ranked(prior_as_guide(), num_simulations=2000))
    assert float(found.adjusted_p_values[:-1].min()) > 0.01
    assert float(found.adjusted_p_values[-1]) < 1e-12
    assert "more probable than draws" in found.verdict


def test_latents_that_are_right_one_by_one_are_not_called_right_together():
    """Of a posterior with correlations, a diagonal guide with the marginals' scales."""
    oracle = LinearGaussian.random(orthogonal=False)
    found = judge(ranked(oracle.vae(), num_simulations=4000))
    assert float(found.adjusted_p_values[:-1].min()) > 0.01
    assert found.p_value < 0.01


# --- The band ---


def test_the_band_holds_uniform_ranks_as_often_as_it_says():
    """Of 2,000 calibrations at least 95%."""
    N, M = 500, 99
    t, lower, upper = cumulative_band(N, M)
    generator = np.random.default_rng(5)
    below = (generator.integers(M + 1, size=(2000, N, 1)) < np.round(t.numpy() * (M + 1))).mean(1)
    inside = ((below >= lower.numpy()) & (below <= upper.numpy())).all(1).mean()
    assert 0.95 < inside < 1
