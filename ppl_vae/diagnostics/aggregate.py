"""Distances of the aggregate posterior from the prior: moments, Kolmogorov-Smirnov, a classifier, and holes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import binary_cross_entropy_with_logits

from ppl_vae.diagnostics.latents import PerLatent
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import (
    PRIOR_DRAWS,
    AggregatePosterior,
    compute_log_prob,
    compute_moments,
    factors,
    get_shared_prior,
    sample_latents,
)
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.records import Data

# A prior draw is in a hole if its score is below this quantile of the scores of held-out images' draws. Source: ours.
HOLE_QUANTILE = 0.01

_SHOWN = 12  # latents of prior draws that are kept for a picture

# Bandwidths among which the one is chosen that makes held-out images' draws most likely, in standard deviations of the
# posterior means over images.
_BANDWIDTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_DRAWS_FOR_BANDWIDTH = 500

# The classifier takes seconds on one core for 5,000 draws of 40 latents. Source: ours.
_HIDDEN, _EPOCHS, _BATCH, _RATE, _DECAY = 64, 20, 250, 3e-3, 1e-2


def _check_draws(name: str, z: Tensor) -> Tensor:
    """(N, L) z in float64 on the CPU; raises ValueError unless it is a matrix of at least two draws."""
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"{name}: expected draws (N, L), at least two, got shape {tuple(z.shape)}")
    return z.detach().double().cpu()


# --- Single latents ---


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-scale of each latent in the prior's units: 0 and 0 if the aggregate posterior is the prior.

    Args:
        mean: (L,) (mean of z_l - prior mean) / prior scale.
        log_scale: (L,) log(scale of z_l / prior scale).
    """

    mean: PerLatent
    log_scale: PerLatent


@serialize_threads(gradients=False)
def latent_moments(z: Tensor, prior: Distribution) -> LatentMoments:
    """(mean z_l - m_l) / s_l and log(scale z_l / s_l), with the prior's mean m and scale s.

    The error of the log-scale is the delta method's, from the fourth moment.

    Args:
        z: (N, L) one draw of q(z | x_n) per image: draws of the aggregate posterior. Fewer than two raise ValueError.
        prior: p(z), event (L,). Moments without a closed form are those of 20,000 draws.
    """
    z = _check_draws("z", z)
    p = compute_moments(prior)
    z = (z - p.mean.double().cpu()) / p.scale.double().cpu()
    N, variance = len(z), z.var(0)
    log_scale_stderr = (z - z.mean(0)).square().std(0) / (2 * variance * math.sqrt(N))
    mean = PerLatent(z.mean(0), (variance / N).sqrt())
    return LatentMoments(mean, PerLatent(variance.log() / 2, log_scale_stderr))


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """D_l = sup_t |F_N(t) - F_l(t)| for each latent, (L,): the effect size from 0 to 1."""

    statistic: Tensor


@serialize_threads(gradients=False)
def kolmogorov_smirnov(z: Tensor, prior: Distribution) -> KolmogorovSmirnov:
    """D_l = sup_t |F_N(t) - F_l(t)|, for the share F_N(t) of z_nl up to t and the prior's F_l(t).

    Args:
        z: (N, L) one draw of q(z | x_n) per image. Fewer than two raise ValueError.
        prior: p(z), event (L,). A prior whose latents have no distribution functions is represented by 20,000 draws.
    """
    ordered = _check_draws("z", z).sort(0).values
    N = len(ordered)
    try:
        marginals = factors(prior)
        if marginals is None:
            raise NotImplementedError
        at = marginals.cdf(ordered.to(z.device)).cpu().double()
    except NotImplementedError:
        drawn = sample_latents(prior, PRIOR_DRAWS).double().cpu().T.contiguous().sort(-1).values
        at = torch.searchsorted(drawn, ordered.T.contiguous(), right=True).T.double() / PRIOR_DRAWS
    rank = torch.arange(1, N + 1, dtype=torch.double)[:, None] / N
    return KolmogorovSmirnov(torch.maximum((rank - at).amax(0), (at - rank + 1 / N).amax(0)))


