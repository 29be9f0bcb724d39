"""Priors: densities by quadrature and by scipy, what reaches their parameters, and a guide that a prior shares."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import per_image
import pyro
import pytest
import torch
from capture_cases import copy_state
from fitting import fit
from oracles import bernoulli_vae, draws_have_the_moments_of_the_density, quadrature_grid
from random_weights import at_random
from scipy.special import logsumexp
from scipy.stats import norm
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, log_weights
from ppl_vae.parts import registry
from ppl_vae.parts.networks import MLP, Standardized
from ppl_vae.parts.posteriors import DiagonalNormal, FullNormal
from ppl_vae.parts.priors import FlowPrior, Mixture, StandardNormal, VampPrior
from ppl_vae.parts.registry import PRIORS
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import initialize_output_bias

COUPLINGS = {word: part.load() for word, part in registry.COUPLINGS.items()}

D = 12


def _guide(L, family=DiagonalNormal):
    return Conditional(MLP(D, family(L).num_features, hidden=(6,), activation=torch.nn.Tanh), family(L))


def _flow(name):
    def prior(L, guide):
        coupling = COUPLINGS[name]
        return FlowPrior(L, coupling=coupling, num_layers=2, hidden=(8,))

    return prior


PARTS = {
    "standard-normal": lambda L, guide: StandardNormal(L),
    "mixture": lambda L, guide: Mixture(L, components=3),
    "vamp": lambda L, guide: VampPrior(guide, (D,), components=3),
    "flow": _flow("affine"),
    "spline flow": _flow("spline"),
}


COUPLED = ["flow", "spline flow"]
IN_ONE = [name for name in PARTS if name not in COUPLED]  # of one latent, which no flow can halve


def _vae(name, L=2, *, size=0.3):
    """A small Bernoulli VAE of this prior, in float64, with weights far from their start."""
    vae = bernoulli_vae(latent_dim=L, D=D)
    torch.manual_seed(0)
    guide = _guide(L)
    return at_random(VAE(PARTS[name](L, guide), vae.likelihood, guide), size=size)


def _images(num_images=30):
    rates = torch.linspace(0.1, 0.9, D, dtype=torch.double).expand(num_images, D)
    return torch.bernoulli(rates, generator=torch.Generator().manual_seed(0))


POINTS = {1: 2001, 2: 301}
SHAPES = [(name, 1) for name in IN_ONE] + [(name, 2) for name in PARTS]


def test_every_prior_of_the_command_line_is_in_the_list():
    assert set(PRIORS) <= set(PARTS)


# --- The density ---


@pytest.mark.parametrize(("name", "L"), SHAPES)
@torch.no_grad()
def test_a_density_integrates_to_one(name, L):
    p = _vae(name, L).prior()
    z, cell = quadrature_grid(p, points=601 if name == "spline flow" else POINTS[L])
    assert float(p.log_prob(z).exp().sum() * cell) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("name", "L"), SHAPES)
@torch.no_grad()
def test_draws_have_the_moments_of_the_density(name, L):
    p = _vae(name, L).prior()
    assert draws_have_the_moments_of_the_density(p, points=POINTS[L])


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("leading", [(), (4,), (3, 4)])
@torch.no_grad()
def test_a_prior_is_one_distribution_over_a_vector_for_any_leading_dimensions(name, leading):
    p = _vae(name).prior()
    z = torch.randn(*leading, 2, dtype=torch.double)
    one_by_one = torch.stack([p.log_prob(one) for one in z.reshape(-1, 2)]).reshape(leading)
    assert (p.batch_shape, p.event_shape) == ((), (2,))
    assert_close(p.log_prob(z), one_by_one)


@torch.no_grad()
def test_a_mixture_is_scipys_normals_by_their_weights():
    prior = at_random(Mixture(2, components=3), size=0.3)
    z = 2 * torch.randn(50, 2, dtype=torch.double)
    log_weights = prior.logits.log_softmax(-1).numpy()
    scales = (7 * (prior.log_scale / 7).tanh()).exp().numpy()
    terms = [
        log_weight + norm.logpdf(z.numpy(), loc, scale).sum(-1)
        for log_weight, loc, scale in zip(log_weights, prior.loc.numpy(), scales, strict=True)
    ]
    np.testing.assert_allclose(prior().log_prob(z), logsumexp(terms, axis=0), rtol=1e-10)


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_a_mixture_stays_finite_at_extreme_scales_in_single_precision(value):
    prior = Mixture(3, components=4)
    with torch.no_grad():
        prior.log_scale.fill_(value)
    log_p = prior().log_prob(torch.tensor([[0.0, 0.1, -0.1], [30.0, 30.0, 30.0]]))
    gradients = torch.autograd.grad(log_p.sum(), list(prior.parameters()))
    assert log_p.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


# --- The VampPrior ---


@pytest.mark.parametrize("family", [DiagonalNormal, FullNormal])
@torch.no_grad()
def test_a_vamp_prior_of_one_component_is_the_posterior_of_its_pseudo_image(family):
    guide = _guide(3, family)
    prior = at_random(VampPrior(guide, (D,), components=1), size=0.3)
    at_random(guide, size=0.3, seed=1)
    z = torch.randn(20, 3, dtype=torch.double)
    assert_close(prior().log_prob(z), guide(prior.pseudo_images[0]).log_prob(z), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_vamp_prior_is_the_mean_of_scipys_normals_of_the_encoders_features():
    vae = _vae("vamp")
    h = vae.posterior.net(vae.prior.pseudo_images)
    z = torch.randn(20, 2, dtype=torch.double)
    terms = [
        norm.logpdf(z.numpy(), one[:2].numpy(), (7 * (one[2:] / 7).tanh()).exp().numpy()).sum(-1) - math.log(len(h))
        for one in h
    ]
    np.testing.assert_allclose(vae.prior().log_prob(z), logsumexp(terms, axis=0), rtol=1e-10)


def _through_a_state(vae):
    other = _vae("vamp", size=0.1)
    other.load_state_dict(vae.state_dict())
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_a_state], ids=["copy", "state"])
@torch.no_grad()
def test_a_copys_vamp_prior_is_of_the_copys_guide(copied):
    vae, z = _vae("vamp"), torch.randn(5, 2, dtype=torch.double)
    other, before = copied(vae), vae.prior().log_prob(z)
    assert torch.equal(other.prior().log_prob(z), before)
    vae.posterior.net.output.bias.add_(1.0)
    assert torch.equal(other.prior().log_prob(z), before)
    other.posterior.net.output.bias.add_(1.0)
    assert torch.equal(other.prior().log_prob(z), vae.prior().log_prob(z))
    assert not torch.equal(other.prior().log_prob(z), before)


def _numbered(num_images):
    return torch.arange(num_images, dtype=torch.double)[:, None].expand(num_images, D) / num_images


@pytest.mark.parametrize("num_images", [5, 6, 100])
def test_pseudo_images_start_as_different_training_images(num_images):
    prior = VampPrior(_guide(2), (D,), components=5).double()
    torch.manual_seed(0)
    prior.start_from(_numbered(num_images))
    seen = {tuple(one) for one in prior.pseudo_images.tolist()}
    assert len(seen) == 5
    assert seen <= {tuple(one) for one in _numbered(num_images).tolist()}


# --- What a VampPrior starts from ---


@pytest.mark.parametrize("standardized", [False, True])
def test_training_starts_a_vamp_prior_from_its_images(standardized):
    """In the unit of the data, of which an encoder that standardizes takes the pseudo-images too."""
    words = {"likelihood": "normal"} if standardized else {}
    options = Options(prior="vamp", prior_components=4, hidden=(5,), latent_dim=2, network="mlp", **words)
    torch.manual_seed(0)
    vae, x = build_vae(options, (D,)), 100 + 7 * torch.randn(20, D) if standardized else _images(20).float()
    initialize_output_bias(vae, x)
    assert isinstance(vae.posterior.net, Standardized) == standardized
    assert {tuple(one) for one in vae.prior.pseudo_images.tolist()} <= {tuple(one) for one in x.tolist()}
    z = torch.randn(3, 2)
    terms = torch.stack([vae.posterior(u).log_prob(z) for u in vae.prior.pseudo_images])
    assert_close(vae.prior().log_prob(z), terms.logsumexp(0) - math.log(4))


def test_a_gradient_of_the_density_reaches_the_encoder_through_a_vamp_prior():
    vae = _vae("vamp")
    log_p = vae.prior().log_prob(torch.randn(50, 2, dtype=torch.double))
    gradients = torch.autograd.grad(log_p.sum(), list(vae.posterior.parameters()))
    assert all((g != 0).any() for g in gradients)


# --- Gradients ---


def test_a_gradient_of_the_pseudo_images_is_the_numeric_one():
    vae, z = _vae("vamp"), torch.randn(5, 2, dtype=torch.double)

    def log_p(pseudo_images):
        vae.prior.pseudo_images.data.copy_(pseudo_images)
        return float(vae.prior().log_prob(z).sum().detach())

    u = vae.prior.pseudo_images.detach().clone()
    (gradient,) = torch.autograd.grad(vae.prior().log_prob(z).sum(), vae.prior.pseudo_images)
    for index in (0, 7, 20):
        step = torch.zeros_like(u).reshape(-1)
        step[index] = 1e-6
        numeric = (log_p(u + step.reshape_as(u)) - log_p(u - step.reshape_as(u))) / 2e-6
        assert float(gradient.reshape(-1)[index]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


# --- In a VAE ---


def _quadrature(vae, x):
    """(N,) log int p(z) p(x | z) dz on a grid, the Bernoulli mass written out."""
    z, cell = quadrature_grid(vae.prior(), points=401)
    with torch.no_grad():
        rate = vae.likelihood.net(z).sigmoid()
        log_p = x @ rate.log().T + (1 - x) @ (1 - rate).log().T + vae.prior().log_prob(z)
    return log_p.logsumexp(-1) + cell.log()


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_log_weights_estimate_the_evidence_of_quadrature(name):
    vae, x = _vae(name), _images(4)
    with torch.no_grad():
        vae.posterior.net.output.weight.mul_(0.1)  # a guide that is wide of every posterior
        vae.posterior.net.output.bias[:2] = 0.0
        vae.posterior.net.output.bias[2:] = 0.5
    torch.manual_seed(0)
    weights = (log_weights(vae.model, vae.guide, x, 20_000) - _quadrature(vae, x)).exp()
    stderr = weights.std(0) / math.sqrt(len(weights))
    assert stderr.max() < 0.05
    assert ((weights.mean(0) - 1).abs() <= 4.5 * stderr).all()


OBJECTIVES = {
    "elbo": per_image.elbo,
    "iwae": partial(per_image.iwae, num_particles=3),
    "dreg": partial(per_image.dreg, num_particles=3),
    "stl": partial(per_image.stl, num_particles=1),
}


def _trained(name, objective, *, compile, **changes):
    vae = _vae(name)
    pyro.set_rng_seed(5)
    states = []
    asked = {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "learning_rate": 0.01, "checkpoint_seconds": 0.0}
    fit(
        vae,
        _images(),
        **(asked | changes),
        objective=OBJECTIVES[objective],
        transform=lambda values, generator: values,
        compile=compile,
        on_checkpoint=lambda state: states.append(copy_state(state)),
    )
    return states


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "objective", "compile", "steps"),
    [
        ("flow", "dreg", False, (2, 4, 6)),
        ("flow", "dreg", True, (6,)),
        ("spline flow", "elbo", False, (2, 4, 6)),
        ("vamp", "stl", False, (2, 4, 6)),
        ("vamp", "stl", True, (6,)),
    ],
)
def test_a_training_goes_on_bit_for_bit_from_any_step(graphs, name, objective, compile, steps):
    """With moving averages, in the middle of an epoch and at its end."""
    asked = {"compile": compile, "average_decay": 0.9}
    states = {scalars["step"]: (tensors, scalars) for tensors, scalars in _trained(name, objective, **asked)}
    expected, _ = states[12]
    for step in steps:
        tensors, scalars = _trained(name, objective, **asked, saved=states[step])[-1]
        assert tensors.keys() == expected.keys()
        assert any(key.startswith("average/") for key in tensors)
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
        assert scalars["step"] == 12


def test_draws_of_a_vampprior_are_of_its_own_density() -> None:
    """Of one component each: the mean of log p over them is minus the entropy, by quadrature of one latent."""
    torch.manual_seed(0)
    posterior = Conditional(MLP((3,), 2, hidden=(4,)), DiagonalNormal(1)).double()
    prior = VampPrior(posterior, (3,), components=4).double()
    with torch.no_grad():
        prior.pseudo_images.mul_(6)
        z = torch.linspace(-40, 40, 400_001, dtype=torch.double)[:, None]
        log_p = prior().log_prob(z)
        entropy = -torch.trapezoid(log_p.exp() * log_p, z[:, 0])
        for drawn in (prior().sample((40_000,)), prior().expand((40_000,)).sample()):
            found = -prior().log_prob(drawn)
            assert drawn.shape == (40_000, 1)
            assert abs(found.mean() - entropy) < 4.5 * found.std() / 200
