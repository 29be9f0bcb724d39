"""The error of a share: that of repetitions where it is neither 0 nor 1, and near the exact bound where it is."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from ppl_vae.evidence.estimate import Estimate


def share(k, N):
    return Estimate.share_of(torch.arange(N) < k)


def test_a_share_is_what_was_counted():
    assert [share(k, 40).mean for k in (0, 10, 40)] == [0.0, 0.25, 1.0]


def test_the_error_of_a_share_of_many_draws_is_the_binomials():
    exact = scipy.stats.binom.std(5000, 0.1) / 5000
    assert share(500, 5000).stderr == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("N", [30, 300, 3000])
@pytest.mark.parametrize("side", [0, 1])
def test_two_errors_of_a_share_of_none_or_all_are_near_the_exact_bound(N, side):
    """Clopper and Pearson's: P(no success of N) = 1/20 at p = 1 - 20^(-1/N)."""
    assert 2 * share(side * N, N).stderr == pytest.approx(-math.expm1(-math.log(20) / N), rel=0.2)


def test_a_share_of_no_draw_is_refused():
    with pytest.raises(ValueError, match="flags: expected at least one"):
        share(0, 0)
