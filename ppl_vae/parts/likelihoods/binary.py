"""Likelihoods of zeros and ones."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from ppl_vae import data
from ppl_vae.parts.likelihoods.family import Pixels
from ppl_vae.runtime.numerics import sum_over_images


class Bernoulli(Pixels):
    """p(x | h) = prod_d sigmoid(h_d)^{x_d} (1 - sigmoid(h_d))^{1 - x_d}, for x in {0, 1}^E.

    Features are logits: probabilities would saturate in float32 and lose both value and gradient. Gray pixels are not
    on the support: a Bernoulli of a fraction is no density (its integral is below one), and they are refused.

    Args:
        event_shape: E, the shape of an image, such as (1, 28, 28).
    """

    support = constraints.boolean
    support_words = "0 or 1"
    measure = "mass"
    data_kind = data.BINARY

    def pixel(self, logits: Tensor) -> dist.Bernoulli:
        """Of logits."""
        return dist.Bernoulli(logits=logits)

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = logit((1 + sum_n x_nd) / (2 + N)), each pixel's rate, Laplace-smoothed. x: (N, *E) -> (prod(E),)."""
        rate = (1 + sum_over_images(x.flatten(1))) / (2 + len(x))
        return rate.logit().float()
