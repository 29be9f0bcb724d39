"""A normal for each image, fitted to draws of its posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_vae.evidence.proposals.own import Proposal
from ppl_vae.evidence.proposals.refinement import normal_features
from ppl_vae.parts.posteriors import FullNormal, exponential_log_scale


@torch.no_grad()
def fitted(z: Tensor, x: Tensor, *, shrinkage: float | None = None) -> Proposal:
    """Normal(z; mean, C), C_ij = (1 - a) S_ij for i != j, C_ii = S_ii: mean and covariance S of an image's M draws.

    Draws may come of a pilot's chains. They must not be those whose log-weights a bound takes, since a proposal that
    has seen its particles is none. Scales of a few draws are uncertain: ``defensive`` guards against narrow ones.

    Args:
        z: draws of p(z | x), (M, N, L), about independent of each other.
        x: the images (N, *E).
        shrinkage: a, from 0 to 1; by default what minimizes the correlations' expected squared error, for each image.

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
    a = _shrinkage_of_correlations(u, r) if shrinkage is None else r.new_full((len(x),), shrinkage)
    # A trace of the identity: with fewer draws than latents and no shrinkage a correlation matrix is singular.
    a = a.clamp(min=1e-6)[:, None, None]
    r = (1 - a) * r + a * torch.eye(z.shape[2], dtype=r.dtype, device=r.device)
    family = FullNormal(z.shape[2], log_scale=exponential_log_scale).to(z.device)
    h = normal_features(family, loc, scale[:, :, None] * torch.linalg.cholesky(r))
    return Proposal(family, h.to(z.dtype), x)


def _shrinkage_of_correlations(u: Tensor, r: Tensor) -> Tensor:
    """(N,) sum_{i != j} Var(r_ij) / sum_{i != j} r_ij^2, from 0 to 1. u: standardized (M, N, L), r: (N, L, L)."""
    M, L = len(u), u.shape[2]
    mean = r * (M - 1) / M
    spread = torch.einsum("mni,mnj->nij", u.square(), u.square()) - M * mean.square()
    off = ~torch.eye(L, dtype=torch.bool, device=u.device)
    variance = (M / (M - 1) ** 3 * spread)[:, off].sum(-1)
    return (variance / r.square()[:, off].sum(-1)).nan_to_num(1.0).clamp(0, 1)
