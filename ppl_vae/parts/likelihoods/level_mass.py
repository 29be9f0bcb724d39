"""Exact masses of 8-bit levels under densities of one pixel: P(x) = F((x + 1) / 256) - F(x / 256)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae.data import NUM_LEVELS
from ppl_vae.parts.likelihoods.unit_interval import Sigmoid, StableBeta, StableContinuousBernoulli
from ppl_vae.runtime.numerics import HALF_LOG_TWO_PI, stirling_remainder

_FRACTION_DEPTH = 16  # of the incomplete beta function's continued fraction: right to 1e-12 for the densities here
_NUM_NODES = 10  # of the Gauss-Legendre rule within one level of a Beta
_STEEP = 16.0  # nats by which a Beta's density falls within a level, beyond which its far edge is negligible (e^-16)
_MILLS_FROM, _MILLS_DEPTH = 5.0, 12
_FARTHEST_LOGIT = 1e4  # replaces logit(0) and logit(1), whose gradients would be NaN


def has_exact_mass(p: dist.TorchDistribution) -> bool:
    """Whether ``log_level_mass`` knows the masses of levels under this density of a pixel."""
    return type(p.base if type(p) is Sigmoid else p) in _LOG_CDF or type(p) in _LOG_MASS


def log_level_mass(p: dist.TorchDistribution, x: Tensor) -> Tensor:
    """log P(x) = log [F((x + 1) / 256) - F(x / 256)], nats, F the distribution function of a pixel.

    The difference is taken in double precision, between the smaller tails, so that it is exact for narrow, wide and
    distant densities. The result has the batch shape of p, for which ``has_exact_mass``, and the precision of x.
    """
    if type(p) in _LOG_MASS:
        return _LOG_MASS[type(p)](p, x)
    lower, upper = x.double() / NUM_LEVELS, (x.double() + 1) / NUM_LEVELS
    if type(p) is Sigmoid:
        p = p.base
        lower, upper = (edge.logit().clamp(-_FARTHEST_LOGIT, _FARTHEST_LOGIT) for edge in (lower, upper))
    loc, scale = p.loc.double(), p.scale.double()
    log_cdf = _LOG_CDF[type(p)](p)
    return _log_interval_mass(log_cdf, (lower - loc) / scale, (upper - loc) / scale).to(x.dtype)


def _log_interval_mass(log_cdf: Callable[[Tensor], Tensor], lower: Tensor, upper: Tensor) -> Tensor:
    """log [F(upper) - F(lower)] of a distribution that is symmetric about 0, from log F, in any shape."""
    is_right = lower + upper > 0
    lower, upper = torch.where(is_right, -upper, lower), torch.where(is_right, -lower, upper)
    log_upper = log_cdf(upper)
    return log_upper + (-torch.expm1(log_cdf(lower) - log_upper)).log()


# --- Symmetric distributions of real numbers ---


def _laplace_log_cdf(z: Tensor) -> Tensor:
    """log F(z), F(z) = e^z / 2 for z < 0 and 1 - e^-z / 2 beyond."""
    tail = (-z.abs()).exp() / 2
    return torch.where(z < 0, -z.abs() - math.log(2), torch.log1p(-tail))


def _normal_log_cdf(z: Tensor) -> Tensor:
    """log Phi(z), by the complementary error function, and below -5 by 12 terms of Mills' ratio.

    Phi(-t) / phi(t) = 1 / (t + 1 / (t + 2 / (t + 3 / ...))). torch's log_ndtr is four times slower in a compiled graph.

    Reference: Abramowitz and Stegun 1964, 26.2.14 (the continued fraction).
    """
    t = (-z).clamp(min=_MILLS_FROM)
    denominator = t
    for n in range(_MILLS_DEPTH, 0, -1):
        denominator = t + n / denominator
    is_far = z < -_MILLS_FROM
    near = torch.erfc(-z.clamp(min=-_MILLS_FROM) / math.sqrt(2)) / 2
    log_phi = torch.where(is_far, -t.square() / 2 - HALF_LOG_TWO_PI, 0.0)
    return log_phi + torch.where(is_far, 1 / denominator, near).log()


def _student_log_cdf(df: Tensor) -> Callable[[Tensor], Tensor]:
    """z -> log F(z) of Student's t with ``df`` degrees of freedom.

    F(-t) = I_u(df / 2, df / 2), u = 1 / (1 + r^2), r = q + sqrt(1 + q^2), q = t / sqrt(df), for t > 0,

    since F(-t) = I_v(df / 2, 1/2) / 2 with v = 1 / (1 + q^2) = 4 u (1 - u), and I_v(a, 1/2) = 2 I_u(a, a). No
    difference from 1 is taken, so the tail keeps its digits.
    """
    df = df.double()
    a = df / 2
    log_beta = HALF_LOG_TWO_PI - a.log() / 2 - (df - 0.5) * math.log(2)  # B(df / 2, df / 2)
    log_beta = log_beta + 2 * stirling_remainder(a) - stirling_remainder(df)

    def log_cdf(z: Tensor) -> Tensor:
        q = z.abs() / df.sqrt()
        r = q + (1 + q.square()).sqrt()
        fraction = incomplete_beta_fraction(a, a, 1 / (1 + r.square()))
        log_tail = -a * (math.log(4) + torch.log1p(q.square())) - log_beta + (fraction / a).log()
        return torch.where(z < 0, log_tail, torch.log1p(-log_tail.exp()))

    return log_cdf


def incomplete_beta_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The continued fraction c of I_x(a, b) = x^a (1 - x)^b c / (a B(a, b)), for 0 < x < (a + 1) / (a + b + 2).

        c = 1 / (1 + d_1 / (1 + d_2 / (1 + ...))),
        d_2m = m (b - m) x / [(a + 2 m - 1) (a + 2 m)],   d_2m+1 = -(a + m) (a + b + m) x / [(a + 2 m) (a + 2 m + 1)],

    cut at m = 16. It converges in O(sqrt(min(a, b))) terms. The shapes of a, b and x broadcast.

    Reference: Press et al. 2007, Numerical Recipes, section 6.4.
    """
    c = torch.ones_like(a + b + x)
    for m in range(_FRACTION_DEPTH, 0, -1):
        # 1 + d_2m / (1 + d_2m+1 / c) with a single division
        rest = c * (a + 2 * m) * (a + (2 * m + 1)) - (a + m) * (a + b + m) * x
        c = 1 + m * (b - m) * x * c * (a + (2 * m + 1)) / ((a + (2 * m - 1)) * rest)
    return 1 / (1 - (a + b) * x / (a + 1) / c)  # d_1 = -(a + b) x / (a + 1)


