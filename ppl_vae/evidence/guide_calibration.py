"""Simulation-based calibration of a guide: is the z that made an image where q(z | x) expects it?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.guide_calibration import (
    STDERRS,
    NormalShape,
    Ranks,
    adjust_p_values,
    estimate_shape,
    rank_p_values,
)
from ppl_vae.evidence.moments import sample_latents
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.weights import DeterministicGuide, is_autoencoder

SIGNIFICANT = 0.01  # the overall p-value below which a guide is not calibrated. Source: ours


@serialize_threads()
@torch.no_grad()
def compute_ranks(vae: LatentModel, *, num_simulations: int, num_draws: int) -> Ranks:
    """R_l = #{m: z_ml < z*_l} and R = #{m: log p(x, z_m) < log p(x, z*)}: z* ~ p(z), x ~ p(x | z*), z_m ~ q(z | x).

    If q(z | x) = p(z | x), then given x the z* and the z_m are M + 1 independent draws from one distribution, and every
    rank is uniform on 0, ..., M; ties are broken at random. Ranks that are not uniform show that the guide is not the
    model's posterior, for images from the model. Uniform ranks prove less: a guide that ignores x and draws from the
    prior has uniform ranks of z. The rank of log p(x, z) detects it.

    Draws come from torch's global generator. Memory does not grow with M.

    Args:
        vae: In evaluation mode, of one layer or several.
        num_simulations: N.
        num_draws: M.

    Raises:
        ValueError: N or M is below 1.
        DeterministicGuide: A ValueError: the guide has no density.
        NotFinite: A z or a log p(x, z) is NaN.

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
    return Ranks(found[:, :-1].cpu(), found[:, -1].cpu(), num_draws)


def _ranks_of_group(vae: LatentModel, z_true: Tensor, num_draws: int, *, chunk: int) -> Tensor:
    """(B, L + 1). z_true: (B, L)."""
    x = _images(vae, z_true)
    q = vae.posterior(x)
    below = torch.zeros(len(z_true), z_true.shape[1] + 1, dtype=torch.long, device=z_true.device)
    equal = torch.zeros_like(below)
    for start in range(0, num_draws, chunk):
        # z* goes through each pass together with the draws: otherwise rounding could decide a tie.
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


# --- Judgment ---


@dataclass(frozen=True)
class GuideCalibration:
    """The judgment on the ranks, by quantity: each latent, and last log p(x, z).

    Args:
        p_value: Of all quantities together being uniform. Below 0.01 the guide is not the posterior.
        p_values: (L + 1,) of each quantity by itself.
        adjusted_p_values: (L + 1,) with Holm's correction.
        shape: Of the L latents, or None for a single draw.
        mean_joint_rank: The mean of (R + 1/2) / (M + 1) of log p(x, z): 1/2 where it is uniform.
        words: (L + 1,) what is wrong with each, or "calibrated".
        verdict: The judgment in one line.
        num_simulations: N.
        num_draws: M.
    """

    p_value: float
    p_values: Tensor
    adjusted_p_values: Tensor
    shape: NormalShape | None
    mean_joint_rank: Estimate
    words: tuple[str, ...]
    verdict: str
    num_simulations: int
    num_draws: int


def judge(found: Ranks) -> GuideCalibration:
    """p-values of each quantity and of all, and what is wrong with those that are not uniform, in words."""
    p = rank_p_values(found)
    holm = adjust_p_values(p)
    shapes = estimate_shape(found.latents, found.num_draws) if found.num_draws > 1 else None
    joint = Estimate.mean_of((found.log_joint.double() + 0.5) / (found.num_draws + 1))
    N, is_off = len(found.log_joint), (holm < SIGNIFICANT).tolist()
    words = [_describe_latent(shapes, latent) if off else "calibrated" for latent, off in enumerate(is_off[:-1])]
    words.append(_describe_joint(joint) if is_off[-1] else "calibrated")
    overall = float(holm.min())
    p_words = f"p = {overall:.2g}" if overall >= 1e-300 else "p < 1e-300"
    if overall >= SIGNIFICANT:
        verdict = f"no sign that the guide is not the posterior ({p_words}, {N:,} simulations)"
    else:
        scale = shapes and f", with {shapes.mean_scale:.3f} ± {shapes.mean_scale_stderr:.3f} of its scale"
        verdict = (
            f"the guide is not the posterior ({p_words}): {sum(is_off[:-1])} of {len(is_off) - 1} latents are off by "
            f"themselves{scale or ''}; log p(x, z): {words[-1]}"
        )
    return GuideCalibration(overall, p, holm, shapes, joint, tuple(words), verdict, N, found.num_draws)


def _describe_latent(shapes: NormalShape | None, latent: int) -> str:
    if shapes is None:
        return "not uniform"
    too_narrow, too_wide = bool(shapes.narrow[latent]), bool(shapes.wide[latent])
    width = (
        "too narrow, or misplaced by image"
        if too_narrow
        else "too wide"
        if too_wide
        else "shifted, or of another shape"
    )
    return f"{width}: {shapes.scale[latent]:.2f} of its scale, shifted by {shapes.shift[latent]:+.2f} scales"


def _describe_joint(rank: Estimate) -> str:
    """What the mean rank of log p(x, z) says about the guide.

    A guide that is too narrow has draws of higher density than z*. A guide that is too wide, misplaced, or blind to how
    latents depend on each other has draws of lower density.
    """
    rank_words = f"(mean rank {rank.mean:.3f} ± {rank.stderr:.3f})"
    if abs(rank.mean - 0.5) <= STDERRS * rank.stderr:
        return f"among its draws, too often or too seldom {rank_words}"
    return f"the z of an image is {'less' if rank.mean < 0.5 else 'more'} probable than draws of the guide {rank_words}"
