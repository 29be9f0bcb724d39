"""Single precision at extreme features, and the graph of each likelihood, against double precision and eager mode."""

from __future__ import annotations

import decimal
import functools
import itertools
import math

import pytest
import scipy.special
import torch
from likelihood_cases import CASES, COLOR
from torch.testing import assert_close

from ppl_vae.parts import likelihoods
from ppl_vae.runtime import capture
from ppl_vae.runtime.numerics import stirling_remainder

GRID = [sign * size for size in (1e-3, 1.0, 10.0, 100.0, 1e3, 1e4) for sign in (1, -1)] + [0.0]
NUM_CORNERS = 1000


def _corners(num_features):
    """Points of GRID^F: all of them for one or two features, else as many drawn at random."""
    if num_features <= 2:
        return torch.tensor(list(itertools.product(GRID, repeat=num_features)))
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(GRID)[torch.randint(len(GRID), (NUM_CORNERS, num_features), generator=generator)]


@functools.cache
def _at_corners(word, dtype):
    """log p (V, N) of extreme values at extreme features, and its gradients by the features (V, N, F)."""
    case = CASES[word]
    torch.manual_seed(0)
    likelihood = case.make((3, 1, 1) if case.event == COLOR else (1,)).to(dtype)
    h = _corners(likelihood.num_features).to(dtype).requires_grad_()
    if case.event == COLOR:
        x = torch.tensor(list(itertools.product(case.extreme, repeat=3)))[::13].reshape(-1, 1, 3, 1, 1)
    else:
        x = torch.tensor(case.extreme).reshape(-1, 1, 1)
    log_p = likelihood(h).log_prob(x.to(dtype))
    gradients = [torch.autograd.grad(row.sum(), h, retain_graph=True)[0] for row in log_p]
    return log_p.detach(), torch.stack(gradients)


# Of a value and of a gradient. Logits of a categorical are up to 200,000 there: single precision knows 0.01 of them. In
# color a location is a sum that it knows to 1e-7, and gradients change by up to 3e5 times that at the smallest scale.
ABSOLUTE = dict.fromkeys(CASES, (5e-4, 1e-3)) | {"categorical": (2e-2, 1e-2), "color mixture": (5e-4, 5e-3)}


@pytest.mark.parametrize("word", CASES)
def test_single_precision_agrees_with_double_at_extreme_features(word):
    """To 1e-5 of the value and 5e-4 nats, at features of 0, +-0.001, +-1, +-10, +-100, +-1,000 and +-10,000."""
    single, double = _at_corners(word, torch.float)[0], _at_corners(word, torch.double)[0]
    assert single.isfinite().all()
    assert_close(single.double(), double, rtol=1e-5, atol=ABSOLUTE[word][0])


@pytest.mark.parametrize("word", CASES)
def test_gradients_in_single_precision_agree_with_double_at_extreme_features(word):
    """To 1e-4 of the gradient's norm, and 3e-7 |log p| of it: what rounding log p does to a mixture's weights."""
    single = _at_corners(word, torch.float)[1]
    log_p, double = _at_corners(word, torch.double)
    assert single.isfinite().all()
    norm = torch.linalg.vector_norm(double, dim=-1)
    error = torch.linalg.vector_norm(single.double() - double, dim=-1)
    assert (error <= (1e-4 + 3e-7 * log_p.abs()) * norm + ABSOLUTE[word][1]).all()


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
@pytest.mark.parametrize("word", CASES)
def test_log_p_is_in_the_type_of_the_features(word, dtype):
    case = CASES[word]
    likelihood = case.make(case.event).to(dtype)
    distribution = likelihood(case.draw(3).to(dtype))
    x = distribution.sample()
    assert x.dtype == distribution.log_prob(x).dtype == distribution.mean.dtype == dtype


# --- As a graph ---


def _value_and_gradients(likelihood):
    """(h, x, *parameters and buffers) -> log p, and the gradients of its sum by h and by the parameters."""
    names = [name for name, _ in likelihood.named_parameters()]
    others = [name for name, _ in likelihood.named_buffers()]

    def function(h, x, *tensors):
        fixed = dict(zip(others, tensors[len(names) :], strict=True))

        def total(h, weights):
            log_p = torch.func.functional_call(likelihood, (weights | fixed), (h,)).log_prob(x)
            return log_p.sum(), log_p

        weights = dict(zip(names, tensors[: len(names)], strict=True))
        (of_h, of_weights), (_, log_p) = torch.func.grad_and_value(total, argnums=(0, 1), has_aux=True)(h, weights)
        return (log_p, of_h, *of_weights.values())

    return function, [*(w.detach() for w in likelihood.parameters()), *likelihood.buffers()]


