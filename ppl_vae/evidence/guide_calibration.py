"""Simulation-based calibration of a guide: is the z that made an image where q(z | x) expects it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import sample_latents, sample_prior
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import evaluation_mode, serialize_threads
from ppl_vae.runtime.records import Records, arguments_of
from ppl_vae.weights import DeterministicGuide, is_autoencoder

SIGNIFICANT = 0.01  # the overall p-value below which a guide is not calibrated. Source: ours
STDERRS = 3.0  # by which a mean rank must be off to be called so. Source: ours
MAX_BINS = 20  # of a histogram. Source: ours
_MIN_EXPECTED = 10  # ranks per bin, so that the tail of the chi-square distribution holds


@dataclass(frozen=True)
class Ranks:
    """The rank of the z* that made an image among M draws of q(z | x): uniform on 0, ..., M for the exact posterior.

    Args:
        latents: (N, L) int64, of each latent.
        log_joint: (N,) int64, of log p(x, z*) among the log p(x, z_m).
        num_draws: M.
    """

    latents: Tensor
    log_joint: Tensor
    num_draws: int

    @property
    def all(self) -> Tensor:
        """(N, L + 1) the ranks of the latents, and in the last column that of log p(x, z)."""
        return torch.cat([self.latents, self.log_joint[:, None]], dim=1)


@serialize_threads(gradients=False)
def compute_ranks(vae: LatentModel, *, num_simulations: int, num_draws: int, further: Sequence[Tensor] = ()) -> Ranks:
    """R_l = #{m: z_ml < z*_l} and R = #{m: log p(x, z_m) < log p(x, z*)}: z* ~ p(z), x ~ p(x | z*), z_m ~ q(z | x).

    If q(z | x) = p(z | x), then given x the z* and the z_m are M + 1 independent draws from one distribution, and every
    rank is uniform on 0, ..., M; ties are broken at random. Ranks that are not uniform show that the guide is not the
    model's posterior, for images from the model. Uniform ranks prove less: a guide that ignores x and draws from the
    prior has uniform ranks of z. The rank of log p(x, z) detects it. Draws come from torch's global generator. Memory
    does not grow with M.

    Args:
        vae: Of one layer or several. A guide without a density raises DeterministicGuide.
        num_simulations, num_draws: N and M.
        further: N rows each of what the model takes beside the images, such as labels.

    Reference: Talts et al. 2018, arXiv 1804.06788, theorem 1; Modrák et al. 2023, arXiv 2211.02383 (log p(x, z)).
    """
    check_latent_model(vae)
    num_simulations = check_count("num_simulations", num_simulations)
    num_draws = check_count("num_draws", num_draws)
    with evaluation_mode(vae):
        codes = Records(sample_prior(vae, num_simulations, *further), *further)
        x = _sample_images(vae, codes[:1])
        if is_autoencoder(vae.guide, x):
            raise DeterministicGuide(
                "guide: expected a density to calibrate, got a deterministic one (Delta), whose draws are one point"
            )
        pairs = pairs_per_pass(vae, x)
        found = torch.empty(num_simulations, codes.shape[1] + 1, dtype=torch.long, device=codes.device)
        group = max(1, pairs // (num_draws + 1))
        for z, place in zip(codes.split(group), found.split(group), strict=True):
            place.copy_(_rank_group(vae, z, num_draws, chunk=max(1, pairs // len(z) - 1)))
    return Ranks(found[:, :-1].cpu(), found[:, -1].cpu(), num_draws)


def _rank_group(vae: LatentModel, codes: Records, num_draws: int, *, chunk: int) -> Tensor:
    """(B, L + 1). codes: z* (B, L), with further tensors where the model takes them."""
    data, z_true, further = _sample_images(vae, codes), codes.x, codes.further
    q = vae.posterior(*arguments_of(data))
    below = torch.zeros(len(z_true), z_true.shape[1] + 1, dtype=torch.long, device=z_true.device)
    equal = torch.zeros_like(below)
    for start in range(0, num_draws, chunk):
        # z* goes through each pass together with the draws: otherwise rounding could decide a tie.
        z = torch.cat([z_true[None], sample_latents(q, min(chunk, num_draws - start))])
        log_joint = vae.prior(*further).log_prob(z) + vae.likelihood(z, *further).log_prob(data.x)
        values = torch.cat([z, log_joint[..., None].to(z.dtype)], dim=-1)
        if values.isnan().any():
            raise NotFinite("z, log p(x, z): expected numbers, got NaN")
        below += (values[1:] < values[0]).sum(0)
        equal += (values[1:] == values[0]).sum(0)
    return below + (torch.rand(equal.shape, dtype=torch.double, device=equal.device) * (equal + 1)).long()


def _sample_images(vae: LatentModel, codes: Records) -> Records:
    """x ~ p(x | z), (B, *E), with the further tensors of the codes z (B, L)."""
    return Records(vae.likelihood(*arguments_of(codes)).sample().to(codes.dtype), *codes.further)


# --- Uniformity ---


def bin_edges(num_simulations: int, num_draws: int) -> Tensor:
    """(K + 1,) int64 from 0 to M + 1: bin k holds the ranks from edge k up to, not including, edge k + 1.

    Bins are as equal as possible. K is 20, or fewer so that each bin expects at least ten ranks and holds one.
    """
    K = max(min(2, num_draws + 1), min(MAX_BINS, num_draws + 1, num_simulations // _MIN_EXPECTED))
    return torch.arange(K + 1) * (num_draws + 1) // K


def count_ranks(ranks: Tensor, edges: Tensor) -> Tensor:
    """(..., K) the number of ranks in each bin, int64. ranks: (N, ...)."""
    return torch.stack([(ranks < edge).sum(0) for edge in edges.tolist()], dim=-1).diff()


def rank_p_values(found: Ranks) -> Tensor:
    """P(chi^2_{K-1} >= sum_k (n_k - N pi_k)^2 / (N pi_k)) for uniform ranks, of each quantity.

    pi_k is the share of the M + 1 ranks that bin k holds. Returns (L + 1,) float64, of each latent, and last of
    log p(x, z). They depend on each other.

    Reference: Pearson 1900; for ranks Talts et al. 2018, arXiv 1804.06788, section 5.
    """
    N = len(found.latents)
    edges = bin_edges(N, found.num_draws)
    expected = N * edges.diff().double() / (found.num_draws + 1)
    statistic = ((count_ranks(found.all, edges) - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (len(expected) - 1) / 2), statistic / 2)


def adjust_p_values(p: Tensor) -> Tensor:
    """Holm's correction, max_{j <= i} min(1, (n - j + 1) p_(j)) for the i-th smallest of n p-values.

    The smallest corrected one is the p-value of "all ranks are uniform". p: (n,) -> (n,), in the same order.

    Reference: Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    ordered, order = p.sort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype, device=p.device)
    return torch.empty_like(p).scatter_(0, order, (factors * ordered).clamp(max=1).cummax(0).values)


