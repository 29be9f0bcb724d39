"""Each likelihood against scipy.stats, in double precision, and what a single one of them promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch.testing import assert_close

from ppl_vae.parts import likelihoods
from ppl_vae.parts.likelihoods.base import planes, unbounded
from ppl_vae.runtime.numerics import bounded

EVENT = (1, 2, 3)
D = 6
FIRST, SECOND = np.linspace(-1.5, 2.0, D), np.linspace(1.2, -0.9, D)
LEVELS = np.array([0.0, 3, 100, 128, 254, 255])
COUNTS = np.array([0.0, 1, 2, 10, 100, 255])
REALS = np.array([0.1, -3, 2, 0.5, 1, 6.2])
INSIDE = np.array([1e-9, 0.01, 0.3, 0.5, 0.97, 1 - 1e-7])


def bound(h, limit):
    return limit * np.tanh(h / limit)


def log_p(likelihood, x, *features):
    """What the likelihood says, of its features plane by plane."""
    h = torch.tensor(np.concatenate(features), dtype=torch.double)
    return float(likelihood.double()(h).log_prob(torch.tensor(x).reshape(EVENT)).detach())


def logistic_levels(x, loc, log_scale):
    """log [F(x + 1/2) - F(x - 1/2)] by scipy, levels in units of level / 127.5 - 1; on the side of the smaller tail."""
    upper = np.where(x == 255, np.inf, ((x + 0.5) / 127.5 - 1 - loc) / np.exp(log_scale))
    lower = np.where(x == 0, -np.inf, ((x - 0.5) / 127.5 - 1 - loc) / np.exp(log_scale))
    flip = lower > 0
    upper, lower = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
    return np.log(scipy.stats.logistic.cdf(upper) - scipy.stats.logistic.cdf(lower))


def test_bernoulli_agrees_with_scipy():
    x = np.array([0.0, 1, 0, 1, 1, 0])
    expected = scipy.stats.bernoulli(scipy.special.expit(FIRST)).logpmf(x).sum()
    assert log_p(likelihoods.Bernoulli(EVENT), x, FIRST) == pytest.approx(expected, rel=1e-12)


def test_a_discretized_logistic_agrees_with_scipy():
    expected = logistic_levels(LEVELS, FIRST, -3 + bound(SECOND, 4)).sum()
    assert log_p(likelihoods.DiscretizedLogistic(EVENT), LEVELS, FIRST, SECOND) == pytest.approx(expected, rel=1e-10)


def test_a_mixture_of_discretized_logistics_agrees_with_scipy():
    rng = np.random.default_rng(0)
    logits, locs, features = rng.normal(size=(3, 4, D))
    log_weights = scipy.special.log_softmax(logits, axis=0)
    expected = scipy.special.logsumexp(log_weights + logistic_levels(LEVELS, locs, -3 + bound(features, 4)), axis=0)
    likelihood = likelihoods.DiscretizedLogisticMixture(EVENT, components=4)
    found = log_p(likelihood, LEVELS, logits.ravel(), locs.ravel(), features.ravel())
    assert found == pytest.approx(expected.sum(), rel=1e-10)


def test_a_color_mixture_agrees_with_a_loop_over_positions_components_and_colors():
    rng = np.random.default_rng(0)
    K, H, W = 3, 2, 2
    logits, locs = rng.normal(size=(K, H, W)), 0.5 * rng.normal(size=(3, K, H, W))
    features, c = rng.normal(size=(3, K, H, W)), rng.normal(size=(3, K, H, W))
    x = rng.integers(0, 256, size=(3, H, W)).astype(float)
    x[:, 0, 0] = 0, 255, 128
    t, coefficient = x / 127.5 - 1, np.tanh(c)
    total = 0.0
    for i, j in itertools.product(range(H), range(W)):
        terms = []
        for k in range(K):
            loc = locs[:, k, i, j].copy()
            loc[1] += coefficient[0, k, i, j] * t[0, i, j]
            loc[2] += coefficient[1, k, i, j] * t[0, i, j] + coefficient[2, k, i, j] * t[1, i, j]
            terms.append(logistic_levels(x[:, i, j], loc, -3 + bound(features[:, k, i, j], 4)).sum())
        total += scipy.special.logsumexp(scipy.special.log_softmax(logits[:, i, j]) + np.array(terms))
    h = torch.tensor(np.concatenate([p.ravel() for p in (logits, locs, features, c)]))
    likelihood = likelihoods.DiscretizedLogisticMixture((3, H, W), components=K)
    assert float(likelihood(h).log_prob(torch.tensor(x))) == pytest.approx(total, rel=1e-10)


def test_a_categorical_is_the_softmax_of_its_low_rank_logits():
    rng = np.random.default_rng(0)
    h, A, b = rng.normal(size=(3, D)), rng.normal(size=(3, 256)), rng.normal(size=256)
    likelihood = likelihoods.Categorical(EVENT, rank=3).double()
    with torch.no_grad():
        likelihood.A.copy_(torch.tensor(A))
        likelihood.b.copy_(torch.tensor(b))
    log_mass = scipy.special.log_softmax(h.T @ A + b, axis=1)
    expected = log_mass[np.arange(D), LEVELS.astype(int)].sum()
    assert log_p(likelihood, LEVELS, h.ravel()) == pytest.approx(expected, rel=1e-12)


def test_a_binomial_agrees_with_scipy():
    expected = scipy.stats.binom(255, scipy.special.expit(FIRST)).logpmf(LEVELS).sum()
    assert log_p(likelihoods.Binomial(EVENT), LEVELS, FIRST) == pytest.approx(expected, rel=1e-11)


def test_a_continuous_bernoulli_agrees_with_its_formula_over_its_integral():
    h = 4 * FIRST
    integrals = [scipy.integrate.quad(lambda x, a=a: math.exp(a * x), 0, 1, epsabs=0, epsrel=1e-13)[0] for a in h]
    expected = (h * INSIDE - np.log(integrals)).sum()
    assert log_p(likelihoods.ContinuousBernoulli(EVENT), INSIDE, h) == pytest.approx(expected, rel=1e-11)


def test_a_beta_agrees_with_scipy():
    mean, kappa = scipy.special.expit(bound(FIRST, 10)), np.exp(3 + bound(SECOND, 6))
    expected = scipy.stats.beta(mean * kappa, (1 - mean) * kappa).logpdf(INSIDE).sum()
    assert log_p(likelihoods.Beta(EVENT), INSIDE, FIRST, SECOND) == pytest.approx(expected, rel=1e-10)


def _normal_of_logit(x, loc, scale):
    return scipy.stats.norm(loc, scale).logpdf(scipy.special.logit(x)) - np.log(x) - np.log1p(-x)


def test_a_logit_normal_agrees_with_scipy():
    expected = _normal_of_logit(INSIDE, FIRST, np.exp(bound(SECOND, 7))).sum()
    assert log_p(likelihoods.LogitNormal(EVENT), INSIDE, FIRST, SECOND) == pytest.approx(expected, rel=1e-10)


def test_the_logit_of_a_laplace_agrees_with_scipy():
    y = scipy.stats.laplace(FIRST, 1).logpdf(scipy.special.logit(INSIDE))
    expected = (y - np.log(INSIDE) - np.log1p(-INSIDE)).sum()
    likelihood = likelihoods.Logit(likelihoods.Laplace(EVENT))
    assert log_p(likelihood, INSIDE, FIRST) == pytest.approx(expected, rel=1e-10)


def _in_a_unit(likelihood, log_scale=-1.2):
    with torch.no_grad():
        likelihood.unit.fill_(0.5)
        if hasattr(likelihood, "log_scale"):
            likelihood.log_scale.fill_(log_scale)
    return likelihood.double()


@pytest.mark.parametrize("kind", [likelihoods.Normal, likelihoods.NormalOptimal])
def test_a_normal_agrees_with_scipy(kind):
    likelihood = _in_a_unit(kind(EVENT).double())
    expected = scipy.stats.norm(0.5 * FIRST, 0.5 * math.exp(-1.2)).logpdf(REALS).sum()
    assert log_p(likelihood, REALS, FIRST) == pytest.approx(expected, rel=1e-12)


def test_a_normal_of_a_fixed_scale_agrees_with_scipy():
    likelihood = _in_a_unit(likelihoods.NormalFixed(EVENT, scale=0.7))
    expected = scipy.stats.norm(0.5 * FIRST, 0.35).logpdf(REALS).sum()
    assert log_p(likelihood, REALS, FIRST) == pytest.approx(expected, rel=1e-12)


def test_a_normal_per_pixel_agrees_with_scipy():
    expected = scipy.stats.norm(0.5 * FIRST, 0.5 * np.exp(bound(SECOND, 7))).logpdf(REALS).sum()
    likelihood = _in_a_unit(likelihoods.NormalPerPixel(EVENT))
    assert log_p(likelihood, REALS, FIRST, SECOND) == pytest.approx(expected, rel=1e-12)


def test_a_laplace_agrees_with_scipy():
    expected = scipy.stats.laplace(0.5 * FIRST, 0.5 * math.exp(-1.2)).logpdf(REALS).sum()
    assert log_p(_in_a_unit(likelihoods.Laplace(EVENT).double()), REALS, FIRST) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("feature", [-3.0, 0.0, 4.0])
def test_a_student_t_agrees_with_scipy(feature):
    likelihood = _in_a_unit(likelihoods.StudentT(EVENT).double())
    with torch.no_grad():
        likelihood.feature.fill_(feature)
    df = 1 + math.exp(bound(feature, math.log(100)))
    expected = scipy.stats.t(df, 0.5 * FIRST, 0.5 * math.exp(-1.2)).logpdf(REALS).sum()
    assert log_p(likelihood, REALS, FIRST) == pytest.approx(expected, rel=1e-12)


def test_a_poisson_agrees_with_scipy():
    expected = scipy.stats.poisson(np.exp(bound(FIRST, 15))).logpmf(COUNTS).sum()
    assert log_p(likelihoods.Poisson(EVENT), COUNTS, FIRST) == pytest.approx(expected, rel=1e-11)


def test_a_negative_binomial_agrees_with_scipy():
    mean, total = np.exp(bound(FIRST, 15)), np.exp(bound(4 * SECOND, 9))
    expected = scipy.stats.nbinom(total, total / (total + mean)).logpmf(COUNTS).sum()
    assert log_p(likelihoods.NegativeBinomial(EVENT), COUNTS, FIRST, 4 * SECOND) == pytest.approx(expected, rel=1e-11)


# --- Features ---


def test_planes_are_the_first_feature_of_every_pixel_and_then_the_second():
    h = torch.arange(12.0)
    first, second = planes(h, 2, EVENT)
    assert_close(first, torch.arange(6.0).reshape(EVENT))
    assert_close(second, torch.arange(6.0, 12.0).reshape(EVENT))


@pytest.mark.parametrize("value", [-math.inf, -7.0, 7.0, 1e9, math.inf])
def test_what_no_feature_gives_is_brought_within_the_bound(value):
    found = bounded(unbounded(torch.tensor(value), 7.0), 7.0)
    assert abs(float(found)) == pytest.approx(0.98 * 7, rel=1e-5)


NEEDS_SPREAD = ["Normal", "NormalFixed", "NormalOptimal", "NormalPerPixel", "Laplace", "StudentT"]


@pytest.mark.parametrize("name", NEEDS_SPREAD)
def test_data_without_any_spread_is_refused(name):
    with pytest.raises(ValueError, match="x: expected pixels that vary, got the same image every time"):
        getattr(likelihoods, name)(EVENT).fit_marginals(torch.ones(10, *EVENT))


@pytest.mark.parametrize("name", NEEDS_SPREAD)
def test_a_fit_in_another_unit_gives_the_same_density_up_to_the_unit(name):
    """With x in units of 1 / 1000, log p changes by D log 1000 for the same features, exactly."""
    torch.manual_seed(0)
    x = 2 * torch.randn(50, *EVENT) + 1
    small, large = getattr(likelihoods, name)(EVENT), getattr(likelihoods, name)(EVENT)
    offset = small.fit_marginals(x)
    h = 0.5 * torch.randn(50, small.num_features)
    assert_close(large.fit_marginals(1000 * x), offset, rtol=1e-4, atol=1e-5)
    difference = small(h + offset).log_prob(x) - large(h + offset).log_prob(1000 * x)
    assert_close(difference, torch.full((50,), D * math.log(1000)), rtol=1e-4, atol=0)


# --- Scales that are learned, and one that is not ---


@pytest.mark.parametrize("kind", [likelihoods.Normal, likelihoods.Laplace])
def test_one_scale_for_all_pixels_is_learned(kind):
    """At the maximum it is the root of the mean square, or the mean, of the deviations of all pixels."""
    torch.manual_seed(0)
    likelihood, x = kind(EVENT), 0.2 * torch.randn(500, *EVENT) + 3
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood(torch.full((D,), 3.0)).log_prob(x).mean()).backward()
        optimizer.step()
    deviation = (x - 3).square().mean().sqrt() if kind is likelihoods.Normal else (x - 3).abs().mean()
    assert_close((likelihood.unit * likelihood.log_scale.exp()).detach(), deviation, rtol=1e-3, atol=0)


def test_a_student_t_learns_scale_and_degrees_of_freedom_of_its_data():
    """Against scipy's own fit of the same 6,000 numbers."""
    x = torch.tensor(scipy.stats.t(3, 0, 0.5).rvs(6000, random_state=0), dtype=torch.double).reshape(1000, *EVENT)
    likelihood = likelihoods.StudentT(EVENT).double()
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood(torch.zeros(D, dtype=torch.double)).log_prob(x).mean()).backward()
        optimizer.step()
    df, _, scale = scipy.stats.t.fit(x.numpy().ravel(), floc=0)
    assert float(likelihood.df.detach()) == pytest.approx(df, rel=1e-3)
    assert float(likelihood.log_scale.exp().detach()) == pytest.approx(scale, rel=1e-3)


