"""Latents of images, their KL, traversals and planes, on linear Gaussian models where each has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from oracles import LinearGaussian
from torch.testing import assert_close

from ppl_vae.diagnostics.pictures import decode_plane, decode_traversals, latent_quantiles
from ppl_vae.evidence.moments import compute_moments, encode


@pytest.fixture
def oracle():
    return LinearGaussian.random()


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


# --- What latents move ---


def test_a_traversal_moves_one_latent_and_keeps_the_others(oracle):
    z, steps = torch.tensor([0.3, -0.2, 1.1], dtype=torch.double), torch.tensor([-3.0, 0.0, 3.0], dtype=torch.double)
    images = decode_traversals(oracle.vae(), z, [2, 0], steps)
    for row, latent in enumerate((2, 0)):
        for column, step in enumerate(steps):
            moved = z.clone()
            moved[latent] = step
            assert_close(images[row, column], oracle.W @ moved + oracle.b)


def test_a_traversal_is_in_scales_of_the_prior(oracle):
    vae = oracle.vae()
    loc, scale = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 2.0, 1.0]).double()
    vae.prior.loc, vae.prior.scale = loc, scale
    images = decode_traversals(vae, torch.zeros(3).double(), [1], torch.tensor([-1.0, 2.0]).double())
    assert_close(images[0], torch.stack([oracle.W[:, 1] * 0.0, oracle.W[:, 1] * 6.0]) + oracle.b)


def test_quantiles_of_a_normal_prior_are_exact():
    prior = dist.Normal(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])).to_event(1)
    exact = scipy.stats.norm.ppf((np.arange(15)[:, None] + 0.5) / 15, [0.0, 2.0], [1.0, 3.0])
    np.testing.assert_allclose(latent_quantiles(prior, 15), exact, atol=1e-5)


def test_a_plane_has_the_first_latent_along_its_columns():
    oracle = LinearGaussian.random(L=2)
    grid = torch.tensor([[-1.0, 3.0], [0.5, 1.0], [2.0, -2.0]], dtype=torch.double)
    images = decode_plane(oracle.vae(), grid)
    for row in range(3):
        for column in range(3):
            z = torch.stack([grid[column, 0], grid[row, 1]])
            assert_close(images[row, column], oracle.W @ z + oracle.b)
