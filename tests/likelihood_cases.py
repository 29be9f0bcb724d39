"""The likelihoods that the conformance tests go through, with values on and off their supports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats
import torch

from ppl_vae.parts import likelihoods

LEVELS = [float(v) for v in range(256)]
COUNTS = [float(v) for v in range(4000)]  # beyond, the features below leave less than 1e-12
EVENT = (1, 2, 3)
COLOR = (3, 1, 2)


class Case(NamedTuple):
    """A likelihood as it is tested.

    Args:
        make: event shape -> likelihood.
        off: values that are off the support.
        values: for a mass, those that a pixel can take, as far as they matter.
        features: for each feature of a pixel, a center and a spread: where features are drawn for tests that need the
            distribution to be of moderate width.
        event: an event shape for it.
        extreme: values of a pixel for the tests at extreme features.
        fits_peak: whether ``fit_marginals`` is a maximum of the likelihood.
        formula: (distribution of single pixels, values) -> log-probability, by an independent formula in float64;
            None where a test of its own compares.
    """

    make: Callable[..., Any]
    off: list[float]
    values: list[float] | None
    features: list[tuple[float, float]]
    event: tuple[int, ...] = EVENT
    extreme: tuple[float, ...] = (-3.0, 0.0, 0.7, 100.0)
    fits_peak: bool = False
    formula: Callable[..., Any] | None = None

    def draw(self, *batch: int, event: tuple[int, ...] | None = None, seed: int = 0) -> torch.Tensor:
        """Features (*batch, num_features) in float64."""
        event = event or self.event
        generator = torch.Generator().manual_seed(seed)
        positions = math.prod(event) // (3 if self.event == COLOR else 1)
        noise = torch.randn(*batch, len(self.features), positions, generator=generator, dtype=torch.double)
        center, spread = torch.tensor(self.features, dtype=torch.double).T
        return (center[:, None] + spread[:, None] * noise).flatten(-2)


# --- Independent formulas ---


def double(values: torch.Tensor) -> Any:
    """As NumPy in float64."""
    return values.detach().double().numpy()


def bernoulli(p, x):
    logits = double(p.logits)
    return x * scipy.special.log_expit(logits) + (1 - x) * scipy.special.log_expit(-logits)


def binomial(p, x):
    logits, n = double(p.logits), 255
    log_choose = scipy.special.gammaln(n + 1) - scipy.special.gammaln(x + 1) - scipy.special.gammaln(n - x + 1)
    return log_choose + x * scipy.special.log_expit(logits) + (n - x) * scipy.special.log_expit(-logits)


def discretized_logistic(p, x):
    """Of the two sides of the location, the smaller tail: the difference of two numbers near 1 would be lost."""
    loc, scale = double(p.loc), np.exp(double(p.log_scale))
    upper = np.where(x == 255, np.inf, ((x + 0.5) / 127.5 - 1 - loc) / scale)
    lower = np.where(x == 0, -np.inf, ((x - 0.5) / 127.5 - 1 - loc) / scale)
    upper, lower = np.where(lower > 0, -lower, upper), np.where(lower > 0, -upper, lower)
    return scipy.special.log_expit(upper) + np.log1p(
        -np.exp(scipy.special.log_expit(lower) - scipy.special.log_expit(upper))
    )


def mixture(p, x):
    log_weight = scipy.special.log_softmax(double(p.mixture_distribution.logits), -1)
    return scipy.special.logsumexp(log_weight + discretized_logistic(p.component_distribution, x[..., None]), -1)


def categorical(p, x):
    log_mass = scipy.special.log_softmax(double(p.logits), -1)
    return np.take_along_axis(log_mass, x.astype(int)[..., None], -1)[..., 0]


def continuous_bernoulli(p, x):
    h = double(p.logits)
    a = abs(h)
    return -a * np.where(h > 0, 1 - x, x) - np.log(-np.expm1(-a) / a)


def beta(p, x):
    kappa, logit = np.exp(double(p.log_concentration)), double(p.mean_logit)
    return scipy.stats.beta.logpdf(x, kappa * scipy.special.expit(logit), kappa * scipy.special.expit(-logit))


def normal(p, x):
    return scipy.stats.norm.logpdf(x, double(p.loc), double(p.scale))


def laplace(p, x):
    return -abs(x - double(p.loc)) / double(p.scale) - np.log(2 * double(p.scale))


def student_t(p, x):
    return scipy.stats.t.logpdf(x, double(p.df), double(p.loc), double(p.scale))


def logit_normal(p, x):
    return normal(p.base, scipy.special.logit(x)) - np.log(x) - np.log1p(-x)


# --- Cases ---

_OFF_LEVELS = [0.5, -1.0, 256.0, math.inf, math.nan]
_OFF_COUNTS = [0.5, -1.0, math.nan]
_OFF_REAL = [math.nan]
_OFF_OPEN = [0.0, 1.0, -0.5, 1.5, math.nan]
_SOME_LEVELS = (0.0, 1.0, 17.0, 127.0, 128.0, 254.0, 255.0)
_SOME_COUNTS = (0.0, 1.0, 5.0, 100.0, 255.0)
_INSIDE = (2.0**-33, 1e-3, 0.3, 0.5, 0.999, 1 - 2.0**-24)
_LOCATION = [(0.0, 1.0)]
_MIXTURE = [(0.0, 1.0)] * 5 + [(0.0, 0.7)] * 5 + [(0.0, 2.0)] * 5

# Each word of the command line.
WORDS = {
    "bernoulli": Case(
        likelihoods.Bernoulli,
        [0.5, -1.0, 2.0, math.nan],
        [0.0, 1.0],
        [(0.0, 1.0)],
        extreme=(0.0, 1.0),
        fits_peak=True,
        formula=bernoulli,
    ),
    "categorical": Case(
        likelihoods.Categorical, _OFF_LEVELS, LEVELS, [(0.0, 0.7)] * 16, extreme=_SOME_LEVELS, formula=categorical
    ),
    "discretized-logistic": Case(
        likelihoods.DiscretizedLogistic,
        _OFF_LEVELS,
        LEVELS,
        [(0.0, 0.4), (0.0, 1.0)],
        extreme=_SOME_LEVELS,
        fits_peak=True,
        formula=discretized_logistic,
    ),
    "discretized-logistic-mixture": Case(
        likelihoods.DiscretizedLogisticMixture, _OFF_LEVELS, LEVELS, _MIXTURE, extreme=_SOME_LEVELS, formula=mixture
    ),
    "binomial": Case(
        likelihoods.Binomial, _OFF_LEVELS, LEVELS, [(0.0, 2.0)], extreme=_SOME_LEVELS, fits_peak=True, formula=binomial
    ),
    "continuous-bernoulli": Case(
        likelihoods.ContinuousBernoulli,
        [-0.1, 1.1, math.nan],
        None,
        [(0.0, 5.0)],
        extreme=(0.0, *_INSIDE, 1.0),
        fits_peak=True,
        formula=continuous_bernoulli,
    ),
    "beta": Case(
        likelihoods.Beta, _OFF_OPEN, None, [(0.0, 1.0), (0.0, 1.0)], extreme=_INSIDE, fits_peak=True, formula=beta
    ),
    "logit-normal": Case(
        likelihoods.LogitNormal,
        _OFF_OPEN,
        None,
        [(0.0, 1.0)] * 2,
        extreme=_INSIDE,
        fits_peak=True,
        formula=logit_normal,
    ),
    "normal": Case(likelihoods.Normal, _OFF_REAL, None, _LOCATION, fits_peak=True, formula=normal),
    "normal-fixed": Case(likelihoods.NormalFixed, _OFF_REAL, None, _LOCATION, fits_peak=True, formula=normal),
    "normal-optimal": Case(likelihoods.NormalOptimal, _OFF_REAL, None, _LOCATION, fits_peak=True, formula=normal),
    "normal-per-pixel": Case(
        likelihoods.NormalPerPixel, _OFF_REAL, None, [(0.0, 1.0)] * 2, fits_peak=True, formula=normal
    ),
    "laplace": Case(likelihoods.Laplace, _OFF_REAL, None, _LOCATION, fits_peak=True, formula=laplace),
    "student-t": Case(likelihoods.StudentT, _OFF_REAL, None, _LOCATION, formula=student_t),
    "poisson": Case(likelihoods.Poisson, _OFF_COUNTS, COUNTS, [(2.0, 1.0)], extreme=_SOME_COUNTS, fits_peak=True),
    "negative-binomial": Case(
        likelihoods.NegativeBinomial, _OFF_COUNTS, COUNTS, [(2.0, 1.0), (1.0, 0.5)], extreme=_SOME_COUNTS
    ),
}

# And what the words do not reach: other parts, and color.
CASES = WORDS | {
    "logit of laplace": Case(
        lambda event: likelihoods.Logit(likelihoods.Laplace(event)), _OFF_OPEN, None, _LOCATION, extreme=_INSIDE
    ),
    "logit of a normal": Case(
        lambda event: likelihoods.Logit(likelihoods.Normal(event)),
        _OFF_OPEN,
        None,
        _LOCATION,
        extreme=_INSIDE,
        fits_peak=True,
    ),
    "color mixture": Case(
        lambda event: likelihoods.DiscretizedLogisticMixture(event, components=2),
        _OFF_LEVELS,
        LEVELS,
        [(0.0, 1.0)] * 2 + [(0.0, 0.2)] * 6 + [(-1.0, 0.5)] * 6 + [(0.0, 0.5)] * 6,  # between the ends
        event=COLOR,
        extreme=_SOME_LEVELS,
    ),
}
MASSES = [word for word, case in CASES.items() if case.values is not None]
DENSITIES = [word for word in CASES if word not in MASSES]


@torch.no_grad()
def one_value(word: str, num: int = 6, *, seed: int = 0) -> Any:
    """The distribution of a single pixel for ``num`` draws of features: batch (num,), in float64.

    The event shape is (1,), or in color (3, 1, 1).
    """
    case = CASES[word]
    event = (3, 1, 1) if case.event == COLOR else (1,)
    return case.make(event).double()(case.draw(num, event=event, seed=seed))


def real_line(word: str, num: int = 40_001) -> tuple[torch.Tensor, torch.Tensor]:
    """Points x over a density's whole support, (num,), and the weight of each in the trapezoidal rule.

    x = sigmoid(v) between 0 and 1, x = sinh(v) over the real numbers: densities fall exponentially in v.
    """
    end = 25.0
    v = torch.linspace(-end, end, num, dtype=torch.double)
    step = torch.full_like(v, 2 * end / (num - 1))
    step[[0, -1]] /= 2
    if 0.5 in CASES[word].extreme:
        return v.sigmoid(), step * v.sigmoid() * (-v).sigmoid()
    return v.sinh(), step * v.cosh()
