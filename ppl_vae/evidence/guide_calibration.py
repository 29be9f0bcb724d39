"""Simulation-based calibration of a guide: is the z that made an image where q(z | x) expects it?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae.evidence.moments import sample_latents
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.weights import DeterministicGuide, is_autoencoder

# Bins of a histogram of ranks, and the fewest ranks that a bin may expect: chi-square's distribution is a limit, and a
# p-value that is multiplied by the number of quantities needs its tail. Source: ours.
MOST_BINS = 20
_FEWEST_A_BIN = 10

# Below this overall p-value a guide is said not to be calibrated; a scale or a place is called wrong where it is off
# by so many standard errors. Source: ours.
SIGNIFICANT = 0.01
_STDERRS = 3.0


class Ranks(NamedTuple):
    """Where the z* that made an image stands among M draws of q(z | x): uniform on 0, ..., M for the posterior.

    Args:
        latents: (N, L) int64, of each latent of z* among those of the draws.
        log_joint: (N,) int64, of log p(x, z*) among the log p(x, z_m).
        num_draws: M.
    """

    latents: Tensor
    log_joint: Tensor
    num_draws: int

    @property
    def all(self) -> Tensor:
        """(N, L + 1) the latents', and in the last column that of log p(x, z)."""
        return torch.cat([self.latents, self.log_joint[:, None]], dim=1)