@pytest.mark.parametrize("word", CASES)
def test_the_graph_of_log_p_and_its_gradients_is_what_runs_eagerly(graphs, word):
    case = CASES[word]
    torch.manual_seed(0)
    likelihood = case.make(case.event).double()
    h = case.draw(5)
    x = likelihood(h).sample()
    function, state = _value_and_gradients(likelihood)
    captured = capture.compile_function(function, [h, x, *state])([h, x, *state])
    assert len(graphs) == 1
    for seen, expected in zip(captured, function(h, x, *state), strict=True):
        assert_close(seen, expected, rtol=1e-10, atol=1e-10)


# --- Around seams ---


def _exactly(h, x):
    """The continuous Bernoulli's log p and its derivative by h, with 120 digits."""
    with decimal.localcontext() as context:
        context.prec = 120
        h, x = decimal.Decimal(h), decimal.Decimal(x)
        e = h.exp()
        return float(h * x - ((e - 1) / h).ln()), float(x - e / (e - 1) + 1 / h)


@pytest.mark.parametrize("h", [s * v for v in (1e-30, 1e-8, 1e-3, 0.49999, 0.5, 0.50001, 3, 40, 900) for s in (1, -1)])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float, 3e-7), (torch.double, 1e-15)])
def test_a_continuous_bernoulli_is_exact_on_both_sides_of_its_seam(h, dtype, digits):
    logits = torch.tensor([h], dtype=dtype, requires_grad=True)
    for value in (0.0, 0.3, 1.0):
        x = torch.tensor([value], dtype=dtype)
        log_p = likelihoods.ContinuousBernoulli((1,))(logits).log_prob(x)
        expected, slope = _exactly(logits.item(), x.item())
        assert log_p.item() == pytest.approx(expected, rel=4 * digits, abs=2 * digits)
        assert torch.autograd.grad(log_p, logits)[0].item() == pytest.approx(slope, rel=4 * digits, abs=4 * digits)


def test_a_continuous_bernoulli_is_uniform_at_zero():
    h = torch.zeros(1, requires_grad=True)
    log_p = likelihoods.ContinuousBernoulli((1,))(h).log_prob(torch.tensor([0.9]))
    assert log_p.item() == 0
    assert torch.autograd.grad(log_p, h)[0].item() == pytest.approx(0.4)


@pytest.mark.parametrize("h", [0.0, 1e-8, 0.49999, 0.50001, -3.0, 40.0, -900.0])
def test_the_mean_of_a_continuous_bernoulli_is_where_its_gradient_vanishes(h):
    logits = torch.tensor([h], dtype=torch.double, requires_grad=True)
    p = likelihoods.ContinuousBernoulli((1,))(logits)
    (slope,) = torch.autograd.grad(p.log_prob(p.mean.detach()), logits)
    assert slope.item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("z", [1e-6, 0.01, 1.0, 7.999, 8.0, 8.001, 300.0, 1e6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float, 2e-6), (torch.double, 1e-13)])
def test_what_stirlings_formula_leaves_is_right_on_both_sides_of_its_seam(z, dtype, error):
    """log Gamma at z is, by recurrence, that at z + 30, where Stirling's formula has 20 digits after three terms."""
    at = torch.tensor(z, dtype=dtype, requires_grad=True)
    s = stirling_remainder(at)
    with decimal.localcontext() as context:
        context.prec = 60
        exact = decimal.Decimal(at.item())
        far = exact + 30
        series = [(12, 1), (-360, 3), (1260, 5), (-1680, 7), (1188, 9)]
        rest = sum(1 / (a * far**n) for a, n in series)
        product = decimal.Decimal(1)
        for k in range(30):
            product *= exact + k
        half = decimal.Decimal("0.5")
        expected = (far - half) * far.ln() - far + rest - product.ln() - (exact - half) * exact.ln() + exact
    assert s.item() == pytest.approx(float(expected), rel=error, abs=error)
    (slope,) = torch.autograd.grad(s, at)
    numeric = scipy.special.digamma(at.item()) - math.log(at.item()) + 0.5 / at.item()
    assert slope.item() == pytest.approx(numeric, rel=2 * error, abs=2 * error)
