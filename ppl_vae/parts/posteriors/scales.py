"""Maps from a feature to a latent's log-scale."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae.runtime.numerics import bounded

# |log scale| never exceeds this: scales lie between 0.0009 and 1,097.
MAX_LOG_SCALE = 7.0


def bounded_log_scale(h: Tensor) -> Tensor:
    """log sigma = 7 tanh(h / 7): the map from a feature to a latent's log-scale, in the shape of h.

    It has slope one at h = 0, where it gives sigma = 1, the prior's scale; it is smooth, with a gradient for every
    feature up to |h| = 60 in float32; and it is bounded. An unbounded exp(h) overflows the KL after one bad step (at
    h = 50, sigma^2 = 10^43), and lets a scale vanish, where log q(z | x) is infinite; softplus cannot overflow, but its
    slope makes small scales slow to learn and needs an epsilon at the bottom. A posterior narrower than 0.0009 prior
    scales cannot be expressed.

    Source: ours.
    """
    return bounded(h, MAX_LOG_SCALE)


def exponential_log_scale(h: Tensor) -> Tensor:
    """log sigma = h, sigma = exp(h): the map of most published code, in the shape of h. It has no bound either way.

    Reference: Kingma and Welling 2014, arXiv 1312.6114, appendix C.2 (there h = log sigma^2).
    """
    return h


_SOFTPLUS_OFFSET = math.log(math.e - 1)  # softplus of it is 1, so that h = 0 gives the prior's scale
_LEAST_SOFTPLUS = (
    1.1e-19  # whose square is a normal float32: a KL takes it, and that of softplus(-55) is 0, a KL of inf
)


def softplus_log_scale(h: Tensor) -> Tensor:
    """log sigma = log softplus(h + log(e - 1)): linear where exp overflows, exp where scales are small.

    In the shape of h. Slope in log sigma at h = 0: 1 - 1/e. Below h = -44 sigma stays at 1.1e-19, with no gradient.

    Source: common practice; the offset is ours, so that h = 0 gives sigma = 1 as the other maps do.
    """
    return softplus(h + _SOFTPLUS_OFFSET).clamp(min=_LEAST_SOFTPLUS).log()
