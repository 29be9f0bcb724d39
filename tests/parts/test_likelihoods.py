"""Conformance: what every likelihood must be, from one list."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from likelihood_cases import CASES, DENSITIES, MASSES, WORDS, one_value, real_line
from torch.testing import assert_close

from ppl_vae import data
from ppl_vae.parts.registry import LIKELIHOODS

OFF_SUPPORT = [(word, value) for word, case in CASES.items() for value in case.off]
SINGLE = [word for word in CASES if word != "color mixture"]  # pixels are independent, of channels too

# Probability that a correct sampler fails one test of it.
FALSE_ALARM = 1e-4
NUM_SAMPLES = 20_000


def test_every_likelihood_of_the_command_line_is_in_the_list():
    assert {word: case.make for word, case in WORDS.items()} == {
        word: part.load() for word, part in LIKELIHOODS.items()
    }


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def likelihood(case):
    torch.manual_seed(0)
    return case.make(case.event)


# --- What it says of itself ---


@pytest.mark.parametrize("word", CASES)
def test_the_measure_is_mass_where_values_can_be_counted(word):
    assert CASES[word].make(CASES[word].event).measure == ("mass" if word in MASSES else "density")


def test_what_it_asks_for_is_on_its_support(likelihood):
    some = {
        data.BINARY: [0.0, 1.0],
        data.LEVELS: [0.0, 255.0],
        data.UNIT_INTERVAL: [2.0**-33, 1 - 2.0**-24],
        data.REAL: [-1e6, 1e6],
        data.COUNTS: [0.0, 1e4],
    }
    assert likelihood.support.check(torch.tensor(some[likelihood.data_kind])).all()


# --- Shapes ---


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_batch_and_event_shapes_are_those_of_features_and_images(case, likelihood, batch):
    distribution = likelihood(torch.randn(*batch, likelihood.num_features))
    assert tuple(distribution.batch_shape) == batch
    assert tuple(distribution.event_shape) == case.event == likelihood.event_shape
    assert tuple(distribution.log_prob(distribution.sample()).shape) == batch
    assert tuple(distribution.mean.shape) == (*batch, *case.event)


@pytest.mark.parametrize("event", [(7,), (1, 3, 2), (3, 2, 2)])
@pytest.mark.parametrize("word", WORDS)
def test_any_event_shape_will_do(word, event):
    likelihood = WORDS[word].make(event)
    distribution = likelihood(torch.randn(5, likelihood.num_features))
    assert tuple(distribution.event_shape) == event
    assert distribution.log_prob(distribution.sample()).isfinite().all()


def test_samples_are_on_the_support(likelihood):
    x = likelihood(3 * torch.randn(4, likelihood.num_features)).sample((100,))
    assert likelihood.support.check(x).all()


def test_samples_carry_no_gradient(likelihood):
    h = torch.randn(4, likelihood.num_features, requires_grad=True)
    assert not likelihood(h).sample().requires_grad


def test_a_distribution_expands_to_a_larger_batch(case, likelihood):
    h = torch.randn(4, likelihood.num_features)
    x = likelihood(h).sample((3,))
    expanded = likelihood(h).expand((3, 4))
    assert tuple(expanded.sample().shape) == (3, 4, *case.event)
    assert_close(expanded.log_prob(x), likelihood(h).log_prob(x))


def test_images_broadcast_against_particles(likelihood):
    h = torch.randn(3, 4, likelihood.num_features)
    x = likelihood(h[0]).sample()
    loop = torch.stack([likelihood(h_s).log_prob(x) for h_s in h])
    assert_close(likelihood(h).log_prob(x), loop)


# --- Probability ---


@pytest.mark.parametrize("word", SINGLE)
def test_pixels_are_independent_and_summed(word):
    """Features come plane by plane, so those of pixel d are every D-th."""
    case = CASES[word]
    likelihood, single = case.make(case.event).double(), case.make((1,)).double()
    D = math.prod(case.event)
    h = case.draw(4)
    x = likelihood(h).sample()
    loop = sum(single(h[:, d::D]).log_prob(x.flatten(1)[:, d : d + 1]) for d in range(D))
    assert_close(likelihood(h).log_prob(x), loop, rtol=1e-12, atol=1e-12)


def test_positions_of_a_color_mixture_are_independent_and_summed():
    case = CASES["color mixture"]
    likelihood, single = case.make((3, 2, 2)).double(), case.make((3, 1, 1)).double()
    h = case.draw(4, event=(3, 2, 2))
    x = likelihood(h).sample()
    loop = sum(single(h[:, p::4]).log_prob(x[:, :, p // 2 : p // 2 + 1, p % 2 : p % 2 + 1]) for p in range(4))
    assert_close(likelihood(h).log_prob(x), loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("word", [word for word in MASSES if word in SINGLE])
def test_mass_sums_to_one_over_the_support(word):
    distribution = one_value(word)
    log_mass = distribution.log_prob(torch.tensor(CASES[word].values, dtype=torch.double)[:, None, None])
    assert_close(log_mass.logsumexp(0), torch.zeros(6, dtype=torch.double), rtol=0, atol=1e-10)


def test_mass_of_a_color_mixture_sums_to_one_over_all_colors():
    """Scales of a third of a level: within 15 levels of the means is all but 1e-12 of the mass."""
    likelihood = CASES["color mixture"].make((3, 1, 1)).double()
    h = torch.zeros(20, dtype=torch.double)
    h[:2] = torch.tensor([0.3, -0.4])
    h[2:8] = torch.tensor([0.1, 0.12, -0.2, -0.25, 0.5, 0.45])
    h[8:14] = -5.0
    h[14:] = torch.tensor([0.5, -0.7, 0.8, 0.1, -0.6, 0.9])
    distribution = likelihood(h)
    p = distribution.sample((200,)).flatten(1)
    axes = [torch.arange(float(low) - 15, float(high) + 16) for low, high in zip(p.amin(0), p.amax(0), strict=True)]
    images = torch.cartesian_prod(*axes).double().reshape(-1, 3, 1, 1)
    assert float(distribution.log_prob(images).logsumexp(0)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("word", DENSITIES)
def test_density_integrates_to_one(word):
    distribution = one_value(word)
    x, weight = real_line(word)
    integral = (distribution.log_prob(x[:, None, None]).exp() * weight[:, None]).sum(0)
    assert_close(integral, torch.ones(6, dtype=torch.double), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("word", "value"), OFF_SUPPORT)
def test_values_off_the_support_raise(word, value):
    likelihood = CASES[word].make(CASES[word].event)
    distribution = likelihood(torch.zeros(likelihood.num_features))
    x = distribution.sample()
    x.flatten()[-2] = value
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(x)


# --- Samples and mean ---


def _samples(word):
    """A distribution of one value and samples of it: (num, features)."""
    torch.manual_seed(0)
    distribution = one_value(word, 4)
    return distribution, distribution.sample((NUM_SAMPLES,))


@pytest.mark.parametrize("word", [word for word in MASSES if word in SINGLE])
def test_samples_of_a_mass_agree_with_it(word):
    """Pearson's chi-square, values pooled until each cell expects at least 10."""
    distribution, x = _samples(word)
    values = torch.tensor(CASES[word].values, dtype=torch.double)
    mass = distribution.log_prob(values[:, None, None]).exp()
    for i in range(4):
        expected = NUM_SAMPLES * mass[:, i].numpy()
        seen = np.bincount(x[:, i, 0].long().numpy(), minlength=len(values))
        cell = np.unique(np.floor((np.cumsum(expected) - expected / 2) / 10), return_inverse=True)[1]
        expected, seen = np.bincount(cell, expected), np.bincount(cell, seen)
        kept = expected > 5
        assert seen[~kept].sum() < 40
        expected, seen = (
            np.append(expected[kept], expected[~kept].sum() + 1e-9),
            np.append(seen[kept], seen[~kept].sum()),
        )
        statistic = ((seen - expected) ** 2 / np.maximum(expected, 5)).sum()
        assert scipy.stats.chi2.sf(statistic, max(len(expected) - 1, 1)) > FALSE_ALARM


