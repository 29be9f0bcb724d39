"""Exact masses of 8-bit levels, against distribution functions of scipy and mpmath."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from likelihood_cases import CASES
from torch import Tensor
from torch.testing import assert_close

from ppl_vae.evidence.dequantization import Dequantized
from ppl_vae.parts.likelihoods.level_mass import has_exact_mass, log_level_mass
from ppl_vae.parts.likelihoods.unit_interval import Sigmoid, StableBeta, StableContinuousBernoulli

LEVELS = torch.arange(256, dtype=torch.double)
EDGES = np.arange(257) / 256


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.double)


def beta(mean: float, concentration: float) -> tuple[Any, Any]:
    density = StableBeta(torch.logit(number(mean)), number(concentration).log())
    return density, scipy.stats.beta(mean * concentration, (1 - mean) * concentration)


class LogitOf:
    """The distribution functions of sigmoid(y), by those of y."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def cdf(self, x: np.ndarray) -> np.ndarray:
        return self.base.cdf(scipy.special.logit(x))

    def sf(self, x: np.ndarray) -> np.ndarray:
        return self.base.sf(scipy.special.logit(x))


class ContinuousBernoulli:
    """F(x) = (e^{h x} - 1) / (e^h - 1)."""

    def __init__(self, h: float) -> None:
        self.h = h

    def cdf(self, x: np.ndarray) -> np.ndarray:
        return x if self.h == 0 else np.expm1(self.h * x) / np.expm1(self.h)

    def sf(self, x: np.ndarray) -> np.ndarray:
        return ContinuousBernoulli(-self.h).cdf(1 - x)


def location_scale(name: str, loc: float, scale: float, df: float = 3.0) -> tuple[Any, Any]:
    if name == "normal":
        return dist.Normal(number(loc), number(scale)), scipy.stats.norm(loc, scale)
    if name == "laplace":
        return dist.Laplace(number(loc), number(scale)), scipy.stats.laplace(loc, scale)
    return dist.StudentT(number(df), number(loc), number(scale)), scipy.stats.t(df, loc, scale)


def pairs() -> dict[str, tuple[Any, Any]]:
    """A density of a pixel, and scipy's distribution (or one that is written here) of the same."""
    found = {}
    for loc, scale in ((0.4, 0.3), (0.4, 0.02), (0.3, 0.0011), (0.0, 0.1), (1.3, 0.2), (0.5, 30.0), (0.25, 1e-4)):
        for name in ("normal", "laplace"):
            found[f"{name} {loc} {scale}"] = location_scale(name, loc, scale)
        for df in (1.01, 5.0, 101.0):
            found[f"student {loc} {scale} {df}"] = location_scale("student", loc, scale, df)
    for loc, scale in ((0.0, 1.0), (-6.0, 1.0), (-20.0, 3.0), (4.0, 0.01), (0.3, 50.0)):
        for name in ("normal", "laplace"):
            density, exact = location_scale(name, loc, scale)
            found[f"logit of {name} {loc} {scale}"] = Sigmoid(density), LogitOf(exact)
    for mean in (5e-5, 1e-3, 0.0038, 0.0042, 0.05, 0.5, 0.93, 0.9999):
        for concentration in (0.05, 1.0, 30.0, 800.0, 8100.0):
            found[f"beta {mean} {concentration}"] = beta(mean, concentration)
    for h in (0.0, 1e-7, 0.3, -4.0, 60.0, -700.0):
        found[f"continuous bernoulli {h}"] = StableContinuousBernoulli(number(h)), ContinuousBernoulli(h)
    return found


PAIRS = pairs()


def log_mass(exact: Any) -> np.ndarray:
    """(256,) log [F((x + 1) / 256) - F(x / 256)], from the tail in which the difference loses least."""
    below, above = np.diff(exact.cdf(EDGES)), -np.diff(exact.sf(EDGES))
    is_left = exact.cdf(EDGES[1:]) < 0.5
    with np.errstate(divide="ignore"):
        return np.log(np.where(is_left, below, above))


@pytest.mark.parametrize("name", PAIRS)
def test_masses_are_differences_of_the_distribution_function(name):
    """To 1e-6 nats; below e^-600 scipy's differences end, and mpmath's follow below."""
    density, exact = PAIRS[name]
    expected = log_mass(exact)
    seen = expected > -600
    # of a wide density, F itself is rounded: 1e-16 of a mass of 1e-5
    assert_close(log_level_mass(density, LEVELS)[seen], torch.from_numpy(expected[seen]), rtol=1e-10, atol=1e-6)
    assert seen.any()


