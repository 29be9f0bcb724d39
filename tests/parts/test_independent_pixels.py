"""Independent pixels by maximum likelihood, against optima that scipy finds and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from likelihood_cases import CASES
from sklearn.datasets import load_wine
from torch import Tensor

from ppl_vae import data, likelihoods
from ppl_vae.evidence.dequantization import mass_of_levels
from ppl_vae.parts.likelihoods import fit_independent_pixels

EDGES = np.arange(257) / 256


def baseline(family, x: Tensor, **asked) -> np.ndarray:
    """(N,) nats of the images that the pixels are fitted to; dequantized ones as their levels."""
    with torch.no_grad():
        log_prob = fit_independent_pixels(family, x, **asked)
        return log_prob((256 * x).floor() if asked.get("is_dequantized") else x).double().numpy()


def optimum(log_p, start: list[float], counts=None) -> float:
    """The largest mean of log_p(parameters), weighted by counts, by scipy's simplex from ``start``."""
    with np.errstate(all="ignore"):
        found = scipy.optimize.minimize(
            lambda parameters: -np.average(np.nan_to_num(log_p(parameters), nan=-1e9), weights=counts),
            start,
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10},
        )
    return -float(found.fun)


def levels_of_pixels() -> np.ndarray:
    """(3000, 4) levels: mostly black with a bright tail, a narrow gray, a wide gray, and mostly white."""
    rng = np.random.default_rng(0)
    columns = [
        np.where(rng.random(3000) < 0.7, 0, rng.integers(0, 200, 3000)),
        rng.normal(90, 3, 3000),
        rng.normal(120, 40, 3000),
        255 - np.where(rng.random(3000) < 0.5, 0, rng.exponential(40, 3000)),
    ]
    return np.stack(columns, 1).round().clip(0, 255)


def dequantized_levels() -> Tensor:
    return data.dequantize_uniformly(torch.from_numpy(levels_of_pixels()).float(), torch.Generator().manual_seed(0))


