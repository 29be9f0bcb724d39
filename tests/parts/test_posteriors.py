"""Guides: maps from a feature to a scale, and the normal ones, against float64 and their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from scipy.stats import multivariate_normal
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, log_weights
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import MAX_LOG_SCALE, Delta, DiagonalNormal, FullNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.parts.registry import SCALE_MAPS

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
def test_a_log_scale_in_single_precision_is_that_of_double_precision(name):
    features = [h for h in FEATURES if name != "softplus" or h > -44]  # below which its scale is held
    found = SCALE_MAPS[name].load()(torch.tensor(features)).double().numpy()
    np.testing.assert_allclose(found, EXACT[name](np.array(features)), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_the_gradient_at_zero_is_what_is_documented(name):
    h = torch.zeros((), dtype=torch.double, requires_grad=True)
    SCALE_MAPS[name].load()(h).backward()
    assert float(h.grad) == pytest.approx(SLOPE_AT_ZERO[name], rel=1e-12)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_gradients_are_finite_for_whatever_feature(name):
    h = torch.tensor([-1e30, -1e4, -104.0, -88.0, 0.0, 88.0, 1e4, 1e30], requires_grad=True)
    SCALE_MAPS[name].load()(h).sum().backward()
    assert h.grad.isfinite().all()


def _kl(name, feature):
    """KL(q || N(0, 1)) of one latent with mean 0."""
    q = DiagonalNormal(1, log_scale=SCALE_MAPS[name].load())(torch.tensor([0.0, feature])).base_dist
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).item()


@pytest.mark.parametrize(("name", "finite"), [("bounded", True), ("softplus", True), ("exp", False)])
def test_where_exp_overflows_the_other_maps_still_have_a_kl(name, finite):
    """In float32 exp(100) is infinite."""
    assert math.isfinite(_kl(name, 100.0)) == finite


@pytest.mark.parametrize("feature", [-44.0, -50.0, -104.0, -1e4])
def test_the_softplus_map_never_gives_a_scale_without_a_kl(feature):
    """KL(N(0, s^2) || N(0, 1)) = -log s + (s^2 - 1) / 2, by torch from s^2, which is 0 in float32 below s = 1e-23."""
    s = max(1.1e-19, math.exp(feature) * math.expm1(1.0))
    assert _kl("softplus", feature) == pytest.approx(-math.log(s) - 0.5, rel=1e-5)


@pytest.mark.parametrize("name", SCALE_MAPS)
def test_a_diagonal_normal_takes_its_scales_from_the_map(name):
    h = torch.tensor([[0.3, -2.0, 0.5, -1.0], [1.0, 0.0, 2.0, 0.0]])
    q = DiagonalNormal(2, log_scale=SCALE_MAPS[name].load())(h)
    assert_close(q.mean, h[:, :2])
    np.testing.assert_allclose(q.stddev.numpy(), np.exp(EXACT[name](h[:, 2:].numpy())), rtol=1e-5)


def test_a_deterministic_guide_is_at_its_features_and_nowhere_else():
    h = torch.randn(4, 3)
    q = Delta(3)(h)
    assert (tuple(q.batch_shape), tuple(q.event_shape)) == ((4,), (3,))
    assert torch.equal(q.sample((2,)), h.expand(2, 4, 3))
    assert torch.equal(q.variance, torch.zeros(4, 3))


# --- A full covariance ---


def _features(T, loc):
    """The features of N(loc, T T'), T (L, L) lower triangular: the inverse of what the docstring says."""
    L, scale = len(T), T.diagonal()
    row, column = torch.tril_indices(L, L, offset=-1)
    feature = MAX_LOG_SCALE * (scale.log() / MAX_LOG_SCALE).atanh()
    return torch.cat([loc, feature, math.sqrt(L) * (T / scale[:, None])[row, column]])


def _random_factor(L, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(L, L, generator=generator, dtype=torch.double).tril()
    return T - T.diagonal().diag() + T.diagonal().abs().add(0.1).diag()


@pytest.mark.parametrize("L", [1, 2, 5])
def test_a_full_normal_has_the_covariance_of_its_features(L):
    T, loc = _random_factor(L), torch.arange(L, dtype=torch.double)
    z = torch.randn(50, L, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    q = FullNormal(L).double()(_features(T, loc))
    expected = multivariate_normal(loc.numpy(), (T @ T.T).numpy()).logpdf(z.numpy())
    np.testing.assert_allclose(q.log_prob(z).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(), (7,), (3, 7)])
def test_the_density_of_an_own_draw_of_a_full_normal_is_that_of_its_value(shape):
    posterior = FullNormal(4).double()
    h = torch.randn(7, posterior.num_features, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    q = posterior(h).expand(shape) if len(shape) > 1 else posterior(h if shape else h[0])
    z = q.rsample((2,))
    assert z.shape == (2, *shape, 4)
    assert_close(q.log_prob(z), torch.distributions.MultivariateNormal(q.loc, scale_tril=q.scale_tril).log_prob(z))


def test_a_full_normal_close_to_singular_knows_the_density_of_its_draws_in_single_precision():
    """The triangular system that the value alone leaves loses every digit: its answer is not finite."""
    L = 40
    h = 30 * torch.randn(8, FullNormal(L).num_features, generator=torch.Generator().manual_seed(0))
    q = FullNormal(L)(h)
    torch.manual_seed(0)
    z = q.rsample()
    u = torch.distributions.Normal(0.0, 1.0)
    torch.manual_seed(0)
    noise = torch.normal(torch.zeros(8, L), torch.ones(8, L))
    expected = u.log_prob(noise).double().sum(-1) - 7 * (h[:, L : 2 * L].double() / 7).tanh().sum(-1)
    assert_close(q.log_prob(z).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(q.log_prob(z.clone()).double(), expected, rtol=0.1)


def _exact_kl(loc, T, prior_loc, prior_scale):
    """(tr(S^-1 C) + d' S^-1 d - L + log det S - log det C) / 2 with C = T T', S = diag(scale^2), by numpy."""
    C, S = T @ T.T, np.diag(prior_scale**2)
    d, precision = loc - prior_loc, np.linalg.inv(S)
    log_ratio = np.linalg.slogdet(S)[1] - np.linalg.slogdet(C)[1]
    return (np.trace(precision @ C) + d @ precision @ d - len(loc) + log_ratio) / 2


NORMAL_PRIORS = {
    "standard": (np.zeros(4), np.ones(4)),
    "diagonal": (np.array([0.3, -1.0, 2.0, 0.0]), np.array([0.5, 2.0, 1.0, 0.1])),
}


def _full_and_prior(name):
    """Three full normals, batch shape (3,), and a product of normals without a batch; the first with their numbers."""
    loc, scale = NORMAL_PRIORS[name]
    locs = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    factors = [_random_factor(4, seed=seed) for seed in range(3)]
    q = FullNormal(4).double()(torch.stack([_features(T, m) for T, m in zip(factors, locs, strict=True)]))
    expected = [_exact_kl(m.numpy(), T.numpy(), loc, scale) for T, m in zip(factors, locs, strict=True)]
    return q, dist.Normal(torch.from_numpy(loc), torch.from_numpy(scale)).to_event(1), np.array(expected)


@pytest.mark.parametrize("name", NORMAL_PRIORS)
def test_the_kl_of_a_full_normal_is_that_of_the_covariance_matrices(name):
    q, p, expected = _full_and_prior(name)
    np.testing.assert_allclose(torch.distributions.kl_divergence(q, p).numpy(), expected, rtol=1e-12)
    over_particles = torch.distributions.kl_divergence(q.expand((2, 3)), p.expand((2, 3)))
    np.testing.assert_allclose(over_particles.numpy(), np.stack([expected, expected]), rtol=1e-12)


def test_the_kl_of_a_full_normal_close_to_singular_holds_in_single_precision():
    L = 40
    h = 30 * torch.randn(8, FullNormal(L).num_features, generator=torch.Generator().manual_seed(0))
    q = FullNormal(L)(h)
    T, loc = q.scale_tril.double().numpy(), h[:, :L].double().numpy()
    log_det = 7 * np.tanh(h[:, L : 2 * L].double().numpy() / 7).sum(-1)
    expected = ((T**2).sum((1, 2)) + (loc**2).sum(1) - L) / 2 - log_det
    found = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(L), 1.0).to_event(1))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "p", [dist.Laplace(torch.zeros(4), 1.0).to_event(1), dist.Normal(torch.zeros(2, 4), 1.0).to_event(2)]
)
def test_the_kl_of_a_full_normal_is_refused_for_what_is_no_product_of_normals(p):
    q, _, _ = _full_and_prior("standard")
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(q, p)


def test_gradients_of_a_full_normal_are_finite_for_whatever_feature():
    h = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4])[torch.randint(5, (20, 65), generator=torch.manual_seed(0))]
    h.requires_grad_()
    q = FullNormal(10)(h)
    z = q.rsample()
    (q.log_prob(z).sum() + z.sum()).backward()
    assert z.isfinite().all()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("L", [1, 4])