@pytest.mark.parametrize(
    ("mean", "concentration", "level"),
    [(0.005, 8100, 255), (0.005, 4000, 60), (0.5, 8100, 0), (0.3, 8100, 200), (0.999, 2000, 3), (5e-5, 100, 255)],
)
def test_a_level_far_in_the_tail_of_a_beta_keeps_its_mass(mean, concentration, level):
    """Down to e^-44,000, by mpmath with 60 digits."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(mean) * concentration, (1 - mpmath.mpf(mean)) * concentration
        lower, upper = mpmath.mpf(level) / 256, mpmath.mpf(level + 1) / 256
        if lower > mean:  # the upper tail, as a lower one
            a, b, lower, upper = b, a, 1 - upper, 1 - lower

        def incomplete(x):
            return x**a * (1 - x) ** b / a * mpmath.hyp2f1(a + b, 1, a + 1, x) if x else mpmath.mpf(0)

        exact = float(mpmath.log((incomplete(upper) - incomplete(lower)) / mpmath.beta(a, b)))
    assert exact < -60
    density, _ = beta(mean, concentration)
    assert_close(log_level_mass(density, number(level)), number(exact), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("loc", "scale", "level"), [(0.1, 1e-3, 200), (-40.0, 0.3, 7), (0.9, 0.02, 0)])
def test_a_level_far_in_the_tail_of_a_normal_keeps_its_mass(loc, scale, level):
    with mpmath.workdps(60):
        z = [(mpmath.mpf(level + step) / 256 - mpmath.mpf(loc)) / mpmath.mpf(scale) for step in (0, 1)]
        tails = sorted(mpmath.erfc(abs(part) / mpmath.sqrt(2)) / 2 for part in z)
        exact = float(mpmath.log(tails[1] - tails[0]))
    assert exact < -500
    density, _ = location_scale("normal", loc, scale)
    assert_close(log_level_mass(density, number(level)), number(exact), rtol=1e-9, atol=1e-6)


DENSITIES = [name for name, case in CASES.items() if case.make(case.event).measure == "density"]


def pixels(name: str, dtype: torch.dtype, count: int = 784) -> Any:
    """The distribution of as many pixels under a likelihood, by random features of moderate width."""
    case = CASES[name]
    family = case.make((count,)).to(dtype)
    return family(case.draw(event=(count,)).to(dtype)).base_dist


@pytest.mark.parametrize("name", DENSITIES)
def test_the_masses_of_every_likelihood_that_is_a_density_are_exact(name):
    assert has_exact_mass(pixels(name, torch.double))


@pytest.mark.parametrize("name", DENSITIES)
def test_an_image_loses_less_than_a_thousandth_of_a_nat_in_single_precision(name):
    """784 pixels, features near those of a trained decoder, against double precision, which scipy has confirmed."""
    single, double = (pixels(name, dtype) for dtype in (torch.float, torch.double))
    torch.manual_seed(0)
    x = (256 * double.sample().clamp(0, 1 - 1e-9)).floor()
    exact = log_level_mass(double, x).sum()
    assert abs(float(log_level_mass(single, x.float()).double().sum() - exact)) < 1e-3


@pytest.mark.parametrize("concentration", [0.05, 1.0, 18.0, 138.0, 1204.0, 8103.0])
def test_an_image_of_a_beta_loses_less_than_1e_4_nats_in_single_precision(concentration):
    """Five images of 784 pixels of one concentration, against scipy in double precision at the same parameters."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(5, 784)).clamp(-8, 8)
    single = StableBeta(logits, torch.full_like(logits, concentration).log())
    double = StableBeta(single.mean_logit.double(), single.log_concentration.double())
    x = (256 * double.sample().clamp(0, 1 - 1e-9)).floor()
    a, b = (part.numpy() for part in double.exponents())
    lower, upper = x.numpy() / 256, (x.numpy() + 1) / 256
    below = scipy.special.betainc(a, b, upper) - scipy.special.betainc(a, b, lower)
    above = scipy.special.betaincc(a, b, lower) - scipy.special.betaincc(a, b, upper)
    exact = np.log(np.where(scipy.special.betainc(a, b, upper) < 0.5, below, above)).sum(-1)
    found = log_level_mass(single, x.float())
    assert found.dtype == torch.float
    np.testing.assert_allclose(found.double().sum(-1).numpy(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DENSITIES)
def test_exact_masses_draw_nothing(name):
    before = torch.get_rng_state()
    Dequantized(pixels(name, torch.float), 16).log_prob(torch.zeros(784))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DENSITIES)
def test_gradients_of_the_masses_are_those_of_finite_differences(name):
    """At levels 0, 1, 128 and 255, where each branch is taken."""
    case = CASES[name]
    family = case.make((4,)).double()
    h = case.draw(event=(4,)).requires_grad_()
    x = torch.tensor([0.0, 1.0, 128.0, 255.0], dtype=torch.double)
    assert torch.autograd.gradcheck(lambda h: log_level_mass(family(h).base_dist, x), h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [10.0, 1000.0])
@pytest.mark.parametrize("name", DENSITIES)
def test_extreme_features_give_finite_masses_and_gradients_in_single_precision(name, size):
    case = CASES[name]
    family = case.make((256,))
    h = (size * case.draw(event=(256,))).float().requires_grad_()
    log_p = log_level_mass(family(h).base_dist, LEVELS.float())
    assert log_p.isfinite().all()
    assert (log_p < 1e-4).all()
    (gradient,) = torch.autograd.grad(log_p.sum(), h)
    assert gradient.isfinite().all()


def test_a_kind_that_is_not_known_has_no_exact_mass():
    class Shifted(dist.Normal):
        """Another density, though a Normal by name."""

    assert not has_exact_mass(Shifted(0.0, 1.0))
    assert not has_exact_mass(dist.Cauchy(0.0, 1.0))
    assert math.isfinite(float(Dequantized(dist.Cauchy(number(0.0), number(1.0)), 4).log_prob(number(3.0))))
