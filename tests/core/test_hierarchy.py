"""Several stochastic layers against a two-layer linear-Gaussian model, quadrature, and Pyro's own traces."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import per_image
import pyro
import pytest
import torch
from capture_cases import as_stored
from fitting import fit
from oracles import NormalFixed
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from ppl_vae import Conditional, importance, log_weights
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, HierarchicalVAE, LayeredPrior, TopDown, product_of_normals
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal, exponential_log_scale
from ppl_vae.parts.priors import Mixture, StandardNormal

GUIDES = ["bottom-up", "top-down"]


# --- A model whose evidence and posterior are known ---


def _affine(W: Tensor, b: Tensor) -> MLP:
    """W c + b."""
    net = MLP(W.shape[1], W.shape[0], hidden=()).double()
    with torch.no_grad():
        net.output.weight.copy_(W)
        net.output.bias.copy_(b)
    return net


def _normal(W: Tensor, b: Tensor, scale: Tensor) -> Conditional:
    """N(W c + b, diag(scale^2))."""
    features = _affine(torch.cat([W, torch.zeros_like(W)]), torch.cat([b, scale.log()]))
    return Conditional(features, DiagonalNormal(len(b), log_scale=exponential_log_scale))


@dataclass(frozen=True)
class TwoLayers:
    """z_2 ~ N(0, I), z_1 = a z_2 + c + s e (elementwise), x = W z_1 + b + sigma e, W with orthogonal columns.

    y = W'(x - b) / |w|^2 is N(z_1, t^2) given z_1, t = sigma / |w|, and holds all that x says; so every conditional
    of the posterior is a diagonal normal.
    """

    W: Tensor
    b: Tensor
    a: Tensor
    c: Tensor
    s: Tensor
    sigma: float

    @classmethod
    def random(cls) -> TwoLayers:
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(7, 3, generator=generator, dtype=torch.double)
        W = torch.linalg.qr(draw[:6]).Q[:, :2] * torch.tensor([0.9, 1.7], dtype=torch.double)
        a, c, s = (torch.tensor(pair, dtype=torch.double) for pair in ([0.8, -1.5], [0.3, -0.6], [0.7, 0.4]))
        return cls(W, draw[:6, 2], a, c, s, 0.6)

    def draw(self, num_images: int) -> Tensor:
        """(N, D) images from the model."""
        e = torch.randn(num_images, 4 + len(self.b), generator=torch.Generator().manual_seed(1), dtype=torch.double)
        z_1 = self.a * e[:, :2] + self.c + self.s * e[:, 2:4]
        return z_1 @ self.W.T + self.b + self.sigma * e[:, 4:]

    def log_evidence(self, x: Tensor) -> Tensor:
        """(N,) nats, log N(x; b + W c, W (a^2 + s^2) W' + sigma^2 I)."""
        noise = self.sigma**2 * torch.eye(len(self.b), dtype=torch.double)
        covariance = (self.W * (self.a**2 + self.s**2)) @ self.W.T + noise
        return MultivariateNormal(self.b + self.W @ self.c, covariance).log_prob(x)

    def _y(self) -> tuple[Tensor, Tensor, Tensor]:
        """P and p of y = P x + p, and t."""
        P = self.W.T / self.W.square().sum(0)[:, None]
        return P, -P @ self.b, self.sigma / self.W.square().sum(0).sqrt()

    def posterior_of_z_1(self) -> tuple[Tensor, Tensor, Tensor]:
        """M, m and s of p(z_1 | x) = N(M x + m, s^2)."""
        P, p, t = self._y()
        prior = self.a**2 + self.s**2
        variance = 1 / (1 / prior + 1 / t**2)
        weight = variance / t**2
        return weight[:, None] * P, weight * p + variance * self.c / prior, variance.sqrt()

    def _posterior_of_z_2(self, variance_of_z_1: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of (z_1 - c), known up to that variance, and the scale."""
        variance = 1 / (1 + self.a**2 / variance_of_z_1)
        return variance * self.a / variance_of_z_1, variance.sqrt()

    def prior(self) -> LayeredPrior:
        return LayeredPrior(StandardNormal(2).double(), [_normal(torch.diag(self.a), self.c, self.s)])

    def bottom_up(self, widen: float) -> BottomUp:
        M, m, scale = self.posterior_of_z_1()
        weight, scale_2 = self._posterior_of_z_2(self.s**2)
        return BottomUp([_normal(M, m, widen * scale), _normal(torch.diag(weight), -weight * self.c, widen * scale_2)])

    def top_down(self, prior: LayeredPrior, widen: float) -> TopDown:
        P, p, t = self._y()
        weight, scale_2 = self._posterior_of_z_2(self.s**2 + t**2)
        same = torch.eye(2, dtype=torch.double)
        return TopDown(
            [_affine(P, p), _affine(same, torch.zeros(2))],
            [_normal(same, torch.zeros(2), widen * t), _normal(torch.diag(weight), -weight * self.c, widen * scale_2)],
            prior,
            activation=nn.Identity,
        )

    def vae(self, guide: str, *, widen: float = 1.0) -> HierarchicalVAE:
        """The model with its exact posterior as the guide, or one with scales ``widen`` times as wide."""
        prior = self.prior()
        decoder = BottomLayerOnly(_affine(self.W, self.b), prior.latent_dims)
        posterior = self.bottom_up(widen) if guide == "bottom-up" else self.top_down(prior, widen)
        return HierarchicalVAE(
            prior, Conditional(decoder, NormalFixed((len(self.b),), self.sigma).double()), posterior
        ).double()

    def reconstruction(self, x: Tensor) -> Tensor:
        """(N,) E[log p(x | z_1)] under the exact posterior."""
        M, m, scale = self.posterior_of_z_1()
        residual = x - self.b - (x @ M.T + m) @ self.W.T
        spread = (self.W.square() @ scale.square()).sum()
        normalizer = len(self.b) / 2 * math.log(2 * math.pi * self.sigma**2)
        return -(residual.square().sum(-1) + spread) / (2 * self.sigma**2) - normalizer


@pytest.mark.parametrize("guide", GUIDES)
def test_with_the_exact_posterior_every_log_weight_is_the_log_evidence(guide):
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide), oracle.draw(20)
    log_w = log_weights(vae.model, vae.guide, x, 5)
    assert_close(log_w, oracle.log_evidence(x).expand(5, 20), rtol=0, atol=1e-11)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_bound_rises_with_particles_and_never_exceeds_the_evidence(guide):
    """Each gap is a mean over 2,000 independent bounds of one image or another, in float64."""
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide, widen=1.5), oracle.draw(20).repeat(100, 1)
    pyro.set_rng_seed(0)
    gaps = []
    for num_particles in (1, 10, 100):
        bound = importance(vae.model, vae.guide, x, num_particles=num_particles).log_evidence
        gap = oracle.log_evidence(x) - bound
        gaps.append((float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))))
    for (gap, stderr), (next_gap, next_stderr) in pairwise(gaps):
        assert gap - next_gap > 5 * math.hypot(stderr, next_stderr)
    assert gaps[0][0] > 0.3
    assert all(gap > -5 * stderr for gap, stderr in gaps)
    assert gaps[-1][0] < 0.02


def test_a_bottom_up_guide_that_is_too_wide_loses_the_divergence_of_each_layer():
    """KL(N(m, c^2 s^2) || N(m, s^2)) = (c^2 - 1) / 2 - log c for each of the four latents, whatever x is."""
    oracle, widen = TwoLayers.random(), 1.5
    vae, x = oracle.vae("bottom-up", widen=widen), oracle.draw(20)
    pyro.set_rng_seed(0)
    lost = (oracle.log_evidence(x) - log_weights(vae.model, vae.guide, x, 2000)).detach()
    expected = 4 * ((widen**2 - 1) / 2 - math.log(widen))
    assert abs(float(lost.mean()) - expected) < 5 * float(lost.std()) / math.sqrt(lost.numel())


CASES = [("bottom-up", Trace_ELBO), ("top-down", Trace_ELBO), ("top-down", TraceMeanField_ELBO)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("guide", "estimator"), CASES)
def test_beta_scales_every_latent_site_and_no_image(guide, estimator, beta):
    """At the exact posterior the KL of all layers is E[log p(x | z)] - log p(x), both known."""
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide), oracle.draw(20)
    pyro.set_rng_seed(0)
    asked = {"beta": beta, "estimator": estimator, "num_particles": 100}
    losses = torch.stack([per_image.elbo(vae.model, vae.guide, x, **asked).detach() for _ in range(30)])
    rec = oracle.reconstruction(x)
    expected = -(rec - beta * (rec - oracle.log_evidence(x))).mean()
    assert abs(float(losses.mean() - expected)) < 5 * float(losses.std()) / math.sqrt(30) + 1e-10


def test_free_bits_of_none_is_the_ladders_bound():
    oracle = TwoLayers.random()
    vae, x = oracle.vae("top-down"), oracle.draw(20)
    pyro.set_rng_seed(0)
    losses = torch.stack(
        [per_image.free_bits(vae.model, vae.guide, x, free_nats=0.0, num_particles=100).detach() for _ in range(30)]
    )
    error = float(losses.mean() + oracle.log_evidence(x).mean())
    assert abs(error) < 5 * float(losses.std()) / math.sqrt(30)


def test_the_prior_of_affine_layers_is_one_normal_over_all_latents():
    """z_2 ~ N(0, I), z_1 = A z_2 + c + s e, A any matrix: covariance [[A A' + s^2, A], [A', I]]."""
    generator = torch.Generator().manual_seed(0)
    A, c = (torch.randn(*shape, generator=generator, dtype=torch.double) for shape in ((3, 2), (3,)))
    s = torch.tensor([0.5, 1.0, 2.0], dtype=torch.double)
    prior = LayeredPrior(StandardNormal(2).double(), [_normal(A, c, s)])
    top = np.block([[(A @ A.T + torch.diag(s**2)).numpy(), A.numpy()], [A.T.numpy(), np.eye(2)]])
    joint = stats.multivariate_normal(np.concatenate([c.numpy(), np.zeros(2)]), top)
    z = 2 * torch.randn(50, 5, generator=generator, dtype=torch.double)
    np.testing.assert_allclose(prior().log_prob(z).detach().numpy(), joint.logpdf(z.numpy()), rtol=1e-11)


# --- The weighing of two normals ---


def test_the_ladder_multiplies_two_densities():
    """Against the product of scipy's densities, normalized by the trapezoidal rule."""
    (m_p, s_p), (m_q, s_q) = (-1.0, 0.7), (2.0, 1.9)
    nodes = np.linspace(-15, 15, 6001)
    product = stats.norm(m_p, s_p).pdf(nodes) * stats.norm(m_q, s_q).pdf(nodes)
    expected = product / integrate.trapezoid(product, nodes)
    both = product_of_normals(*(_standing(m, s, torch.double) for m, s in ((m_p, s_p), (m_q, s_q))))
    found = both.log_prob(torch.from_numpy(nodes)[:, None]).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def _standing(loc, scale, dtype):
    return pyro.distributions.Normal(torch.tensor([loc], dtype=dtype), torch.tensor([scale], dtype=dtype)).to_event(1)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((0.5, 1.0), (-2.0, 1e-25)),
        ((0.5, 1e-25), (-2.0, 1.0)),
        ((0.5, 1e-25), (0.5, 1e-25)),
        ((0.5, 1e25), (-2.0, 1.0)),
        ((0.5, 1e25), (-2.0, 1e25)),
        ((0.5, 0.001), (-2.0, 1000.0)),
    ],
)
def test_weighing_takes_scales_whose_precision_is_no_float(p, q):
    """In float32 against float64, where the squares of these scales still exist."""
    (m_p, s_p), (m_q, s_q) = p, q
    precision = s_p**-2 + s_q**-2
    expected = ((m_p / s_p**2 + m_q / s_q**2) / precision, precision**-0.5)
    both = product_of_normals(_standing(*p, torch.float), _standing(*q, torch.float)).base_dist
    assert float(both.loc) == pytest.approx(expected[0], rel=1e-6)
    assert float(both.scale) == pytest.approx(expected[1], rel=1e-6)


