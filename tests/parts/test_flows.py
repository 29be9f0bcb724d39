"""Flows: both ways, their volumes and the densities they make, with weights far from where they start."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import quadrature_grid
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from random_weights import at_random
from scipy.stats import kstest
from torch.testing import assert_close

from ppl_vae.parts import registry
from ppl_vae.parts.flows import SPLINE_BOUND, ElementwiseAffine, Permutation, spline
from ppl_vae.parts.priors import Pushforward, StandardNormal, stack_couplings

COUPLINGS = {word: part.load() for word, part in registry.COUPLINGS.items()}


def _couplings(name, dim, *, num_layers=3, hidden=(8,)):
    return stack_couplings(dim, coupling=COUPLINGS[name], num_layers=num_layers, hidden=hidden)


LAYERS = {
    "elementwise": ElementwiseAffine,
    "permutation": Permutation,
    "affine": lambda dim: COUPLINGS["affine"](dim, hidden=(8, 8)),
    "spline": lambda dim: COUPLINGS["spline"](dim, hidden=(8,)),
    "flow of affine": lambda dim: _couplings("affine", dim),
    "flow of spline": lambda dim: _couplings("spline", dim),
}
HALVED = [name for name in LAYERS if name not in ("elementwise", "permutation")]
SHAPES = [(name, dim) for name in LAYERS for dim in (1, 2, 3, 8) if dim > 1 or name not in HALVED]


def _layer(name, dim, *, size=0.4):
    torch.manual_seed(0)
    return at_random(LAYERS[name](dim), size=size)


def _randn(*shape, seed=0, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)


# --- Both ways ---


# A spline of large weights has slopes of e^19, and so loses what it has to one way; a flow of them, as often again.
SIZES = [(*shape, 0.2, 1e-10) for shape in SHAPES] + [
    (*shape, 1.5, 1e-6) for shape in SHAPES if not shape[0].startswith("flow")
]


@pytest.mark.parametrize(("way", "back"), [("forward", "inverse"), ("inverse", "forward")])
@pytest.mark.parametrize(("name", "dim", "size", "tolerance"), SIZES)
@torch.no_grad()
def test_a_layer_and_its_inverse_undo_each_other_with_opposite_volumes(name, dim, size, tolerance, way, back):
    layer, u = _layer(name, dim, size=size), 2 * _randn(200, dim)
    y, log_volume = getattr(layer, way)(u)
    again, log_volume_again = getattr(layer, back)(y)
    assert_close(again, u, rtol=tolerance, atol=tolerance)
    assert_close(log_volume_again, -log_volume, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize(("name", "dim"), SHAPES)
def test_a_volume_is_the_determinant_of_the_jacobian(name, dim, way):
    """By automatic differentiation of the value alone."""
    layer = _layer(name, dim)
    for u in 2 * _randn(4, dim, seed=2):
        _, log_volume = getattr(layer, way)(u)
        jacobian = torch.autograd.functional.jacobian(lambda u: getattr(layer, way)(u)[0], u)
        assert_close(log_volume, jacobian.slogdet().logabsdet, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_takes_any_leading_dimensions(name):
    layer, u = _layer(name, 3), _randn(4, 2, 5, 3)
    y, log_volume = layer(u)
    one_by_one = [layer(one) for one in u.reshape(-1, 3)]
    assert_close(y, torch.stack([value for value, _ in one_by_one]).reshape(u.shape))
    volumes = torch.stack([volume for _, volume in one_by_one]).reshape(u.shape[:-1])
    assert_close(log_volume.expand(u.shape[:-1]), volumes)


@pytest.mark.parametrize("name", [name for name in LAYERS if name in ("elementwise", *COUPLINGS)])
@pytest.mark.parametrize("dim", [2, 3, 8])
@torch.no_grad()
def test_a_layer_starts_as_the_identity(name, dim):
    layer, u = LAYERS[name](dim).double(), 4 * _randn(50, dim)
    for value, log_volume in (layer(u), layer.inverse(u)):
        assert_close(value, u, rtol=0, atol=1e-12)
        assert_close(log_volume.expand(50), torch.zeros(50, dtype=torch.double), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 9])
@pytest.mark.parametrize("name", COUPLINGS)
def test_a_coupling_keeps_one_half_and_maps_each_of_the_other_by_it(name, dim):
    layer, kept = _layer(name, dim), (dim + 1) // 2
    # At eight places: a unit that is off at one of them passes nothing on there.
    jacobians = [torch.autograd.functional.jacobian(lambda u: layer(u)[0], u) for u in _randn(8, dim)]
    seen = (torch.stack(jacobians) != 0).any(0)
    expected = torch.eye(dim).bool()
    expected[kept:, :kept] = True
    assert torch.equal(seen, expected)


@torch.no_grad()
def test_the_order_of_a_permutation_is_saved_with_the_weights():
    torch.manual_seed(0)
    one, other = _couplings("affine", 20), _couplings("affine", 20)
    u = torch.randn(3, 20)
    assert not torch.equal(one(u)[0], other(u)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(u)[0], other(u)[0])
    assert torch.equal(one.inverse(u)[0], other.inverse(u)[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_a_layer_stays_finite_far_outside_in_single_precision(name, way):
    """Values and gradients, by weights too."""
    layer = _layer(name, 4).float()
    far = torch.tensor([0.0, 5.0, -5.0, 30.0, -1e3, 1e6, -1e12])
    u = torch.cartesian_prod(far, far, far[:2], far[3:5]).requires_grad_()
    y, log_volume = getattr(layer, way)(u)
    gradients = torch.autograd.grad(
        (y * 1e-6).sum() + log_volume.sum(), [u, *layer.parameters()], allow_unused=True, materialize_grads=True
    )
    assert all(found.isfinite().all() for found in (y, log_volume, *gradients))


@pytest.mark.parametrize("name", COUPLINGS)
@torch.no_grad()
def test_a_flow_of_many_layers_inverts_in_single_precision(name):
    """Ten couplings of 40 latents, as the prior's defaults have them."""
    torch.manual_seed(0)
    flow = at_random(_couplings(name, 40, num_layers=10, hidden=(256,)), size=0.02).float()
    u = torch.randn(500, 40)
    y, log_volume = flow(u)
    back, log_volume_back = flow.inverse(y)
    assert (y.sort(-1).values - u.sort(-1).values).abs().max() > 0.3
    assert_close(back, u, rtol=0, atol=1e-3)
    assert_close(log_volume_back, -log_volume, rtol=0, atol=2e-2)


