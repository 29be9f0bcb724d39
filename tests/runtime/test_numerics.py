"""Streamed log-weights against the same numbers computed at once, and k-hat against its known value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import LinearGaussian
from torch.testing import assert_close

from ppl_vae import importance
from ppl_vae.runtime.numerics import (
    LogWeightSummary,
    bound_by_particles,
    location_and_spread,
    log_mean_exp,
    pareto_k,
    tail_length,
)


def test_log_mean_exp_neither_overflows_nor_underflows():
    log_w = torch.tensor([[1000.0, -2000.0], [1000.0, -2000.0 + math.log(3)]])
    assert_close(log_mean_exp(log_w), torch.tensor([1000.0, -2000.0 + math.log(2)]))


# --- The bound by its number of particles ---


def test_a_bound_is_the_mean_over_disjoint_blocks():
    """Seven particles make three blocks of two, and the seventh is left out."""
    w = torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0, 7.0, 100.0], dtype=torch.double)
    bounds = bound_by_particles(w.log()[:, None], [1, 2, 7])
    expected = [w.log().mean(), (math.log(2) + math.log(4) + math.log(6)) / 3, math.log(124 / 7)]
    assert_close(bounds, torch.tensor(expected, dtype=torch.double)[:, None], rtol=1e-14, atol=0)


@pytest.mark.parametrize("size", [0, 5])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=f"sizes: expected numbers from 1 to 4, got {size}"):
        bound_by_particles(torch.zeros(4, 2), [1, size])


# --- Streamed statistics ---


def _summary(log_w, sizes):
    summary = LogWeightSummary(len(log_w), log_w.shape[1])
    for part in log_w.split(sizes):
        summary.update(part)
    return summary


def _exact(log_w):
    """Every statistic from its definition, at once, the jackknife by leaving each particle out in turn."""
    S = len(log_w)
    bound = log_w.logsumexp(0) - math.log(S)
    v = (log_w - log_w.logsumexp(0)).exp()
    without = torch.stack([torch.cat([log_w[:s], log_w[s + 1 :]]).logsumexp(0) for s in range(S)]) - math.log(S - 1)
    return {
        "log_mean_exp": bound,
        "effective_sample_size": 1 / v.square().sum(0),
        "monte_carlo_stderr": (v.square().sum(0) - 1 / S).clamp(min=0).sqrt(),
        "bias": (S - 1) * (bound - without.mean(0)),
        "tenfold_gain": bound
        - torch.stack([part.logsumexp(0) - math.log(len(part)) for part in log_w.chunk(10)]).mean(0),
    }


@pytest.mark.parametrize("chunk", [1, 7, 300])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
def test_a_streamed_statistic_is_the_one_computed_at_once(chunk, spread):
    generator = torch.Generator().manual_seed(0)
    log_w = -90 + spread * torch.randn(300, 4, generator=generator, dtype=torch.double)
    summary = _summary(log_w, chunk)
    for name, exact in _exact(log_w).items():
        streamed = getattr(summary, name)()
        summed_weights = 1 / (3 * tail_length(300) ** 2) if name == "bias" else 0.0
        assert_close(streamed, exact, rtol=1e-7, atol=1e-12 + summed_weights, msg=lambda m, n=name: f"{n}: {m}")


def test_one_weight_that_dwarfs_all_others_keeps_the_bias_exact():
    log_w = torch.zeros(10, 1, dtype=torch.double)
    log_w[3] = 60.0  # 1 - v is 1e-25: it rounds to zero where it is not computed from the others
    exact = _exact(log_w)["bias"]
    assert_close(_summary(log_w, 4).bias(), exact, rtol=1e-9, atol=0)
    assert exact > 50


def test_memory_grows_with_the_root_of_the_particles():
    summary = LogWeightSummary(100_000, 2)
    for _ in range(100):
        summary.update(torch.randn(1000, 2))
    assert len(summary._largest) == tail_length(100_000) + 1 < 1000


def test_the_tail_is_that_of_the_paper():
    assert [tail_length(S) for S in (25, 100, 225, 5000)] == [5, 20, 45, 213]


@pytest.mark.parametrize("spread", [1e3, 1e4])
def test_k_is_infinite_where_one_weight_is_beyond_all_others(spread):
    generator = torch.Generator().manual_seed(0)
    log_w = spread * torch.randn(5000, 4, generator=generator, dtype=torch.double)
    assert (_summary(log_w, 1000).pareto_k() > 10).all()


@pytest.mark.parametrize("num_particles", [1, 2, 20])
def test_too_few_particles_have_no_k(num_particles):
    assert _summary(torch.randn(num_particles, 3), num_particles).pareto_k().isnan().all()


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_k_of_pareto_weights_is_their_shape(k):
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20_000, 40, generator=generator, dtype=torch.double)
    log_w = -k * uniform.log()  # w = u^-k has a Pareto tail of shape k
    fitted = _summary(log_w, 5000).pareto_k()
    # The fit shrinks towards 0.5 with the weight of ten observations among M = 425.
    expected = (425 * k + 5) / 435
    assert abs(fitted.mean() - expected) < 5 * fitted.std() / math.sqrt(40)


def test_k_is_one_number_an_image():
    good, bad = torch.randn(1000, 1) * 0.1, -2.0 * torch.rand(1000, 1).log()
    k = _summary(torch.cat([good, bad], dim=1), 100).pareto_k()
    assert k[0] < 0.5 < 1 < k[1]


def test_k_does_not_depend_on_the_scale_of_the_weights():
    log_w = torch.randn(500, 3, dtype=torch.double).sort(dim=0, descending=True).values[:60]
    assert_close(pareto_k(log_w), pareto_k(log_w - 5000.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_location_and_spread_are_numpys(chunk):
    x = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5
    mean, spread = location_and_spread(x, chunk=chunk)
    expected = x.double().numpy()
    np.testing.assert_allclose(mean.numpy(), expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(float(spread), np.sqrt(expected.var(0).mean()), rtol=1e-12)


def test_weights_that_differ_by_rounding_alone_have_no_tail():
    """The log-weights of an exact guide: the fit of such a tail divided by zero."""
    log_w = -6.4 + 2e-15 * torch.randn(500, 50, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    assert pareto_k(log_w.sort(dim=0, descending=True).values[:100]).isnan().all()


def test_the_jackknifes_correction_takes_most_of_a_bounds_bias_away():
    """A wide guide at S = 10 and 2,000 images, against exact log p(x)."""
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(widen=1.6), oracle.draw(2000)
    torch.manual_seed(0)
    result = importance(vae.model, vae.guide, x, num_particles=10)
    exact = oracle.log_evidence(x)
    plain, corrected = result.log_evidence - exact, result.jackknife_estimate() - exact
    stderr = float(corrected.std()) / math.sqrt(2000)
    assert plain.mean() < -5 * stderr
    assert corrected.mean().abs() + 2 * stderr < plain.mean().abs() / 2
