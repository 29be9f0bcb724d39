"""The benchmark's part ``likelihoods``: what it times, and what it says of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppl_vae import data
from ppl_vae.parts.priors import StandardNormal

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def benchmark(monkeypatch, graphs):
    """scripts/benchmark.py as a module, its graphs run without the compiler."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark

    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "WARM_UP_STEPS", 1)
    yield benchmark
    for name in ("benchmark", "benchmark_contestants"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def few_digits():
    """MNIST with 300 training images."""
    digits = data.load("mnist")
    return replace(digits, train=digits.train[:300])


def test_what_is_timed_under_each_likelihood_is_a_plain_vae(benchmark, few_digits):
    import benchmark_contestants as by

    vae = by.Setting("laplace", few_digits, device=torch.device("cpu"))._vae
    assert isinstance(vae.prior, StandardNormal)
    assert sum(weights.numel() for weights in vae.parameters()) == 1_116_865  # 300 300, 40 latents, and one scale


@pytest.mark.thorough
def test_the_reference_takes_part_whatever_is_asked_for(benchmark, few_digits):
    results = benchmark.under_likelihoods(["laplace"], few_digits, torch.device("cpu"), rounds=2)
    assert {name: list(records) for name, records in results.items()} == {
        "ppl_vae, captured": ["bernoulli", "laplace"],
        "ppl_vae, eager": ["bernoulli", "laplace"],
    }


def test_a_captured_step_that_computes_another_loss_is_no_contestant(benchmark, few_digits, monkeypatch):
    import benchmark_contestants as by

    honest = by.Setting.steps

    def steps(setting, *, captured):
        take = honest(setting, captured=captured)
        return (lambda n: 1.01 * take(n)) if captured else take

    monkeypatch.setattr(by.Setting, "steps", steps)
    with pytest.raises(ValueError, match="bernoulli: expected the same first loss captured and eager"):
        benchmark.under_likelihoods([], few_digits, torch.device("cpu"), rounds=1)
