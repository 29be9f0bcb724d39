"""Codes of images, principal directions of codes, and quantiles of priors, each against an independent answer."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.testing import assert_close

from ppl_vae.diagnostics.pictures import find_principal_directions, latent_quantiles
from ppl_vae.evidence.moments import compute_moments, encode


@pytest.fixture
def small_passes(monkeypatch):
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 7)


def without_moments(loc, scale):
    """Normal(loc, scale), of which nothing but draws is known."""
    base = dist.Normal(torch.zeros(()), torch.ones(()))
    affine = dist.transforms.AffineTransform(torch.tensor(loc), torch.tensor(scale))
    return dist.TransformedDistribution(base.expand([len(loc)]).to_event(1), [affine])


# --- Codes ---


def test_images_are_where_the_exact_posterior_puts_them(oracle, small_passes):
    x = oracle.draw(20)
    A, _ = oracle.posterior_map()
    codes = encode(oracle.vae(), x)
    assert_close(codes.mean, (x - oracle.b) @ A.T)
    assert_close(codes.scale, oracle.guide_scale().expand(20, -1))


def test_moments_that_are_not_known_are_those_of_draws():
    torch.manual_seed(0)
    loc, scale = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    estimated = compute_moments(without_moments(loc.tolist(), scale.tolist()))
    assert ((estimated.mean - loc).abs() < 5 * scale / math.sqrt(200)).all()
    assert ((estimated.scale - scale).abs() < 5 * scale / math.sqrt(400)).all()


# --- Principal directions, and what they move ---


def test_principal_directions_are_the_eigenvectors_of_the_covariance():
    torch.manual_seed(0)
    codes = torch.randn(200, 5, dtype=torch.double) @ torch.randn(5, 5, dtype=torch.double) + 3
    found = find_principal_directions(codes, 3)
    values, vectors = np.linalg.eigh(np.cov(codes.numpy(), rowvar=False, bias=True))
    np.testing.assert_allclose(found.scale.square(), values[::-1][:3])
    np.testing.assert_allclose(found.share, values[::-1][:3] / values.sum())
    assert_close((found.directions * torch.tensor(vectors.T[::-1][:3].copy())).sum(1).abs(), torch.ones(3).double())
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()
    assert_close(found.project(codes).square().mean(0), found.scale.square())


def test_only_the_latents_that_are_moved_have_a_part_in_directions():
    codes = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 100, 100])
    found = find_principal_directions(codes, 10, num_moved=3)
    assert found.directions.shape == (3, 5)
    assert not found.directions[:, 3:].any()
    assert_close(found.share.sum(), torch.tensor(1.0))


def test_the_central_code_is_the_nearest_in_standard_deviations():
    """Along the first direction the scale is 10, and along the second 1: a step of 2 there is farther than one of 5."""
    codes = torch.tensor([[10.0, 0], [-10, 0], [0, 1], [0, -1]]).repeat(100, 1)
    codes = torch.cat([codes, torch.tensor([[0.0, 1.5], [5.0, 0.0]])])
    assert find_principal_directions(codes, 2).find_central(codes) == len(codes) - 1


@pytest.mark.parametrize("codes", [torch.full((7, 3), 0.3), torch.randn(1, 3), torch.zeros(2, 1)], ids=len)
def test_codes_that_do_not_vary_have_directions_that_move_nothing(codes):
    found = find_principal_directions(codes, 4)
    assert_close(found.scale, torch.zeros(len(found.scale)), atol=1e-6, rtol=0)
    assert 0 <= found.find_central(codes) < len(codes)


def test_quantiles_of_a_normal_prior_are_exact():
    prior = dist.Normal(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])).to_event(1)
    exact = scipy.stats.norm.ppf((np.arange(15)[:, None] + 0.5) / 15, [0.0, 2.0], [1.0, 3.0])
    np.testing.assert_allclose(latent_quantiles(prior, 15), exact, atol=1e-5)