# --- Numbers between 0 and 1 ---


def _log_beta_mass(p: StableBeta, x: Tensor) -> Tensor:
    """Log-mass of levels under a Beta, in any shape: by quadrature within a level, or by the tail.

    The first and the last level, where the density may have a pole, have the mass of the tail beyond their inner edge
    e: I_e(alpha, beta) for the first. Where that tail holds most of the mass it is 1 minus the other tail. Where the
    density falls by more than 16 nats within a level, the mass is that of the tail from the edge next to the mode.
    Double precision avoids an error of 0.009 nats per image at kappa = 8,100.
    """
    # ``crossing`` is near the mean. The fraction converges for the lower tail to its left, and for the upper tail, with
    # alpha and beta swapped (a, b), to its right. ``edge`` is the side of a level that is nearer to the mean. ``rest``
    # is 1 minus the other tail. c and d are the exponents of the density, for the quadrature within a level.
    p = StableBeta(p.mean_logit.double(), p.log_concentration.double())
    level = x.double()
    alpha, beta = p.exponents()
    first, last = x == 0, x == NUM_LEVELS - 1
    crossing = (alpha + 1) / (alpha + beta + 2)
    center = (level + 0.5) / NUM_LEVELS
    is_right = center > crossing
    edge = torch.where(last | (is_right & ~first), level, level + 1) / NUM_LEVELS
    is_upper = edge > crossing
    a, b = torch.where(is_upper, beta, alpha), torch.where(is_upper, alpha, beta)
    fraction = incomplete_beta_fraction(a, b, torch.where(is_upper, 1 - edge, edge))
    slope = ((alpha - 1) / edge - (beta - 1) / (1 - edge)) / NUM_LEVELS
    is_tail = first | last | (slope.abs() > _STEEP)
    log_p = p.log_prob(torch.where(is_tail, edge, center))
    log_tail = log_p + edge.log() + torch.log1p(-edge) - a.log() + fraction.log()
    is_rest = (first & is_upper) | (last & ~is_upper)
    rest = torch.log1p(-torch.where(is_rest, log_tail, -1.0).exp())
    is_inside = ~is_tail  # elsewhere the ratio might overflow, and its gradient with it
    c, d = (torch.where(is_inside, h - 1, 0.0).to(x.dtype) for h in (alpha, beta))
    ratio = _mean_ratio(c, d, x)
    within = log_p + ratio.log() - math.log(NUM_LEVELS)
    return torch.where(is_rest, rest, torch.where(is_tail, log_tail, within)).to(x.dtype)


def _mean_ratio(c: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """The mean of p over level x, divided by p at the level's center m, for p(y) proportional to y^c (1 - y)^d.

    It is sum_i w_i p(m + t_i) / p(m) with the weights and nodes of Gauss and Legendre within a level, in which

        log [p(m + t) / p(m)] = c log(1 + t / m) + d log(1 - t / (1 - m))

    is small enough for single precision, which takes a third of the time of double precision. Shapes broadcast.
    """
    nodes, weights = (part / 2 for part in np.polynomial.legendre.leggauss(_NUM_NODES))
    ratio = torch.zeros_like(c + d + x)
    for t, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        log_ratio = c * torch.log1p(t / (x + 0.5)) + d * torch.log1p(-t / (NUM_LEVELS - 0.5 - x))
        ratio = ratio + weight * log_ratio.exp()
    return ratio


def _log_continuous_bernoulli_mass(p: StableContinuousBernoulli, x: Tensor) -> Tensor:
    """log P(x) = -|h| d + log [(1 - e^{-|h| / 256}) / (1 - e^-|h|)], d from the mode to the level's nearer edge."""
    h = p.logits.double()
    a = h.abs().clamp(min=1e-6)  # at 0 the quotient would be 0 / 0; at 1e-6 it is 1 / 256 to nine digits
    distance = torch.where(h > 0, NUM_LEVELS - 1 - x, x).double() / NUM_LEVELS
    return (-h.abs() * distance + (torch.expm1(-a / NUM_LEVELS) / torch.expm1(-a)).log()).to(x.dtype)


_LOG_CDF: dict[type, Callable[[dist.TorchDistribution], Callable[[Tensor], Tensor]]] = {
    dist.Normal: lambda p: _normal_log_cdf,
    dist.Laplace: lambda p: _laplace_log_cdf,
    dist.StudentT: lambda p: _student_log_cdf(p.df),
}
_LOG_MASS: dict[type, Callable[[dist.TorchDistribution, Tensor], Tensor]] = {
    StableBeta: _log_beta_mass,
    StableContinuousBernoulli: _log_continuous_bernoulli_mass,
}
