"""log p of one value in float32 against scipy in float64: large values, extreme parameters, every family."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from likelihood_cases import WORDS
from torch.testing import assert_close

from ppl_vae.parts import likelihoods
from ppl_vae.parts.likelihoods.counts import StableNegativeBinomial, StablePoisson
from ppl_vae.runtime import capture

LARGEST_COUNT = 2.0**24  # beyond, float32 does not know every whole number
NATS = 1e-3
RELATIVE = 5e-7  # four units in the last place of float32, of log-masses so small that NATS is less


def double(x):
    return x.detach().double().numpy()


def check(log_p, expected):
    assert log_p.dtype == torch.float
    assert log_p.isfinite().all()
    np.testing.assert_array_less(abs(double(log_p) - expected), np.maximum(NATS, RELATIVE * abs(expected)))


# --- Counts ---


def poisson_log_mass(x, rate):
    return scipy.stats.poisson.logpmf(x, rate)


def negative_binomial_log_mass(x, mean, total):
    log_choose = scipy.special.gammaln(x + total) - scipy.special.gammaln(total) - scipy.special.gammaln(x + 1)
    return log_choose - total * np.log1p(mean / total) - x * np.log1p(total / mean)


def counts(mean, scale):
    """Counts from 0 to the largest, and around each mean to 9 scales. mean, scale: (N,) -> (V, N)."""
    everywhere = np.concatenate([np.arange(300.0), np.geomspace(300, LARGEST_COUNT, 200).round()])
    around = (mean + np.linspace(-9, 9, 37)[:, None] * scale).clip(0, LARGEST_COUNT).round()
    return np.concatenate([np.repeat(everywhere[:, None], len(mean), 1), around])


@pytest.fixture
def poissons():
    """Poisson distributions over the whole range of rates that features can give, and counts for each."""
    distribution = likelihoods.Poisson((200,))(torch.linspace(-80, 80, 200)).base_dist
    rate = double(distribution.rate)
    assert rate.min() < 4e-7
    assert rate.max() > 3.2e6
    return distribution, counts(rate, np.sqrt(rate))


@pytest.fixture
def negative_binomials():
    """Negative binomials over the whole range of means and total counts, and counts for each."""
    a, b = torch.cartesian_prod(torch.linspace(-80, 80, 30), torch.linspace(-40, 40, 15)).T
    distribution = likelihoods.NegativeBinomial((450,))(torch.cat([a, b])).base_dist
    mean, total = (np.exp(double(p)) for p in (distribution.log_mean, distribution.log_total))
    assert mean.max() > 3.2e6
    assert total.max() > 8000
    assert total.min() < 2e-4
    return distribution, counts(mean, np.sqrt(mean + mean**2 / total))


def test_the_log_mass_of_a_poisson_is_exact_at_every_rate_and_count(poissons):
    distribution, x = poissons
    check(distribution.log_prob(torch.tensor(x).float()), poisson_log_mass(x, double(distribution.rate)))


def test_the_log_mass_of_a_negative_binomial_is_exact_at_every_mean_total_and_count(negative_binomials):
    distribution, x = negative_binomials
    mean, total = (np.exp(double(p)) for p in (distribution.log_mean, distribution.log_total))
    check(distribution.log_prob(torch.tensor(x).float()), negative_binomial_log_mass(x, mean, total))


def test_the_gradient_of_a_poisson_is_count_over_rate_minus_one(poissons):
    distribution, x = poissons
    rate = distribution.rate.expand(x.shape).clone().requires_grad_()
    StablePoisson(rate).log_prob(torch.tensor(x).float()).sum().backward()
    np.testing.assert_allclose(double(rate.grad), x / double(rate) - 1, rtol=1e-6)


def test_gradients_of_a_negative_binomial_agree_with_its_derivatives(negative_binomials):
    distribution, x = negative_binomials
    parameters = [p.expand(x.shape).clone().requires_grad_() for p in (distribution.log_mean, distribution.log_total)]
    StableNegativeBinomial(*parameters).log_prob(torch.tensor(x).float()).sum().backward()
    m, r = (np.exp(double(p)) for p in parameters)
    by_mean = r * (x - m) / (r + m)
    digamma = scipy.special.digamma(r + x) - scipy.special.digamma(r)
    by_total = r * (digamma - np.log1p(m / r) + (m - x) / (r + m))
    np.testing.assert_allclose(double(parameters[0].grad), by_mean, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(double(parameters[1].grad), by_total, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("mean", [10.0, 1e4, 1e6, 3e6])
def test_masses_of_large_counts_sum_to_one(mean):
    total = 1000.0
    m, r = torch.tensor(mean), torch.tensor(total)
    for distribution, variance in (
        (StablePoisson(m), mean),
        (StableNegativeBinomial(m.log(), r.log()), mean + mean**2 / total),
    ):
        reach = 12 * math.sqrt(variance) + 50
        x = torch.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach)).float()
        assert float(distribution.log_prob(x).double().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_compiled_log_masses_are_exact(poissons, negative_binomials):
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)

    def log_masses(x, rate, y, log_mean, log_total):
        return StablePoisson(rate).log_prob(x), StableNegativeBinomial(log_mean, log_total).log_prob(y)

    (poisson, x), (negative_binomial, y) = poissons, negative_binomials
    parameters = [negative_binomial.log_mean, negative_binomial.log_total]
    arguments = [torch.tensor(x).float(), poisson.rate, torch.tensor(y).float(), *parameters]
    with pyro.validation_enabled(False):
        of_x, of_y = capture.compile_function(log_masses, arguments)(arguments)
    check(of_x, poisson_log_mass(x, double(poisson.rate)))
    check(of_y, negative_binomial_log_mass(y, *(np.exp(double(p)) for p in parameters)))


@pytest.mark.parametrize("word", ["poisson", "negative-binomial"])
def test_means_that_no_feature_gives_are_refused(word):
    family = WORDS[word].make((2,))
    x = torch.tensor([[5.0, 2.9e6]]).repeat(10_000, 1)
    assert_close(family(family.fit_marginals(x)).mean, torch.tensor([5.0, 2.9e6]), rtol=2e-4, atol=0)
    with pytest.raises(ValueError, match=r"mean of at most 3,000,000 .* got 9,9"):
        family.fit_marginals(x.clamp(max=1e6) + torch.tensor([0.0, 9e6]))


# --- Every other family ---


@pytest.mark.parametrize("size", [1, 5, 30])
@pytest.mark.parametrize("word", [word for word, case in WORDS.items() if case.formula])
def test_log_p_is_exact_at_large_values(word, size):
    """Values are samples, the ends of the support and, of real numbers, far from the location; units are 1 and 1e6."""
    torch.manual_seed(0)
    family = WORDS[word].make((500,))
    h = size * torch.randn(family.num_features)
    for unit in (1.0, 1e6) if hasattr(family, "unit") else (None,):
        if unit is not None:
            family.unit.fill_(unit)
        distribution = family(h)
        values = [distribution.sample(), *(torch.full((500,), v) for v in WORDS[word].extreme)]
        if unit is not None:
            values += [torch.full((500,), v) for v in (1e6, -1e8, LARGEST_COUNT)]
        for x in values:
            check(distribution.base_dist.log_prob(x), WORDS[word].formula(distribution.base_dist, double(x)))
