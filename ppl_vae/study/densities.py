"""Densities that are fitted to the codes of a trained model: a normal, a Gaussian mixture and a flow.

A plain autoencoder is not trained with a prior, so its decoder can be judged fairly only with codes that are drawn from
such a density. The codes of training images fit it, those of validation images choose among candidates, and test images
play no part.
"""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import AffineTransform, Categorical, Distribution, MixtureSameFamily, MultivariateNormal
from torch.distributions import TransformedDistribution as Transformed

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.parts.flows import affine_coupling
from ppl_vae.parts.priors import FlowPrior

COMPONENTS = (10, 30, 100)  # candidates for a mixture
_CODES_PER_COMPONENT = 20  # at least
_RIDGE = 1e-6  # added to variances of standardized codes: a latent may be constant
_COUPLINGS, _HIDDEN = 8, (128, 128)
_SEED = 0  # of the mixture's start, and of the flow's start and batches
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _CLIP_NORM = 20, 500, 2e-3, 10.0


class FittedDensity(NamedTuple):
    """A density of codes.

    Args:
        distribution: Event (L,).
        log_density: Mean log-density of the validation codes, nats.
        num_components: K of a mixture.
    """

    distribution: Distribution
    log_density: Estimate
    num_components: int | None = None


def fit_densities(train: Tensor, validation: Tensor) -> dict[str, FittedDensity]:
    """A "normal", a "mixture" of normals and a "flow", each fitted to codes by maximum likelihood.

    Codes are standardized first. Torch's global generator is left as it was.

    Args:
        train: (N, L) codes that are fitted to.
        validation: (M, L) codes that choose the mixture's number of components and the flow's epoch.

    Returns:
        By name. There is no mixture without scikit-learn or with fewer than 200 codes, and no flow of one latent.

    Reference: Ghosh et al. 2020, arXiv 1903.12436 (a mixture fitted to an autoencoder's codes); Dai and Wipf 2019,
    arXiv 1903.05789 (a second model of a VAE's codes).
    """
    loc, scale = train.mean(0), train.std(0).clamp(min=_RIDGE)
    standardize = AffineTransform(loc, scale, event_dim=1)
    u, u_validation = (train - loc) / scale, (validation - loc) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        fitted = {
            "normal": (_fit_normal(u), None),
            "mixture": _fit_mixture(u, u_validation),
            "flow": (_fit_flow(u, u_validation), None) if train.shape[1] > 1 else None,
        }
    found = {}
    for name, pair in fitted.items():
        if pair is not None:
            distribution = Transformed(pair[0], [standardize])
            with torch.no_grad():
                log_density = Estimate.mean_of(distribution.log_prob(validation))
            found[name] = FittedDensity(distribution, log_density, pair[1])
    return found


def _fit_normal(u: Tensor) -> MultivariateNormal:
    """The normal with the mean and covariance of u (N, L)."""
    covariance = torch.cov(u.T).reshape(u.shape[1], -1) + _RIDGE * torch.eye(u.shape[1])
    return MultivariateNormal(u.mean(0), covariance)


def _fit_mixture(u: Tensor, validation: Tensor) -> tuple[MixtureSameFamily, int] | None:
    """Normals with full covariances by expectation-maximization; as many as give validation codes the highest density.

    Reference: Dempster, Laird and Rubin 1977.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
    except ImportError:  # the extra is not installed
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # validation codes judge a candidate, converged or not
        candidates = [
            GaussianMixture(K, reg_covar=_RIDGE, tol=1e-2, max_iter=50, random_state=_SEED).fit(u.numpy())
            for K in COMPONENTS
            if len(u) >= K * _CODES_PER_COMPONENT
        ]
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: candidate.score(validation.numpy()))
    weights, means, covariances = (
        torch.as_tensor(each).to(u) for each in (best.weights_, best.means_, best.covariances_)
    )
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances)), best.n_components


@torch.enable_grad()
def _fit_flow(u: Tensor, validation: Tensor) -> Distribution:
    """Affine couplings from N(0, I), by Adam with a cosine schedule; the epoch of the best validation density."""
    prior = FlowPrior(u.shape[1], coupling=affine_coupling, num_layers=_COUPLINGS, hidden=_HIDDEN)
    optimizer = torch.optim.Adam(prior.parameters(), lr=_LEARNING_RATE)
    batches = -(-len(u) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS * batches)
    best, weights = -torch.inf, copy.deepcopy(prior.state_dict())
    for _ in range(_EPOCHS):
        for index in torch.randperm(len(u)).split(_BATCH_SIZE):
            loss = -prior().log_prob(u[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), _CLIP_NORM)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            reached = float(prior().log_prob(validation).mean())
        if reached > best:
            best, weights = reached, copy.deepcopy(prior.state_dict())
    prior.load_state_dict(weights)
    return prior().expand(())