@serialize_threads()
@torch.no_grad()
def ranks(
    vae: LatentModel, *, num_simulations: int, num_draws: int, progress: Callable[[int], None] | None = None
) -> Ranks:
    """R_l = #{m: z_ml < z*_l} and R = #{m: log p(x, z_m) < log p(x, z*)}: z* ~ p(z), x ~ p(x | z*), z_m ~ q(z | x).

    If q(z | x) = p(z | x), then given x the z* and the z_m are M + 1 independent draws of one distribution, so every
    rank is uniform on 0, ..., M, exactly, for every N and M; ties are broken at random. Where ranks are not uniform,
    the guide is not the posterior of the model: of the model's own images, whatever the data are. Uniform ranks prove
    less: a guide that ignores x and draws from the prior has uniform ranks of z, and it is the rank of log p(x, z)
    that finds it out.

    The VAE is taken as it is. A density of dequantized levels is calibrated as such, on images in (0, 1); of a
    ``dequantized`` one, whose log p(x | z) is estimated, the ranks hold all the same, since each z has its own noise.
    Draws come from torch's global generator. Memory does not depend on N and M, but for the results and the z*; the
    encoder runs once an image.

    Args:
        vae: in evaluation mode, of one layer or several: the latents of all layers are one vector.
        num_simulations: N.
        num_draws: M.
        progress: called with the number of images after each group of them.

    Raises:
        ValueError: N or M below 1.
        DeterministicGuide: a ValueError: the guide has no density, and all its draws are one point.
        NotFinite: a z or a log p(x, z) is NaN.

    Reference: Talts et al. 2018, arXiv 1804.06788, theorem 1; Modrák et al. 2023, arXiv 2211.02383 (log p(x, z)).
    """
    num_simulations = check_count("num_simulations", num_simulations)
    num_draws = check_count("num_draws", num_draws)
    z_true = sample_latents(vae.prior(), num_simulations)
    x = _images(vae, z_true[:1])
    if is_autoencoder(vae.guide, x):
        raise DeterministicGuide(
            "guide: expected a density to calibrate, got a deterministic one (Delta), whose draws are one point"
        )
    pairs = pairs_per_pass(vae, x)
    found = torch.empty(num_simulations, z_true.shape[1] + 1, dtype=torch.long, device=z_true.device)
    group = max(1, pairs // (num_draws + 1))
    for z, place in zip(z_true.split(group), found.split(group), strict=True):
        place.copy_(_ranks_of_group(vae, z, num_draws, chunk=max(1, pairs // len(z) - 1)))
        if progress is not None:
            progress(len(z))
    return Ranks(found[:, :-1].cpu(), found[:, -1].cpu(), num_draws)


def _ranks_of_group(vae: LatentModel, z_true: Tensor, num_draws: int, *, chunk: int) -> Tensor:
    """(B, L + 1). z_true: (B, L)."""
    x = _images(vae, z_true)
    q = vae.posterior(x)
    below = torch.zeros(len(z_true), z_true.shape[1] + 1, dtype=torch.long, device=z_true.device)
    equal = torch.zeros_like(below)
    for start in range(0, num_draws, chunk):
        # z* goes through each pass beside the draws: apart from them, rounding could decide a tie.
        z = torch.cat([z_true[None], sample_latents(q, min(chunk, num_draws - start))])
        log_joint = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)
        values = torch.cat([z, log_joint[..., None].to(z.dtype)], dim=-1)
        if values.isnan().any():
            raise NotFinite("z, log p(x, z): expected numbers, got NaN")
        below += (values[1:] < values[0]).sum(0)
        equal += (values[1:] == values[0]).sum(0)
    return below + (torch.rand(equal.shape, dtype=torch.double, device=equal.device) * (equal + 1)).long()


def _images(vae: LatentModel, z: Tensor) -> Tensor:
    """(B, *E) x ~ p(x | z). z: (B, L)."""
    return vae.likelihood(z).sample().to(z.dtype)


# --- Are they uniform? ---


def edges(num_simulations: int, num_draws: int) -> Tensor:
    """(K + 1,) int64 from 0 to M + 1: bin k holds the ranks from edge k to before edge k + 1, as equal as they can be.

    K is 20, and less where ranks are few: at least ten of them are expected in a bin, and a bin holds a rank.
    """
    K = max(min(2, num_draws + 1), min(MOST_BINS, num_draws + 1, num_simulations // _FEWEST_A_BIN))
    return torch.arange(K + 1) * (num_draws + 1) // K


def histogram(of_one: Tensor, edges: Tensor) -> Tensor:
    """(..., K) how many ranks are in each bin, int64. of_one: (N, ...) ranks."""
    return torch.stack([(of_one < edge).sum(0) for edge in edges.tolist()], dim=-1).diff()


def p_values(found: Ranks) -> Tensor:
    """P(chi^2_{K-1} >= sum_k (n_k - N pi_k)^2 / (N pi_k)): of each quantity, that of ranks that are uniform.

    pi_k is the share of the M + 1 ranks that bin k holds, so that no rank is weighed more than another for whatever M.

    Returns:
        (L + 1,) float64: of each latent, and last of log p(x, z). Each is uniform on (0, 1) for an exact guide, as
        closely as N discrete ranks allow; they depend on each other, since all are of the same simulations.

    Reference: Pearson 1900; for ranks Talts et al. 2018, arXiv 1804.06788, section 5.
    """
    N = len(found.latents)
    at = edges(N, found.num_draws)
    expected = N * at.diff().double() / (found.num_draws + 1)
    statistic = ((histogram(found.all, at) - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (len(expected) - 1) / 2), statistic / 2)


def adjusted(p: Tensor) -> Tensor:
    """max_{j <= i} min(1, (n - j + 1) p_(j)) for the i-th smallest: p-values that hold for all n quantities at once.

    The smallest of them is the p-value of "all ranks are uniform", whatever they have to do with each other.

    Args:
        p: (n,).

    Returns:
        (n,), in the same order.

    Reference: Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    ordered, order = p.sort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype, device=p.device)
    return torch.empty_like(p).scatter_(0, order, (factors * ordered).clamp(max=1).cummax(0).values)


# --- What is wrong with them? ---


class Shape(NamedTuple):
    """What ranks would be those of, were guide and posterior normals: q = N(m + d s, (c s)^2), p = N(m, s^2).

    Args:
        scale: (n,) c, the guide's scale over the posterior's: below 1 for ranks that pile up at both ends (U), above
            for a hump.
        scale_stderr: (n,).
        shift: (n,) d, how far the guide lies above the posterior, in the posterior's scales: a slope.
        shift_stderr: (n,).
        mean_scale: (), the mean of the n scales.
        mean_scale_stderr: (), over simulations, so that what the n have to do with each other is in it.
    """

    scale: Tensor
    scale_stderr: Tensor
    shift: Tensor
    shift_stderr: Tensor
    mean_scale: Tensor
    mean_scale_stderr: Tensor

    @property
    def narrow(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.scale + _STDERRS * self.scale_stderr < 1

    @property
    def wide(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.scale - _STDERRS * self.scale_stderr > 1

    @property
    def shifted(self) -> Tensor:
        """(n,) bool, by three standard errors."""
        return self.shift.abs() > _STDERRS * self.shift_stderr


def shape(of_each: Tensor, num_draws: int) -> Shape:
    """c and d with E[u] = Phi(a) and E[u^2] = Phi_2(a, a; r), r = 1 / (1 + c^2), a = -d sqrt(r).

    u = Q(z* | x), the guide's distribution function, is Phi((z* - m - d s) / (c s)), and a rank is Binomial(M, u): so
    the means of R / M and R (R - 1) / (M (M - 1)) are those of u and u^2, for every M. Phi_2 is the distribution
    function of two standard normals of correlation r. Standard errors are the delta method's.

    It sums up in two numbers what may be different in each image: a guide of the right scale that is misplaced by
    image, now up and now down, looks too narrow as well. And it knows nothing of other shapes. Of ranks that are all
    the same it is NaN, and the means are those of the others.

    Args:
        of_each: (N, n) ranks from 0 to M.
        num_draws: M, at least 2.

    Raises:
        ValueError: M below 2.

    Reference: ours; of Phi_2, Plackett 1954, Biometrika 41(3-4), 351-360.
    """
    num_draws = check_count("num_draws", num_draws, least=2)
    N, M = len(of_each), num_draws
    R = of_each.double()
    least = 1 / (2 * N * M)  # where all ranks are at one end, as if half of one draw were not
    mean = (R / M).mean(0).clamp(least, 1 - least)
    square = (R * (R - 1) / (M * (M - 1))).mean(0)
    a = torch.special.ndtri(mean)
    r = _correlation(a, mean, square)
    slope = torch.exp(-a.square() / (1 + r)) / (2 * math.pi * (1 - r.square()).sqrt())  # of Phi_2 in r
    a_each = (R / M - mean) * math.sqrt(2 * math.pi) * torch.exp(a.square() / 2)
    share = torch.special.ndtr(a * ((1 - r) / (1 + r)).sqrt())
    r_each = (R * (R - 1) / (M * (M - 1)) - square - 2 * share * (R / M - mean)) / slope
    scale, shift = ((1 - r) / r).sqrt(), -a / r.sqrt()
    scale_each = -r_each / (2 * r.square() * scale)
    shift_each = -a_each / r.sqrt() + a / (2 * r**1.5) * r_each
    known = (R[0] != R).any(0)
    return Shape(
        scale=scale.where(known, math.nan),
        scale_stderr=_stderr(scale_each).where(known, math.nan),
        shift=shift.where(known, math.nan),
        shift_stderr=_stderr(shift_each).where(known, math.nan),
        mean_scale=scale[known].mean(),
        mean_scale_stderr=_stderr(scale_each[:, known].mean(1)),
    )


def _stderr(of_each: Tensor) -> Tensor:
    """Of the mean over the first dimension; NaN for one."""
    N = len(of_each)
    return of_each.std(0) / math.sqrt(N) if N > 1 else torch.full_like(of_each[0], math.nan)


_NODES = (torch.arange(64, dtype=torch.double) + 0.5) / 64
_LARGEST_ANGLE = math.pi / 2 - 1e-3  # a scale of 0.0005; and as near to none of its u's variance at the other end


def _correlation(a: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """The r in (0, 1) with Phi_2(a, a; r) = square, by bisection; the nearest where there is none. All (n,).

    Phi_2(a, a; r) = Phi(a)^2 + int_0^{asin r} exp(-a^2 / (1 + sin t)) dt / (2 pi), which rises with r.
    """
    low, high = torch.full_like(a, 1e-3), torch.full_like(a, _LARGEST_ANGLE)
    for _ in range(50):
        angle = (low + high) / 2
        heights = torch.exp(-a[:, None].square() / (1 + (angle[:, None] * _NODES).sin())).mean(-1)
        too_low = mean.square() + angle * heights / (2 * math.pi) < square
        low, high = torch.where(too_low, angle, low), torch.where(too_low, high, angle)
    return ((low + high) / 2).sin()


# --- In words ---


class GuideCalibration(NamedTuple):
    """What the ranks say, by quantity: each latent, and last log p(x, z).

    Args:
        p_value: that all ranks are uniform, of all quantities together.
        p_values: (L + 1,) of each by itself.
        adjusted: (L + 1,) of each among all of them.
        shape: of the L latents, or None for a single draw.
        mean_joint_rank: the mean of (R + 1/2) / (M + 1) of log p(x, z): 1/2 where it is uniform.
        mean_joint_rank_stderr: its standard error.
        words: (L + 1,) of each what is wrong, or that nothing is seen.
        num_simulations: N.
        num_draws: M.
    """

    p_value: float
    p_values: Tensor
    adjusted: Tensor
    shape: Shape | None
    mean_joint_rank: float
    mean_joint_rank_stderr: float
    words: list[str]
    num_simulations: int
    num_draws: int

    @property
    def is_calibrated(self) -> bool:
        """Nothing is seen: the overall p-value is not below 0.01. With more simulations something may be."""
        return self.p_value >= SIGNIFICANT

    @property
    def worst(self) -> list[int]:
        """The latents, the least uniform first: by p-value, and where that is 0 by how far they are off."""
        if self.shape is None:
            return self.p_values[:-1].argsort().tolist()
        off = (self.shape.scale.log().abs() + self.shape.shift.abs()).nan_to_num(math.inf).tolist()
        p = self.p_values[:-1].tolist()
        return sorted(range(len(p)), key=lambda latent: (p[latent], -off[latent]))

    @property
    def verdict(self) -> str:
        """One line for all."""
        p = f"p = {self.p_value:.2g}" if self.p_value >= 1e-300 else "p < 1e-300"
        if self.is_calibrated:
            return f"no sign that the guide is not the posterior ({p}, {self.num_simulations:,} simulations)"
        wrong = self.adjusted[:-1] < SIGNIFICANT
        latents = f"{int(wrong.sum())} of {len(wrong)} latents are off by themselves{self._sizes(wrong)}"
        joint = f"log p(x, z): {self.words[-1]}"
        if not wrong.any():  # and yet something is: what no latent shows by itself
            joint += "; latents one by one do not show it: the guide misses how they go together, or with x"
        return f"the guide is not the posterior ({p}): {latents}; {joint}"

    def _sizes(self, wrong: Tensor) -> str:
        found = self.shape
        if found is None:
            return ""
        kinds = {"too narrow or misplaced by image": found.narrow, "too wide": found.wide, "shifted": found.shifted}
        counts = [f"{int((wrong & kind).sum())} {name}" for name, kind in kinds.items()]
        told = f"{', '.join(counts)}; " if wrong.any() else ""
        mean = f"{float(found.mean_scale):.3f} ± {float(found.mean_scale_stderr):.3f} on average"
        known = ~found.scale.isnan()
        if not known.any():
            return " (of none do the ranks differ)"
        least, most = float(found.scale[known].min()), float(found.scale[known].max())
        return (
            f" ({told}as the guide's scale over the posterior's: {mean}, {least:.2f} to {most:.2f}; shifted by up to "
            f"{float(found.shift[known].abs().max()):.2f} of the posterior's scales)"
        )

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        shape = None if self.shape is None else {name: each.tolist() for name, each in self.shape._asdict().items()}
        return {
            "p_value": self.p_value,
            "p_values": self.p_values.tolist(),
            "adjusted_p_values": self.adjusted.tolist(),
            "shape": shape,
            "mean_joint_rank": {"mean": self.mean_joint_rank, "stderr": self.mean_joint_rank_stderr},
            "words": self.words,
            "verdict": self.verdict,
            "num_simulations": self.num_simulations,
            "num_draws": self.num_draws,
        }


def judge(found: Ranks) -> GuideCalibration:
    """p-values of each quantity and of all, and what is wrong with those that are not uniform, in words."""
    p = p_values(found)
    holm = adjusted(p)
    shapes = shape(found.latents, found.num_draws) if found.num_draws > 1 else None
    u = (found.log_joint.double() + 0.5) / (found.num_draws + 1)
    joint, joint_stderr = float(u.mean()), float(_stderr(u))
    off = (holm < SIGNIFICANT).tolist()
    words = [_of_latent(shapes, latent) if bad else "calibrated" for latent, bad in enumerate(off[:-1])]
    words.append(_of_joint(joint, joint_stderr) if off[-1] else "calibrated")
    return GuideCalibration(float(holm.min()), p, holm, shapes, joint, joint_stderr, words, len(u), found.num_draws)


def _of_latent(shapes: Shape | None, latent: int) -> str:
    if shapes is None:
        return "not uniform"
    c, d = float(shapes.scale[latent]), float(shapes.shift[latent])
    if math.isnan(c):
        return "off by more than the guide's draws reach: all ranks are the same"
    words = []
    if shapes.narrow[latent] or shapes.wide[latent]:
        words.append(
            f"too {'narrow, or now here and now there' if c < 1 else 'wide'}, as {c:.2f} of the posterior's scale"
        )
    if shapes.shifted[latent]:
        words.append(f"{abs(d):.2f} scales {'above' if d > 0 else 'below'} the posterior")
    return ", ".join(words) or "of another shape than the posterior"


def _of_joint(mean: float, stderr: float) -> str:
    """Too narrow a guide has draws of higher density than z*; one that is too wide, misplaced or blind to how latents
    depend on each other has draws of lower density.
    """
    told = f"(mean rank {mean:.3f} ± {stderr:.3f})"
    if abs(mean - 0.5) <= _STDERRS * stderr:
        return f"now below and now above its draws, or among them too often {told}"
    if mean < 0.5:
        return f"the z of an image is less probable than draws of the guide, which keep to where p is high {told}"
    return f"the z of an image is more probable than draws of the guide, which go where it is not {told}"


# --- What uniform ranks would look like ---


def cumulative_band(num_simulations: int, num_draws: int, *, coverage: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Where the whole distribution function of N uniform ranks is, with this probability, at the bins' edges.

        n_k ~ Binomial(N, t_k),   t_k = edge_k / (M + 1),   lower_k <= n_k <= upper_k for all k at once

    The bounds are quantiles of each binomial at a level that is the same for all k, and found by 20,000 simulations
    with a seed of their own.

    Args:
        num_simulations: N.
        num_draws: M.
        coverage: of all k together.

    Returns:
        t, lower and upper, each (K - 1,): the inner edges, and shares of the ranks below them.

    Reference: Säilynoja et al. 2022, arXiv 2103.10522, section 2 (by simulation).
    """
    N = num_simulations
    t = edges(N, num_draws)[1:-1].double() / (num_draws + 1)
    n = torch.arange(N + 1, dtype=torch.double)[:, None]
    log_choose = torch.lgamma(torch.tensor(N + 1.0, dtype=torch.double)) - torch.lgamma(n + 1) - torch.lgamma(N - n + 1)
    mass = (log_choose + n * t.log() + (N - n) * (-t).log1p()).exp()
    at_most, at_least = mass.cumsum(0).clamp(max=1), mass.flip(0).cumsum(0).flip(0).clamp(max=1)
    tail = torch.minimum(at_most, at_least)
    level = tail.gather(0, _simulated_counts(N, t)).min(1).values.sort().values[int((1 - coverage) * _BAND_DRAWS)]
    inside = tail >= level
    lower = inside.int().argmax(0)
    upper = N - inside.flip(0).int().argmax(0)
    return t, lower.double() / N, upper.double() / N


_BAND_DRAWS = 20_000


def _simulated_counts(N: int, t: Tensor) -> Tensor:
    """(20,000, K - 1) int64: of N uniform numbers, how many are below each t."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(_BAND_DRAWS, len(t), dtype=torch.double)
    before, last = torch.zeros(_BAND_DRAWS, dtype=torch.double), 0.0
    for k, edge in enumerate(t.tolist()):
        share = torch.full_like(before, (edge - last) / (1 - last))
        before = before + torch.binomial(N - before, share, generator=generator)
        counts[:, k], last = before, edge
    return counts.long()
