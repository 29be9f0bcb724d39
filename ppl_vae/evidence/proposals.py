"""Importance-sampling proposals with a distribution for each image, in the place of the encoder's guide.

    q = refine_proposal(vae, x, family=FullNormal(L))          # refinement.py: a normal for each image
    evaluate(replace_guide(vae, defend_proposal(q)), x, num_particles=5000, seed=0)

q is made with random draws of its own, before the particles of L_S are drawn. Given q the particles are independent, so
L_S stays a lower bound on log p(x), whatever q is. The model p(x, z) does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.parts.posteriors import MAX_LOG_SCALE, DiagonalNormal, FullNormal, bounded_log_scale, exponential_log_scale
from ppl_vae.parts.posteriors.flow import ConditionedFlow
from ppl_vae.protocols import Family, LatentModel
from ppl_vae.runtime.capture import is_capturing
from ppl_vae.vae import VAE


class Proposal(dist.TorchDistribution):
    """q(z | x_n) = family(h_n), n = 1..N: a distribution for each of N known images.

    Args:
        family: features (..., F) -> a distribution with batch shape (...) and event shape (L,).
        h: features (N, F).
        x: the images (N, *E).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.real_vector

    def __init__(self, family: Family, h: Tensor, x: Tensor) -> None:
        self.family, self.h, self.x = family, h, x
        self._q = family(h)
        super().__init__(self._q.batch_shape, self._q.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws have gradients, as in the family."""
        return self._q.has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Distribution:
        """The distribution alone, without its images, for another batch shape."""
        return self._q.expand(torch.Size(batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """sample_shape + (N, L), without gradients."""
        with torch.no_grad():
            return self._q.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """sample_shape + (N, L)."""
        return self._q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """value: (..., N, L) -> (..., N) nats."""
        return self._q.log_prob(value)


class PerImageGuide(nn.Module):
    """x (B, *E) -> q(z | x), for images among the N that a proposal was made for.

    Images are found by their pixels, so they may come in any order and in any groups.

    Args:
        q: the proposal.
        guide: the VAE's own, kept because a VampPrior uses its weights.

    Raises:
        ValueError: an image that is not among the N. A compiled graph cannot raise, and gives NaN instead.
    """

    pixels: Tensor
    direction: Tensor
    keys: Tensor
    h: Tensor

    def __init__(self, q: Proposal, guide: Callable[[Tensor], Distribution]) -> None:
        super().__init__()
        self.family = q.family
        self.guide = guide
        self.event_shape = tuple(q.event_shape)
        pixels = q.x.detach().flatten(1)
        direction = torch.randn(pixels.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.double)
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("direction", direction.to(pixels.device), persistent=False)
        self.register_buffer("keys", pixels.double() @ self.direction, persistent=False)
        self.register_buffer("h", q.h.detach(), persistent=False)

    def forward(self, x: Tensor) -> Distribution:
        """x: (B, *E) -> batch shape (B,), event shape (L,)."""
        pixels = x.flatten(1)
        if pixels.shape[1] != self.pixels.shape[1]:
            raise ValueError(f"x: expected images of {self.pixels.shape[1]} pixels, got {pixels.shape[1]}")
        # Find the nearest image along one random direction, then compare all pixels with that image alone: comparing
        # with all N images would take N / B times the work.
        nearest = ((pixels.double() @ self.direction)[:, None] - self.keys).abs().argmin(1)
        known = (self.pixels[nearest] == pixels).all(1)
        if not is_capturing() and not known.all():
            raise ValueError(
                f"x: expected images that the proposal was made for, got {int((~known).sum())} of {len(x)} that are "
                f"not among its {len(self.pixels)}"
            )
        return self.family(torch.where(known[:, None], self.h[nearest], math.nan))


def replace_guide(vae: LatentModel, q: Proposal) -> VAE:
    """The same p(x, z) with q as its guide, for the images that q was made for.

    ``evaluate`` and ``importance`` take the result like any VAE, compiled or not.

    Args:
        vae: a VAE, or a hierarchical one, whose layers' latents are then one vector and one site.
        q: from ``refine_proposal``, ``fit_proposal`` or ``defend_proposal``.

    Returns:
        A VAE that shares the prior and the likelihood.

    Raises:
        ValueError: q is not a ``Proposal``. When the VAE is used: an image that q was not made for; a compiled graph
            leads to ``NotFinite`` instead.
    """
    if not isinstance(q, Proposal):
        raise ValueError(f"q: expected a Proposal, which knows its images, got {type(q).__name__}")
    return VAE(vae.prior, vae.likelihood, PerImageGuide(q, vae.posterior)).train(vae.training)


# --- Normal proposals ---

# From log-scales to features, for the maps with a known inverse. The bounded map is inverted up to 6.99, where the
# feature is 25 and the map still has a slope.
_INVERSES: dict[object, Callable[[Tensor], Tensor]] = {
    bounded_log_scale: lambda log_scale: MAX_LOG_SCALE * (log_scale.clamp(-6.99, 6.99) / MAX_LOG_SCALE).atanh(),
    exponential_log_scale: lambda log_scale: log_scale,
}


def normal_features(family: nn.Module, loc: Tensor, T: Tensor) -> Tensor:
    """The features (N, F) of Normal(z; loc, T T') under a family of normals.

    Args:
        family: ``DiagonalNormal``, which takes the diagonal of T, or ``FullNormal``.
        loc: (N, L).
        T: (N, L, L) lower triangular.

    Raises:
        ValueError: another family, or one of other latents.
    """
    inverse = _INVERSES.get(getattr(family, "log_scale", None))
    if inverse is None or not isinstance(family, DiagonalNormal | FullNormal):
        raise ValueError(
            "family: expected DiagonalNormal or FullNormal, with log_scale bounded_log_scale or exponential_log_scale, "
            f"got {type(family).__name__}"
        )
    L = loc.shape[1]
    if tuple(family.event_shape) != (L,):
        raise ValueError(f"family: expected {L} latents, as the guide has, got {family.event_shape[0]}")
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    h = [loc, inverse(diagonal.log())]
    if isinstance(family, FullNormal):
        row, column = torch.tril_indices(L, L, offset=-1)
        h.append((T / diagonal[:, :, None] * math.sqrt(L))[:, row, column])
    return torch.cat(h, dim=-1)


@torch.no_grad()
def fit_proposal(z: Tensor, x: Tensor, *, shrinkage: float | None = None) -> Proposal:
    """Normal(z; mean, C) with C_ii = S_ii and C_ij = (1 - a) S_ij: mean and covariance S of M posterior draws.

    The draws may come from a pilot's chains, but not from the chains whose log-weights a bound takes: the proposal must
    be independent of its particles. Scales from a few draws are uncertain; ``defend_proposal`` guards against narrow
    ones.

    Args:
        z: draws of p(z | x), (M, N, L), nearly independent.
        x: the images (N, *E).
        shrinkage: a, from 0 to 1; by default the value that minimizes the correlations' expected squared error, for
            each image.

    Returns:
        q, batch shape (N,), event shape (L,).

    Raises:
        ValueError: shapes that do not fit, fewer than three draws, or a shrinkage out of its range.

    Reference: Schäfer and Strimmer 2005, Statistical Applications in Genetics and Molecular Biology 4(1), table 1,
    target D, equation 10.
    """
    if z.dim() != 3 or z.shape[1] != len(x) or len(z) < 3:
        raise ValueError(
            f"z: expected shape (M, {len(x)}, L) with at least 3 draws of each image, got {tuple(z.shape)}"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: expected a number from 0 to 1, got {shrinkage}")
    loc, scale = z.double().mean(0), z.double().std(0)
    u = (z.double() - loc) / scale
    r = torch.einsum("mni,mnj->nij", u, u) / (len(z) - 1)
    a = _best_shrinkage(u, r) if shrinkage is None else r.new_full((len(x),), shrinkage)
    # At least 1e-6: with fewer draws than latents and no shrinkage a correlation matrix is singular.
    a = a.clamp(min=1e-6)[:, None, None]
    r = (1 - a) * r + a * torch.eye(z.shape[2], dtype=r.dtype, device=r.device)
    family = FullNormal(z.shape[2], log_scale=exponential_log_scale).to(z.device)
    h = normal_features(family, loc, scale[:, :, None] * torch.linalg.cholesky(r))
    return Proposal(family, h.to(z.dtype), x)


def _best_shrinkage(u: Tensor, r: Tensor) -> Tensor:
    """(N,) sum_{i != j} Var(r_ij) / sum_{i != j} r_ij^2, within [0, 1]. u: standardized (M, N, L), r: (N, L, L)."""
    M, L = len(u), u.shape[2]
    mean = r * (M - 1) / M
    spread = torch.einsum("mni,mnj->nij", u.square(), u.square()) - M * mean.square()
    off_diagonal = ~torch.eye(L, dtype=torch.bool, device=u.device)
    variance = (M / (M - 1) ** 3 * spread)[:, off_diagonal].sum(-1)
    return (variance / r.square()[:, off_diagonal].sum(-1)).nan_to_num(1.0).clamp(0, 1)


# --- Defensive mixtures ---


class DefensiveMixture(dist.TorchDistribution):
    """(1 - a) q(z) + a p(z): a proposal with a share a of a wider distribution, such as the prior.

    With the prior as p, no importance weight p(x | z) p(z) / q(z) exceeds max_z p(x | z) / a. Weights then have a
    variance wherever the likelihood is bounded, however narrow q is.

    Args:
        proposal: q, batch shape (B,).
        prior: p, batch shape () or (B,), the event shape of q.
        share: (B,) a, from 0 to 1.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194 (defensive mixture).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for

    def __init__(self, proposal: Distribution, prior: Distribution, share: Tensor) -> None:
        self.proposal, self.share = proposal, share
        self.prior = prior.expand(proposal.batch_shape)
        super().__init__(proposal.batch_shape, proposal.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of p."""
        return self.prior.support

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> DefensiveMixture:
        """The same distribution for a larger batch shape."""
        return type(self)(self.proposal.expand(torch.Size(batch_shape)), self.prior, self.share.expand(batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """(*sample_shape, *batch_shape, *event_shape), without gradients."""
        shape = (*sample_shape, *self.batch_shape)
        is_prior = torch.rand(shape, dtype=self.share.dtype, device=self.share.device) < self.share
        is_prior = is_prior.reshape(*shape, *[1] * len(self.event_shape))
        sample_shape = torch.Size(sample_shape)
        with torch.no_grad():
            return torch.where(is_prior, self.prior.sample(sample_shape), self.proposal.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The density at value, (*sample_shape, *batch_shape), nats."""
        log_q = torch.log1p(-self.share) + self.proposal.log_prob(value)
        return torch.logaddexp(log_q, self.share.log() + self.prior.log_prob(value))


class _NoiseMixture(DefensiveMixture):
    """A defensive mixture as the noise of a flow, which asks for reparametrized draws; they have no gradients here."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """sample_shape + batch shape + (L,)."""
        return self.sample(sample_shape)


class DefensiveFamily(nn.Module):
    """h -> (1 - a) q(z | h) + a q_c(z | h), where q_c is q with its scales c times as wide.

    Args:
        family: of q, normal or a flow.
        share: a.
        widen: c.
    """

    def __init__(self, family: Family, *, share: float, widen: float) -> None:
        super().__init__()
        self.family, self.share, self.widen = family, share, widen
        self.event_shape, self.num_features = family.event_shape, family.num_features

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """h: (..., F) -> batch shape (...), event shape (L,)."""
        return _mix_wide(self.family(h), self.share, self.widen)


def defend_proposal(q: Distribution, *, share: float = 0.1, widen: float = 2.0) -> dist.TorchDistribution:
    """q'(z) = (1 - a) q(z) + a q_c(z), where q_c is q with its scales c times as wide.

    Where q is too narrow, weights p(x, z) / q(z) are unbounded and may have no variance. Those of q' do not exceed
    p(x, z) / (a q_c(z)), which is bounded where the posterior's tails are lighter than those of q_c, and nowhere exceed
    1 / (1 - a) times those of q. In many dimensions a small c is already wide: with 40 latents and c = 2 almost no draw
    of q_c hits the posterior, and the share a of the particles is an insurance premium.

    Args:
        q: a ``Proposal``, a normal, diagonal or full, or a flow of one, batch shape (B,).
        share: a, between 0 and 1.
        widen: c, above 1.

    Returns:
        A ``Proposal`` for the same images where q is one, else a distribution, batch shape (B,).

    Raises:
        ValueError: an argument out of its range, or a distribution of another kind.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194; Owen and Zhou 2000, JASA 95(449), 135-143.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if not widen > 1:
        raise ValueError(f"widen: expected a number above 1, got {widen}")
    if isinstance(q, Proposal):
        return Proposal(DefensiveFamily(q.family, share=share, widen=widen), q.h, q.x)
    return _mix_wide(q, share, widen)


def _mix_wide(q: Distribution, share: float, widen: float) -> dist.TorchDistribution:
    if isinstance(q, ConditionedFlow):  # its noise is widened, so the density stays one pass through the layers
        noise = _mix_wide(q.base, share, widen)
        noise = _NoiseMixture(noise.proposal, noise.prior, noise.share)
        return ConditionedFlow(noise, q.layers, context=q.context, loc=q.loc, log_scale=q.log_scale, checked=False)
    wide = _widen(q, widen)
    return DefensiveMixture(q, wide, torch.full(q.batch_shape, share, dtype=q.mean.dtype, device=q.mean.device))


def _widen(q: Distribution, widen: float) -> Distribution:
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc, scale_tril=widen * q._unbroadcasted_scale_tril)
    base = getattr(q, "base_dist", None)
    if isinstance(q, torch.distributions.Independent) and isinstance(base, torch.distributions.Normal):
        return dist.Normal(base.loc, widen * base.scale).to_event(q.reinterpreted_batch_ndims)
    raise ValueError(f"q: expected a normal or a flow of one, which can be widened, got {type(q).__name__}")
