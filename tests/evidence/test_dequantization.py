"""The mass of levels under a density: against masses that are known exactly."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from oracles import NormalFixed
from torch import Tensor, nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, data, log_evidence
from ppl_vae.evidence.dequantization import Dequantized, dequantized, mass_of_levels
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal

LEVELS = torch.arange(256, dtype=torch.double)


class UnknownNormal(dist.Normal):
    """A density whose masses are not known by its kind, so that they are estimated by draws."""


class UnknownLaplace(dist.Laplace):
    """A density whose masses are not known by its kind, so that they are estimated by draws."""


# Densities of a pixel in (0, 1), narrow and wide, whose masses are drawn, and their distribution functions.
DENSITIES = {
    "a wide normal": (UnknownNormal(0.4, 0.3), scipy.stats.norm(0.4, 0.3).cdf),
    "a normal narrower than a level": (UnknownNormal(0.4, 0.001), scipy.stats.norm(0.4, 0.001).cdf),
    "a beta without a bound": (dist.Beta(0.5, 0.8), scipy.stats.beta(0.5, 0.8).cdf),
    "a laplace": (UnknownLaplace(0.9, 0.05), scipy.stats.laplace(0.9, 0.05).cdf),
}


def exact_mass(name: str) -> Tensor:
    """(256,) P(x) = F((x + 1) / 256) - F(x / 256)."""
    cdf = DENSITIES[name][1]
    edges = torch.arange(257, dtype=torch.double) / 256
    return torch.from_numpy(cdf(edges.numpy())).diff()


def doubled(density: dist.Distribution) -> dist.Distribution:
    return type(density)(*(getattr(density, name).double() for name in list(density.arg_constraints)[:2]))


def estimates(name: str, num_draws: int, repeats: int = 4000) -> Tensor:
    """(repeats, 256) log P^ of each level."""
    torch.manual_seed(0)
    levels = Dequantized(doubled(DENSITIES[name][0]).expand((256,)), num_draws)
    return levels.log_prob(LEVELS.expand(repeats, 256))


@pytest.mark.thorough
@pytest.mark.parametrize("num_draws", [1, 4])
@pytest.mark.parametrize("name", DENSITIES)
def test_the_estimated_mass_is_unbiased_for_every_level(name, num_draws):
    """Within six standard errors at each level of a mass above 1e-4; of rarer ones 4,000 draws say too little."""
    mass, exact = estimates(name, num_draws).exp(), exact_mass(name)
    stderr = mass.std(0) / math.sqrt(len(mass))
    seen = exact > 1e-4
    assert ((mass.mean(0) - exact).abs() <= 6 * stderr + 1e-9)[seen].all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", DENSITIES)
def test_sixteen_draws_are_within_two_thousandths_of_a_nat_of_the_exact_mass(name):
    """One draw lacks 0.43 nats a pixel of the density that is narrower than a level, sixteen 0.0006."""
    exact = exact_mass(name)
    seen = exact > 1e-12
    gap = (exact * (exact.log() - estimates(name, 16).mean(0)))[seen].sum()
    assert abs(gap) < 2e-3


@pytest.mark.parametrize("num_draws", [1, 16])
def test_next_to_a_pole_the_bound_lacks_more_and_stays_one(num_draws):
    """Beta(0.025, 0.025) has half its mass nearer to 0 or 1 than single precision can tell, and no draw finds that."""
    pole = dist.Beta(torch.full((20_000,), 0.025, dtype=torch.double), 0.025)
    torch.manual_seed(0)
    mass = Dequantized(pole, num_draws).log_prob(torch.zeros(20_000, dtype=torch.double)).exp()
    exact = float(scipy.stats.beta(0.025, 0.025).cdf(1 / 256))
    assert mass.mean() < exact - 5 * mass.std() / math.sqrt(len(mass))


def test_a_flat_density_gives_each_level_one_in_256_exactly():
    x = LEVELS.reshape(16, 16)
    flat = mass_of_levels(dist.Uniform(torch.zeros(16, 16).double(), 1.0).to_event(2), 3)
    assert_close(flat.log_prob(x), torch.tensor(-256 * math.log(256), dtype=torch.double))


def test_pixels_draw_their_own_noise():
    torch.manual_seed(0)
    log_p = Dequantized(UnknownNormal(torch.full((1000,), 0.5), 0.001), 1).log_prob(torch.full((1000,), 128.0))
    assert len(log_p.unique()) > 990


@pytest.mark.parametrize("value", [-1.0, 0.5, 256.0, math.nan])
def test_what_is_no_level_raises(value):
    levels = Dequantized(dist.Normal(torch.tensor(0.5), 0.1), 2)
    with pytest.raises(ValueError, match="support"):
        levels.log_prob(torch.tensor(value))


def test_pixels_that_depend_on_each_other_are_refused():
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match="likelihood: expected pixels that are independent given z"):
        mass_of_levels(joint, 2)


def test_samples_are_the_levels_of_the_density():
    torch.manual_seed(0)
    x = Dequantized(dist.Normal(torch.tensor(0.0), 0.2), 1).sample((20000,))
    counts = torch.bincount(x.long(), minlength=256).double()
    cdf = scipy.stats.norm(0, 0.2).cdf
    inside = torch.from_numpy(cdf((torch.arange(1, 256, dtype=torch.double) / 256).numpy()))
    expected = torch.cat([inside[:1], inside.diff(), 1 - inside[-1:]]) * 20000  # the ends take what lies beyond them
    kept = expected > 5
    statistic = float(((counts - expected).square() / expected)[kept].sum())
    assert scipy.stats.chi2(int(kept.sum())).sf(statistic) > 1e-4


def test_a_mass_is_not_dequantized_again():
    vae = VAE(
        StandardNormal(1),
        Conditional(MLP(1, 2, hidden=()), Bernoulli((2,))),
        Conditional(MLP(2, 2, hidden=()), DiagonalNormal(1)),
    )
    with pytest.raises(ValueError, match="vae: expected a density of pixels, got Bernoulli, a mass"):
        dequantized(vae)


# --- A whole VAE, whose mass of levels is known by quadrature ---


def normal_vae(D: int = 4) -> VAE:
    """One latent, float64, with scales near that of a few levels and a guide wider than the posterior."""
    torch.manual_seed(1)
    decoder, encoder = MLP(1, D, hidden=(6,), activation=nn.Tanh), MLP(D, 2, hidden=())
    with torch.no_grad():
        decoder.output.bias.fill_(0.5)
        decoder.output.weight.mul_(0.3)
        encoder.output.weight.mul_(0.1)
        encoder.output.bias.zero_()
    vae = VAE(StandardNormal(1), Conditional(decoder, NormalFixed((D,), 0.02)), Conditional(encoder, DiagonalNormal(1)))
    return vae.double()


def quadrature(vae: VAE, x: Tensor) -> Tensor:
    """(N,) log int N(z; 0, 1) prod_d [F((x_d + 1) / 256) - F(x_d / 256)] dz by the trapezoidal rule on [-8, 8]."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.double)[:, None]
    with torch.no_grad():
        loc = vae.likelihood.net(z)[:, None]
    upper, lower = (dist.Normal(loc, 0.02).cdf((x + step) / 256) for step in (1, 0))
    log_p = (upper - lower).log().sum(-1) - z.square() / 2 - math.log(2 * math.pi) / 2
    return (log_p + math.log(16 / 4000)).logsumexp(0)


