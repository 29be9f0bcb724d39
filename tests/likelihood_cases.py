"""The likelihoods that the conformance tests go through, with values on and off their supports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    """

    make: Callable[..., Any]
    off: list[float]
    values: list[float] | None
    features: list[tuple[float, float]]
    event: tuple[int, ...] = EVENT
    extreme: tuple[float, ...] = (-3.0, 0.0, 0.7, 100.0)
    fits_peak: bool = False

    def draw(self, *batch: int, event: tuple[int, ...] | None = None, seed: int = 0) -> torch.Tensor:
        """Features (*batch, num_features) in float64."""
        event = event or self.event
        generator = torch.Generator().manual_seed(seed)
        positions = math.prod(event) // (3 if self.event == COLOR else 1)
        noise = torch.randn(*batch, len(self.features), positions, generator=generator, dtype=torch.double)
        center, spread = torch.tensor(self.features, dtype=torch.double).T
        return (center[:, None] + spread[:, None] * noise).flatten(-2)


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
        likelihoods.Bernoulli, [0.5, -1.0, 2.0, math.nan], [0.0, 1.0], [(0.0, 1.0)], extreme=(0.0, 1.0), fits_peak=True
    ),
    "categorical": Case(likelihoods.Categorical, _OFF_LEVELS, LEVELS, [(0.0, 0.7)] * 16, extreme=_SOME_LEVELS),
    "discretized-logistic": Case(
        likelihoods.DiscretizedLogistic,
        _OFF_LEVELS,
        LEVELS,
        [(0.0, 0.4), (0.0, 1.0)],
        extreme=_SOME_LEVELS,
        fits_peak=True,
    ),
    "discretized-logistic-mixture": Case(
        likelihoods.DiscretizedLogisticMixture, _OFF_LEVELS, LEVELS, _MIXTURE, extreme=_SOME_LEVELS
    ),
    "binomial": Case(likelihoods.Binomial, _OFF_LEVELS, LEVELS, [(0.0, 2.0)], extreme=_SOME_LEVELS, fits_peak=True),
    "continuous-bernoulli": Case(
        likelihoods.ContinuousBernoulli,
        [-0.1, 1.1, math.nan],
        None,
        [(0.0, 5.0)],
        extreme=(0.0, *_INSIDE, 1.0),
        fits_peak=True,
    ),
    "beta": Case(likelihoods.Beta, _OFF_OPEN, None, [(0.0, 1.0), (0.0, 1.0)], extreme=_INSIDE, fits_peak=True),
    "logit-normal": Case(likelihoods.LogitNormal, _OFF_OPEN, None, [(0.0, 1.0)] * 2, extreme=_INSIDE, fits_peak=True),
    "normal": Case(likelihoods.Normal, _OFF_REAL, None, _LOCATION, fits_peak=True),
    "normal-fixed": Case(likelihoods.NormalFixed, _OFF_REAL, None, _LOCATION, fits_peak=True),
    "normal-optimal": Case(likelihoods.NormalOptimal, _OFF_REAL, None, _LOCATION, fits_peak=True),
    "normal-per-pixel": Case(likelihoods.NormalPerPixel, _OFF_REAL, None, [(0.0, 1.0)] * 2, fits_peak=True),
    "laplace": Case(likelihoods.Laplace, _OFF_REAL, None, _LOCATION, fits_peak=True),
    "student-t": Case(likelihoods.StudentT, _OFF_REAL, None, _LOCATION),
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
