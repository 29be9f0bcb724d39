"""Effective noise: eigenvalues in its units against numpy, and predicted directions against trained linear VAEs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from likelihood_cases import CASES
from oracles import NormalFixed as UserNormal
from torch import nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional
from ppl_vae.diagnostics.likelihood import (
    compute_edge,
    compute_eigenvalues,
    has_location,
    live_directions,
    whiten_scores,
)
from ppl_vae.parts import likelihoods
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal

EIGENVALUES = torch.tensor([2.0, 1.4, 1.0, 0.7, 0.45, 0.3, 0.2, 0.12]).double()
D = len(EIGENVALUES)
SIGMA2 = 0.16


def noise_eigenvalues(family, x, **options):
    return compute_eigenvalues(whiten_scores(family, x, **options))


def edge_of(family, x, *, seed=0, **options):
    return compute_edge(whiten_scores(family, x, **options), seed=seed)


def rotation():
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.double)).Q


def gaussian_data(N=64):
    """(N, D) images of mean 0.3 whose covariance has exactly these eigenvalues, in the directions of ``rotation``."""
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(N)
    return white * EIGENVALUES.sqrt() @ rotation().T + 0.3


def binary_data(N=2000, pixels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(N, 1, generator=generator, dtype=torch.double)
    logits = 1.5 * z + torch.linspace(-1, 1, pixels).double()
    return torch.bernoulli(logits.sigmoid(), generator=generator)


# --- Eigenvalues in units of the noise ---


def test_normal_eigenvalues_are_those_of_the_covariance_over_sigma_squared():
    found = noise_eigenvalues(UserNormal((D,), math.sqrt(SIGMA2)), gaussian_data(), features=torch.zeros(D))
    assert_close(found, EIGENVALUES / SIGMA2)


def test_bernoulli_eigenvalues_are_those_of_the_correlation_matrix():
    x = binary_data(20_000)
    exact = np.linalg.eigvalsh(np.corrcoef(x.numpy().T))[::-1]
    np.testing.assert_allclose(noise_eigenvalues(likelihoods.Bernoulli((6,)), x), exact, rtol=1e-3)


def test_laplace_eigenvalues_are_those_of_the_signs():
    x, family = gaussian_data(2001), likelihoods.Laplace((D,))
    signs = np.sign(x.numpy() - np.median(x.numpy(), axis=0))
    exact = np.linalg.eigvalsh(np.cov(signs.T, bias=True))[::-1]
    np.testing.assert_allclose(noise_eigenvalues(family, x), exact, atol=0.05)


def test_fewer_images_than_pixels_give_the_same_eigenvalues():
    x = gaussian_data()[:5]
    found = noise_eigenvalues(UserNormal((D,), 1.0), x, features=torch.zeros(D))
    exact = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(found, exact[:5], atol=1e-12)


WITH_LOCATION = [word for word, case in CASES.items() if has_location(case.make(case.event))]
FITTED = [word for word in WITH_LOCATION if CASES[word].fits_peak and word != "normal-fixed"]


def drawn(case, N=2000):
    """A likelihood, and images (N, *E) of its own pixels, the same features for every image."""
    family = case.make(case.event).double()
    torch.manual_seed(0)
    return family, family(case.draw(1).expand(N, -1)).sample().detach()


@pytest.mark.parametrize("word", WITH_LOCATION)
def test_pixels_of_the_likelihood_itself_are_noise_of_one(word):
    """E[s^2] = -E[d2 log p / dh2] (Fisher's information), whatever the likelihood."""
    case = CASES[word]
    family, x = drawn(case)
    assert_noise_of_one(noise_eigenvalues(family, x, features=case.draw(1)[0]))


@pytest.mark.parametrize("word", FITTED)
def test_pixels_that_the_likelihood_was_fitted_to_are_noise_of_one(word):
    family, x = drawn(CASES[word])
    assert_noise_of_one(noise_eigenvalues(family, x))


def assert_noise_of_one(eigenvalues, N=2000):
    """Those of a sample covariance are within (1 +- sqrt(D / N))^2, and curvatures of skewed pixels are noisy too."""
    assert (eigenvalues.diff() <= 0).all()
    assert ((eigenvalues > 0.75) & (eigenvalues < 1.3)).all()


# --- Thresholds ---


def test_directions_above_the_threshold_are_counted():
    eigenvalues = torch.tensor([900.0, 50.0, 3.0, 1.5, 0.5])
    assert live_directions(eigenvalues) == 4
    assert live_directions(eigenvalues, beta=2) == 3
    assert live_directions(eigenvalues, beta=784) == 1


# --- The edge of chance ---


def coins(N=2000, pixels=200):
    return torch.bernoulli(torch.full((N, pixels), 0.5).double(), generator=torch.Generator().manual_seed(0))


def test_the_edge_of_independent_pixels_follows_marchenko_and_pastur():
    """(1 + sqrt(D / N))^2, the largest eigenvalue of a sample covariance of the identity."""
    for x in (coins(), coins(400, 800)):
        exact = (1 + math.sqrt(x.shape[1] / len(x))) ** 2
        assert edge_of(likelihoods.Bernoulli(x.shape[1:]), x) == pytest.approx(exact, rel=0.04)


def test_independent_pixels_have_hardly_any_direction_above_the_edge():
    """Though about half of them are above 1, the threshold."""
    x, family = coins(), likelihoods.Bernoulli((200,))
    eigenvalues = noise_eigenvalues(family, x)
    assert live_directions(eigenvalues) > 60
    assert live_directions(eigenvalues, edge=edge_of(family, x, seed=3)) <= 2


def test_one_factor_of_many_pixels_is_one_direction_above_the_edge():
    x, family = binary_data(2000, pixels=100), likelihoods.Bernoulli((100,))
    eigenvalues = noise_eigenvalues(family, x)
    assert live_directions(eigenvalues, edge=edge_of(family, x)) == 1
    assert live_directions(eigenvalues) > 1


def test_a_pixel_louder_than_the_noise_does_not_lift_the_edge():
    """Tied to no other, it is a direction all the same: the edge is that of pixels at the noise, near 1.21."""
    x = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x[:, 3] *= 3
    family, features = UserNormal((20,), 1.0), torch.zeros(20)
    assert float(noise_eigenvalues(family, x, features=features)[0]) > 8
    assert edge_of(family, x, features=features) == pytest.approx((1 + math.sqrt(20 / 2000)) ** 2, rel=0.08)


# --- Predicted, and trained ---


def linear_vae(x, L=D):
    """A linear VAE with a decoder, an encoder, and log-scales that are the same for every image."""
    torch.manual_seed(0)
    decoder, encoder = MLP(L, D, hidden=()).double(), MLP(D, 2 * L, hidden=()).double()
    with torch.no_grad():
        decoder.output.weight.copy_(0.3 * torch.randn(D, L))
        decoder.output.bias.copy_(x.mean(0))
        encoder.output.weight[:L] = 0.3 * torch.randn(L, D)
        encoder.output.weight[L:] = 0
    likelihood = Conditional(decoder, UserNormal((D,), math.sqrt(SIGMA2)).double())
    return VAE(StandardNormal(L).double(), likelihood, Conditional(encoder, DiagonalNormal(L)))


def trained(x, *, beta, reduction):
    """By full batches, reconstruction in closed form: E_q |x - y(z)|^2 = |x - y(m)|^2 + sum_l s_l^2 |w_l|^2."""
    vae, steps = linear_vae(x), 2500 if beta == 1.0 and reduction == "sum" else 1200  # more live, and slower to part
    output = vae.likelihood.net.output
    pixels = D if reduction == "mean" else 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        q = vae.posterior(x).base_dist
        s2 = q.scale.square()
        error = (x - output(q.loc)).square().sum(-1) + s2 @ output.weight.square().sum(0)
        kl = (q.loc.square() + s2 - 1 - s2.log()).sum(-1) / 2
        (error / (2 * SIGMA2 * pixels) + beta * kl).mean().backward()
        optimizer.step()
        schedule.step()
    return vae


def threshold(beta, reduction):
    return beta * (D if reduction == "mean" else 1)


TRAININGS = {
    "beta 1": {"beta": 1.0, "reduction": "sum"},
    "beta 2.3": {"beta": 2.3, "reduction": "sum"},
    "beta 5.3": {"beta": 5.3, "reduction": "sum"},
    "mean over pixels": {"beta": 1.0, "reduction": "mean"},
    "mean over pixels, beta 2": {"beta": 2.0, "reduction": "mean"},
}


BY_DEFAULT = ("beta 2.3", "mean over pixels")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.thorough) for name in TRAININGS],
)
def training(request):
    case = TRAININGS[request.param]
    options = {"beta": case["beta"], "reduction": case["reduction"]}
    return options, trained(gaussian_data(), **options)