def test_a_full_normal_of_no_features_is_the_prior(L):
    q = FullNormal(L)(torch.zeros(3, FullNormal(L).num_features))
    assert_close(q.covariance_matrix, torch.eye(L).expand(3, L, L), rtol=0, atol=0)
    assert torch.equal(q.mean, torch.zeros(3, L))


def test_the_draws_of_a_full_normal_have_its_covariance():
    """Each entry of the sample covariance in its standard error, sqrt((C_ij^2 + C_ii C_jj) / n)."""
    T = _random_factor(3)
    C = T @ T.T
    torch.manual_seed(0)
    z = FullNormal(3).double()(_features(T, torch.zeros(3, dtype=torch.double))).sample((200_000,))
    stderr = ((C.square() + C.diagonal()[:, None] * C.diagonal()) / len(z)).sqrt()
    assert ((z.T @ z / len(z) - C).abs() < 4.5 * stderr).all()


def test_a_full_normal_reaches_the_exact_evidence_where_the_posterior_is_correlated():
    """Every log-weight is then log p(x)."""
    exact = LinearGaussian.random(D=6, L=3, orthogonal=False)
    A, C = exact.posterior_map()
    encoder = MLP(6, FullNormal(3).num_features, hidden=()).double()
    with torch.no_grad():
        encoder.output.weight.zero_()[:3] = A
        encoder.output.bias.copy_(_features(torch.linalg.cholesky(C), -A @ exact.b))
    vae = exact.vae()
    full = VAE(StandardNormal(3).double(), vae.likelihood, Conditional(encoder, FullNormal(3)))
    x = exact.draw(20)
    log_w = log_weights(full.model, full.guide, x, 50)
    assert_close(log_w, exact.log_evidence(x).expand(50, 20), rtol=0, atol=1e-12)
    assert log_weights(vae.model, vae.guide, x, 50).std(0).min() > 0.01  # which no diagonal one does
