"""Importance-sampling proposals with a distribution for each image, which replace the encoder's guide.

    q = refine_proposal(vae, x, family=FullNormal(L))          # refinement.py: a normal for each image
    evaluate(replace_guide(vae, defend_proposal(q)), x, num_particles=5000, seed=0)

q is made with random draws of its own, before the particles of L_S are drawn. Given q the particles are independent, so
L_S stays a lower bound on log p(x), whatever q is. The model p(x, z) does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.evidence.moments import normal_factors
from ppl_vae.parts.posteriors import MAX_LOG_SCALE, DiagonalNormal, FullNormal, bounded_log_scale, exponential_log_scale
from ppl_vae.protocols import Family, LatentModel, check_latent_model
from ppl_vae.runtime.capture import is_capturing
from ppl_vae.runtime.records import Data, arguments_of
from ppl_vae.vae import VAE


@dataclass(frozen=True)
class Proposal:
    """q(z | x_n) = family(h_n), n = 1..N: a distribution for each of N known images.

    Args:
        family: Features (..., F) -> a distribution with batch shape (...) and event shape (L,).
        h: Features (N, F).
        x: The images (N, *E), or ``Records``.
    """

    family: Family
    h: Tensor
    x: Data


class PerImageGuide(nn.Module):
    """x (B, *E) -> q(z | x), for images among the N that a proposal was made for.

    Images are found by their pixels and their further tensors, so they may come in any order and in any groups. An
    image that is not among the N raises ValueError. A compiled graph cannot raise, and gives NaN instead.

    Args:
        q: The proposal.
        guide: The VAE's own guide, kept because a VampPrior uses its weights.
    """

    pixels: Tensor
    direction: Tensor
    keys: Tensor
    h: Tensor

    def __init__(self, q: Proposal, guide: Callable[..., Distribution]) -> None:
        super().__init__()
        self.family = q.family
        self.guide = guide
        self.event_shape = tuple(q.family.event_shape)
        pixels = _rows(arguments_of(q.x))
        # An image is found by its key, its projection on a random direction: comparing all pixels with those of all N
        # images would take N times the work.
        direction = torch.randn(pixels.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.double)
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("direction", direction.to(pixels.device), persistent=False)
        self.register_buffer("keys", pixels.double() @ self.direction, persistent=False)
        self.register_buffer("h", q.h.detach(), persistent=False)

    def forward(self, *data: Tensor) -> Distribution:
        """x: (B, *E), and its further tensors -> batch shape (B,), event shape (L,)."""
        x, pixels = data[0], _rows(data)
        if pixels.shape[1] != self.pixels.shape[1]:
            raise ValueError(f"x: expected images of {self.pixels.shape[1]} pixels, got {pixels.shape[1]}")
        nearest = ((pixels.double() @ self.direction)[:, None] - self.keys).abs().argmin(1)
        known = (self.pixels[nearest] == pixels).all(1)
        if not is_capturing() and not known.all():
            raise ValueError(
                f"x: expected images that the proposal was made for, got {int((~known).sum())} of {len(x)} that are "
                f"not among its {len(self.pixels)}"
            )
        return self.family(torch.where(known[:, None], self.h[nearest], math.nan))


def _rows(data: Sequence[Tensor]) -> Tensor:
    """(B, D) all numbers of an image and of its further tensors, which the images' type might round to equal ones."""
    x, *further = (tensor.detach().reshape(len(tensor), -1) for tensor in data)
    return torch.cat([x, *(tensor.double() for tensor in further)], dim=1)


def replace_guide(vae: LatentModel, q: Proposal) -> VAE:
    """The same p(x, z), with shared weights, and q as its guide, for the images that q was made for.

    ``evaluate`` and ``importance`` take the result like any VAE, compiled or not.

    Args:
        vae: A VAE, or a hierarchical one, whose layers' latents are then one vector and one site.
        q: From ``refine_proposal`` or ``defend_proposal``.
    """
    check_latent_model(vae)
    return VAE(vae.prior, vae.likelihood, PerImageGuide(q, vae.posterior)).train(vae.training)


# From log-scales to features. The bounded map, 7 tanh(h / 7), reaches 7 only at infinity: log-scales beyond 6.99 are
# brought there, where h is 25 and a gradient still passes.
_INVERSES: dict[object, Callable[[Tensor], Tensor]] = {
    bounded_log_scale: lambda log_scale: MAX_LOG_SCALE * (log_scale.clamp(-6.99, 6.99) / MAX_LOG_SCALE).atanh(),
    exponential_log_scale: lambda log_scale: log_scale,
}


