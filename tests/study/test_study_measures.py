"""The study's measures against independent answers: distances, densities of codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from ppl_vae.study.data import fit_densities, frechet_distance, jackknife

# --- Distances between images ---


def test_the_frechet_distance_is_that_of_scipys_square_root() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(200, 4)), generator.normal(1, 2, size=(300, 4)) @ generator.normal(size=(4, 4))
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distances_error_is_that_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [(torch.randn(400, 3, generator=generator), torch.randn(400, 3, generator=generator)) for _ in range(100)]
    repeats = [jackknife(frechet_distance, a, 1 + b) for a, b in samples]
    spread = torch.tensor([found.mean for found in repeats]).std()
    told = torch.tensor([found.stderr for found in repeats]).mean()
    assert float(told / spread) == pytest.approx(1, abs=0.25)  # the spread of 100 is known to 7%, its jackknife alike


def test_the_jackknife_knows_what_samples_share() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 1)))
    assert jackknife(lambda a, b: float(a.mean() - b.mean()), x, x + 1).stderr == pytest.approx(0, abs=1e-12)


# --- Densities of codes ---


def clustered_codes(count: int, seed: int) -> Tensor:
    """Two narrow clusters far apart, in three latents of different scales."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[4.0, 0.0, 30.0], [-4.0, 1.0, -30.0]])
    which = torch.randint(2, (count,), generator=generator)
    return centers[which] + torch.tensor([0.5, 0.1, 3.0]) * torch.randn(count, 3, generator=generator)


def true_log_density(z: Tensor) -> Tensor:
    centers = torch.tensor([[4.0, 0.0, 30.0], [-4.0, 1.0, -30.0]])
    parts = [Normal(center, torch.tensor([0.5, 0.1, 3.0])).log_prob(z).sum(-1) for center in centers]
    return torch.stack(parts).logsumexp(0) - math.log(2)


TRAIN, VALIDATION = clustered_codes(4000, 0), clustered_codes(1000, 1)


@pytest.fixture(scope="module")
def densities() -> dict[str, Distribution]:
    pytest.importorskip("sklearn")
    return fit_densities(TRAIN, VALIDATION)


def test_a_fitted_normal_has_the_density_of_the_maximum_likelihood(densities: dict[str, Distribution]) -> None:
    expected = MultivariateNormal(TRAIN.double().mean(0), torch.cov(TRAIN.double().T)).log_prob(VALIDATION.double())
    found = densities["normal"].log_prob(VALIDATION).mean()
    assert float(found) == pytest.approx(float(expected.mean()), abs=1e-3)


def test_a_mixture_comes_near_to_the_true_density_of_clusters(densities: dict[str, Distribution]) -> None:
    truth = float(true_log_density(VALIDATION).mean())
    normal, found = (float(densities[name].log_prob(VALIDATION).mean()) for name in ("normal", "mixture"))
    assert truth - 0.5 < found < truth + 0.1
    assert found > normal + 0.5


def test_draws_of_each_density_have_the_moments_of_the_codes(densities: dict[str, Distribution]) -> None:
    for density in densities.values():
        torch.manual_seed(0)
        z = density.sample((4000,))
        assert ((z.mean(0) - TRAIN.mean(0)) / TRAIN.std(0)).abs().max() < 0.1
        torch.testing.assert_close(z.std(0), TRAIN.std(0), rtol=0.1, atol=0)