# --- The spline ---

BINS = 8
WAYS = {"forward": False, "inverse": True}


def _features(*shape, size=1.0, seed=0):
    return size * _randn(*shape, 3 * BINS - 1, seed=seed)


def _knots(h):
    """Of the definition: widths and heights a softmax of which each bin has 0.001 at least, slopes 0.001 or more."""
    shares = [0.001 + (1 - 0.001 * BINS) * part.softmax(-1) for part in (h[..., :BINS], h[..., BINS : 2 * BINS])]
    inner = 0.001 + 0.999 * (1 + (h[..., 2 * BINS :] + math.log(math.e - 1)).exp()).log()
    return *shares, inner


def _spline(x, h, *, inverse=False):
    return spline(x, h, inverse)


@pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_spline_is_pyros(way, size):
    """Which takes shares and slopes as they are, once its own least ones are 0; inside the interval, and outside."""
    h = _features(5_000, size=size)
    x = 12 * torch.rand(5_000, generator=torch.Generator().manual_seed(1), dtype=torch.double) - 6
    least = {"min_bin_width": 0.0, "min_bin_height": 0.0, "min_derivative": 0.0}
    value, log_slope = _monotonic_rational_spline(
        x, *_knots(h), inverse=WAYS[way], bound=SPLINE_BOUND, eps=0.0, **least
    )
    found, found_log_slope = _spline(x, h, inverse=WAYS[way])
    assert_close(found, value, rtol=0, atol=1e-7)
    assert_close(found_log_slope, log_slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_a_splines_gradients_are_its_numeric_derivatives(way):
    """Also in the middle of a bin of the identity, where the two forms of the inverse's root meet."""
    h = torch.cat([_features(6), torch.zeros(2, 3 * BINS - 1, dtype=torch.double)]).requires_grad_()
    x = torch.tensor([-4.9, -2.0, 0.3, 1.7, 3.3, 4.9, 0.625, -1.875], dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, h: _spline(x, h, inverse=WAYS[way]), (x, h))


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("way", WAYS)
def test_a_spline_is_the_identity_from_its_bound_on(way, dtype):
    x = torch.tensor([-1e30, -1e4, -10.0, -5.0, 5.0, 10.0, 1e4, 1e30], dtype=dtype)
    value, log_slope = _spline(x, _features(8, size=3.0).to(dtype), inverse=WAYS[way])
    assert torch.equal(value, x)
    assert torch.equal(log_slope, torch.zeros_like(x))


@pytest.mark.parametrize(("dtype", "distance", "tolerance"), [(torch.double, 1e-9, 1e-6), (torch.float, 1e-6, 1e-2)])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("way", WAYS)
def test_value_and_slope_of_a_spline_are_continuous_at_its_bound(way, sign, dtype, distance, tolerance):
    h = _features(300).to(dtype)
    inside = torch.full((300,), sign * (SPLINE_BOUND - distance), dtype=dtype)
    inside = torch.minimum(inside.abs(), torch.nextafter(torch.tensor(5.0, dtype=dtype), torch.zeros((), dtype=dtype)))
    value, log_slope = _spline(sign * inside, h, inverse=WAYS[way])
    assert_close(value, torch.full_like(value, sign * SPLINE_BOUND), rtol=0, atol=100 * distance)
    assert_close(log_slope, torch.zeros_like(log_slope), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_spline_rises_everywhere(way, size):
    x = torch.linspace(-6, 6, 20_001, dtype=torch.double)
    for h in _features(10, size=size):
        assert (_spline(x, h.expand(len(x), -1), inverse=WAYS[way])[0].diff() > 0).all()


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_spline_and_its_gradient_are_finite_in_single_precision(way, size):
    """Knots of slopes that are far apart included: a difference of alike numbers under a root has no gradient."""
    h = _features(20_000, size=size).float().requires_grad_()
    near = [torch.nextafter(torch.tensor(5.0), torch.tensor(end)) for end in (0.0, 9.0)]
    ends = torch.tensor([-5.0, 5.0, *near, *(-one for one in near), 0.0, -0.0, 1e30, -1e30])
    inside = 10 * torch.rand(20_000 - len(ends), generator=torch.Generator().manual_seed(1)) - 5
    x = torch.cat([ends, inside]).requires_grad_()
    value, log_slope = _spline(x, h, inverse=WAYS[way])
    gradients = torch.autograd.grad(value.sum() + log_slope.sum(), [x, h])
    assert all(found.isfinite().all() for found in (value, log_slope, *gradients))


@pytest.mark.parametrize("size", [10.0, 30.0])
@torch.no_grad()
def test_the_inverse_of_a_spline_in_single_precision_is_that_in_double_precision(size):
    """To what the places of knots in single precision leave; slopes here go from 0.001 to 100."""
    h = _features(50_000, size=size).float()
    x = 10 * torch.rand(50_000, generator=torch.Generator().manual_seed(1)) - 5
    single, double = _spline(x, h, inverse=True), _spline(x.double(), h.double(), inverse=True)
    assert_close(single[0].double(), double[0], rtol=0, atol=5e-3)
    assert_close(single[1].double(), double[1], rtol=0, atol=0.15)


# --- The distribution that a map makes ---

SMALL = {"affine": 0.3, "spline": 0.25}  # so that points of a grid lie closer than the density bends


def _pushforward(name, *, dim=2):
    torch.manual_seed(0)
    flow = at_random(_couplings(name, dim, num_layers=2), size=SMALL[name])
    return Pushforward(StandardNormal(dim).double()(), flow)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", COUPLINGS)
@torch.no_grad()
def test_draws_of_a_latent_have_the_distribution_function_of_the_density(name, axis):
    p, points = _pushforward(name), 401
    z, cell = quadrature_grid(p, points=points)
    marginal = p.log_prob(z).exp().reshape(points, points).sum(1 - axis)
    nodes = z.reshape(points, points, 2).select(1 - axis, 0)[:, axis].numpy()
    below = ((marginal.cumsum(0) - marginal / 2) * cell).numpy()
    torch.manual_seed(0)
    draws = p.sample((5_000,))[:, axis].numpy()
    assert kstest(draws, lambda at: np.interp(at, nodes, below)).pvalue > 1e-3


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_gradient_of_a_draw_is_that_of_its_expectation(name):
    """d/dw E[sin(z_1 + 2 z_2)] by quadrature of the density's gradient, and by draws, in their standard errors."""
    p = _pushforward(name)
    weights = [p.flow.layers[0].loc, p.flow.layers[0].log_scale, p.flow.layers[1].net.output.bias]

    def function(z):
        return (z[..., 0] + 2 * z[..., 1]).sin()

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])

    z, cell = quadrature_grid(p, points=301)
    exact = gradient((p.log_prob(z).exp() * function(z)).sum() * cell)
    torch.manual_seed(0)
    found = torch.stack([gradient(function(p.rsample((300,))).mean()) for _ in range(40)])
    stderr = found.std(0) / math.sqrt(len(found))
    assert exact.abs().max() > 0.1
    assert ((found.mean(0) - exact).abs() <= 4.5 * stderr + 1e-3 * exact.abs()).all()


@pytest.mark.parametrize("name", COUPLINGS)
def test_an_expanded_distribution_draws_each_by_itself_and_has_the_same_density(name):
    p = _pushforward(name)
    wide = p.expand((3, 4))
    torch.manual_seed(0)
    z = wide.rsample((2,))
    assert (wide.batch_shape, wide.event_shape, z.shape) == ((3, 4), (2,), (2, 3, 4, 2))
    assert len(z.detach().reshape(-1, 2).unique(dim=0)) == 24
    assert_close(wide.log_prob(z), p.log_prob(z))
