"""IWAE, DReG and STL: their values and the expectation of their gradients against closed forms and quadrature."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import per_image
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.torch_transform import TransformModule
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from ppl_vae import VAE, log_weights
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options

OBJECTIVES = {"iwae": per_image.iwae, "dreg": per_image.dreg, "stl": per_image.stl}
BETAS = (0.0, 0.4, 1.0, 3.0)


def _log_normal(value, loc, scale):
    return -(((value - loc) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2


# --- The expectation of value and gradient, by quadrature over the noise of all particles ---


class OneSite(nn.Module):
    """z ~ N(0, 1), x_d ~ N(w_d z + b_d, 0.6^2), and a guide that is wide of the posterior."""

    num_noise = 1
    spread = torch.tensor(0.6, dtype=torch.double)

    def __init__(self):
        super().__init__()
        values = {
            "w": [0.9, -0.5, 0.4],
            "b": [0.1, 0.3, -0.2],
            "m": [0.5, -0.1, 0.3],
            "c": [0.2],
            "log_scale": [-0.3],
            "u": [0.7, 0.2, -0.5],
            "g": [0.6],
            "log_t": [-0.2],
            "a": [0.8],
        }
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.double)))

    def q(self, x):
        return x @ self.m[:, None] + self.c, self.log_scale.exp()

    def prior(self):
        return torch.zeros(1, dtype=torch.double), torch.ones(1, dtype=torch.double)

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(*self.prior()).to_event(1))
            pyro.sample("x", dist.Normal(z * self.w + self.b, self.spread).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            loc, scale = self.q(x)
            pyro.sample("z", dist.Normal(loc, scale.expand_as(loc)).to_event(1))

    def terms(self, noise, x):
        """log p(x | z) and log p(z) - log q(z | x), (..., B), of z = loc + scale e; noise e: (..., 1, 1)."""
        loc, scale = self.q(x)
        z = loc + scale * noise
        log_p_x = _log_normal(x, z * self.w + self.b, self.spread).sum(-1)
        return log_p_x, (_log_normal(z, *self.prior()) - _log_normal(z, loc, scale))[..., 0]


class PriorOfTheGuide(OneSite):
    """p(z) = q(z | u), a VampPrior of one component: the guide's parameters are the model's too."""

    def prior(self):
        return self.q(self.u)


class TwoSites(OneSite):
    """z_2 ~ N(0, 1), z_1 ~ N(a z_2, 1); q(z_2 | x) and q(z_1 | z_2, x) = N(g z_2 + u x, t^2): a hierarchy."""

    num_noise = 2

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            top = pyro.sample("z_2", dist.Normal(*self.prior()).to_event(1))
            z = pyro.sample("z_1", dist.Normal(self.a * top, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.w + self.b, self.spread).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            loc, scale = self.q(x)
            top = pyro.sample("z_2", dist.Normal(loc, scale.expand_as(loc)).to_event(1))
            pyro.sample("z_1", dist.Normal(self.g * top + x @ self.u[:, None], self.log_t.exp()).to_event(1))

    def terms(self, noise, x):
        (loc, scale), t = self.q(x), self.log_t.exp()
        top = loc + scale * noise[..., :1]
        loc_1 = self.g * top + x @ self.u[:, None]
        z = loc_1 + t * noise[..., 1:]
        log_p_x = _log_normal(x, z * self.w + self.b, self.spread).sum(-1)
        one = torch.ones(1, dtype=torch.double)
        log_p_z = _log_normal(top, *self.prior()) + _log_normal(z, self.a * top, one)
        log_q_z = _log_normal(top, loc, scale) + _log_normal(z, loc_1, t)
        return log_p_x, (log_p_z - log_q_z)[..., 0]


PROGRAMS = {"one site": OneSite, "prior of the guide": PriorOfTheGuide, "two sites": TwoSites}
X = torch.tensor([[1.1, -0.4, 0.9], [-0.6, 0.8, 0.1]], dtype=torch.double)


def _integrated_loss(program, *, beta, num_particles, points):
    """-E[log (1/S) sum_s w_s], the mean of two images, by the trapezoidal rule on one particle's noise.

    E log sum_s w_s = int (exp(-e^u) - E[exp(-e^u w)]^S) du, as log a = int_0^inf (exp(-t) - exp(-t a)) / t dt.
    """
    nodes = torch.linspace(-8, 8, points, dtype=torch.double)
    grid = torch.cartesian_prod(*[nodes] * program.num_noise).reshape(-1, 1, program.num_noise)
    mass = (-grid.square().sum((-2, -1)) / 2).softmax(0)
    log_p_x, log_ratio = program.terms(grid, X)  # (points, B)
    u = torch.arange(-30, 45, 0.25, dtype=torch.double)[:, None]
    log_w = log_p_x + beta * log_ratio
    of_one = torch.stack([(-(u + column).exp()).exp() @ mass for column in log_w.T], dim=1)  # (u, B)
    bound = 0.25 * ((-u.exp()).exp() - of_one**num_particles).sum(0) - math.log(num_particles)
    return -bound.mean()


def _gradient(loss, program):
    found = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(w) if g is None else g for w, g in zip(program.parameters(), found, strict=True)]
    )


def _sampled(objective, program, *, repeats=40, copies=1000, seed=0, **asked):
    """(repeats, 1 + P): the loss and its gradient, each from ``copies`` draws for each of the two images."""
    torch.manual_seed(seed)
    x, rows = X.repeat(copies, 1), []
    for _ in range(repeats):
        loss = objective(program.model, program.guide, x, **asked)
        rows.append(torch.cat([loss.detach()[None], _gradient(loss, program)]))
    return torch.stack(rows)


def _assert_expected(sampled, exact):
    """Every entry within 4.5 standard errors, and these small beside the gradient: 13 entries, at most a few tests."""
    mean, error = sampled.mean(0), sampled.std(0) / math.sqrt(len(sampled))
    assert ((mean - exact).abs() <= 4.5 * error + 1e-9).all(), ((mean - exact) / error).tolist()
    assert error.max() < 0.02 * exact[1:].abs().max()


CASES = [
    (name, objective, num_particles, 1.0)
    for name in PROGRAMS
    for objective, num_particles in [
        ("iwae", 1),
        ("iwae", 2),
        ("iwae", 5),
        ("dreg", 1),
        ("dreg", 2),
        ("dreg", 5),
        ("stl", 1),
    ]
]
CASES += [("two sites", "stl", 1, 3.0), ("prior of the guide", "dreg", 2, 0.4)]
CASES += [("one site", o, k, beta) for o, k in [("iwae", 5), ("dreg", 5), ("stl", 1)] for beta in BETAS if beta != 1]


@pytest.mark.parametrize(("name", "objective", "num_particles", "beta"), CASES)
def test_value_and_gradient_have_the_expectation_of_the_bound(name, objective, num_particles, beta):
    program, points = PROGRAMS[name](), (100, 80) if name != "two sites" else (64, 50)
    exact, coarser = (
        torch.cat([loss.detach()[None], _gradient(loss, program)])
        for loss in (_integrated_loss(program, beta=beta, num_particles=num_particles, points=n) for n in points)
    )
    assert_close(exact, coarser, rtol=0, atol=1e-6)  # the rule has converged
    asked = {"num_particles": num_particles, "beta": beta}
    _assert_expected(_sampled(OBJECTIVES[objective], program, **asked), exact)


# --- The linear-Gaussian VAE ---


def _guides_gradients(vae, x, objective, *, repeats=50, **asked):
    """(repeats, P)"""
    torch.manual_seed(0)
    parameters = list(vae.posterior.parameters())
    losses = (OBJECTIVES[objective](vae.model, vae.guide, x, **asked) for _ in range(repeats))
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses])


@pytest.mark.parametrize(("objective", "num_particles"), [("stl", 1), ("stl", 5), ("dreg", 1), ("dreg", 5)])
def test_at_the_exact_posterior_the_guides_gradient_has_no_noise(oracle, objective, num_particles):
    gradients = _guides_gradients(oracle.vae(), oracle.draw(5), objective, num_particles=num_particles)
    assert gradients.abs().max() < 1e-12


@pytest.mark.parametrize("num_particles", [1, 5])
def test_at_the_exact_posterior_the_plain_gradient_has_noise(oracle, num_particles):
    gradients = _guides_gradients(oracle.vae(), oracle.draw(5), "iwae", num_particles=num_particles)
    assert gradients.std(0).min() > 0.01


def test_the_noise_goes_with_the_distance_from_the_exact_posterior(oracle):
    """Of a hundredth of the shift, a hundredth of the deviation."""
    near, nearer = (
        _guides_gradients(oracle.vae(shift=shift), oracle.draw(5), "dreg", num_particles=5).std(0).max()
        for shift in (0.1, 0.001)
    )
    assert_close(nearer / near, torch.tensor(0.01).double(), rtol=0.1, atol=0)


def test_dreg_leaves_the_models_gradient_as_it_is(oracle):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    gradients = []
    for objective in (per_image.iwae, per_image.dreg):
        torch.manual_seed(0)
        loss = objective(vae.model, vae.guide, x, num_particles=5)
        gradients.append(torch.autograd.grad(loss, vae.likelihood.net.output.weight)[0])
    assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_particles", [1, 7])
def test_values_are_those_of_the_log_weights_that_are_reported(oracle, num_particles):
    vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(5)
    torch.manual_seed(3)
    log_w = log_weights(vae.model, vae.guide, x, num_particles).detach()
    expected = {"stl": -log_w.numpy().mean()}
    expected["iwae"] = expected["dreg"] = -np.log(np.exp(log_w.numpy()).mean(0)).mean()
    for name, objective in OBJECTIVES.items():
        torch.manual_seed(3)
        loss = objective(vae.model, vae.guide, x, num_particles=num_particles)
        assert loss.item() == pytest.approx(expected[name], rel=1e-12)


# --- The second pass ---


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_random_numbers_are_drawn_once(oracle, objective):
    vae, x = oracle.vae(widen=1.3), oracle.draw(3)
    torch.manual_seed(0)
    OBJECTIVES[objective](vae.model, vae.guide, x, num_particles=2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randn(2, 3, 3, dtype=torch.double)
    assert torch.equal(torch.get_rng_state(), after)


class Scale(TransformModule):
    """y = exp(s) x, s a parameter; with a cache it knows the inverse of what it gave last."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, cache_size):
        super().__init__(cache_size=cache_size)
        self.log_scale = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.double))

    def _call(self, x):
        return x * self.log_scale.exp()

    def _inverse(self, y):
        return y * (-self.log_scale).exp()

    def log_abs_det_jacobian(self, x, y):
        return self.log_scale.sum().expand(x.shape[:-1])