def test_refitting_at_rate_one_is_the_best_scale_there_is():
    torch.manual_seed(0)
    likelihood = likelihoods.NormalOptimal(EVENT).double()
    x = 2 + 3 * torch.randn(50, *EVENT, dtype=torch.double)
    likelihood.fit_marginals(x)
    h = torch.randn(50, D, dtype=torch.double)
    likelihood.refit(h, x, rate=1.0)
    at = float(likelihood(h).log_prob(x).sum())
    for step in (0.01, -0.01):
        likelihood.log_scale.add_(step)
        assert float(likelihood(h).log_prob(x).sum()) < at
        likelihood.log_scale.sub_(step)


def test_refitting_moves_the_squared_scale_by_its_rate():
    torch.manual_seed(0)
    likelihood = likelihoods.NormalOptimal(EVENT).double()
    x = 2 + 3 * torch.randn(50, *EVENT, dtype=torch.double)
    h = likelihood.fit_marginals(x)
    with torch.no_grad():
        likelihood.log_scale.fill_(0.4)
    before = float(likelihood(h).base_dist.scale[0, 0, 0]) ** 2
    residual = float((x - likelihood(h).mean).square().mean())
    likelihood.refit(h.expand(50, D), x)
    assert float(likelihood(h).base_dist.scale[0, 0, 0]) ** 2 == pytest.approx(0.9 * before + 0.1 * residual)