def test_the_prediction_names_the_live_directions_of_a_trained_linear_vae(training):
    """W W' = sum over live d of (lambda_d - t sigma^2) u_d u_d', t the threshold: direction by direction."""
    options, vae = training
    t = threshold(**options)
    live = t * SIGMA2 < EIGENVALUES
    W, U = vae.likelihood.net.output.weight.detach(), rotation()
    expected = torch.where(live, EIGENVALUES - t * SIGMA2, torch.zeros(D).double())
    assert_close(U.T @ W @ W.T @ U, expected.diag(), rtol=0, atol=0.02)


def best_kl_of_a_bernoulli_vae(x, beta, steps=500):
    """The mean KL at the optimum of a VAE with one latent and a linear decoder; E_q by Gauss and Hermite's 16 nodes."""
    torch.manual_seed(0)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(16))
    weights = weights / weights.sum()
    decoder, encoder = nn.Linear(1, 6).double(), nn.Linear(6, 1).double()
    log_scale = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters(), log_scale], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        m, s = encoder(x), log_scale.exp()
        h = decoder((m + s * nodes)[..., None])  # (N, 16, 6)
        log_p = -torch.nn.functional.softplus(torch.where(x[:, None] > 0.5, -h, h)).sum(-1)
        kl = (m.square() + s.square() - 1 - 2 * log_scale).squeeze(-1) / 2
        (beta * kl - log_p @ weights).mean().backward()
        optimizer.step()
    return float(kl.mean().detach())


@pytest.mark.thorough
@pytest.mark.parametrize("ratio", [0.75, 1.25])
def test_a_bernoulli_vae_leaves_the_collapsed_state_where_predicted(ratio):
    x = binary_data(400)
    largest = float(noise_eigenvalues(likelihoods.Bernoulli((6,)), x)[0])
    kl = best_kl_of_a_bernoulli_vae(x, ratio * largest)
    assert (kl > 0.02) == (ratio < 1)
    assert (kl < 1e-3) == (ratio > 1)
