"""One layer of a flow: each latent is mapped by itself, by what the latents before it and a context say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ppl_vae.parts.flows import Univariate
from ppl_vae.runtime.errors import Widths, check_widths


class MaskedLinear(nn.Linear):
    """y = (W * mask) u + b.

    Args:
        mask: (outputs, inputs), whether an output sees an input.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return linear(input, self.weight * self.mask, self.bias)


class MaskedNetwork(nn.Module):
    """h_l = net_l({u_m: order_m < order_l}, c): one network with features for every latent, its weights masked.

    A hidden unit of degree d sees the latents of order below d, and is seen by those of order d and above; degrees are
    spread evenly, and those of degree 0 see the context alone. The context enters the first layer as a sum, so that it
    is multiplied once an image and not once a particle. At first h = 0.

    Args:
        order: L integers from 0.
        num_features: F, of each latent.
        context_dim: C.
        hidden: widths of the hidden layers, at least one.

    Raises:
        ValueError: no hidden layer.

    Reference: Germain et al. 2015 (MADE), arXiv 1502.03509, equations 8 to 11; the even degrees and the context as in
    Papamakarios et al. 2017, arXiv 1705.07057, section 3.4.
    """

    def __init__(self, order: Sequence[int], *, num_features: int, context_dim: int, hidden: Widths) -> None:
        super().__init__()
        hidden = check_widths("hidden", hidden)
        if not hidden:
            raise ValueError("hidden: expected at least one width, got none")
        passes, of_latents = max(order) + 1, torch.tensor(order)
        degrees = [torch.arange(width) * passes // width for width in hidden]
        masks = [degrees[0][:, None] > of_latents]
        masks += [after[:, None] >= before for before, after in pairwise(degrees)]
        masks += [of_latents.repeat_interleave(num_features)[:, None] >= degrees[-1]]
        self.num_features = num_features
        self.context = nn.Linear(context_dim, hidden[0], bias=False)
        self.first = MaskedLinear(masks[0])
        self.further = nn.Sequential(*(nn.Sequential(nn.ReLU(), MaskedLinear(mask)) for mask in masks[1:-1]))
        self.output = MaskedLinear(masks[-1])
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.zero_()

    def forward(self, u: Tensor, context: Tensor) -> Tensor:
        """u: (..., L), context: (..., C) -> (..., L, F)."""
        h = self.further(self.first(u) + self.context(context))
        return self.output(h.relu()).to(u.dtype).unflatten(-1, (-1, self.num_features))


class Autoregressive(nn.Module):
    """y_l = t(u_l; h_l), h_l = net_l({u_m: order_m < order_l}, c): triangular, so that log |det dy/du| is a sum.

    u to y takes one pass of the network; y to u takes as many as there are different numbers in the order: L where
    each latent has its own, 2 where one half is mapped by the other (a coupling). At first y = u.

    Args:
        order: L integers from 0: what each latent is mapped by is of a lower order.
        univariate: t, of ``num_features`` features, monotone in its argument.
        num_features: F.
        context_dim: C.
        hidden: widths of the network's hidden layers.

    Reference: Kingma et al. 2016, arXiv 1606.04934; as one layer with its couplings in Papamakarios et al. 2021,
    arXiv 1912.02762, section 3.1.
    """

    order: Tensor

    def __init__(
        self,
        order: Sequence[int],
        *,
        univariate: Univariate,
        num_features: int,
        context_dim: int,
        hidden: Widths,
    ) -> None:
        super().__init__()
        self.univariate = univariate
        self.passes = max(order) + 1
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.net = MaskedNetwork(order, num_features=num_features, context_dim=context_dim, hidden=hidden)

    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u: (..., L), context: (..., C) -> y (..., L) and log |det dy/du|, (...)."""
        y, log_slope = self.univariate(u, self.net(u, context), False)
        return y, log_slope.sum(-1)

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """y: (..., L), context: (..., C) -> u (..., L) and log |det du/dy|, (...)."""
        u = torch.zeros_like(y)
        for index in range(self.passes - 1):
            found, _ = self.univariate(y, self.net(u, context), True)
            u = torch.where(self.order == index, found, u)  # the others are of latents that are not known yet
        u, log_slope = self.univariate(y, self.net(u, context), True)
        return u, log_slope.sum(-1)
