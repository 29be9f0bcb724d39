"""A proposal with a share that is wider, so that no weight has no bound."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.evidence.missing import DefensiveMixture
from ppl_vae.evidence.proposals.own import Proposal
from ppl_vae.parts.posteriors.flow import ConditionedFlow


class Defensive(nn.Module):
    """h -> (1 - a) q(z | h) + a q_c(z | h), q_c as q with its scales c times as wide.

    Args:
        family: of q, normal or a flow.
        share: a.
        widen: c.
    """

    def __init__(self, family: Any, *, share: float, widen: float) -> None:
        super().__init__()
        self.family, self.share, self.widen = family, share, widen
        self.event_shape, self.num_features = family.event_shape, family.num_features

    def forward(self, h: Tensor) -> Any:
        """h: (..., F) -> batch shape (...), event shape (L,)."""
        return _with_wide_share(self.family(h), self.share, self.widen)


def defensive(q: Any, *, share: float = 0.1, widen: float = 2.0) -> Any:
    """q'(z) = (1 - a) q(z) + a q_c(z), q_c as q with its scales c times as wide.

    Where q is too narrow weights p(x, z) / q(z) have no bound, and may have no variance. Those of q' do not exceed
    p(x, z) / (a q_c(z)), which is bounded where the posterior's tails are lighter than those of q_c; and nowhere are
    they above 1 / (1 - a) times those of q. In many dimensions a little is wide: with 40 latents and c = 2 almost no
    draw of q_c is where the posterior is. Its share of the particles is then the premium of an insurance, and no gain.

    Args:
        q: a ``Proposal``, a normal, diagonal or full, or a flow of one, batch shape (B,).
        share: a, between 0 and 1.
        widen: c, above 1.

    Returns:
        A ``Proposal`` of the same images where q is one, else a distribution, batch shape (B,).

    Raises:
        ValueError: an argument out of its range, or a distribution of another kind.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194; Owen and Zhou 2000, JASA 95(449), 135-143.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if not widen > 1:
        raise ValueError(f"widen: expected a number above 1, got {widen}")
    if isinstance(q, Proposal):
        return Proposal(Defensive(q.family, share=share, widen=widen), q.h, q.x)
    return _with_wide_share(q, share, widen)


def _with_wide_share(q: Any, share: float, widen: float) -> Any:
    if isinstance(q, ConditionedFlow):  # its noise is widened, and the density stays one pass through the layers
        noise = _with_wide_share(q.base, share, widen)
        noise = _Noise(noise.proposal, noise.prior, noise.share)
        return ConditionedFlow(noise, q.layers, context=q.context, loc=q.loc, log_scale=q.log_scale, checked=False)
    wide = _widened(q, widen)
    return DefensiveMixture(q, wide, torch.full(q.batch_shape, share, dtype=q.mean.dtype, device=q.mean.device))


def _widened(q: Any, widen: float) -> Any:
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc, scale_tril=widen * q._unbroadcasted_scale_tril)
    base = getattr(q, "base_dist", None)
    if isinstance(q, torch.distributions.Independent) and isinstance(base, torch.distributions.Normal):
        return dist.Normal(base.loc, widen * base.scale).to_event(q.reinterpreted_batch_ndims)
    raise ValueError(f"q: expected a normal or a flow of one, which can be widened, got {type(q).__name__}")


class _Noise(DefensiveMixture):
    """The mixture as the noise of a flow, which asks for reparametrized draws; nothing in it has a gradient."""

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + batch shape + (L,)."""
        return self.sample(sample_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Noise:
        """With another batch shape."""
        return _Noise(self.proposal.expand(batch_shape), self.prior, self.share.expand(batch_shape))