def test_refitting_to_exact_pixels_stays_finite():
    likelihood = likelihoods.NormalOptimal(EVENT)
    likelihood.refit(torch.ones(2, D), torch.ones(2, *EVENT), rate=1.0)
    assert likelihood.log_scale.isfinite()


def test_refitting_a_logit_is_refitting_its_base_to_the_logit():
    torch.manual_seed(0)
    bent, base = likelihoods.Logit(likelihoods.NormalOptimal(EVENT)), likelihoods.NormalOptimal(EVENT)
    h, y = torch.randn(20, D), 2 * torch.randn(20, *EVENT)
    bent.refit(h, y.sigmoid())
    base.refit(h, y)
    assert_close(bent.base.log_scale, base.log_scale)


# --- Levels ---


@pytest.mark.parametrize("feature", [-20.0, -4.0, 0.0, 20.0])
def test_the_mean_of_a_discretized_logistic_is_exact_at_the_ends_too(feature):
    loc = torch.linspace(-1.3, 1.3, 14, dtype=torch.double)
    h = torch.cat([loc, torch.full_like(loc, feature)])
    p = likelihoods.DiscretizedLogistic((14,))(h)
    levels = torch.arange(256, dtype=torch.double)
    mass = p.base_dist.log_prob(levels[:, None]).exp()
    assert_close(p.mean, (mass * levels[:, None]).sum(0), rtol=1e-10, atol=1e-10)


