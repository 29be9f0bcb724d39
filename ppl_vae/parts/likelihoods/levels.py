"""Likelihoods of 8-bit levels 0, 1, ..., 255: masses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from ppl_vae import data
from ppl_vae.data import NUM_LEVELS
from ppl_vae.parts.likelihoods.base import Pixel, Pixels, ascend, level_counts, unbounded
from ppl_vae.runtime.numerics import bounded, sum_over_images

TOP = NUM_LEVELS - 1  # the highest level
PIXELS_AT_ONCE = 2048  # whose levels are fitted together, for their memory
CENTER = TOP / 2  # of the levels, which t = level / CENTER - 1 brings to [-1, 1]
LEVELS = constraints.integer_interval(0, TOP)
LEVELS_WORDS = "whole numbers from 0 to 255"


class LevelCategorical(dist.Categorical):
    """P(x = v) = softmax(logits)_v: Pyro's Categorical, with levels as floats and a mean."""

    @property
    def mean(self) -> Tensor:
        """sum_v v P(v)."""
        levels = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits.exp() * levels).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_v [v = x] log P(v), nats; the gradient of the library's look-up writes one number at a time."""
        if self._validate_args:
            self._validate_sample(value)
        levels = torch.arange(self.logits.shape[-1], dtype=value.dtype, device=value.device)
        picked = torch.where(value[..., None] == levels, self.logits, 0.0).sum(-1)
        is_level = (value == value.floor()) & (value >= 0) & (value < self.logits.shape[-1])
        return torch.where(is_level, picked, torch.nan)  # never zero, the mass of what is certain


def _cosines(num: int) -> Tensor:
    """sqrt(2) cos(pi (r + 1) (v + 1/2) / 256), r < num: smooth, orthogonal, of mean 0 and mean square 1. (num, 256)."""
    level = torch.arange(NUM_LEVELS, dtype=torch.double) + 0.5
    order = torch.arange(1, num + 1, dtype=torch.double)
    return math.sqrt(2) * (math.pi / NUM_LEVELS * order[:, None] * level).cos()


class Categorical(nn.Module):
    """P(x | h) = prod_d softmax(l_d)_{x_d}, l_dv = b_v + sum_r h_dr A_rv, for x in {0, ..., 255}^E.

    No order of the levels is assumed. 256 free logits per pixel would need 60 million weights after 300 hidden units
    for 28 x 28 pixels; here a pixel has ``rank`` features, and all pixels share A and b. A starts as cosines.

    Args:
        event_shape: E.
        rank: The features per pixel, from 1 to 255; raises ValueError for others.

    Source: a softmax over levels is van den Oord et al. 2016, arXiv 1601.06759, section 3.3; its low rank is ours.
    """

    support = LEVELS
    support_words = LEVELS_WORDS
    measure = "mass"
    data_kind = data.LEVELS

    def __init__(self, event_shape: Sequence[int], *, rank: int = 16) -> None:
        super().__init__()
        if not 1 <= rank < NUM_LEVELS:
            raise ValueError(f"rank: expected a number from 1 to 255, got {rank}")
        self.event_shape = tuple(event_shape)
        self.rank = rank
        self.floats_per_pixel = 3 * NUM_LEVELS + 2 * rank
        self.num_features = rank * math.prod(self.event_shape)
        self.A = nn.Parameter(_cosines(rank).float())
        self.b = nn.Parameter(torch.zeros(NUM_LEVELS))

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., rank prod(E)), feature by feature -> batch shape (...), event shape E."""
        h = h.unflatten(-1, (self.rank, *self.event_shape)).movedim(-len(self.event_shape) - 1, -1)
        return LevelCategorical(logits=h @ self.A + self.b).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The closest to each pixel's log-histogram of that rank, in squares. x: (N, *E) -> (rank prod(E),).

        b is the mean over pixels of L_dv = log softmax_v log(n_dv + 1 / 256), with n the counts, and h A is a truncated
        singular value decomposition of L - b. Missing directions are cosines with features 0.
        """
        log_histogram = (level_counts(x) + 1 / NUM_LEVELS).log()
        log_histogram = log_histogram - log_histogram.logsumexp(-1, keepdim=True)
        b = log_histogram.mean(0)
        U, S, V = torch.linalg.svd(log_histogram - b, full_matrices=False)
        found = min(self.rank, int((S / S[0].clamp(min=1) > 1e-6).sum()))
        scale = math.sqrt(NUM_LEVELS)
        A = torch.cat([scale * V[:found], _cosines(self.rank - found).to(V)])
        h = torch.nn.functional.pad(U[:, :found] * S[:found] / scale, (0, self.rank - found))
        with torch.no_grad():
            self.A.copy_(A)
            self.b.copy_(b)
        return h.T.flatten().to(self.b.dtype)


