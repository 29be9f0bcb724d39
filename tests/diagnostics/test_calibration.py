"""Calibration of pixels, against models whose posterior is exact and errors whose effect is known."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian

from ppl_vae import VAE
from ppl_vae.diagnostics import likelihood
from ppl_vae.diagnostics.likelihood import BINS, calibrate_pixels, summarize_histogram
from ppl_vae.evidence.dequantization import levels_of
from ppl_vae.runtime.global_state import seeded

CPU = torch.device("cpu")
NUM_IMAGES = 3000

# Of twenty shares at once: 20 P(|N(0, 1)| > 4.75) = 4e-5 is the rate of false alarms, with normal means of images.
STDERRS = 4.75


def calibrate(vae, x, *, seed=0, **options):
    with seeded(seed, CPU):
        return calibrate_pixels(vae, x, **options)


def assert_shares(found, expected):
    for k, (share, right) in enumerate(zip(found.histogram, expected, strict=True)):
        assert abs(share.mean - right) < STDERRS * share.stderr, f"bin {k}: {share}, expected {right}"


def mixture_vae(family, rates):
    """p(z) uniform over one-hot vectors, p(x_d | z) = family(rates of z), and the posterior by Bayes' rule."""
    K = len(rates)

    def prior():
        return dist.OneHotCategorical(logits=torch.zeros(K, dtype=torch.double))

    def likelihood(z):
        return family(torch.einsum("...k,kde->...de", z, rates)).to_event(1)

    def posterior(x):
        each = torch.stack([likelihood(one).log_prob(x) for one in torch.eye(K, dtype=torch.double)], dim=-1)
        return dist.OneHotCategorical(logits=each)

    return VAE(prior, likelihood, posterior)


def random_rates(K, D, size):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(K, D, size, generator=generator, dtype=torch.double)


def draw(vae, num_images):
    with seeded(7, CPU):
        return vae.likelihood(vae.prior().sample((num_images,))).sample().double()


MODELS = {
    "normal": lambda: LinearGaussian.random().vae(),
    "bernoulli": lambda: mixture_vae(lambda h: dist.Bernoulli(logits=h[..., 0]), random_rates(3, 5, 1)),
    "categorical": lambda: mixture_vae(lambda h: dist.Categorical(logits=2 * h), random_rates(3, 5, 6)),
    "poisson": lambda: mixture_vae(lambda h: dist.Poisson(h[..., 0].exp()), random_rates(3, 5, 1)),
}


@pytest.mark.parametrize("num_draws", [99, 7])
@pytest.mark.parametrize("name", MODELS)
def test_pixels_are_uniform_if_model_and_posterior_are_exact(name, num_draws):
    vae = MODELS[name]()
    found = calibrate(vae, draw(vae, NUM_IMAGES), num_draws=num_draws)
    assert_shares(found, [1 / BINS] * BINS)


def places_of_a_wrong_scale(factor, num_draws):
    """P(PIT in bin k) = E[P(R in bin k)], R ~ Binomial(J, Phi(e / factor)), e ~ N(0, 1), by the trapezoidal rule."""
    e = torch.linspace(-9, 9, 4001, dtype=torch.double)
    weight = (-e.square() / 2).exp() / math.sqrt(2 * math.pi) * (e[1] - e[0])
    below = torch.special.ndtr(e / factor).clamp(1e-300, 1 - 1e-16)
    ranks = torch.arange(num_draws + 1, dtype=torch.double)
    chances = torch.distributions.Binomial(num_draws, below[:, None]).log_prob(ranks).exp()
    return (weight[:, None] * chances).sum(0).unflatten(0, (BINS, -1)).sum(1)


@pytest.mark.parametrize(("factor", "word"), [(2.0, "scales are too wide"), (0.5, "scales are too narrow")])
def test_a_scale_that_is_wrong_by_a_factor_of_two_distorts_as_computed(factor, word):
    oracle = LinearGaussian.random()
    x, vae = oracle.draw(NUM_IMAGES), oracle.vae()
    vae.likelihood.family.log_scale.data += math.log(factor)  # the guide stays the posterior of the right model
    found = calibrate(vae, x)
    assert_shares(found, places_of_a_wrong_scale(factor, 99).tolist())
    assert found.verdict == word


def test_dequantized_levels_beyond_the_ends_keep_the_transform_uniform():
    """Scaled to levels, a tenth of the exact model's pixels are whole numbers below 0."""
    oracle = LinearGaussian.random()
    vae, y = oracle.vae(), oracle.draw(NUM_IMAGES)
    x = levels_of(y)
    assert (x < 0).double().mean() > 0.1
    dequantized = VAE(vae.prior, vae.likelihood, lambda images: vae.posterior(y[: len(images)]))
    with seeded(0, CPU):
        pit = likelihood._compute_pit(dequantized, x, 99, levels_of, chunk=99)
    expected = torch.full((BINS,), 1 / BINS, dtype=torch.double)
    shares = likelihood._histograms(pit)
    assert ((shares.mean(0) - expected).abs() < STDERRS * shares.std(0) / math.sqrt(NUM_IMAGES)).all()


@pytest.mark.parametrize(("level", "expected"), [(-1e-9, -1), (0.0, 0), (255.5 / 256, 255), (1.0, 256), (2.0, 512)])
def test_levels_are_cells_of_the_density(level, expected):
    assert levels_of(torch.tensor(level, dtype=torch.double)) == expected


@pytest.mark.parametrize(("shift", "word"), [(0.5, "bright"), (-0.5, "dark")])
def test_shifted_pixels_are_found_on_their_side(shift, word):
    oracle = LinearGaussian.random()
    vae = oracle.vae()
    x = oracle.draw(NUM_IMAGES)
    with seeded(0, CPU), torch.no_grad():
        z = vae.posterior(x).sample()
        brighter = vae.likelihood(z).sample() + shift * oracle.scale

    def posterior(images):
        return dist.Delta(z).to_event(1)

    found = calibrate(VAE(vae.prior, vae.likelihood, posterior), brighter, num_draws=9)
    assert f"{word} pixels surprise more" in found.verdict


def test_the_standard_error_is_over_images_not_pixels():
    """Every pixel of an image is the same: D pixels are worth no more than one."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(1), dtype=torch.double).expand(-1, 40)

    def likelihood(z):
        return dist.Normal(torch.zeros(*z.shape[:-1], 40, dtype=torch.double), 1.0).to_event(1)

    def normal(images=None):
        return dist.Normal(torch.zeros(1, dtype=torch.double), 1.0).to_event(1)

    vae = VAE(normal, likelihood, lambda images: normal().expand((len(images),)))
    share = calibrate(vae, x).above_90_percent_quantile
    independent = math.sqrt(0.1 * 0.9 / x.numel())
    assert share.stderr == pytest.approx(math.sqrt(0.1 * 0.9 / 500), rel=0.15)
    assert share.stderr > 5 * independent


def test_the_deviation_is_the_largest_of_the_cumulative_histogram():
    mean = torch.full((BINS,), 1 / BINS, dtype=torch.double)
    mean[3] += 0.03
    mean[12] -= 0.03
    covariance = torch.zeros(BINS, BINS, dtype=torch.double)
    found = summarize_histogram(mean, covariance, num_images=10, num_draws=99)
    assert found.largest_deviation == pytest.approx(0.03)