# --- A classifier ---


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier distinguishes posterior draws from prior draws, on held-out draws.

    Args:
        effect: 2 A - 1 for the held-out accuracy A, in [-1, 1]; 0 if the two distributions are the same. It is a lower
            bound on their total variation distance, up to its error.
        num_held_out: The number of held-out draws.
    """

    effect: Estimate
    num_held_out: int


@serialize_threads()
def classifier_test(z_posterior: Tensor, z_prior: Tensor, *, seed: int = 0) -> TwoSample:
    """2 A - 1, with the held-out accuracy A = P(a classifier names the sample that a draw came from).

    A small network of (z, z^2) is trained on a random half of each sample and tested on the other.

    Args:
        z_posterior: (N, L) one draw of q(z | x_n) per image. N below 4 raises ValueError.
        z_prior: (N, L) as many draws of the prior.
        seed: of the halves, the network's initialization and the batches; torch's global generator is not changed.

    Reference: Lopez-Paz and Oquab 2017, arXiv 1610.06545. The network is ours.
    """
    if z_posterior.dim() != 2 or z_posterior.shape != z_prior.shape or len(z_posterior) < 4:
        got = f"{tuple(z_posterior.shape)} and {tuple(z_prior.shape)}"
        raise ValueError(f"z_posterior, z_prior: expected two samples (N, L) of one shape, N at least 4, got {got}")
    with seeded(seed, z_posterior.device):
        halves = zip(_split_in_halves(z_posterior), _split_in_halves(z_prior), strict=True)
        (features, label), (held_out, truth) = (_label_features(*half) for half in halves)
        loc, scale = features.mean(0), features.std(0).clamp(min=1e-6)  # a latent may be constant in both samples
        classifier = _train_classifier((features - loc) / scale, label)
    with torch.no_grad():
        right = (classifier((held_out - loc) / scale).squeeze(-1) > 0) == (truth > 0.5)
    n, accuracy = len(truth), Estimate.share_of(right)
    return TwoSample(Estimate(2 * accuracy.mean - 1, 2 * accuracy.stderr, n), n)


def _split_in_halves(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().float()[torch.randperm(len(z)).to(z.device)]
    return z[: len(z) // 2], z[len(z) // 2 :]


def _label_features(posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """(z, z^2) of both samples, (M, 2 L), and 1 for the posterior's draws, 0 for the prior's."""
    z = torch.cat([posterior, prior])
    label = torch.cat([z.new_ones(len(posterior)), z.new_zeros(len(prior))])
    return torch.cat([z, z.square()], dim=-1), label


@torch.enable_grad()
def _train_classifier(features: Tensor, label: Tensor) -> nn.Module:
    """A network of standardized features (M, F) -> (M, 1), the log-odds of label 1."""
    net = nn.Sequential(nn.Linear(features.shape[1], _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1)).to(features)
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY)
    steps = _EPOCHS * math.ceil(len(label) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(_EPOCHS):
        for index in torch.randperm(len(label)).to(label.device).split(_BATCH):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(net(features[index]).squeeze(-1), label[index]).backward()
            optimizer.step()
            schedule.step()
    return net


# --- Holes ---


@dataclass(frozen=True)
class Holes:
    """Prior draws that the smoothed aggregate posterior covers less than it covers 99% of other images' draws.

    Args:
        share: of the prior draws that are in holes.
        expected: the share if the aggregate posterior were the prior.
        bandwidth: h, by which the posteriors were smoothed.
        worst, ordinary: latents of the prior draws that are covered least, the worst first, and of draws near the
            median.
    """

    share: Estimate
    expected: float
    bandwidth: float
    worst: tuple[tuple[float, ...], ...]
    ordinary: tuple[tuple[float, ...], ...]


@serialize_threads(gradients=False)
def holes(vae: LatentModel, x: Data, z_held_out: Tensor, z_prior: Tensor) -> Holes:
    """P_{z ~ p}(r(z) < t), r(z) = log q(z) - log p(z), with the 1% quantile t of r at held-out images' posterior draws.

    q(z) = (1/N) sum_n q_h(z | x_n) over the N reference images. No absolute threshold would do: in many dimensions
    narrow posteriors leave even a perfect model's prior draws far from each of them. If the aggregate posterior is the
    prior, held-out and prior draws have one distribution, and 1% of the prior draws are in holes, whatever q is.

    A normal guide's variances s^2 are widened to s^2 + h^2 Var_n m_n, with the h (0 included) that makes held-out draws
    most likely. Every other held-out draw chooses h, and the rest set t. The error is that of the share and of t as a
    sample quantile.

    Args:
        vae: with a guide that has a density.
        x: reference images (N, *E), as the model sees them; none raise ValueError.
        z_held_out: (M', L) one draw of q(z | x) for each of other images; a reference image's draw would lie in its own
            component.
        z_prior: (M, L) draws of the prior.

    Source: ours; the term is Rezende and Viola 2018, arXiv 1810.00597.
    """
    _check_draws("z_held_out", z_held_out)
    _check_draws("z_prior", z_prior)
    prior = get_shared_prior(vae, x)
    bandwidth, q = _choose_bandwidth(AggregatePosterior.encode(vae, x), z_held_out[::2])
    held_out, at_prior = ((q.log_prob(z) - compute_log_prob(prior, z)).cpu() for z in (z_held_out[1::2], z_prior))
    reach = math.sqrt(HOLE_QUANTILE * (1 - HOLE_QUANTILE) / len(held_out))  # the quantile's error as a share
    share, most, least = (
        Estimate.share_of(at_prior < held_out.quantile(min(1.0, max(0.0, HOLE_QUANTILE + step))))
        for step in (0.0, reach, -reach)
    )
    order, middle = at_prior.argsort(), len(at_prior) // 2

    def select(index: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(z) for z in z_prior[index.to(z_prior.device)].double().cpu().tolist())

    return Holes(
        share=Estimate(share.mean, math.hypot(share.stderr, (most.mean - least.mean) / 2)),
        expected=HOLE_QUANTILE,
        bandwidth=bandwidth,
        worst=select(order[:_SHOWN]),
        ordinary=select(order[max(0, middle - _SHOWN // 2) :][:_SHOWN]),
    )


def _choose_bandwidth(q: AggregatePosterior, z: Tensor) -> tuple[float, AggregatePosterior]:
    """The bandwidth h with the highest mean log q_h(z) over 500 of the draws, and q_h."""
    smoothed = [(bandwidth, q.smoothed(bandwidth)) for bandwidth in _BANDWIDTHS]
    candidates = [(bandwidth, mixture) for bandwidth, mixture in smoothed if mixture is not None]
    some = z[:: math.ceil(len(z) / _DRAWS_FOR_BANDWIDTH)]
    return (
        (0.0, q) if not candidates else max(candidates, key=lambda candidate: float(candidate[1].log_prob(some).mean()))
    )
