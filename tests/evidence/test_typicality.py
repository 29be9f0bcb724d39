"""What log p(x) says of another data set, against normals, scipy, and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence
from scipy import stats
from torch.testing import assert_close

from ppl_vae.evidence import evaluation
from ppl_vae.evidence.typicality import auroc, mix_prior_into_guide, typicality

ERRORS = 4.5


def normal(count, *, loc=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return loc + scale * torch.randn(count, generator=generator, dtype=torch.double)


def within(found, right):
    return abs(found.mean - right) < ERRORS * found.stderr


def is_claimed_error(values, errors):
    """Of repeated estimates: their spread is what each of them claims, up to 15%."""
    return abs(np.mean(errors) / np.std(values) - 1) < 0.15


# --- The scores ---


def scored(vae, x, *, num_particles=2000, **options):
    return evaluation.evaluate(vae, x, num_particles=num_particles, seed=0, **options)


def test_a_guarded_guide_scores_images_that_the_guide_sends_elsewhere():
    """Of a guide 30 scales off the posterior alone the bound lacks hundreds of nats, and of a guarded one little."""
    vae = bernoulli_vae(latent_dim=1)
    x = torch.bernoulli(torch.full((20, 12), 0.5, dtype=torch.double), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vae.posterior.net.output.bias[0] += 30.0
        right = quadrature_log_evidence(vae, x, latent_dim=1)
    assert (scored(vae, x).log_evidence < right - 100).all()
    assert_close(scored(mix_prior_into_guide(vae), x).log_evidence, right, atol=0.3, rtol=0)


def test_weights_of_a_guarded_guide_are_unbiased():
    """log p(x) in closed form, within errors of 20,000 particles, though neither part of the guide is the posterior."""
    oracle = LinearGaussian.random()
    x = oracle.draw(5)
    found = scored(mix_prior_into_guide(oracle.vae(widen=1.5, shift=0.5)), x, num_particles=20_000)
    assert ((found.log_evidence - oracle.log_evidence(x)).abs() < ERRORS * found.monte_carlo_stderr).all()


# --- AUROC ---


def test_auroc_is_mann_whitneys_statistic():
    low, high = normal(300, seed=1).round(decimals=1), normal(170, loc=0.4, seed=2).round(decimals=1)  # with ties
    right = stats.mannwhitneyu(high, low).statistic / (300 * 170)
    assert auroc(low, high).mean == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("loc", [-1.0, 0.0, 0.7, 2.0])
def test_auroc_of_two_normals_is_phi_of_their_distance(loc):
    found = auroc(normal(3000, seed=3), normal(2000, loc=loc, scale=2.0, seed=4))
    assert within(found, stats.norm.cdf(loc / math.sqrt(1 + 4)))


@pytest.mark.parametrize("loc", [0.0, 1.5])
def test_aurocs_error_is_that_of_repeated_samples(loc):
    found = [auroc(normal(80, seed=2 * i), normal(200, loc=loc, seed=2 * i + 1)) for i in range(400)]
    assert is_claimed_error([one.mean for one in found], [one.stderr for one in found])


def test_sets_that_do_not_overlap_have_an_auroc_of_one_with_an_error():
    found = auroc(normal(100), normal(50, loc=100.0))
    assert found.mean == 1
    assert found.stderr == pytest.approx(1 / 51)


# --- Both sets ---


def test_means_and_their_errors_are_those_of_the_two_sets():
    own, other = normal(400, loc=-90.0, seed=7), normal(100, loc=-200.0, scale=30.0, seed=8)
    found = typicality(own, other, dataset="other", num_particles=50)
    for estimate, values in ((found.own, own), (found.other, other)):
        assert estimate.mean == pytest.approx(float(values.mean()), abs=1e-9)
        assert estimate.stderr == pytest.approx(stats.sem(values), rel=1e-9)
        assert estimate.num_images == len(values)


def test_distance_tells_a_narrow_set_from_a_wide_one_where_density_does_not():
    """P(|a| < |b|) of normals of scales 1 and s about one mean is 2 atan(s) / pi."""
    found = typicality(normal(4000, seed=9), normal(4000, scale=3.0, seed=10), dataset="wide", num_particles=1)
    assert within(found.auroc_of_distance, 2 * math.atan(3.0) / math.pi)
    assert within(found.auroc_of_density, 0.5)