# --- Chains: layers as one distribution ---

E = (1, 3, 4)


def _bent(width_in, latent_dim):
    """A nonlinear conditional."""
    return Conditional(MLP(width_in, 2 * latent_dim, hidden=(6,), activation=nn.Tanh), DiagonalNormal(latent_dim))


def _vae(guide, dims=(3, 2, 1), *, top=None, sees_all=False, dtype=torch.double, seed=0):
    """Nonlinear, with Bernoulli pixels; dims from the bottom to the top."""
    pyro.set_rng_seed(seed)
    top = top or StandardNormal(dims[-1])
    prior = LayeredPrior(top, [_bent(above, here) for here, above in pairwise(dims)])
    net = MLP(sum(dims) if sees_all else dims[0], math.prod(E), hidden=(6,), activation=nn.Tanh)
    likelihood = Conditional(net if sees_all else BottomLayerOnly(net, prior.latent_dims), Bernoulli(E))
    if guide == "bottom-up":
        below = [E, *dims]
        posterior = BottomUp([_bent(c, L) for c, L in zip(below, dims, strict=False)])
    else:
        widths = [E, *[7 - layer for layer in range(len(dims))]]
        features = [MLP(c, d, hidden=(6,)) for c, d in pairwise(widths)]
        posterior = TopDown(features, [_bent(d, L) for d, L in zip(widths[1:], dims, strict=True)], prior)
    return HierarchicalVAE(prior, likelihood, posterior).to(dtype)