def cumulative_band(num_simulations: int, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """A band that holds the whole distribution function of N uniform ranks with probability 0.95 or more.

        |F_N(t) - t| <= sqrt(log(2 / 0.05) / (2 N)) for all t at once

    Returns:
        t, lower and upper, each (K - 1,): the bins' inner edges, and bounds on the share of ranks below them.

    Reference: Dvoretzky, Kiefer and Wolfowitz 1956; the constant: Massart 1990.
    """
    t = bin_edges(num_simulations, num_draws)[1:-1].double() / (num_draws + 1)
    reach = math.sqrt(math.log(2 / (1 - 0.95)) / (2 * num_simulations))
    return t, (t - reach).clamp(min=0), (t + reach).clamp(max=1)


# --- Normals that would explain the ranks ---


@dataclass(frozen=True)
class NormalShape:
    """The normals q = N(m + d s, (c s)^2), the guide, and p = N(m, s^2), the posterior, that would explain the ranks.

    Args:
        scale: (n,) c, the guide's scale over the posterior's: below 1 for a U-shaped histogram of ranks, above for a
            hump.
        scale_stderr: (n,).
        mean_scale: The mean of the n scales.
        mean_scale_stderr: Over simulations, which includes the correlations between the n scales.
    """

    scale: Tensor
    scale_stderr: Tensor
    mean_scale: float
    mean_scale_stderr: float


def estimate_shape(ranks: Tensor, num_draws: int) -> NormalShape:
    """c with E[u] = Phi(a) and E[u^2] = Phi_2(a, a; r), r = 1 / (1 + c^2), a = -d sqrt(r).

    u = Q(z* | x), the guide's distribution function, is Phi((z* - m - d s) / (c s)), and a rank is Binomial(M, u). The
    means of R / M and R (R - 1) / (M (M - 1)) therefore estimate those of u and u^2. Phi_2 is the distribution function
    of two standard normals of correlation r. Standard errors are the delta method's.

    A guide of the right scale that is misplaced upward in some images and downward in others also looks too narrow. The
    result is NaN for a quantity whose ranks are all the same, and the means are over the others.

    ranks: (N, n) from 0 to M, M at least 2.

    Reference: ours; of Phi_2, Plackett 1954, Biometrika 41(3-4), 351-360.
    """
    num_draws = check_count("num_draws", num_draws, least=2)
    N, M = len(ranks), num_draws
    R = ranks.double()
    least = 1 / (2 * N * M)  # if all ranks are at one end, count half of one draw at the other
    mean = (R / M).mean(0).clamp(least, 1 - least)
    square = (R * (R - 1) / (M * (M - 1))).mean(0)
    a = torch.special.ndtri(mean)
    r = _correlation(a, mean, square)
    slope = torch.exp(-a.square() / (1 + r)) / (2 * math.pi * (1 - r.square()).sqrt())  # of Phi_2 in r
    share = torch.special.ndtr(a * ((1 - r) / (1 + r)).sqrt())
    r_each = (R * (R - 1) / (M * (M - 1)) - square - 2 * share * (R / M - mean)) / slope
    scale = ((1 - r) / r).sqrt()
    scale_each = -r_each / (2 * r.square() * scale)
    known = (R[0] != R).any(0)
    return NormalShape(
        scale.where(known, math.nan),
        _mean_stderr(scale_each).where(known, math.nan),
        mean_scale=float(scale[known].mean()),
        mean_scale_stderr=float(_mean_stderr(scale_each[:, known].mean(1))),
    )


def _mean_stderr(values: Tensor) -> Tensor:
    """The standard error of the mean over the first of (N, ...); NaN for one value."""
    N = len(values)
    return values.std(0) / math.sqrt(N) if N > 1 else torch.full_like(values[0], math.nan)


_NODES = (torch.arange(64, dtype=torch.double) + 0.5) / 64
_LARGEST_ANGLE = math.pi / 2 - 1e-3  # a scale of 0.0005


def _correlation(a: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """The r in (0, 1) with Phi_2(a, a; r) = square, by bisection, or the nearest there is. All (n,).

    Phi_2(a, a; r) = Phi(a)^2 + int_0^{asin r} exp(-a^2 / (1 + sin t)) dt / (2 pi), which rises with r.
    """
    low, high = torch.full_like(a, 1e-3), torch.full_like(a, _LARGEST_ANGLE)
    for _ in range(50):
        angle = (low + high) / 2
        heights = torch.exp(-a[:, None].square() / (1 + (angle[:, None] * _NODES).sin())).mean(-1)
        too_low = mean.square() + angle * heights / (2 * math.pi) < square
        low, high = torch.where(too_low, angle, low), torch.where(too_low, high, angle)
    return ((low + high) / 2).sin()


# --- Judgment ---


@dataclass(frozen=True)
class GuideCalibration:
    """The judgment on the ranks, by quantity: each latent, and last log p(x, z).

    Args:
        p_value: Of the hypothesis that all quantities are uniform. Below 0.01 the guide is not the posterior.
        p_values: (L + 1,) of each quantity by itself.
        adjusted_p_values: (L + 1,) with Holm's correction.
        shape: The normals that would explain the ranks of the L latents; None for a single draw.
        mean_joint_rank: The mean of (R + 1/2) / (M + 1) of log p(x, z): 1/2 where it is uniform.
        verdict: The judgment in one line.
        num_simulations, num_draws: N and M.
    """

    p_value: float
    p_values: Tensor
    adjusted_p_values: Tensor
    shape: NormalShape | None
    mean_joint_rank: Estimate
    verdict: str
    num_simulations: int
    num_draws: int


def judge(found: Ranks) -> GuideCalibration:
    """p-values of each quantity and of all, and what is wrong where they are not uniform, in words."""
    p = rank_p_values(found)
    holm = adjust_p_values(p)
    shapes = estimate_shape(found.latents, found.num_draws) if found.num_draws > 1 else None
    joint = Estimate.mean_of((found.log_joint.double() + 0.5) / (found.num_draws + 1))
    N, is_off = len(found.log_joint), (holm < SIGNIFICANT).tolist()
    overall = float(holm.min())
    p_words = f"p = {overall:.2g}" if overall >= 1e-300 else "p < 1e-300"
    if overall >= SIGNIFICANT:
        verdict = f"no sign that the guide is not the posterior ({p_words}, {N:,} simulations)"
    else:
        scale = shapes and f", with {shapes.mean_scale:.3f} ± {shapes.mean_scale_stderr:.3f} of the posterior's scale"
        verdict = (
            f"the guide is not the posterior ({p_words}): {sum(is_off[:-1])} of {len(is_off) - 1} latents are off by "
            f"themselves{scale or ''}; log p(x, z): {_describe_joint(joint) if is_off[-1] else 'calibrated'}"
        )
    return GuideCalibration(overall, p, holm, shapes, joint, verdict, N, found.num_draws)


def _describe_joint(rank: Estimate) -> str:
    # A guide that is too narrow has draws of higher density than z*. One that is too wide, misplaced, or blind to how
    # latents depend on each other has draws of lower density.
    rank_words = f"(mean rank {rank.mean:.3f} ± {rank.stderr:.3f})"
    if abs(rank.mean - 0.5) <= STDERRS * rank.stderr:
        return f"among its draws, too often or too seldom {rank_words}"
    return f"the z of an image is {'less' if rank.mean < 0.5 else 'more'} probable than draws of the guide {rank_words}"