def levels_of(vae: VAE, count: int = 20) -> Tensor:
    torch.manual_seed(2)
    z = torch.randn(count, 1, dtype=torch.double)
    return (256 * vae.likelihood(z).sample()).floor().clamp(0, 255)


def test_the_bound_of_a_whole_vae_reaches_its_mass_of_levels():
    vae = normal_vae()
    x = levels_of(vae)
    exact = quadrature(vae, x)
    torch.manual_seed(3)
    levels = dequantized(vae, num_draws=16)
    bounds = torch.stack([log_evidence(levels.model, levels.guide, x, num_particles=2000) for _ in range(20)])
    assert ((bounds.mean(0) - exact).abs() < 5 * bounds.std(0) / math.sqrt(20) + 0.01).all()


# --- The noise of the data ---


def test_dequantized_pixels_are_strictly_inside_the_unit_interval():
    """u = 0 at level 0 and u just below 1 at level 255 round to the ends in single precision."""
    ends = torch.tensor([0.0, 1.0, 2.0**-40, 1 - 2.0**-30])
    inside = data.clamp_to_unit_interval(ends)
    assert ((inside > 0) & (inside < 1)).all()
    x = data.dequantize_uniformly(torch.tensor([0, 255], dtype=torch.uint8).repeat(2_000_000))
    assert x.min() > 0
    assert x.max() < 1


def test_dequantized_pixels_are_uniform_within_their_level():
    torch.manual_seed(0)
    x = data.dequantize_uniformly(torch.full((20000,), 37, dtype=torch.uint8))
    assert scipy.stats.kstest((256 * x.double() - 37).numpy(), "uniform").pvalue > 1e-4