def _images(num_images=6, dtype=torch.double):
    return torch.bernoulli(torch.full((num_images, *E), 0.4, dtype=dtype), generator=torch.Generator().manual_seed(0))


def _traces(vae, x, num_particles=None):
    particles = pyro.plate("particles", num_particles, dim=-2) if num_particles else (lambda program: program)
    q = poutine.trace(particles(vae.guide)).get_trace(x)
    p = poutine.trace(poutine.replay(particles(vae.model), trace=q)).get_trace(x)
    p.compute_log_prob()
    q.compute_log_prob()
    return q, p


@pytest.mark.parametrize("sees_all", [False, True])
@pytest.mark.parametrize("num_particles", [None, 4])
@pytest.mark.parametrize("dims", [(3,), (3, 2), (3, 2, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("guide", GUIDES)
def test_the_joint_density_is_the_sum_of_pyros_sites(guide, dims, num_particles, sees_all):
    vae, x = _vae(guide, dims, sees_all=sees_all), _images()
    q, p = _traces(vae, x, num_particles)
    names = [f"z_{layer + 1}" for layer in range(len(dims))]
    z = torch.cat([q.nodes[name]["value"] for name in names], dim=-1)
    shape = (6,) if num_particles is None else (num_particles, 6)
    assert z.shape == (*shape, sum(dims))
    for trace, joint in ((q, vae.posterior(x)), (p, vae.prior())):
        sites = sum(trace.nodes[name]["log_prob"] for name in names)
        assert sites.shape == shape
        assert_close(joint.log_prob(z), sites, rtol=1e-12, atol=1e-12)
    assert_close(vae.likelihood(z).log_prob(x), p.nodes["x"]["log_prob"], rtol=1e-12, atol=1e-12)


def _chains():
    """Two layers of one latent each, every kind of chain."""
    return {
        "prior": _vae("top-down", (1, 1)).prior(),
        "bottom-up": _vae("bottom-up", (1, 1)).posterior(_images(1)),
        "top-down": _vae("top-down", (1, 1)).posterior(_images(1)),
    }


def _quadrature(chain):
    """Nodes (M, 2), the weights of the trapezoidal rule with the density, (M,)."""
    nodes = torch.linspace(-14, 14, 500, dtype=torch.double)
    grid = torch.cartesian_prod(nodes, nodes)
    return grid, chain.log_prob(grid[:, None] if chain.batch_shape else grid).exp().flatten() * (28 / 499) ** 2


@pytest.mark.parametrize("name", _chains())
@torch.no_grad()
def test_the_density_of_a_chain_integrates_to_one(name):
    _, mass = _quadrature(_chains()[name])
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", _chains())
@torch.no_grad()
def test_draws_of_a_chain_have_the_moments_of_its_density(name):
    chain = _chains()[name]
    grid, mass = _quadrature(chain)
    pyro.set_rng_seed(0)
    z = chain.sample((40_000,)).reshape(-1, 2)
    for function in (lambda z: z[:, 0], lambda z: z[:, 1], lambda z: z[:, 0] * z[:, 1], lambda z: z[:, 0].square()):
        values = function(z)
        stderr = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean() - (mass * function(grid)).sum())) < 5 * stderr


@pytest.mark.parametrize("guide", GUIDES)
def test_the_draws_of_one_seed_are_the_same_as_sites_and_as_a_vector(guide):
    vae, x = _vae(guide), _images()
    torch.manual_seed(0)
    sites = poutine.trace(vae.guide).get_trace(x)
    torch.manual_seed(0)
    expected = torch.cat([sites.nodes[f"z_{layer}"]["value"] for layer in (1, 2, 3)], dim=-1)
    assert torch.equal(vae.posterior(x).rsample(), expected)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_batch_is_as_many_batches_of_one(guide):
    vae, x = _vae(guide), _images()
    q, p = _traces(vae, x)
    for image in range(len(x)):
        z = {name: q.nodes[name]["value"][image : image + 1] for name in LATENTS}
        for program, whole in ((vae.guide, q), (vae.model, p)):
            alone = poutine.trace(poutine.condition(program, z)).get_trace(x[image : image + 1])
            expected = sum(whole.nodes[name]["log_prob"][image] for name in whole.nodes if name in (*LATENTS, "x"))
            assert_close(alone.log_prob_sum(), expected, rtol=1e-12, atol=1e-12)


LATENTS = ("z_1", "z_2", "z_3")


@pytest.mark.parametrize("guide", GUIDES)
def test_the_encoder_runs_once_an_image_and_never_once_a_particle(guide):
    vae, x = _vae(guide), _images()
    seen = []
    vae.posterior.net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    log_weights(vae.model, vae.guide, x, 5)
    assert seen == [x.shape]


@pytest.mark.parametrize("sees_all", [False, True])
@pytest.mark.parametrize("guide", GUIDES)
def test_every_named_parameter_has_a_gradient(guide, sees_all):
    vae = _vae(guide, sees_all=sees_all, top=Mixture(1, components=2))
    per_image.elbo(vae.model, vae.guide, _images()).backward()
    assert [name for name, w in vae.named_parameters() if w.grad is None or not w.grad.any()] == []


# --- Training ---


@pytest.mark.parametrize("guide", GUIDES)
def test_doubly_reparametrized_gradients_have_the_expectation_of_the_plain_ones(guide):
    """Also for what a ladder shares with its prior. Means of 30 gradients of 1,000 images, entry by entry."""
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide, widen=1.4), oracle.draw(10).repeat(100, 1)
    pyro.set_rng_seed(0)
    weights = [w for w in vae.parameters() if w.requires_grad]
    means, errors = [], []
    for objective in (per_image.iwae, per_image.dreg):
        found = []
        for _ in range(30):
            loss = objective(vae.model, vae.guide, x, num_particles=3)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        gradients = torch.stack(found)
        means.append(gradients.mean(0))
        errors.append(gradients.std(0) / math.sqrt(30))
    assert float(means[0].abs().max()) > 0.05  # else there is nothing to compare
    assert ((means[0] - means[1]).abs() <= 5 * torch.hypot(*errors) + 1e-12).all()


