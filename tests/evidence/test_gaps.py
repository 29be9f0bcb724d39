"""The gaps of linear-Gaussian VAEs, in closed form: what the family cannot express, and what the encoder loses."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import LinearGaussian
from test_proposals import _hierarchical
from torch.testing import assert_close

from ppl_vae.evidence.refinement import measure_gaps


def _mean_field_gap(oracle):
    """KL(q* || p(z | x)), q* = N(mean, 1 / diag(C^-1)): (log |C| + sum_l log (C^-1)_ll) / 2, the same for every x."""
    _, C = oracle.posterior_map()
    return float(C.logdet() + C.inverse().diagonal().log().sum()) / 2


def _guides_gap(oracle, widen, shift):
    """KL(N(mean + shift s, diag(widen s)^2) || N(mean, C)), s_l^2 = C_ll."""
    _, C = oracle.posterior_map()
    s, P = C.diagonal().sqrt(), C.inverse()
    trace = (P.diagonal() * (widen * s).square()).sum()
    return float(trace + shift**2 * s @ P @ s - len(s) + C.logdet() - 2 * (widen * s).log().sum()) / 2


@pytest.mark.parametrize(("widen", "shift"), [(1.0, 0.0), (1.5, 0.0), (0.6, 0.0), (1.0, 1.0)])
def test_the_gaps_of_a_correlated_posterior_are_those_in_closed_form(widen, shift):
    oracle = LinearGaussian.random(orthogonal=False, seed=3)
    vae, x = oracle.vae(widen=widen, shift=shift), oracle.draw(20)
    torch.manual_seed(0)
    found = measure_gaps(vae, x, oracle.log_evidence(x), steps=200, num_particles=8, evaluation_particles=4000)
    approximation, total = _mean_field_gap(oracle), _guides_gap(oracle, widen, shift)
    assert approximation > 0.1  # there is one to be found
    for gap, exact in (
        (found.approximation, approximation),
        (found.amortization, total - approximation),
        (found.total, total),
    ):
        assert abs(gap.mean() - exact) < 5 * float(gap.std()) / math.sqrt(20) + 1e-3


def test_an_exact_guide_has_no_gap():
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(), oracle.draw(5)
    torch.manual_seed(0)
    found = measure_gaps(vae, x, oracle.log_evidence(x), steps=100, num_particles=4)
    for gap in (found.approximation, found.amortization, found.total):
        assert_close(gap, torch.zeros(5, dtype=torch.double), rtol=0, atol=1e-4)


def test_a_guide_of_several_layers_has_only_a_total_gap():
    with pytest.raises(ValueError, match=r"expected a guide Conditional\(net, family\)"):
        measure_gaps(_hierarchical(), torch.ones(2, 6, dtype=torch.double), torch.zeros(2), steps=2, num_particles=1)