_LOG_SCALE_CENTER, _LOG_SCALE_LIMIT = -3.0, 4.0


def logistic_log_scale(feature: Tensor) -> Tensor:
    """log scale = -3 + 4 tanh(feature / 4), in units of t = level / 127.5 - 1, between -7 and 1, in any shape.

    At -7 a level is 8.6 scales wide, and a pixel that never varies costs 0.027 nats; at 1 the mass is at the two ends.
    """
    return _LOG_SCALE_CENTER + bounded(feature, _LOG_SCALE_LIMIT)


def discretized_logistic_log_mass(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) = log [sigmoid(a) - sigmoid(b)], a, b = (x +- 1/2 - loc) / scale, with a = inf at 255, b = -inf at 0.

    It equals log sigmoid(a) + log sigmoid(-b) + log(1 - e^{-(a - b)}), which has no differences.

    Args:
        x: Levels.
        loc, log_scale: In units of t = level / 127.5 - 1; their shapes broadcast to that of x.
    """
    precision = (-log_scale).exp()
    middle = ((x - CENTER) / CENTER - loc) * precision
    half = precision / TOP
    above_first, below_last = (x > 0).to(middle.dtype), (x < TOP).to(middle.dtype)
    return (
        below_last * logsigmoid(middle + half)
        + above_first * logsigmoid(half - middle)
        + below_last * above_first * (-torch.expm1(-2 * half)).log()
    )


def discretized_logistic_mean(loc: Tensor, log_scale: Tensor) -> Tensor:
    """E[x] = sum_{v = 1}^{255} P(x >= v) = sum_v sigmoid((loc - edge_v) / scale). loc, log_scale: (...) -> (...)."""
    precision = (-log_scale).exp()
    edges = (torch.arange(1, NUM_LEVELS, dtype=loc.dtype, device=loc.device) - 0.5) / CENTER - 1
    total = torch.zeros_like(loc)
    for part in edges.split(15):  # so many are held in memory at once
        total = total + ((loc[..., None] - part) * precision[..., None]).sigmoid().sum(-1)
    return total


def discretized_logistic_draw(u: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """The level nearest to loc + scale logit(u), for u ~ Uniform[0, 1); the shapes broadcast."""
    return ((loc + log_scale.exp() * u.logit() + 1) * CENTER).round().clamp(0, TOP)


def match_moments(share: Tensor) -> tuple[Tensor, Tensor]:
    """(loc, feature) of a discretized logistic with about the mean and variance of levels with these shares.

    The scale of a logistic distribution is sqrt(3) / pi standard deviations. A location at 0 or 255 is moved one level
    outward, since a narrow distribution around 0 has 2% of its mass at level 1. share: (..., 256) -> (...) and (...).
    """
    levels = torch.arange(NUM_LEVELS, dtype=share.dtype, device=share.device)
    total = share.sum(-1).clamp(min=torch.finfo(share.dtype).tiny)
    mean = share @ levels / total
    variance = (share * (levels - mean[..., None]).square()).sum(-1) / total
    log_scale = (variance.sqrt() / CENTER * math.sqrt(3) / math.pi).log()  # -inf where all is one level
    beyond = (mean > TOP - 0.5).to(mean.dtype) - (mean < 0.5).to(mean.dtype)
    return (mean + beyond) / CENTER - 1, unbounded(log_scale - _LOG_SCALE_CENTER, _LOG_SCALE_LIMIT)


class LevelLogistic(Pixel):
    """The logistic distribution of one pixel, rounded to levels; loc, log_scale in units of t = level / 127.5 - 1."""

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}  # noqa: RUF012, as torch has it
    support = LEVELS
    loc: Tensor
    log_scale: Tensor

    @property
    def mean(self) -> Tensor:
        return discretized_logistic_mean(self.loc, self.log_scale)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return discretized_logistic_draw(self.uniform(sample_shape), self.loc, self.log_scale)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return discretized_logistic_log_mass(value, self.loc, self.log_scale)


class DiscretizedLogistic(Pixels):
    """P(x | h) = prod_d [sigmoid((x_d + 1/2 - loc_d) / scale_d) - sigmoid((x_d - 1/2 - loc_d) / scale_d)], levels x.

    A logistic distribution is rounded to the nearest level from 0 to 255. h = (loc, feature), in units of
    t = level / 127.5 - 1, with log scale = -3 + 4 tanh(feature / 4).

    Reference: Kingma et al. 2016, arXiv 1606.04934, appendix (the discretization; there one scale per channel);
    Salimans et al. 2017, arXiv 1701.05517, section 2.1 (the open ends).
    """

    support = LEVELS
    support_words = LEVELS_WORDS
    measure = "mass"
    data_kind = data.LEVELS
    features_per_pixel = 2
    floats_per_pixel = 13

    def pixel(self, loc: Tensor, feature: Tensor) -> LevelLogistic:
        return LevelLogistic(loc, logistic_log_scale(feature))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """The most likely h of each pixel. x: (N, *E) -> (2 prod(E),)."""
        share = level_counts(x) / len(x)
        start = torch.stack(match_moments(share))
        levels = torch.arange(NUM_LEVELS, dtype=torch.float, device=share.device)

        def log_p(h: Tensor, share: Tensor) -> Tensor:
            loc, log_scale = h[0, :, None], logistic_log_scale(h[1, :, None])
            return (share * discretized_logistic_log_mass(levels, loc, log_scale)).sum(-1)

        parts = zip(start.float().split(PIXELS_AT_ONCE, 1), share.float().split(PIXELS_AT_ONCE), strict=True)
        return torch.cat([ascend(partial(log_p, share=part), h) for h, part in parts], 1).flatten().to(x.dtype)


class LevelBinomial(dist.Binomial):
    """Pyro's Binomial with 255 trials, and a log-mass that is exact in float32.

    Pyro subtracts log-gamma functions up to 1,167, which float32 resolves to 0.0001.
    """

    support = LEVELS

    def log_prob(self, value: Tensor) -> Tensor:
        """log C(255, x) + x log sigmoid(h) + (255 - x) log sigmoid(-h), nats."""
        if self._validate_args:
            self._validate_sample(value)
        n = torch.arange(NUM_LEVELS, dtype=torch.double, device=value.device)
        log_factorial = n.clamp(min=1).log().cumsum(0)  # a sum is taken once; log Gamma(n + 1) would be at each pixel
        log_choose = log_factorial[TOP] - log_factorial - log_factorial.flip(0)
        h = self.logits
        return log_choose.to(h.dtype)[value.long()] + value * logsigmoid(h) + (TOP - value) * logsigmoid(-h)


class Binomial(Pixels):
    """P(x | h) = prod_d Binomial(x_d; 255, sigmoid(h_d)), for levels x in {0, ..., 255}^E.

    One feature per pixel sets both the mean level and its standard deviation sqrt(255 p (1 - p)), at most 8 levels.
    Data that vary more are predicted with far too much certainty.
    """

    support = LEVELS
    support_words = LEVELS_WORDS
    measure = "mass"
    data_kind = data.LEVELS
    floats_per_pixel = 8

    def pixel(self, logits: Tensor) -> LevelBinomial:
        return LevelBinomial(TOP, logits=logits)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = logit((1 + sum_n x_nd) / (2 + 255 N)), Laplace-smoothed. x: (N, *E) -> (prod(E),)."""
        rate = (1 + sum_over_images(x.flatten(1))) / (2 + TOP * len(x))
        return rate.logit().to(x.dtype)
