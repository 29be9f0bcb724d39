"""Pictures: variation, sharpness and blur, against spectra and variances that are known."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.fft
import scipy.ndimage
import torch

from ppl_vae import VAE
from ppl_vae.diagnostics import blur, reconstruction_variation, sharpness
from ppl_vae.diagnostics.pictures import high_frequency_power
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime.global_state import seeded

CPU = torch.device("cpu")
E = (1, 8, 8)


def noise(N, *, size=16, seed=0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, channels, size, size, generator=generator, dtype=torch.double)


def wave(k_y, k_x, size=16):
    """cos(pi k_y (i + 1/2) / n) cos(pi k_x (j + 1/2) / n): one frequency, k / 2 n cycles a pixel each way."""
    place = (np.arange(size) + 0.5) / size * math.pi
    return np.cos(k_y * place)[:, None] * np.cos(k_x * place)


def images_of(picture, N=3):
    """(N, 1, H, W) multiples of one picture."""
    amplitudes = torch.arange(1, N + 1).double()[:, None, None, None]
    return amplitudes * torch.from_numpy(picture)


# --- Variation ---


def test_reconstructions_that_are_the_images_vary_as_they_do():
    found = reconstruction_variation(noise(20), noise(20))
    assert found.mean == pytest.approx(1.0)
    assert found.stderr == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_a_variation_is_that_of_repetitions():
    found = [
        reconstruction_variation(0.5 * x + 0.3 * noise(100, size=3, seed=1000 + seed), x)
        for seed, x in enumerate(noise(100, size=3, seed=seed) for seed in range(200))
    ]
    spread = np.std([value.mean for value in found])
    assert np.mean([value.stderr for value in found]) == pytest.approx(spread, rel=0.15)


# --- Sharpness ---


@pytest.mark.parametrize(("k_y", "k_x"), [(9, 0), (0, 15), (10, 10)])
def test_a_gaussian_blur_leaves_the_square_of_its_transfer_function(k_y, k_x):
    x = images_of(wave(k_y, k_x))
    blurred = torch.stack([torch.from_numpy(scipy.ndimage.gaussian_filter(i[0].numpy(), 0.8))[None] for i in x])
    width = int(4 * 0.8 + 0.5)
    offsets = np.arange(-width, width + 1)
    kernel = np.exp(-(offsets**2) / (2 * 0.8**2))
    kernel /= kernel.sum()
    transfer = np.prod([(kernel * np.cos(math.pi * k * offsets / 16)).sum() for k in (k_y, k_x)])
    assert sharpness(blurred, x).mean == pytest.approx(transfer**2, rel=1e-9)


@pytest.mark.parametrize(("k_y", "k_x", "is_high"), [(8, 0, False), (9, 0, True), (5, 6, False), (6, 6, True)])
def test_the_edge_is_half_the_nyquist_frequency(k_y, k_x, is_high):
    assert (high_frequency_power(images_of(wave(k_y, k_x)))[0] > 1e-9).item() == is_high


def test_the_power_is_that_of_the_cosine_transform():
    """Of the orthonormal one's coefficients beyond the edge, for images that are not square too."""
    x = noise(5)[..., :12]
    spectrum = scipy.fft.dctn(x[:, 0].numpy(), axes=(-2, -1), norm="ortho")
    is_high = (np.arange(16)[:, None] / 32) ** 2 + (np.arange(12) / 24) ** 2 > 0.25**2
    np.testing.assert_allclose(high_frequency_power(x), (spectrum**2 * is_high).sum((-2, -1)))


# --- Blur ---


def linear(*, scale):
    """y(z) = W z, W (64, 2), and q(z | x) = N(A x, scale^2): all that ``blur`` returns is known."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 2, generator=generator, dtype=torch.double)
    A = torch.linalg.pinv(W) * 0.9

    def likelihood(z):
        return dist.Normal((z @ W.T).unflatten(-1, E), 1.0).to_event(3)

    def posterior(x):
        loc = x.flatten(1) @ A.T
        return dist.Normal(loc, scale).to_event(1) if scale else dist.Delta(loc, event_dim=1)

    return W, A, VAE(StandardNormal(2).double(), likelihood, posterior)


def data(N=300):
    return noise(N, size=8, seed=3)


def blurred(scale, **options):
    W, A, vae = linear(scale=scale)
    with seeded(0, CPU):
        return W, A, blur(vae, data(), **options)


def test_bias_and_posterior_noise_are_those_of_the_linear_decoder():
    W, A, found = blurred(0.7)
    x = data().flatten(1)
    bias = (x - x @ A.T @ W.T).square().mean()
    posterior_noise = 0.7**2 * W.square().sum() / 64
    assert abs(found.bias.mean - bias) < 0.02 * bias
    assert abs(found.posterior_noise.mean - posterior_noise) < 4 * found.posterior_noise.stderr


def test_bias_and_posterior_noise_are_the_error():
    _, _, found = blurred(0.7, draws=3)
    assert found.error.mean == pytest.approx(found.bias.mean + found.posterior_noise.mean, abs=1e-12)


def test_an_autoencoder_has_no_posterior_noise():
    _, _, found = blurred(0.0)
    assert found.posterior_noise.mean == pytest.approx(0.0, abs=1e-12)


def test_reconstructions_are_compared_with_the_gray_images():
    W, A, vae = linear(scale=0.0)
    gray = (data().flatten(1) @ A.T @ W.T).reshape(300, *E)
    found = blur(vae, data(), gray=gray)
    assert found.at_mean.mean == pytest.approx(1.0)
    assert found.error.mean == pytest.approx(0.0, abs=1e-12)