class Scaled(nn.Module):
    def __init__(self, posterior, *, cache_size):
        super().__init__()
        self.posterior = posterior
        self.transform = Scale(cache_size)

    def forward(self, x):
        return dist.TransformedDistribution(self.posterior(x), [self.transform])


class Folded(Scaled):
    """The same distribution as a normal, of whose density no parameter is asked for after the guide has run."""

    def forward(self, x):
        q, factor = self.posterior(x).base_dist, self.transform.log_scale.exp()
        return dist.Normal(q.loc * factor, q.scale * factor).to_event(1)


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("objective", ["stl", "dreg"])
def test_a_transforms_parameters_are_held_where_its_density_is_taken(oracle, objective, cache_size):
    gradients = []
    for guide in (Scaled, Folded):
        vae, x = oracle.vae(widen=1.3, shift=0.4), oracle.draw(3)
        behind = VAE(vae.prior, vae.likelihood, guide(vae.posterior, cache_size=cache_size))
        gradients.append(_guides_gradients(behind, x, objective, repeats=2, num_particles=3))
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flow", ["iaf", "spline"])
@pytest.mark.parametrize("objective", ["stl", "dreg"])
def test_of_a_flow_guide_the_gradient_is_that_of_a_frozen_copys_density(objective, flow):
    options = Options(network="mlp", hidden=(6,), latent_dim=3, posterior="flow", posterior_flow=flow)
    torch.manual_seed(0)
    vae = build_vae(replace(options, prior="standard-normal", posterior_hidden=(7,)), (1, 2, 2)).double()
    x = torch.randint(2, (5, 1, 2, 2)).double()
    with torch.no_grad():
        for w in vae.parameters():
            w.add_(0.3 * torch.randn_like(w))
    frozen = copy.deepcopy(vae).requires_grad_(False)
    torch.manual_seed(0)
    z = vae.posterior(x).rsample((4,))
    log_w = frozen.prior().log_prob(z) + frozen.likelihood(z).log_prob(x) - frozen.posterior(x).log_prob(z.view_as(z))
    weight = torch.full_like(log_w, 0.25) if objective == "stl" else log_w.softmax(0).square()
    parameters = dict(vae.posterior.named_parameters())
    expected = torch.autograd.grad(-(weight.detach() * log_w).sum(0).mean(), parameters.values())
    torch.manual_seed(0)
    loss = OBJECTIVES[objective](vae.model, vae.guide, x, num_particles=4)
    found = torch.autograd.grad(loss, parameters.values())
    for name, ours, exact in zip(parameters, found, expected, strict=True):
        assert_close(ours, exact, rtol=1e-8, atol=1e-10, msg=lambda words, name=name: f"{name}: {words}")


# --- What is refused ---


class OtherGuide(nn.Module):
    def __init__(self, distribution):
        super().__init__()
        self.distribution = distribution

    def forward(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", self.distribution(len(x)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_guide_that_is_not_reparametrized_is_refused(oracle, objective):
    vae, x = oracle.vae().float(), oracle.draw(4).float()
    guide = OtherGuide(lambda B: NonreparameterizedNormal(torch.zeros(B, 3), torch.ones(3)).to_event(1))
    with pytest.raises(ValueError, match="site 'z': expected a reparametrized guide, got Independent"):
        OBJECTIVES[objective](vae.model, guide, x, num_particles=2)