def test_the_mean_of_a_color_mixture_without_coupling_is_exact_at_the_ends_too():
    torch.manual_seed(0)
    K = 2
    h = torch.cat([torch.randn(K), 1.5 * torch.randn(3 * K), 2 * torch.randn(3 * K), torch.zeros(3 * K)]).double()
    color = likelihoods.DiscretizedLogisticMixture((3, 1, 1), components=K)(h)
    per_value = h[:K].expand(3, K).T, h[K : 4 * K].reshape(3, K).T, h[4 * K : 7 * K].reshape(3, K).T
    gray = likelihoods.DiscretizedLogisticMixture((3,), components=K)(torch.cat([p.flatten() for p in per_value]))
    assert_close(color.mean.flatten(), gray.mean, rtol=1e-10, atol=1e-10)


def test_color_couples_channels():
    """With c_0 = tanh(20) = 1 green follows red, and blue, whose coefficients are 0, does not."""
    torch.manual_seed(0)
    h = torch.tensor([0.0, *[0.0] * 3, 1.0, -4.0, -4.0, 20.0, 0.0, 0.0])
    x = likelihoods.DiscretizedLogisticMixture((3, 1, 1), components=1)(h).sample((4000,)).flatten(1).T
    correlation = torch.corrcoef(x)
    assert correlation[0, 1] > 0.98
    assert correlation[0, 2].abs() < 0.08


