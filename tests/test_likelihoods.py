"""Conformance: what every likelihood must be, from one list."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.testing import assert_close

from ppl_vae import build
from ppl_vae.likelihoods import Bernoulli, Normal

EVENT = (1, 2, 3)

# Each likelihood, values that are off its support, and for a mass all values that a pixel can take.
LIKELIHOODS = {
    "bernoulli": (Bernoulli, [0.5, -1.0, 2.0, math.nan], [0.0, 1.0]),
    "normal": (Normal, [math.nan], None),
}
OFF_SUPPORT = [(word, value) for word, (_, off, _) in LIKELIHOODS.items() for value in off]
MASSES = [word for word, (_, _, values) in LIKELIHOODS.items() if values is not None]
DENSITIES = [word for word in LIKELIHOODS if word not in MASSES]


def test_every_likelihood_of_the_command_line_is_in_the_list():
    assert {word: kind for word, (kind, _, _) in LIKELIHOODS.items()} == build.LIKELIHOODS


@pytest.mark.parametrize("word", LIKELIHOODS)
def test_the_measure_is_mass_where_values_can_be_counted(word):
    assert LIKELIHOODS[word][0].measure == ("mass" if word in MASSES else "density")


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return LIKELIHOODS[request.param][0](EVENT)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_batch_and_event_shapes_are_those_of_features_and_images(likelihood, batch):
    distribution = likelihood(torch.randn(*batch, likelihood.num_features))
    assert tuple(distribution.batch_shape) == batch
    assert tuple(distribution.event_shape) == EVENT == likelihood.event_shape
    assert tuple(distribution.log_prob(distribution.sample()).shape) == batch


def test_pixels_are_independent_and_summed(likelihood):
    h = torch.randn(4, likelihood.num_features, dtype=torch.double)
    x = likelihood(h).sample()
    single = type(likelihood)((1,))
    loop = sum(single(h[:, d : d + 1]).log_prob(x.flatten(1)[:, d : d + 1]) for d in range(math.prod(EVENT)))
    assert_close(likelihood(h).log_prob(x), loop, rtol=1e-12, atol=0)


@pytest.mark.parametrize("word", MASSES)
def test_mass_sums_to_one_over_all_images(word):
    kind, _, values = LIKELIHOODS[word]
    likelihood = kind(EVENT)
    images = torch.tensor(list(itertools.product(values, repeat=math.prod(EVENT))), dtype=torch.double)
    h = 3 * torch.randn(5, likelihood.num_features, dtype=torch.double)
    log_mass = torch.stack([likelihood(h).log_prob(image.reshape(EVENT)) for image in images])
    assert_close(log_mass.logsumexp(0), torch.zeros(5, dtype=torch.double), rtol=0, atol=1e-10)


@pytest.mark.parametrize("word", DENSITIES)
@pytest.mark.parametrize("log_scale", [-2.0, 0.0, 1.5])
def test_density_integrates_to_one_over_a_pixel(word, log_scale):
    likelihood = LIKELIHOODS[word][0]((1,)).double()
    with torch.no_grad():
        likelihood.log_scale.fill_(log_scale)
        h = torch.tensor([0.7], dtype=torch.double)
        integral, _ = scipy.integrate.quad(
            lambda x: float(likelihood(h).log_prob(torch.tensor([x], dtype=torch.double)).exp()), -60, 60, points=[0.7]
        )
    assert integral == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("word", "value"), OFF_SUPPORT)
def test_values_off_the_support_raise(word, value):
    likelihood = LIKELIHOODS[word][0](EVENT)
    x = torch.zeros(EVENT)
    x[0, 1, 1] = value
    with pytest.raises(ValueError, match="support"):
        likelihood(torch.zeros(likelihood.num_features)).log_prob(x)


@torch.no_grad()
def test_fitted_marginals_are_where_their_likelihood_peaks(likelihood):
    torch.manual_seed(0)
    x = likelihood(torch.linspace(-2, 2, likelihood.num_features)).sample((4000,))
    at = likelihood.fit_marginals(x)

    def total(h):
        return float(likelihood(h).log_prob(x).sum())

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


def test_marginals_of_a_constant_pixel_are_finite(likelihood):
    x = torch.zeros(10, *EVENT)
    x[:5, 0, 0, 0] = 1
    x[:, 0, 1, 1] = 1
    assert likelihood.fit_marginals(x).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in likelihood.parameters())


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


def test_a_normal_agrees_with_scipy():
    likelihood = Normal((6,)).double()
    with torch.no_grad():
        likelihood.log_scale.fill_(math.log(0.3))
    h = torch.linspace(-6, 6, 6, dtype=torch.double)
    x = torch.tensor([0.1, -3, 2, 0.5, 1, 6.2], dtype=torch.double)
    expected = scipy.stats.norm(h.numpy(), 0.3).logpdf(x.numpy()).sum()
    assert float(likelihood(h).log_prob(x).detach()) == pytest.approx(expected, rel=1e-12)


def test_a_normal_has_one_scale_for_all_pixels_and_learns_it():
    """At the maximum of its likelihood the scale is the root of the mean squared deviation of all pixels."""
    torch.manual_seed(0)
    likelihood, x = Normal(EVENT), 0.2 * torch.randn(500, *EVENT) + 3
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood(torch.full((6,), 3.0)).log_prob(x).mean()).backward()
        optimizer.step()
    assert_close(
        (likelihood.unit * likelihood.log_scale.exp()).detach(), (x - 3).square().mean().sqrt(), rtol=1e-3, atol=0
    )


def test_a_normal_refuses_data_without_any_spread():
    with pytest.raises(ValueError, match="x: expected pixels that vary, got the same image every time"):
        Normal(EVENT).fit_marginals(torch.ones(10, *EVENT))


def test_a_normal_fitted_in_another_unit_gives_the_same_density_up_to_the_unit():
    """With x in units of 1 / 1000, log p changes by D log 1000 for the same features, exactly."""
    torch.manual_seed(0)
    x, h = 2 * torch.randn(50, *EVENT) + 1, torch.randn(50, 6)
    small, large = Normal(EVENT), Normal(EVENT)
    offset = small.fit_marginals(x)
    assert_close(large.fit_marginals(1000 * x), offset, rtol=1e-5, atol=1e-5)
    difference = small(h + offset).log_prob(x) - large(h + offset).log_prob(1000 * x)
    assert_close(difference, torch.full((50,), 6 * math.log(1000)), rtol=1e-4, atol=0)
