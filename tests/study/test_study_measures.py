"""The study's measures against independent answers: densities of codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from ppl_vae.study.data import fit_densities


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
