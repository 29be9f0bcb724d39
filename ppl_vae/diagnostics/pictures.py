"""Variation and sharpness of reconstructions, what blurs them, and the images along codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import pad

from ppl_vae.evidence.estimate import Estimate, ratio_of_means
from ppl_vae.evidence.moments import PRIOR_DRAWS, factors, mean_or_draw, sample_latents
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.records import Data, arguments_of, further_of, images_of

# Cycles per pixel: half of the Nyquist frequency of 1/2. Source: ours.
HIGH_FREQUENCY = 0.25


@dataclass(frozen=True)
class Blur:
    """Sharpness of reconstructions relative to the data, and the two parts of their squared error.

    Args:
        at_mean: sharpness of E[x | z] at the mean of q(z | x).
        error: E_q |x - E[x | z]|^2 / D, squared units of pixels.
        posterior_noise: the variance of E[x | z] under q, a part of the error.
        bias: |x - E_q E[x | z]|^2 / D, the rest of the error.
    """

    at_mean: Estimate
    error: Estimate
    posterior_noise: Estimate
    bias: Estimate


def _check_shapes(images: Tensor, reference: Tensor, names: str) -> None:
    if images.shape != reference.shape or len(images) < 2:
        got = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"{names}: expected at least two images of one shape each, got {got}")


@torch.no_grad()
def reconstruction_variation(reconstructions: Tensor, x: Tensor) -> Estimate:
    """V = sum_d Var_n y_nd / sum_d Var_n x_nd: 0 if all reconstructions are the same, 1 if they vary as the data.

    The error is the delta method's, over images. NaN where the images are all the same.

    Args:
        reconstructions: (N, *E) expected images y, such as the mean of p(x | z).
        x: (N, *E) the images, in the same unit. For binary pixels give the gray probabilities that they were drawn
            from, since the draws vary more.

    Source: ours.
    """
    _check_shapes(reconstructions, x, "reconstructions, x")
    reconstruction_power, data_power = (
        (images.double() - images.double().mean(0)).square().flatten(1).sum(1) for images in (reconstructions, x)
    )
    return ratio_of_means(reconstruction_power, data_power)


def _cosines(size: int, device: torch.device) -> Tensor:
    """C_ki = sqrt((2 - [k = 0]) / n) cos(pi k (i + 1/2) / n): the orthonormal cosine transform (n, n), float64."""
    k = torch.arange(size, dtype=torch.double, device=device)
    weight = torch.where(k > 0, 2.0, 1.0).double() / size
    return weight.sqrt()[:, None] * (math.pi / size * k[:, None] * (k + 0.5)).cos()


def high_frequency_power(images: Tensor) -> Tensor:
    """P_n = sum_c sum_{f: |f| > 1/4} X_nc(f)^2 for the orthonormal cosine transform X = C x C', f in cycles per pixel.

    Coefficient k of n has k / 2 n cycles per pixel, and |f| is the Euclidean length of (f_y, f_x), each below the
    Nyquist frequency of 1/2. A plain Fourier transform would see high frequencies in the jump from one edge to the
    opposite one. images: (N, C, H, W) -> (N,) float64, squared units of pixels. The power over all f is C H W times the
    pixels' mean square. Another shape raises ValueError.
    """
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    H, W = images.shape[-2:]
    rows, columns = _cosines(H, images.device), _cosines(W, images.device)
    f_y, f_x = (torch.arange(size, dtype=torch.double, device=images.device) / (2 * size) for size in (H, W))
    is_high = f_y[:, None].square() + f_x.square() > HIGH_FREQUENCY**2
    return ((rows @ images.double() @ columns.T).square() * is_high).sum((-3, -2, -1))


@torch.no_grad()
def sharpness(images: Tensor, reference: Tensor) -> Estimate:
    """S = mean_n P(y_n) / mean_n P(x_n) for the power P above half the Nyquist frequency; 1 if equally sharp.

    A blur with transfer function g leaves |g(f)|^2 of the power at f. Noise adds power, so S measures how much detail
    there is, not whether it is right. The error is the delta method's, over images. NaN where the reference has no
    such power.

    Args:
        images, reference: (N, C, H, W), in one unit.

    Source: ours.
    """
    _check_shapes(images, reference, "images, reference")
    return ratio_of_means(high_frequency_power(images), high_frequency_power(reference))


@serialize_threads(gradients=False)
def blur(vae: LatentModel, data: Data, *, gray: Tensor | None = None, draws: int = 8) -> Blur:
    """E_q |x - y(z)|^2 = |x - E_q y|^2 + Var_q y (bias and posterior noise), y(z) = E[x | z], and y's sharpness.

    y at the mean of q lacks the detail that the decoder and the latents do not carry. With J draws y_j of mean Y, per
    image and pixel, the error is mean_j |x - y_j|^2, the noise sum_j |y_j - Y|^2 / (J - 1) and the bias their
    difference. Each is unbiased.

    Args:
        vae: the VAE, or a plain autoencoder.
        data: images x (N, C, H, W), as the VAE sees them, or ``Records``.
        gray: (N, C, H, W) images to compare with, in the unit of the likelihood's mean, such as the gray probabilities
            of binary pixels; by default x.
        draws: J, draws of q(z | x) per image, at least 2.

    Source: the law of total variance; its use on pictures is ours.
    """
    draws = check_count("draws", draws, least=2)
    x = images_of(data)
    truth = x if gray is None else gray
    _check_shapes(truth, x, "gray, x")
    reference = high_frequency_power(truth)
    size = images_per_pass(x, vae.likelihood)
    passes = zip(data.split(size), truth.split(size), strict=True)
    parts = zip(*(_measure_pass(vae, images, target, draws) for images, target in passes), strict=True)
    at_mean, error, noise = (torch.cat(part) for part in parts)
    return Blur(
        at_mean=ratio_of_means(at_mean, reference),
        error=Estimate.mean_of(error),
        posterior_noise=Estimate.mean_of(noise),
        bias=Estimate.mean_of(error - noise),
    )


def _measure_pass(vae: LatentModel, x: Data, truth: Tensor, draws: int) -> tuple[Tensor, ...]:
    """(B,) each: the power at the mean; error and noise per pixel."""
    q, further, truth = vae.posterior(*arguments_of(x)), further_of(x), truth.double()
    at_mean = high_frequency_power(vae.likelihood(mean_or_draw(q), *further).mean)
    total, squares = torch.zeros_like(truth), torch.zeros_like(truth)
    for _ in range(draws):
        residual = vae.likelihood(q.sample(), *further).mean.double() - truth
        total += residual
        squares += residual.square()
    error = squares.flatten(1).mean(1) / draws
    bias_and_noise = (total / draws).square().flatten(1).mean(1)
    noise = (error - bias_and_noise) * draws / (draws - 1)
    return at_mean, error, noise


# --- Images along latents ---


class PrincipalDirections(NamedTuple):
    """Orthonormal directions v_k of codes, with the variances s_k^2 of the codes along them, the largest first.

    Args:
        center: (L,) the mean of the codes.
        directions: (K, L) v_k, with a positive largest entry.
        scale: (K,) s_k.
        share: (K,) s_k^2 / sum_l s_l^2, the share of the codes' variance.
    """

    center: Tensor
    directions: Tensor
    scale: Tensor
    share: Tensor

    def project(self, z: Tensor) -> Tensor:
        """v_k . (z - center): z (..., L) -> (..., K)."""
        return (z - self.center) @ self.directions.T

    def find_central(self, codes: Tensor) -> int:
        """argmin_n sum_k (v_k . (z_n - center))^2 / s_k^2, the most central of the codes (N, L)."""
        least = max(1e-6 * float(self.scale[0]), torch.finfo(codes.dtype).tiny)  # below it is the error of rounding
        return int((self.project(codes) / self.scale.clamp(min=least)).square().sum(-1).argmin())


def find_principal_directions(codes: Tensor, most: int, *, num_moved: int | None = None) -> PrincipalDirections:
    """The eigenvectors v_k of cov(z_n) with the largest eigenvalues s_k^2, of codes z_n such as posterior means.

    Args:
        codes: (N, L).
        most: K, or fewer if there are fewer codes or latents.
        num_moved: Only the first so many latents are moved, such as those of the lowest layer; all by default.
    """
    center = codes.mean(0)
    offsets = (codes - center)[:, :num_moved].double() / math.sqrt(len(codes))
    _, scale, directions = torch.linalg.svd(offsets, full_matrices=False)
    share = scale.square() / scale.square().sum().clamp(min=torch.finfo(torch.double).tiny)
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    directions = pad(directions, (0, codes.shape[1] - directions.shape[1]))
    return PrincipalDirections(center, *(each[:most].to(codes) for each in (directions, scale, share)))


@serialize_threads(gradients=False)
def latent_quantiles(prior: Distribution, count: int) -> Tensor:
    """(count, L) F_l^-1((k + 1/2) / count), k = 0..count - 1: values of z_l that stand for equal probabilities.

    A prior that is not a product over latents with distribution functions F_l is represented by 20,000 draws.
    """
    middles = (torch.arange(count, dtype=torch.double) + 0.5) / count
    try:
        marginals = factors(prior)
        if marginals is None:
            raise NotImplementedError
        return marginals.icdf(middles.to(marginals.mean)[:, None])
    except NotImplementedError:
        z = sample_latents(prior, PRIOR_DRAWS)
        return torch.stack([z[:, latent].quantile(middles.to(z)) for latent in range(z.shape[1])], dim=-1)
