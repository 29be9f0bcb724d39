"""Reconstructions as pictures: do they differ from image to image, how sharp are they, and what blurs them?"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ppl_vae.diagnostics.values import CannotMeasure
from ppl_vae.evidence.estimate import Estimate, ratio_of_means
from ppl_vae.evidence.moments import mean_or_draw
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.vae import VAE

# Cycles a pixel: half of the Nyquist frequency of 1/2. Source: ours.
HIGH_FREQUENCY = 0.25


@dataclass(frozen=True)
class Blur:
    """Sharpness along the way from an image to its averaged reconstruction, and the squared error's two parts.

    Args:
        at_mean: sharpness of E[x | z] at the mean of q(z | x), against the data's.
        at_draw: of E[x | z] at one draw of q(z | x).
        averaged: of the average of E[x | z] over draws.
        error: E_q |x - E[x | z]|^2 / D, squared units of pixels.
        posterior_noise: the part of it that is the variance of E[x | z] under q.
        bias: the rest, |x - E_q E[x | z]|^2 / D.
    """

    at_mean: Estimate
    at_draw: Estimate
    averaged: Estimate
    error: Estimate
    posterior_noise: Estimate
    bias: Estimate

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {field.name: getattr(self, field.name).to_json() for field in fields(self)}


def _same_shape(images: Tensor, reference: Tensor, names: str) -> None:
    if images.shape != reference.shape or len(images) < 2:
        got = f"{tuple(images.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"{names}: expected at least two images of one shape each, got {got}")


@torch.no_grad()
def reconstruction_variation(reconstructions: Tensor, x: Tensor) -> Estimate:
    """V = sum_d Var_n y_nd / sum_d Var_n x_nd: 0 where all reconstructions look the same, 1 where they vary as data.

    The error is the delta method's, over images.

    Args:
        reconstructions: (N, *E) expected images y, such as the mean of p(x | z).
        x: (N, *E) the images that they are of, in the same unit. Binary pixels vary more than what they were drawn
            from, so for those give the gray probabilities.

    Raises:
        ValueError: shapes that differ, or fewer than two images.
        CannotMeasure: a ValueError: the images are all the same.

    Source: ours.
    """
    _same_shape(reconstructions, x, "reconstructions, x")
    of_reconstructions, of_data = (
        (images.double() - images.double().mean(0)).square().flatten(1).sum(1) for images in (reconstructions, x)
    )
    if not of_data.sum() > 0:
        raise CannotMeasure("x: expected images that vary, got the same image every time")
    return ratio_of_means(of_reconstructions, of_data)


def _cosines(size: int, device: torch.device) -> Tensor:
    """C_ki = sqrt((2 - [k = 0]) / n) cos(pi k (i + 1/2) / n): the orthonormal cosine transform (n, n), float64."""
    k = torch.arange(size, dtype=torch.double, device=device)
    weight = torch.where(k > 0, 2.0, 1.0).double() / size
    return weight.sqrt()[:, None] * (math.pi / size * k[:, None] * (k + 0.5)).cos()


def high_frequency_power(images: Tensor) -> Tensor:
    """P_n = sum_c sum_{f: |f| > 1/4} X_nc(f)^2, f in cycles a pixel, X = C x C' the orthonormal cosine transform.

    It is the spectrum of the image mirrored at its edges; coefficient k of n has k / 2 n cycles a pixel, and |f| is the
    Euclidean length of (f_y, f_x), each below the Nyquist frequency of 1/2. A plain Fourier transform would see a jump
    from one edge to the opposite one, whose power is high-frequency whatever the image is; mirrored there is none, and
    no window is needed. The mean has frequency 0, and is left out with all that is below.

    Args:
        images: (N, C, H, W).

    Returns:
        (N,) float64, squared units of pixels: over all f, C H W times their mean square.
    """
    H, W = images.shape[-2:]
    rows, columns = _cosines(H, images.device), _cosines(W, images.device)
    f_y, f_x = (torch.arange(size, dtype=torch.double, device=images.device) / (2 * size) for size in (H, W))
    is_high = f_y[:, None].square() + f_x.square() > HIGH_FREQUENCY**2
    return ((rows @ images.double() @ columns.T).square() * is_high).sum((-3, -2, -1))


@torch.no_grad()
def sharpness(images: Tensor, reference: Tensor) -> Estimate:
    """S = mean_n P(y_n) / mean_n P(x_n), P the power above half the Nyquist frequency: 1 as sharp as the reference.

    A blur with transfer function g leaves |g(f)|^2 of the power at f. Noise adds power: S says how much of it there is,
    not whether it is the right one. The error is the delta method's, over images.

    Args:
        images: (N, C, H, W).
        reference: (N, C, H, W), in the same unit: gray images, where ``images`` are gray.

    Raises:
        ValueError: shapes that differ, or that are no images.
        CannotMeasure: a ValueError: the reference has no such power.

    Source: ours.
    """
    _same_shape(images, reference, "images, reference")
    _need_images(reference)
    return ratio_of_means(high_frequency_power(images), _power_of_reference(reference))


def _need_images(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(x.shape)}")


def _power_of_reference(x: Tensor) -> Tensor:
    power = high_frequency_power(x)
    if not power.sum() > 0:
        raise CannotMeasure("reference: expected images with power above half the Nyquist frequency, got none")
    return power


@serialize_threads()
@torch.no_grad()
def blur(vae: VAE, x: Tensor, *, gray: Tensor | None = None, draws: int = 8) -> Blur:
    """E_q |x - y(z)|^2 = |x - E_q y|^2 + Var_q y (bias, posterior noise), y(z) = E[x | z], and the sharpness of each y.

    From y at the mean of q, over y at a draw, to E_q y: the last loses to the first what the posterior's width blurs,
    and the first loses to the data what the decoder and the latents lack. Per image and pixel, with J draws y_j of mean
    Y: error mean_j |x - y_j|^2, noise sum_j |y_j - Y|^2 / (J - 1), bias their difference; each is unbiased, and bias +
    noise = error exactly. So is the power of E_q y: (J^2 P(Y) - sum_j P(y_j)) / (J (J - 1)), without the draws' own.

    Args:
        vae: the VAE, or a plain autoencoder, whose three reconstructions are one.
        x: images (N, C, H, W), as the VAE sees them.
        gray: (N, C, H, W) what they are compared with, in the unit of the likelihood's mean, such as the gray
            probabilities of binary pixels; by default x.
        draws: J, of q(z | x) an image, at least 2.

    Raises:
        ValueError: an argument out of its range, or no images.
        CannotMeasure: a ValueError: the images have no power at high frequencies.

    Source: the law of total variance; its use on pictures is ours.
    """
    draws = check_count("draws", draws, least=2)
    _need_images(x)
    truth = x if gray is None else gray
    _same_shape(truth, x, "gray, x")
    size = images_per_pass(x, vae.likelihood)
    passes = zip(x.split(size), truth.split(size), strict=True)
    parts = zip(*(_of_one_pass(vae, images, target, draws) for images, target in passes), strict=True)
    at_mean, at_draw, averaged, error, noise = (torch.cat(part) for part in parts)
    reference = _power_of_reference(truth)
    return Blur(
        at_mean=ratio_of_means(at_mean, reference),
        at_draw=ratio_of_means(at_draw, reference),
        averaged=ratio_of_means(averaged, reference),
        error=Estimate.from_values(error),
        posterior_noise=Estimate.from_values(noise),
        bias=Estimate.from_values(error - noise),
    )


def _of_one_pass(vae: VAE, x: Tensor, truth: Tensor, draws: int) -> tuple[Tensor, ...]:
    """(B,) each: powers at the mean, at a draw (averaged over draws) and of the average; error and noise a pixel."""
    q, truth = vae.posterior(x), truth.double()
    at_mean = high_frequency_power(vae.likelihood(mean_or_draw(q)).mean)
    total, squares = torch.zeros_like(truth), torch.zeros_like(truth)
    powers = torch.zeros(len(x), dtype=torch.double, device=x.device)
    for _ in range(draws):
        residual = vae.likelihood(q.sample()).mean.double() - truth
        total += residual
        squares += residual.square()
        powers += high_frequency_power(residual + truth) / draws
    error = squares.flatten(1).mean(1) / draws
    bias_and_noise = (total / draws).square().flatten(1).mean(1)
    noise = (error - bias_and_noise) * draws / (draws - 1)
    of_average = (draws * high_frequency_power(truth + total / draws) - powers) / (draws - 1)
    return at_mean, powers, of_average, error, noise
