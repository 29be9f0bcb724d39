"""Guides: maps from a feature to a scale, against float64 and the closed forms that they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ppl_vae.build import SCALE_MAPS
from ppl_vae.posteriors import MAX_LOG_SCALE, Delta, DiagonalNormal

FEATURES = [-80.0, -30.0, -5.0, -1e-3, 0.0, 0.5, 3.0, 20.0, 80.0]

# log sigma in float64, by numpy; log softplus(a) = log(log1p(exp(a))), and for a below -30 it is a to rounding.
OFFSET = math.log(math.expm1(1.0))
EXACT = {
    "bounded": lambda h: 7 * np.tanh(h / 7),
    "exp": lambda h: h,
    "softplus": lambda h: np.log(np.log1p(np.exp(h + OFFSET))),
}
SLOPE_AT_ZERO = {"bounded": 1.0, "exp": 1.0, "softplus": 1 - math.exp(-1)}


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_a_feature_of_zero_is_the_scale_of_the_prior(name):
    assert float(SCALE_MAPS[name](torch.zeros(())).exp()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_a_log_scale_in_single_precision_is_that_of_double_precision(name):
    features = [h for h in FEATURES if name != "softplus" or h > -44]  # below which its scale is held
    found = SCALE_MAPS[name](torch.tensor(features)).double().numpy()
    np.testing.assert_allclose(found, EXACT[name](np.array(features)), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_a_scale_rises_with_its_feature(name):
    assert (SCALE_MAPS[name](torch.linspace(-20, 20, 101)).diff() > 0).all()


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_the_gradient_at_zero_is_what_is_documented(name):
    h = torch.zeros((), dtype=torch.double, requires_grad=True)
    SCALE_MAPS[name](h).backward()
    assert float(h.grad) == pytest.approx(SLOPE_AT_ZERO[name], rel=1e-12)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_gradients_are_finite_for_whatever_feature(name):
    h = torch.tensor([-1e30, -1e4, -104.0, -88.0, 0.0, 88.0, 1e4, 1e30], requires_grad=True)
    SCALE_MAPS[name](h).sum().backward()
    assert h.grad.isfinite().all()


def _kl(name, feature):
    """KL(q || N(0, 1)) of one latent with mean 0."""
    q = DiagonalNormal(1, log_scale=SCALE_MAPS[name])(torch.tensor([0.0, feature])).base_dist
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).item()


@pytest.mark.parametrize(("name", "finite"), [("bounded", True), ("softplus", True), ("exp", False)])
def test_where_exp_overflows_the_other_maps_still_have_a_kl(name, finite):
    """In float32 exp(100) is infinite."""
    assert math.isfinite(_kl(name, 100.0)) == finite


def test_the_bounded_map_has_the_bound_that_it_names():
    assert float(SCALE_MAPS["bounded"](torch.tensor(1e6))) == pytest.approx(MAX_LOG_SCALE)


@pytest.mark.parametrize("feature", [-44.0, -50.0, -104.0, -1e4])
def test_the_softplus_map_never_gives_a_scale_without_a_kl(feature):
    """KL(N(0, s^2) || N(0, 1)) = -log s + (s^2 - 1) / 2, by torch from s^2, which is 0 in float32 below s = 1e-23."""
    s = max(1.1e-19, math.exp(feature) * math.expm1(1.0))
    assert _kl("softplus", feature) == pytest.approx(-math.log(s) - 0.5, rel=1e-5)


def test_the_least_scale_of_the_softplus_map_has_a_normal_square():
    """A subnormal float32 is one of few digits, and some devices take it for 0."""
    scale = SCALE_MAPS["softplus"](torch.tensor(-1e4)).exp()
    assert float(scale.square()) >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_a_diagonal_normal_takes_its_scales_from_the_map(name):
    h = torch.tensor([[0.3, -2.0, 0.5, -1.0], [1.0, 0.0, 2.0, 0.0]])
    q = DiagonalNormal(2, log_scale=SCALE_MAPS[name])(h)
    assert_close(q.mean, h[:, :2])
    np.testing.assert_allclose(q.stddev.numpy(), np.exp(EXACT[name](h[:, 2:].numpy())), rtol=1e-5)


def test_a_deterministic_guide_is_at_its_features_and_nowhere_else():
    h = torch.randn(4, 3)
    q = Delta(3)(h)
    assert (tuple(q.batch_shape), tuple(q.event_shape)) == ((4,), (3,))
    assert torch.equal(q.sample((2,)), h.expand(2, 4, 3))
    assert torch.equal(q.variance, torch.zeros(4, 3))


def test_a_deterministic_guide_passes_gradients_to_its_features():
    h = torch.randn(4, 3, requires_grad=True)
    Delta(3)(h).rsample().sum().backward()
    assert torch.equal(h.grad, torch.ones(4, 3))
