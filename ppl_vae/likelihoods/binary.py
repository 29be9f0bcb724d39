"""Likelihoods of zeros and ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae import data


class Bernoulli(nn.Module):
    """p(x | h) = prod_d sigmoid(h_d)^{x_d} (1 - sigmoid(h_d))^{1 - x_d}, for x in {0, 1}^E.

    Features are logits: probabilities would saturate in float32 and lose both value and gradient. Gray pixels are not
    on the support: a Bernoulli of a fraction is no density (its integral is below one), and they are refused.

    Args:
        event_shape: E, the shape of an image, such as (1, 28, 28).
    """

    support = constraints.boolean
    support_words = "0 or 1"
    measure = "mass"
    asks_for = data.BINARY
    numbers_a_pixel = 6

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., prod(E)) logits -> batch shape (...), event shape E."""
        logits = h.reshape(*h.shape[:-1], *self.event_shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.event_shape))

    def fit_marginals(self, x: Tensor) -> Tensor:
        """h_d = logit((1 + sum_n x_nd) / (2 + N)), each pixel's rate, Laplace-smoothed. x: (N, *E) -> (prod(E),)."""
        rate = (1 + x.flatten(1).sum(0, dtype=torch.double)) / (2 + len(x))
        return rate.logit().float()