def normal_features(family: DiagonalNormal | FullNormal, loc: Tensor, scale: Tensor) -> Tensor:
    """The features (N, F) of prod_l Normal(z_l; loc_l, scale_l), loc and scale (N, L), under a family of normals.

    Another family raises ValueError.
    """
    inverse = _INVERSES.get(getattr(family, "log_scale", None))
    if inverse is None or not isinstance(family, DiagonalNormal | FullNormal):
        raise ValueError(
            "family: expected DiagonalNormal or FullNormal, with log_scale bounded_log_scale or exponential_log_scale, "
            f"got {type(family).__name__}"
        )
    N, L = loc.shape
    if family.event_shape != (L,):
        raise ValueError(f"family: expected {L} latents, as the guide has, got {family.event_shape[0]}")
    correlations = loc.new_zeros(N, family.num_features - 2 * L)  # none for DiagonalNormal
    return torch.cat([loc, inverse(scale.log()), correlations], dim=-1)


# --- Defensive mixtures ---


class DefensiveMixture(dist.TorchDistribution):
    """(1 - a) q(z) + a p(z): a proposal with a share a of a wider distribution, such as the prior.

    With the prior as p, no importance weight p(x | z) p(z) / q(z) exceeds max_z p(x | z) / a. Weights then have a
    variance wherever the likelihood is bounded, however narrow q is.

    Args:
        proposal: q, batch shape (B,).
        wide: p, batch shape () or (B,), the event shape of q.
        share: (B,) a, from 0 to 1.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194 (defensive mixture).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for

    def __init__(self, proposal: Distribution, wide: Distribution, share: Tensor) -> None:
        self.proposal, self.wide, self.share = proposal, wide.expand(proposal.batch_shape), share
        super().__init__(proposal.batch_shape, proposal.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of p."""
        return self.wide.support

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> DefensiveMixture:
        return DefensiveMixture(
            self.proposal.expand(torch.Size(batch_shape)), self.wide, self.share.expand(batch_shape)
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        is_wide = torch.rand(shape, dtype=self.share.dtype, device=self.share.device) < self.share
        is_wide = is_wide.reshape(*shape, *[1] * len(self.event_shape))
        sample_shape = torch.Size(sample_shape)
        with torch.no_grad():
            return torch.where(is_wide, self.wide.sample(sample_shape), self.proposal.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_q = torch.log1p(-self.share) + self.proposal.log_prob(value)
        return torch.logaddexp(log_q, self.share.log() + self.wide.log_prob(value))


class DefensiveFamily(nn.Module):
    """h -> (1 - a) q(z | h) + a q_c(z | h), where q_c is q with its scales c times as wide.

    Args:
        family: Of q, diagonal or full normals.
        share: a, between 0 and 1.
        widen: c, above 1.
    """

    def __init__(self, family: Family, *, share: float, widen: float) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"share: expected a number between 0 and 1, got {share}")
        if not widen > 1:
            raise ValueError(f"widen: expected a number above 1, got {widen}")
        self.family, self.share, self.widen = family, share, widen
        self.event_shape, self.num_features = family.event_shape, family.num_features

    def forward(self, h: Tensor) -> DefensiveMixture:
        """h: (..., F) -> batch shape (...), event shape (L,)."""
        q = self.family(h)
        if isinstance(q, torch.distributions.MultivariateNormal):
            wide: Distribution = dist.MultivariateNormal(q.loc, scale_tril=self.widen * q._unbroadcasted_scale_tril)
        elif (normals := normal_factors(q)) is not None:
            wide = dist.Normal(normals.loc, self.widen * normals.scale).to_event(1)
        else:
            raise ValueError(f"family: expected normals, whose scales can be widened, got {type(q).__name__}")
        return DefensiveMixture(q, wide, torch.full_like(q.mean[..., 0], self.share))


def defend_proposal(q: Proposal, *, share: float = 0.1, widen: float = 2.0) -> Proposal:
    """q'(z) = (1 - a) q(z) + a q_c(z), where q_c is q with its scales c times as wide, for the same images.

    Where q is too narrow, weights p(x, z) / q(z) are unbounded and may have no variance. Those of q' do not exceed
    p(x, z) / (a q_c(z)), which is bounded where the posterior's tails are lighter than those of q_c, and nowhere exceed
    1 / (1 - a) times those of q. In many dimensions a small c is already wide: with 40 latents and c = 2 almost no draw
    of q_c hits the posterior, so the share a of the particles is spent on the bound alone.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194; Owen and Zhou 2000, JASA 95(449), 135-143.
    """
    return Proposal(DefensiveFamily(q.family, share=share, widen=widen), q.h, q.x)