@pytest.mark.parametrize("guide", GUIDES)
def test_the_gradient_without_the_score_has_the_expectation_of_pyros(guide):
    """Against Pyro's own estimator, over 60 batches of 20 images and 50 particles, parameter by parameter."""
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide, widen=1.5), oracle.draw(20)
    pyro.set_rng_seed(0)

    def gradients(loss) -> Tensor:
        weights = [w for w in vae.parameters() if w.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    pyros = Trace_ELBO(num_particles=50, vectorize_particles=True)
    ours = [gradients(per_image.stl(vae.model, vae.guide, x, num_particles=50)) for _ in range(60)]
    theirs = [gradients(pyros.differentiable_loss(vae.model, vae.guide, x) / len(x)) for _ in range(60)]
    (a, a_error), (b, b_error) = ((g.mean(0), g.std(0) / 60**0.5) for g in map(torch.stack, (ours, theirs)))
    assert ((a - b).abs() <= 5 * torch.hypot(a_error, b_error) + 1e-12).all()
    assert a.abs().max() > 0.1


def test_where_the_guide_adds_nothing_to_a_narrow_prior_its_layer_has_no_gradient():
    """q(z_1 | x, z_2) = p(z_1 | z_2) whatever the prior's weights are, and no pixel sees z_1: each draw says 0.

    A score left out would be of the order of 1 / s = 1,000 in its place.
    """
    oracle = replace(TwoLayers.random(), s=torch.full((2,), 1e-3, dtype=torch.double))
    vae, x = oracle.vae("top-down"), oracle.draw(5)
    vae.posterior.readouts[0] = _normal(torch.eye(2).double(), torch.zeros(2).double(), torch.full((2,), 1e12).double())
    with torch.no_grad():
        vae.likelihood.net.net.output.weight.zero_()
    pyro.set_rng_seed(0)
    loss = per_image.stl(vae.model, vae.guide, x)
    of_the_layer = torch.autograd.grad(loss, list(vae.prior.layers.parameters()), allow_unused=True)
    assert max(g.abs().max() for g in of_the_layer) < 1e-6


@pytest.mark.parametrize("guide", GUIDES)
def test_training_from_a_wrong_posterior_comes_near_the_evidence(guide):
    """The guide starts at zero weights; the model is held at the truth, whose evidence is the best that can be had."""
    oracle = TwoLayers.random()
    vae, x = oracle.vae(guide), oracle.draw(200)
    for w in [*vae.prior.parameters(), *vae.likelihood.parameters()]:
        w.requires_grad_(False)
    with torch.no_grad():
        for w in vae.posterior.parameters():
            w.mul_(0.3)
    pyro.set_rng_seed(0)
    before = _gap(vae, x, oracle)
    fit(vae, x, epochs=40, batch_size=50, learning_rate=0.03, warmup_epochs=0, transform=as_stored)
    after = _gap(vae, x, oracle)
    assert before > 1.0
    assert -1e-2 < after < 0.05


@torch.no_grad()
def _gap(vae, x, oracle):
    """log p(x) - ELBO, nats per image."""
    return float((oracle.log_evidence(x) - log_weights(vae.model, vae.guide, x, 50)).mean())


# --- Weights in their places ---


@pytest.mark.parametrize("guide", GUIDES)
def test_weights_are_stored_once(guide):
    places = [w.data_ptr() for w in _vae(guide).state_dict().values()]
    assert len(set(places)) == len(places)


def test_parameters_put_in_the_place_of_the_priors_reach_the_ladder():
    """As captured steps and held guides put them."""
    vae, x = _vae("top-down"), _images()
    z = vae.posterior(x).sample()
    moved = {name: w + 1.0 for name, w in vae.named_parameters() if name.startswith("prior.layers")}
    found = torch.func.functional_call(_LogQ(vae), {f"vae.{name}": w for name, w in moved.items()}, (x, z))
    with torch.no_grad():
        for name, w in moved.items():
            vae.get_parameter(name).copy_(w)
    assert_close(found, vae.posterior(x).log_prob(z), rtol=1e-12, atol=0)


class _LogQ(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x, z):
        return self.vae.posterior(x).log_prob(z)


def test_free_bits_refuses_a_guide_that_draws_against_the_models_order() -> None:
    """KL(q(z_1 | x) || p(z_1 | z_2)) is then no term of the ELBO: z_2 depends on z_1."""
    vae = _vae("bottom-up", (3, 2))
    with pytest.raises(ValueError, match=r"guide: expected latent sites in the model's order \['z_2', 'z_1'\], got"):
        per_image.free_bits(vae.model, vae.guide, _images(), free_nats=0.1)
