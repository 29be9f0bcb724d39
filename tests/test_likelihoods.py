"""Conformance: what every likelihood must be, from one list."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from ppl_vae import build
from ppl_vae.likelihoods import Bernoulli

EVENT = (1, 2, 3)

# Each likelihood with its event, and all values that an image of a few pixels can take.
LIKELIHOODS = {"bernoulli": (Bernoulli(EVENT), [0.0, 1.0])}


def test_every_likelihood_of_the_command_line_is_in_the_list():
    assert LIKELIHOODS.keys() == build.LIKELIHOODS.keys()


@pytest.fixture(params=LIKELIHOODS)
def part(request):
    return LIKELIHOODS[request.param]


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_batch_and_event_shapes_are_those_of_features_and_images(part, batch):
    likelihood, _ = part
    distribution = likelihood(torch.randn(*batch, likelihood.num_features))
    assert tuple(distribution.batch_shape) == batch
    assert tuple(distribution.event_shape) == EVENT == likelihood.event_shape
    assert tuple(distribution.log_prob(distribution.sample()).shape) == batch


def test_pixels_are_independent_and_summed(part):
    likelihood, _ = part
    h = torch.randn(4, likelihood.num_features, dtype=torch.double)
    x = likelihood(h).sample()
    single = type(likelihood)((1,))
    loop = sum(single(h[:, d : d + 1]).log_prob(x.flatten(1)[:, d : d + 1]) for d in range(math.prod(EVENT)))
    assert_close(likelihood(h).log_prob(x), loop, rtol=1e-12, atol=0)


def test_mass_sums_to_one_over_all_images(part):
    likelihood, values = part
    images = torch.tensor(list(itertools.product(values, repeat=math.prod(EVENT))), dtype=torch.double)
    h = 3 * torch.randn(5, likelihood.num_features, dtype=torch.double)
    log_mass = torch.stack([likelihood(h).log_prob(image.reshape(EVENT)) for image in images])
    assert_close(log_mass.logsumexp(0), torch.zeros(5, dtype=torch.double), rtol=0, atol=1e-10)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, math.nan])
def test_values_off_the_support_raise(part, value):
    likelihood, _ = part
    x = torch.zeros(EVENT)
    x[0, 1, 1] = value
    with pytest.raises(ValueError, match="support"):
        likelihood(torch.zeros(likelihood.num_features)).log_prob(x)


def test_marginal_features_are_where_the_likelihood_of_the_marginals_peaks(part):
    likelihood, _ = part
    torch.manual_seed(0)
    x = likelihood(torch.linspace(-2, 2, likelihood.num_features)).sample((4000,))
    at = likelihood.marginal_features(x)

    def total(h):
        return float(likelihood(h).log_prob(x).sum())

    for d in range(likelihood.num_features):
        step = torch.zeros(likelihood.num_features)
        step[d] = 0.2
        assert total(at) > max(total(at + step), total(at - step))


def test_marginal_features_of_constant_pixels_are_finite(part):
    likelihood, _ = part
    assert likelihood.marginal_features(torch.zeros(10, *EVENT)).isfinite().all()
    assert likelihood.marginal_features(torch.ones(10, *EVENT)).isfinite().all()


def test_bernoulli_agrees_with_scipy():
    h = torch.linspace(-6, 6, 6, dtype=torch.double)
    x = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.double)
    expected = scipy.stats.bernoulli(1 / (1 + (-h).exp().numpy())).logpmf(x.numpy()).sum()
    assert float(Bernoulli((6,))(h).log_prob(x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("logit", [30.0, 80.0, 500.0])
def test_bernoulli_keeps_value_and_gradient_at_extreme_logits_in_float32(logit):
    h = torch.tensor([logit, -logit], requires_grad=True)
    log_p = Bernoulli((2,))(h).log_prob(torch.tensor([0.0, 1.0]))
    assert_close(log_p, torch.tensor(-2 * logit))
    assert_close(torch.autograd.grad(log_p, h)[0], torch.tensor([-1.0, 1.0]))
