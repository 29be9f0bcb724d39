"""Flow guides: against quadrature, automatic Jacobians and models of known evidence, with weights far from 0."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from capture_cases import as_stored
from fitting import fit
from oracles import LinearGaussian, quadrature_grid
from pyro.distributions import Categorical, MixtureSameFamily
from random_weights import at_random
from scipy.stats import kstest
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, log_weights
from ppl_vae.evidence.moments import AggregatePosterior
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import inverse_autoregressive_flow, spline_flow
from ppl_vae.parts.priors import StandardNormal

FLOWS = {"iaf": inverse_autoregressive_flow, "spline": spline_flow}
C = 4  # features of the context


def _posterior(name, L, *, num_layers=3, hidden=(8, 8), size=0.4):
    torch.manual_seed(0)
    return at_random(FLOWS[name](L, context_dim=C, num_layers=num_layers, hidden=hidden), size=size)


def _h(posterior, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, posterior.num_features, generator=generator, dtype=torch.double)


# --- The density ---


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_draws_have_the_distribution_function_of_the_density(name):
    posterior = _posterior(name, 1)
    q = posterior(_h(posterior))
    z, cell = quadrature_grid(q, points=50_001)
    below = (q.log_prob(z).exp().cumsum(0) * cell).numpy()
    torch.manual_seed(0)
    draws = q.sample((20_000,))[:, 0].numpy()
    assert kstest(draws, lambda at: np.interp(at, z[:, 0].numpy(), below)).pvalue > 1e-3


@pytest.mark.parametrize("L", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_a_density_is_that_of_the_noise_over_the_volume_of_the_map(name, L):
    """The volume by automatic differentiation of the draw by its noise, whose density is a standard normal's."""
    posterior = _posterior(name, L)
    h, u = _h(posterior), torch.randn(L, dtype=torch.double, generator=torch.Generator().manual_seed(2))

    def draw(noise):
        y, context = noise, h[2 * L :]
        for layer in posterior.layers:
            y, _ = layer(y, context)
        return h[:L] + (7 * (h[L : 2 * L] / 7).tanh()).exp() * y

    log_volume = torch.autograd.functional.jacobian(draw, u).slogdet().logabsdet
    exact = -(u.square() + math.log(2 * math.pi)).sum() / 2 - log_volume
    assert_close(posterior(h).log_prob(draw(u)), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("L", [1, 2, 7])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_as_the_diagonal_normal(name, L):
    posterior = FLOWS[name](L, context_dim=C, num_layers=3, hidden=(8,)).double()
    h, z = 2 * _h(posterior, 6), 3 * torch.randn(9, 1, L, dtype=torch.double)
    exact = torch.distributions.Normal(h[:, :L], (7 * (h[:, L : 2 * L] / 7).tanh()).exp()).log_prob(z).sum(-1)
    assert_close(posterior(h).log_prob(z), exact)


# --- Both directions ---


@pytest.mark.parametrize("L", [1, 2, 5, 8])
@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_every_layer_inverts(name, L):
    """With the volume of the one way minus that of the other."""
    posterior = _posterior(name, L)
    generator = torch.Generator().manual_seed(0)
    u = 2 * torch.randn(50, L, dtype=torch.double, generator=generator)
    context = torch.randn(50, C, dtype=torch.double, generator=generator)
    for layer in posterior.layers:
        y, log_volume = layer(u, context)
        back, log_volume_back = layer.inverse(y, context)
        assert_close(back, u, rtol=0, atol=1e-7)
        assert_close(log_volume_back, -log_volume, rtol=0, atol=1e-5)
        assert (y - u).abs().max() > 0.1


@pytest.mark.parametrize("name", FLOWS)
def test_the_density_of_an_own_draw_is_that_of_its_value(name):
    posterior = _posterior(name, 4)
    h = _h(posterior, 7)
    q = posterior(h).expand((3, 7))
    z = q.rsample((2,))
    assert z.shape == (2, 3, 7, 4)
    assert_close(q.log_prob(z), posterior(h).log_prob(z.clone()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FLOWS)
def test_an_own_draw_takes_one_pass_a_layer_and_its_density_none(name):
    posterior, passes = _posterior(name, 6, num_layers=2), []
    for layer in posterior.layers:
        layer.net.register_forward_hook(lambda *_: passes.append(1))
    q = posterior(_h(posterior, 3))
    q.log_prob(q.rsample())
    assert len(passes) == 2


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_draws_and_densities_take_any_leading_dimensions(name):
    posterior = _posterior(name, 3)
    h = _h(posterior, 2, 5)
    z = torch.randn(4, 2, 5, 3, dtype=torch.double)
    one_by_one = [[[posterior(h[b, c]).log_prob(z[a, b, c]) for c in range(5)] for b in range(2)] for a in range(4)]
    assert_close(posterior(h).log_prob(z), torch.tensor(one_by_one))


# --- What a latent is mapped by ---


def _seen(layer, L):
    """(L, L) whether y_l changes with u_m, at one of six places: a unit that is off at one of them passes nothing."""
    u = torch.randn(6, L, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    context = torch.ones(C, dtype=torch.double)
    slopes = [torch.autograd.functional.jacobian(lambda u: layer(u, context)[0], one) for one in u]
    return (torch.stack(slopes) != 0).any(0)


@pytest.mark.parametrize("L", [2, 5])
def test_in_an_autoregressive_layer_every_latent_is_mapped_by_all_before_it_in_turns_from_either_end(L):
    posterior = _posterior("iaf", L, hidden=(40, 40))
    for index, layer in enumerate(posterior.layers):
        expected = torch.ones(L, L).triu() if index % 2 else torch.ones(L, L).tril()
        assert torch.equal(_seen(layer, L), expected.bool())


@pytest.mark.parametrize("L", [2, 3, 13])
def test_couplings_let_every_latent_be_mapped_by_every_other(L):
    """By log2(L) pairs of layers, each latent by those of the other half at once."""
    posterior = _posterior("spline", L, num_layers=2 * math.ceil(math.log2(L)), hidden=(16,))
    seen = torch.stack([_seen(layer, L) for layer in posterior.layers])
    assert seen.any(0).all()
    assert all(((one.double() - torch.eye(L)) @ (one.double() - torch.eye(L)) == 0).all() for one in seen)


@pytest.mark.parametrize("of", ["draw", "own density", "density"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_gradient_reaches_every_parameter_and_feature(name, of):
    posterior = _posterior(name, 4)
    h = _h(posterior, 5).requires_grad_()
    q = posterior(h)
    z = q.rsample()
    total = {
        "draw": lambda: z.square(),
        "own density": lambda: q.log_prob(z),
        "density": lambda: q.log_prob(z.detach()),
    }
    total[of]().sum().backward()
    without = [name for name, w in posterior.named_parameters() if w.grad is None or not w.grad.any()]
    if of != "density":  # of which alone the place is part
        assert not h.grad[:, 4:].eq(0).any()
    else:
        assert not h.grad.eq(0).any()
    assert without == []


# --- Gradients ---


@pytest.mark.parametrize("name", FLOWS)
def test_the_slope_of_a_density_is_that_of_finite_differences(name):
    posterior = _posterior(name, 3)
    h = _h(posterior, 4).requires_grad_()
    z = torch.randn(4, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, h: posterior(h).log_prob(z), (z, h), atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_the_slope_of_an_own_draws_density_is_the_whole_one(name):
    """Along the parameters and along z: as from the value, by the chain rule of automatic differentiation."""
    posterior = _posterior(name, 3)
    h = _h(posterior, 4).requires_grad_()
    q = posterior(h)
    z = q.rsample()
    (own,) = torch.autograd.grad(q.log_prob(z).sum(), h, retain_graph=True)
    (whole,) = torch.autograd.grad(posterior(h).log_prob(z).sum(), h)
    assert_close(own, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_the_density_of_a_draw_that_was_written_to_is_that_of_what_it_is_now(name):
    posterior = _posterior(name, 3)
    q = posterior(_h(posterior, 4))
    z = q.sample()
    before = q.log_prob(z)
    z.add_(1.0)
    assert_close(q.log_prob(z), posterior(_h(posterior, 4)).log_prob(z.clone()))
    assert (q.log_prob(z) - before).abs().min() > 1e-6


# --- Numbers of whatever size ---


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("name", FLOWS)
def test_extreme_features_give_finite_draws_densities_and_gradients_in_single_precision(name, size):
    posterior = _posterior(name, 10, num_layers=4).float()
    h = size * torch.randn(20, posterior.num_features, generator=torch.Generator().manual_seed(0))
    h.requires_grad_()
    q = posterior(h)
    z = q.rsample()
    log_q = q.log_prob(z)
    (log_q.sum() + z.sum()).backward()
    values = [z, log_q, h.grad, *(w.grad for w in posterior.parameters())]
    assert all(value.isfinite().all() for value in values)
    posterior.zero_grad()
    log_q = posterior(h).log_prob(torch.randn(20, 10))
    log_q.clamp(min=-1e30).sum().backward()
    assert not log_q.isnan().any()


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_a_density_in_single_precision_is_that_of_double_precision(name):
    posterior = _posterior(name, 8, size=0.2)
    h = _h(posterior, 200)
    single = copy.deepcopy(posterior).float()(h.float())
    z = single.rsample()
    exact = posterior(h).log_prob(z.double())
    assert_close(single.log_prob(z).double(), exact, rtol=0, atol=2e-3)
    assert_close(single.log_prob(z.clone()).double(), exact, rtol=0, atol=2e-3)


# --- In a VAE ---


def _flow_vae(name, exact):
    """The linear-Gaussian model with a guide of random weights, wider than its posterior at first."""
    D, L = exact.W.shape
    vae, wide = exact.vae(widen=1.5), exact.vae(widen=1.5).posterior.net.output
    posterior = at_random(FLOWS[name](L, context_dim=C, num_layers=2, hidden=(8,)), size=0.15)
    encoder = at_random(MLP(D, posterior.num_features, hidden=()))
    with torch.no_grad():
        encoder.output.weight[: 2 * L] = wide.weight
        encoder.output.bias[: 2 * L] = wide.bias
    return VAE(StandardNormal(L).double(), vae.likelihood, Conditional(encoder, posterior))


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_weights_of_a_flow_guide_average_to_the_evidence(name):
    """E[w] = p(x) whatever the guide; per image, in standard errors of the mean weight."""
    exact = LinearGaussian.random(D=4, L=3, orthogonal=False)
    vae, x = _flow_vae(name, exact), exact.draw(10)
    torch.manual_seed(0)
    w = (log_weights(vae.model, vae.guide, x, 5000) - exact.log_evidence(x)).exp()
    assert (w.std(0) > 0.05).all()
    assert ((w.mean(0) - 1).abs() < 4.5 * w.std(0) / math.sqrt(len(w))).all()


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_a_mixture_of_flow_posteriors_is_the_mean_of_their_densities(name):
    exact = LinearGaussian.random(D=4, L=3)
    vae, x = _flow_vae(name, exact), exact.draw(5)
    z = torch.randn(6, 3, dtype=torch.double)
    parts = torch.stack([vae.posterior(x[n : n + 1]).log_prob(z) for n in range(5)])
    mixture = MixtureSameFamily(Categorical(logits=torch.zeros(5, dtype=torch.double)), vae.posterior(x))
    assert_close(mixture.log_prob(z), parts.logsumexp(0) - math.log(5))
    assert_close(AggregatePosterior.encode(vae, x).log_prob(z), parts.logsumexp(0) - math.log(5))
    assert mixture.sample((4,)).shape == (4, 3)


@pytest.mark.thorough
@pytest.mark.parametrize("name", FLOWS)
def test_a_trained_flow_guide_is_nearer_to_the_evidence_than_the_best_diagonal_one(name):
    """Two correlated latents: the diagonal guide's least gap is known, KL = sum_l log(s_l / t_l), t_l^2 = 1 / P_ll."""
    W = torch.tensor([[1.0, 1.0], [1.0, 0.8], [0.0, 0.3]], dtype=torch.double)
    exact = LinearGaussian(W, torch.zeros(3, dtype=torch.double), 0.5)
    _, covariance = exact.posterior_map()
    precision = torch.linalg.inv(covariance)
    least_gap = (precision.diagonal().log().sum() - precision.logdet()).item() / 2
    x = exact.draw(1000)
    torch.manual_seed(0)
    posterior = FLOWS[name](2, context_dim=C, num_layers=2, hidden=(16,)).double()
    encoder = MLP(3, posterior.num_features, hidden=()).double()
    vae = VAE(StandardNormal(2).double(), exact.vae().likelihood.requires_grad_(False), Conditional(encoder, posterior))
    fit(vae, x, epochs=30, batch_size=100, learning_rate=1e-2, transform=as_stored)
    with torch.no_grad():
        gap = (exact.log_evidence(x) - log_weights(vae.model, vae.guide, x, 20)).mean().item()
    assert least_gap > 0.3
    assert gap < least_gap / 4
