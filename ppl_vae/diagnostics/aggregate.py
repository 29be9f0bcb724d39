"""Is the aggregate posterior the prior? Moments and Kolmogorov-Smirnov a latent, a classifier, and holes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ppl_vae.diagnostics.mixture import AggregatePosterior, factors
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import PRIOR_DRAWS, compute_log_prob, compute_moments, sample_latents
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.vae import VAE

# A prior draw is in a hole where the aggregate posterior covers it less than this share of held-out images' draws.
# Source: ours.
HOLE_QUANTILE = 0.01

# By which the posteriors may be widened, in spreads of their means over images, to cover held-out images' draws best.
_BANDWIDTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_DRAWS_FOR_BANDWIDTH = 500

# The classifier: enough for a difference that matters, seconds on one core at 5,000 draws of 40 latents. Source: ours.
_HIDDEN, _EPOCHS, _BATCH, _RATE, _DECAY = 64, 20, 250, 3e-3, 1e-2


@dataclass(frozen=True)
class LatentMoments:
    """Mean and log-scale of each latent, standardized by the prior's: 0 and 0 where the aggregate is the prior.

    Args:
        mean: (L,) (mean of z_l - prior mean) / prior scale.
        mean_stderr: (L,).
        log_scale: (L,) log(scale of z_l / prior scale).
        log_scale_stderr: (L,).
    """

    mean: Tensor
    mean_stderr: Tensor
    log_scale: Tensor
    log_scale_stderr: Tensor

    @property
    def effect(self) -> Tensor:
        """(L,) max(|mean|, |log scale|)."""
        return torch.maximum(self.mean.abs(), self.log_scale.abs())

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {
            "mean": {"mean": self.mean.tolist(), "stderr": self.mean_stderr.tolist()},
            "log_scale": {"mean": self.log_scale.tolist(), "stderr": self.log_scale_stderr.tolist()},
            "effect": self.effect.tolist(),
        }


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """D_l = sup_t |F_N(t) - F(t)| of each latent, from 0 to 1, and its p-value.

    Args:
        statistic: (L,) the effect size.
        p_value: (L,).
    """

    statistic: Tensor
    p_value: Tensor

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {"statistic": self.statistic.tolist(), "p_value": self.p_value.tolist()}


@dataclass(frozen=True)
class TwoSample:
    """How well a classifier tells posterior draws from prior draws.

    Args:
        accuracy: the held-out accuracy, 1/2 where they are alike.
        p_value: of at least this accuracy by chance.
        num_held_out: how many draws it was judged by.
    """

    accuracy: Estimate
    p_value: float
    num_held_out: int

    @property
    def effect(self) -> float:
        """2 accuracy - 1, in [-1, 1]: a lower bound on the total variation distance, up to its error."""
        return 2 * self.accuracy.mean - 1

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {
            "accuracy": self.accuracy.to_json(),
            "p_value": self.p_value,
            "effect": self.effect,
            "num_held_out": self.num_held_out,
        }


@dataclass(frozen=True)
class Holes:
    """Prior draws that the smoothed aggregate posterior covers less than it does 99% of other images' draws.

    Args:
        share: of the prior draws that are in holes; 0.01 is expected where the aggregate posterior is the prior.
        threshold: nats, the score below which a draw is in a hole.
        bandwidth: h, by which the posteriors were smoothed.
        prior_scores: (M,) log q(z) - log p(z), nats, at the prior draws.
        held_out_scores: (M',) the same at draws of q(z | x) of held-out images, those that did not choose h.
        worst: (M,) indices of the prior draws, the lowest score first.
    """

    share: Estimate
    threshold: float
    bandwidth: float
    prior_scores: Tensor
    held_out_scores: Tensor
    worst: Tensor

    def to_json(self) -> dict[str, Any]:
        """As reports hold it: the share and the threshold, without the scores of single draws."""
        numbers = {"threshold": self.threshold, "bandwidth": self.bandwidth, "num_draws": len(self.prior_scores)}
        return {"share": self.share.to_json()} | numbers


def _samples(name: str, z: Tensor) -> Tensor:
    """(N, L) z in float64 on the CPU, once it is a matrix of at least two draws."""
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"{name}: expected draws (N, L), at least two, got shape {tuple(z.shape)}")
    return z.detach().double().cpu()


@serialize_threads()
@torch.no_grad()
def latent_moments(z: Tensor, prior: Any) -> LatentMoments:
    """(mean z_l - m_l) / s_l and log(scale z_l / s_l), m and s the prior's mean and scale: 0 and 0 where they agree.

    The log-scale's error is the delta method's, from the fourth moment.

    Args:
        z: (N, L) one draw of q(z | x_n) an image: draws of the aggregate posterior.
        prior: p(z), event (L,). Where its moments have no closed form they are those of 20,000 draws.

    Raises:
        ValueError: fewer than two draws.
    """
    z = _samples("z", z)
    p = compute_moments(prior)
    z = (z - p.mean.double().cpu()) / p.scale.double().cpu()
    N = len(z)
    squares = (z - z.mean(0)).square()
    variance = z.var(0)
    log_scale_stderr = squares.std(0) / (2 * variance * math.sqrt(N))
    return LatentMoments(z.mean(0), (variance / N).sqrt(), variance.log() / 2, log_scale_stderr)


@serialize_threads()
@torch.no_grad()
def kolmogorov_smirnov(z: Tensor, prior: Any) -> KolmogorovSmirnov:
    """D_l = sup_t |F_N(t) - F_l(t)|, F_N the share of the z_nl up to t and F_l the prior's distribution function.

    The p-value is that of Kolmogorov's limit at (sqrt(N) + 0.12 + 0.11 / sqrt(N)) D. With thousands of images every
    trained model is rejected: D, the largest difference of probabilities, is the effect size to judge by.

    Args:
        z: (N, L) one draw of q(z | x_n) an image.
        prior: p(z), event (L,). Where its latents have no distribution function of their own, 20,000 draws of it take
            its place: the two-sample test.

    Raises:
        ValueError: fewer than two draws.

    Reference: Stephens 1970, Journal of the Royal Statistical Society B 32(1), 115-122 (the correction for N).
    """
    draws = _samples("z", z)
    N = len(draws)
    in_order = draws.sort(0).values
    try:
        marginals = factors(prior)
        if marginals is None:
            raise NotImplementedError
        at = marginals.cdf(in_order.to(z.device)).cpu().double()
        size = float(N)
    except NotImplementedError:
        drawn = sample_latents(prior, PRIOR_DRAWS).double().cpu().T.contiguous().sort(-1).values
        at = torch.searchsorted(drawn, in_order.T.contiguous(), right=True).T.double() / PRIOR_DRAWS
        size = N * PRIOR_DRAWS / (N + PRIOR_DRAWS)
    rank = torch.arange(1, N + 1, dtype=torch.double)[:, None] / N
    D = torch.maximum((rank - at).amax(0), (at - rank + 1 / N).amax(0))
    return KolmogorovSmirnov(D, kolmogorov_tail((math.sqrt(size) + 0.12 + 0.11 / math.sqrt(size)) * D))


def kolmogorov_tail(t: Tensor) -> Tensor:
    """P(K > t) = 2 sum_{k >= 1} (-1)^(k - 1) exp(-2 k^2 t^2), K the supremum of a Brownian bridge's magnitude.

    Below t = 1 by the other form, 1 - sqrt(2 pi) / t sum_{k >= 1} exp(-(2 k - 1)^2 pi^2 / (8 t^2)): either is exact to
    float64 with ten terms on its side.

    Args:
        t: of any shape, float64, which the result has too.

    Reference: Kolmogorov 1933; Feller 1948, Annals of Mathematical Statistics 19(2), 177-189, equation 1.4.
    """
    k = torch.arange(1, 11, dtype=t.dtype)
    small = t[..., None].clamp(min=0.05)  # where the tail is 1 to float64, and 1 / t^2 is still finite
    rest = math.sqrt(2 * math.pi) / small * (-((2 * k - 1) * math.pi).square() / (8 * small.square())).exp()
    tail = 2 * (-1) ** (k - 1) * (-2 * (k * t[..., None]).square()).exp()
    return torch.where(t < 1, 1 - rest.sum(-1), tail.sum(-1)).clamp(0, 1)


def binomial_tail(successes: int, trials: int) -> float:
    """P(B >= k), B ~ Binomial(n, 1/2): the chance of at least k heads."""
    k = torch.arange(successes, trials + 1, dtype=torch.double)
    n = torch.tensor(trials, dtype=torch.double)
    log_p = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma() - n * math.log(2)
    return min(1.0, float(log_p.logsumexp(0).exp()))


@serialize_threads()
def classifier_test(z_posterior: Tensor, z_prior: Tensor, *, seed: int = 0) -> TwoSample:
    """A = P(a classifier names the sample that a held-out draw came from): 1/2 where the two distributions are one.

    A small network of (z, z^2) learns on a random half of each sample and is judged on the other. 2 A - 1 is a lower
    bound on their total variation distance, up to its error, and the tighter the better the classifier. The p-value is
    P(Binomial(n, 1/2) >= the number named rightly), which holds whatever the classifier does: held-out draws are half
    of each kind, so a classifier that leans to one kind makes it, if anything, too large.

    Args:
        z_posterior: (N, L) one draw of q(z | x_n) an image.
        z_prior: (N, L) as many draws of the prior.
        seed: of the halves, and of the network's start and batches; torch's global generator is left as it is.

    Raises:
        ValueError: samples of different shapes, or fewer than four draws.

    Reference: Lopez-Paz and Oquab 2017, arXiv 1610.06545. The network is ours.
    """
    if z_posterior.dim() != 2 or z_posterior.shape != z_prior.shape or len(z_posterior) < 4:
        got = f"{tuple(z_posterior.shape)} and {tuple(z_prior.shape)}"
        raise ValueError(f"z_posterior, z_prior: expected two samples (N, L) of one shape, N at least 4, got {got}")
    with seeded(seed, z_posterior.device):
        posterior_halves, prior_halves = _halves(z_posterior), _halves(z_prior)
        z, label = _labeled(posterior_halves[0], prior_halves[0])
        classifier = _trained(z, label)
    held_out, truth = _labeled(posterior_halves[1], prior_halves[1])
    with torch.no_grad():
        right = (classifier(held_out) > 0) == (truth > 0.5)
    n = len(truth)
    return TwoSample(Estimate.from_flags(right), binomial_tail(int(right.sum()), n), n)


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().float()[torch.randperm(len(z)).to(z.device)]
    return z[: len(z) // 2], z[len(z) // 2 :]


def _labeled(posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples, and 1 for the posterior's draws, 0 for the prior's."""
    z = torch.cat([posterior, prior])
    return z, torch.cat([z.new_ones(len(posterior)), z.new_zeros(len(prior))])


class _Classifier(nn.Module):
    """z (M, L) -> (M,) the log-odds that it is a posterior draw; (z, z^2) in units of the sample that it learns on."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        features = torch.cat([z, z.square()], dim=-1)
        self.loc = features.mean(0)
        self.scale = features.std(0).clamp(min=1e-6)  # of a latent that is constant in both samples
        self.net = nn.Sequential(nn.Linear(features.shape[1], _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1)).to(z)

    def forward(self, z: Tensor) -> Tensor:
        return self.net((torch.cat([z, z.square()], dim=-1) - self.loc) / self.scale).squeeze(-1)


@torch.enable_grad()
def _trained(z: Tensor, label: Tensor) -> _Classifier:
    classifier = _Classifier(z)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_RATE, weight_decay=_DECAY)
    steps = _EPOCHS * math.ceil(len(z) / _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(_EPOCHS):
        for index in torch.randperm(len(z)).to(z.device).split(_BATCH):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(classifier(z[index]), label[index]).backward()
            optimizer.step()
            schedule.step()
    return classifier


def _likeliest(q: AggregatePosterior, z: Tensor) -> tuple[float, AggregatePosterior]:
    """The bandwidth of the highest mean log q_h(z), over 500 draws at equal steps, and q_h."""
    smoothed = [(bandwidth, q.smoothed(bandwidth)) for bandwidth in _BANDWIDTHS]
    candidates = [(bandwidth, mixture) for bandwidth, mixture in smoothed if mixture is not None]
    some = z[:: math.ceil(len(z) / _DRAWS_FOR_BANDWIDTH)]
    if not candidates:
        return 0.0, q
    return max(candidates, key=lambda candidate: float(candidate[1].log_prob(some).mean()))


@serialize_threads()
@torch.no_grad()
def holes(vae: VAE, x: Tensor, z_held_out: Tensor, z_prior: Tensor) -> Holes:
    """P_{z ~ p}(r(z) < t), r(z) = log q(z) - log p(z), t the 1% quantile of r at draws of held-out images' posteriors.

    q(z) = (1/N) sum_n q_h(z | x_n) over the N reference images. Held-out draws say how well so many reference images
    cover what they should: in many dimensions narrow posteriors leave even a perfect model's prior draws far from each
    of them, and no absolute threshold would do. Where the aggregate posterior is the prior, held-out and prior draws
    are of one distribution, and 1% of the latter are in holes, whatever q is. But a good q sees more: posteriors so
    narrow that they miss each other say only how narrow the nearest is. So a normal guide's variances s^2 grow to
    s^2 + h^2 Var_n m_n, with the h, 0 among them, at which held-out draws are likeliest; other guides stay as they are.
    Every other held-out draw chooses h, and the rest set t: of draws that h was fitted to it would be too high. A hole
    is thus where q covers less than it does 99% of other images' codes, and not a place without any code. The error is
    that of the share, and of the threshold as the quantile of so many draws.

    Args:
        vae: the VAE, whose guide has a density.
        x: reference images (N, *E), as the model sees them.
        z_held_out: (M', L) one draw of q(z | x) of each of other images: of the reference images it would lie in its
            own component.
        z_prior: (M, L) draws of the prior.

    Returns:
        The share, both samples' scores, and the prior draws from the worst on: the caller decodes them.

    Raises:
        ValueError: no image, or fewer than two draws.

    Source: ours; the term is Rezende and Viola 2018, arXiv 1810.00597.
    """
    _samples("z_held_out", z_held_out)
    _samples("z_prior", z_prior)
    prior = vae.prior()
    bandwidth, q = _likeliest(AggregatePosterior.of(vae, x), z_held_out[::2])
    held_out, at_prior = ((q.log_prob(z) - compute_log_prob(prior, z)).cpu() for z in (z_held_out[1::2], z_prior))
    wobble = math.sqrt(HOLE_QUANTILE * (1 - HOLE_QUANTILE) / len(held_out))

    def share_below(quantile: float) -> Estimate:
        return Estimate.from_flags(at_prior < held_out.quantile(min(1.0, max(0.0, quantile))))

    share = share_below(HOLE_QUANTILE)
    of_threshold = (share_below(HOLE_QUANTILE + wobble).mean - share_below(HOLE_QUANTILE - wobble).mean) / 2
    threshold = float(held_out.quantile(HOLE_QUANTILE))
    found = Estimate(share.mean, math.hypot(share.stderr, of_threshold))
    return Holes(found, threshold, bandwidth, at_prior, held_out, at_prior.argsort())