# The distribution function of each kind by unconstrained parameters, and where scipy starts.
OF_LEVELS = {
    "beta": (lambda t, x: scipy.special.betainc(*np.exp(t), x), [0.0, 0.0]),
    "normal": (lambda t, x: scipy.special.ndtr((x - t[0]) / np.exp(t[1])), [0.4, -2.0]),
    "normal-fixed": (lambda t, x: scipy.special.ndtr((x - t[0]) / np.exp(t[1])), [0.4, -2.0]),
    "normal-per-pixel": (lambda t, x: scipy.special.ndtr((x - t[0]) / np.exp(t[1])), [0.4, -2.0]),
    "logit-normal": (lambda t, x: scipy.special.ndtr((scipy.special.logit(x) - t[0]) / np.exp(t[1])), [0.0, 0.0]),
    "continuous-bernoulli": (lambda t, x: np.expm1(t[0] * x) / np.expm1(t[0]), [0.1]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("word", OF_LEVELS)
def test_a_density_of_levels_has_the_largest_mass_that_scipy_finds_in_each_pixel(word):
    """Within 0.003 nats per pixel."""
    cdf, start = OF_LEVELS[word]
    levels, x = levels_of_pixels().astype(int), dequantized_levels()
    seen, counts = zip(*(np.unique(column, return_counts=True) for column in levels.T), strict=True)
    best = 0.0
    for d in range(levels.shape[1]):

        def log_p(parameters, d=d):
            return np.log(np.diff(cdf(parameters, EDGES)))[seen[d]]

        best += optimum(log_p, start, counts[d])
    found = baseline(CASES[word].make((4,)), x, is_dequantized=True).mean()
    assert found == pytest.approx(best, abs=4 * 3e-3)


def test_large_counts_are_not_shrunk_under_a_poisson():
    """100 counts near 100,000: the rate is their mean, not 1% below it."""
    counts = np.random.default_rng(0).poisson(1e5, (100, 2))
    exact = scipy.stats.poisson(counts.mean(0)).logpmf(counts).sum(1).mean()
    assert baseline(likelihoods.Poisson((2,)), torch.from_numpy(counts).float()).mean() == pytest.approx(
        exact, abs=0.05
    )


@pytest.mark.thorough
@pytest.mark.parametrize(("mean", "total", "count"), [(3.0, 0.5, 5000), (40.0, 2.0, 5000), (2e4, 5.0, 200)])
def test_a_negative_binomial_has_the_largest_mass_that_scipy_finds(mean, total, count):
    counts = np.random.default_rng(1).negative_binomial(total, total / (total + mean), (count, 1))

    values, times = np.unique(counts, return_counts=True)

    def log_p(t):
        return scipy.stats.nbinom.logpmf(values, np.exp(t[0]), np.exp(t[0]) / (np.exp(t[0]) + np.exp(t[1])))

    best = optimum(log_p, [0.0, math.log(mean)], times)
    found = baseline(likelihoods.NegativeBinomial((1,)), torch.from_numpy(counts).float()).mean()
    assert found == pytest.approx(best, abs=3e-3)


@pytest.mark.parametrize("family", [likelihoods.Normal, likelihoods.NormalFixed, likelihoods.NormalOptimal])
def test_columns_of_a_table_have_a_scale_each_under_a_normal(family):
    wine = load_wine().data
    exact = scipy.stats.norm(wine.mean(0), wine.std(0)).logpdf(wine).sum(1)
    found = baseline(family((13,)), torch.from_numpy(wine).float())
    assert found.mean() == pytest.approx(exact.mean(), abs=1e-3)


def test_columns_of_a_table_have_a_scale_each_under_a_laplace():
    wine = load_wine().data
    exact = sum(scipy.stats.laplace(*scipy.stats.laplace.fit(column)).logpdf(column).mean() for column in wine.T)
    assert baseline(likelihoods.Laplace((13,)), torch.from_numpy(wine).float()).mean() == pytest.approx(exact, abs=1e-2)


@pytest.mark.thorough
def test_columns_of_a_table_have_tails_each_under_a_student_t():
    rng = np.random.default_rng(2)
    table = np.stack([100 + 5 * rng.standard_t(2, 500), 0.01 * rng.standard_t(6, 500), rng.normal(size=500)], 1)
    for column in table.T:

        def log_p(t, column=column):
            return scipy.stats.t.logpdf(column, np.exp(t[0]), t[1], np.exp(t[2]))

        best = optimum(log_p, [1.0, float(np.median(column)), math.log(np.abs(column - np.median(column)).mean())])
        found = baseline(likelihoods.StudentT((1,)), torch.from_numpy(column[:, None]).float()).mean()
        assert found == pytest.approx(best, abs=3e-3)


def test_levels_of_a_pixel_have_their_own_histogram_under_a_categorical():
    """No rank in the way: 20 pixels of unrelated levels, where the family's 16 features could not hold them."""
    levels = np.random.default_rng(3).integers(0, 256, (200, 20))
    share = np.stack([np.bincount(column, minlength=256) + 1 / 256 for column in levels.T]) / 201
    exact = sum(np.log(share[d, levels[:, d]]) for d in range(20))
    found = baseline(likelihoods.Categorical((20,)), torch.from_numpy(levels).float())
    assert found == pytest.approx(exact, abs=1e-3)


DENSITIES = [name for name, case in CASES.items() if case.make(case.event).measure == "density"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", DENSITIES)
def test_no_marginals_within_the_family_have_more_mass(name):
    x = dequantized_levels()
    family = CASES[name].make((4,))
    with torch.no_grad():
        within = mass_of_levels(family(family.fit_marginals(x))).log_prob((256 * x).floor()).double().numpy()
    assert baseline(family, x, is_dequantized=True).mean() > within.mean() - 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["normal", "laplace", "student-t", "logit-normal", "beta", "poisson", "categorical"])
def test_a_constant_pixel_leaves_other_images_a_finite_baseline(name):
    family = CASES[name].make((3,))
    is_density = family.measure == "density"
    x = torch.tensor([[0.0, 3.0, 200.0], [0.0, 9.0, 180.0], [0.0, 4.0, 255.0]]).repeat(20, 1)
    with torch.no_grad():
        seen = data.dequantize_uniformly(x, torch.Generator().manual_seed(0)) if is_density else x
        log_prob = fit_independent_pixels(family, seen, is_dequantized=is_density)
        assert log_prob(torch.tensor([[7.0, 5.0, 100.0]])).isfinite().all()


def test_the_same_table_every_time_has_no_scale():
    with pytest.raises(ValueError, match="x: expected pixels that vary"):
        fit_independent_pixels(likelihoods.Normal((3,)), torch.ones(10, 3))