# --- Categories ---


def test_a_fitted_categorical_has_the_pixels_histograms_where_its_rank_allows():
    torch.manual_seed(0)
    x = torch.randint(256, (4000, 5)).float()
    x[:, 0] = torch.randint(40, (4000,)).float()
    x[:, 1] = 255.0
    likelihood = likelihoods.Categorical((5,), rank=4)
    with torch.no_grad():
        mass = likelihood(likelihood.fit_marginals(x)).base_dist.probs
    smoothed = torch.stack([x[:, d].long().bincount(minlength=256) for d in range(5)]) + 1 / 256
    assert_close(mass, smoothed / smoothed.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_pixels", [1, 3, 40])
def test_every_row_of_a_fitted_categorical_can_be_trained(num_pixels):
    """A feature has a gradient through its row of A, so no row is zero, and none is another's multiple."""
    torch.manual_seed(0)
    likelihood = likelihoods.Categorical((num_pixels,))
    likelihood.fit_marginals(torch.randint(256, (50, num_pixels)).float())
    assert_close(likelihood.A.detach().square().mean(1), torch.ones(16), rtol=1e-3, atol=0)
    assert torch.linalg.matrix_rank(likelihood.A.detach()) == 16


# --- Between zero and one ---


@pytest.mark.thorough
@pytest.mark.parametrize("base", ["Normal", "Laplace"])
def test_the_mean_of_a_logit_is_right_at_every_location_and_scale(base):
    likelihood = likelihoods.Logit(getattr(likelihoods, base)((25,))).double()
    loc = torch.linspace(-12, 12, 25, dtype=torch.double)
    reference = {"Normal": scipy.stats.norm, "Laplace": scipy.stats.laplace}[base]
    u = (np.arange(200_000) + 0.5) / 200_000
    for scale in (0.001, 0.1, 0.5, 1.0, 1.584, 1.6, 1.628, 1.649, 2.5, 8.0, 100.0):  # the quadrature changes near 1.6
        with torch.no_grad():
            likelihood.base.log_scale.fill_(math.log(scale))
            mean = likelihood(loc).mean.numpy()
        expected = [scipy.special.expit(reference(float(m), scale).ppf(u)).mean() for m in loc]
        np.testing.assert_allclose(mean, expected, rtol=0, atol=2e-5)
