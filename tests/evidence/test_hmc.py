"""Hamiltonian Monte Carlo against targets whose moments and distribution functions are known."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, Normal
from torch.testing import assert_close

from ppl_vae.evidence.chains import Point, leapfrog, point_at, transition

COVARIANCE = torch.tensor([[1.0, 0.9, 0.2], [0.9, 2.0, -0.3], [0.2, -0.3, 0.5]], dtype=torch.double)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)
CORRELATED = MultivariateNormal(MEAN, COVARIANCE)


def _banana(z):
    """z_1 ~ N(0, 1), z_2 | z_1 ~ N(z_1^2, 0.5^2)."""
    return Normal(0.0, 1.0).log_prob(z[..., 0]) + Normal(z[..., 0].square(), 0.5).log_prob(z[..., 1])


def _draws_of_banana(*shape):
    first = torch.randn(*shape, dtype=torch.double)
    return torch.stack([first, first.square() + 0.5 * torch.randn(*shape, dtype=torch.double)], dim=-1)


def _normal(loc, scale, z):
    return Normal(loc, scale).log_prob(z).sum(-1)


def _chain(terms, coefficients, z, *, step_size, num_transitions, num_leapfrogs=4):
    """Where the chains end, and the mean acceptance."""
    coefficients, scale = torch.tensor(coefficients, dtype=z.dtype), torch.ones(z.shape[1:], dtype=z.dtype)
    point, total = point_at(terms, z), 0.0
    for _ in range(num_transitions):
        point, acceptance = transition(
            partial(leapfrog, terms),
            coefficients,
            point,
            momentum=torch.randn_like(z),
            uniform=torch.rand_like(z[..., 0]),
            scale=scale,
            step_size=torch.full((z.shape[1],), step_size, dtype=z.dtype),
            num_leapfrogs=num_leapfrogs,
        )
        total += float(acceptance.mean()) / num_transitions
    return point, total


def test_a_correlated_normal_is_reached_from_elsewhere():
    torch.manual_seed(1)
    z = torch.full((4000, 2, 3), 3.0, dtype=torch.double)
    point, acceptance = _chain([CORRELATED.log_prob], [1.0], z, step_size=0.5, num_transitions=60)
    draws = point.z.flatten(0, 1)
    assert 0.5 < acceptance < 0.99  # an own test of nothing rejected, or nothing taken, would be none
    second = COVARIANCE + MEAN[:, None] * MEAN
    products = (draws[:, :, None] * draws[:, None]).flatten(1)
    for value, exact in ((draws, MEAN), (products, second.flatten())):
        stderr = value.std(0) / math.sqrt(len(value))
        assert ((value.mean(0) - exact).abs() < 4 * stderr).all()


@pytest.mark.parametrize("step_size", [0.3, 0.9], ids=["small steps", "steps of which half are rejected"])
def test_exact_draws_of_a_bent_target_stay_exact(step_size):
    torch.manual_seed(2)
    point, acceptance = _chain(
        [_banana], [1.0], _draws_of_banana(5000, 2), step_size=step_size, num_transitions=10, num_leapfrogs=3
    )
    assert acceptance < 0.97
    first, second = point.z.flatten(0, 1).unbind(-1)
    for value in (first, (second - first.square()) / 0.5):
        assert stats.kstest(value.numpy(), "norm").pvalue > 1e-3


def test_coefficients_weigh_the_terms():
    torch.manual_seed(3)
    terms = [partial(_normal, 0.0, 2.0), partial(_normal, 3.0, 1.0)]
    z = torch.zeros(8000, 1, 1, dtype=torch.double)
    point, _ = _chain(terms, [0.25, 0.75], z, step_size=0.4, num_transitions=30)
    precision = 0.25 / 4 + 0.75
    exact = Normal(0.75 * 3.0 / precision, precision**-0.5)
    assert stats.kstest(point.z.flatten().numpy(), lambda z: exact.cdf(torch.as_tensor(z)).numpy()).pvalue > 1e-3


def test_a_step_size_is_counted_in_scales():
    """The chain over z / scale, with the target stretched likewise, takes the very same decisions."""
    torch.manual_seed(5)
    scale = torch.tensor([[0.1, 5.0], [3.0, 0.7]], dtype=torch.double)
    u, noise = torch.randn(20, 2, 2, dtype=torch.double), torch.randn(20, 2, 2, dtype=torch.double)
    uniform = torch.rand(20, 2, dtype=torch.double)

    def moved(terms, z, scale):
        return transition(
            partial(leapfrog, terms),
            torch.ones(1, dtype=torch.double),
            point_at(terms, z),
            momentum=noise,
            uniform=uniform,
            scale=scale,
            step_size=torch.tensor([0.7, 0.9], dtype=torch.double),
            num_leapfrogs=3,
        )

    plain, a = moved([_banana], u, torch.ones_like(scale))
    stretched, b = moved([lambda z: _banana(z / scale)], u * scale, scale)
    assert_close(stretched.z / scale, plain.z)
    assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf], ids=["NaN", "no density", "infinite density"])
def test_a_place_without_a_finite_energy_is_never_taken(bad):
    torch.manual_seed(6)

    def half_normal(z):
        log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return torch.where(z[..., 0] > 0, log_p, torch.full_like(log_p, bad))

    z = torch.randn(2000, 1, 1, dtype=torch.double).abs()
    point, _ = _chain([half_normal], [1.0], z, step_size=0.5, num_transitions=10)
    assert isinstance(point, Point)
    assert (point.z > 0).all()
    assert stats.kstest(point.z.flatten().numpy(), "halfnorm").pvalue > 1e-3