@pytest.mark.parametrize("word", DENSITIES)
def test_samples_of_a_density_agree_with_it(word):
    """Kolmogorov and Smirnov's, against the integral of the density."""
    distribution, samples = _samples(word)
    x, weight = real_line(word)
    density = distribution.log_prob(x[:, None, None]).exp() * weight[:, None]
    cdf = (density.cumsum(0) - density / 2).numpy()
    for i in range(4):
        test = scipy.stats.kstest(samples[:, i, 0].numpy(), lambda v, i=i: np.interp(v, x.numpy(), cdf[:, i]))
        assert test.pvalue > FALSE_ALARM


@pytest.mark.parametrize("word", CASES)
def test_the_mean_is_that_of_samples(word):
    distribution, x = _samples(word)
    stderr = x.std(0) / math.sqrt(NUM_SAMPLES)
    assert ((x.mean(0) - distribution.mean).abs() <= 5 * stderr + 1e-9).all()


# --- Fitted marginals ---


def _images(case, num=300):
    torch.manual_seed(0)
    return case.make(case.event)(case.draw().float()).sample((num,))


@torch.no_grad()
def test_fitted_marginals_are_better_than_features_of_zero(case):
    x = _images(case)
    likelihood = case.make(case.event)
    before = likelihood(torch.zeros(likelihood.num_features)).log_prob(x).mean()
    assert likelihood(likelihood.fit_marginals(x)).log_prob(x).mean() > before


@pytest.mark.parametrize("word", [word for word, case in CASES.items() if case.fits_peak])
@torch.no_grad()
def test_fitted_marginals_are_where_their_likelihood_peaks(word):
    case = CASES[word]
    x = _images(case, 4000)
    likelihood = case.make(case.event)
    at = likelihood.fit_marginals(x)

    def total(h):
        return float(likelihood(h).log_prob(x).sum(dtype=torch.double))

    best = total(at)
    for d in range(likelihood.num_features):
        step = torch.zeros(likelihood.num_features)
        step[d] = 0.2
        assert best > max(total(at + step), total(at - step))
    for parameter in likelihood.parameters():
        for step in (0.05, -0.05):
            parameter.add_(step)
            assert total(at) < best
            parameter.sub_(step)


def test_marginals_of_constant_pixels_are_finite(case, likelihood):
    low, high = (0.0, 1.0) if likelihood.data_kind != data.UNIT_INTERVAL else (0.001, 0.999)
    x = torch.full((10, *case.event), low)
    x[:5].flatten(1)[:, 0] = high
    x.flatten(1)[:, 4] = high
    h = likelihood.fit_marginals(x)
    assert tuple(h.shape) == (likelihood.num_features,)
    assert h.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in likelihood.state_dict().values())
    assert likelihood(h).log_prob(x).isfinite().all()
