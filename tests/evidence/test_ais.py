"""Annealed importance sampling against known evidence, quadrature and plain PyTorch."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence
from test_hierarchy import GUIDES, TwoLayers
from torch.testing import assert_close

from ppl_vae import Conditional
from ppl_vae.evidence.ais import Annealing, lower, lower_bound, pilot, simulate, temperatures, upper, upper_bound
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import inverse_autoregressive_flow
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.weights import DeterministicGuide

GENERAL = LinearGaussian.random(orthogonal=False)
POSTERIORS = {"good": {}, "too narrow": {"widen": 0.4}, "shifted": {"shift": 2.0}}
SHAPE = (1, 8, 8)


def _fixed(num_temperatures, num_images, *, step=0.4, num_leapfrogs=2, start="guide"):
    """An annealing without a pilot."""
    sizes = torch.full((num_temperatures - 1, num_images), step, dtype=torch.double)
    return Annealing(temperatures(num_temperatures), sizes, num_leapfrogs, start)


def _both(vae, x, z, *, num_temperatures, num_chains=8, start="guide"):
    """The two bounds, (B,) each."""
    betas = temperatures(num_temperatures)
    annealing = pilot(vae, x, betas=betas, num_leapfrogs=3, num_chains=num_chains, start=start)
    below = lower(vae, x, annealing, num_chains=num_chains)
    return lower_bound(below.log_w), upper_bound(upper(vae, x, z, annealing, num_chains=num_chains).log_w)


def _mean_and_stderr(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _built(dtype=torch.double, **words):
    small = PLAIN | {"hidden": (5,), "channels": (2, 3), "latent_dim": 3, "network": "mlp"}
    pyro.set_rng_seed(0)
    return build_vae(Options(**(small | words)), SHAPE).to(dtype).eval()


def _binary(num_images=2, dtype=torch.double):
    generator = torch.Generator().manual_seed(1)
    return torch.bernoulli(torch.full((num_images, *SHAPE), 0.3), generator=generator).to(dtype)


# --- The weights ---


@pytest.mark.thorough
@pytest.mark.parametrize("start", ["guide", "prior", "normal"])
def test_forward_weights_are_unbiased(start):
    torch.manual_seed(0)
    x = GENERAL.draw(3)
    log_w = lower(GENERAL.vae(widen=1.3), x, _fixed(8, 3, start=start), num_chains=20_000).log_w
    ratio = (log_w - GENERAL.log_evidence(x)).exp()
    stderr = ratio.std(0) / math.sqrt(len(ratio))
    assert (stderr < 0.1).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * stderr).all()


def test_so_are_the_inverse_weights_of_reverse_chains():
    torch.manual_seed(0)
    x = GENERAL.draw(1)
    A, C = GENERAL.posterior_map()
    z = torch.distributions.MultivariateNormal((x - GENERAL.b) @ A.T, C).sample((20_000,))[:, 0]
    many = x.expand(len(z), -1).contiguous()
    log_w = upper(GENERAL.vae(widen=0.8), many, z, _fixed(4, len(z)), num_chains=1).log_w[0]
    ratio = (GENERAL.log_evidence(x) - log_w).exp()
    mean, stderr = _mean_and_stderr(ratio)
    assert stderr < 0.1
    assert abs(mean - 1) < 4 * stderr


def test_with_the_exact_guide_every_weight_is_the_evidence():
    torch.manual_seed(0)
    exact = LinearGaussian.random(orthogonal=True)
    vae = exact.vae()
    x, z = simulate(vae, 4)
    for result in (lower(vae, x, _fixed(10, 4), num_chains=5), upper(vae, x, z, _fixed(10, 4), num_chains=5)):
        assert result.log_w.dtype == torch.double
        assert_close(result.log_w, exact.log_evidence(x).expand(5, 4), rtol=0, atol=1e-11)


def test_a_few_lines_of_plain_torch_give_the_same_weights():
    vae = bernoulli_vae(latent_dim=2)
    x = torch.bernoulli(torch.full((3, 12), 0.5, dtype=torch.double), generator=torch.Generator().manual_seed(0))
    betas, T, L, C, B = temperatures(6), 6, 3, 4, 3
    steps = torch.linspace(0.2, 1.5, (T - 1) * B, dtype=torch.double).reshape(T - 1, B)
    torch.manual_seed(7)
    ours = lower(vae, x, Annealing(betas, steps, L, "guide"), num_chains=C)

    torch.manual_seed(7)
    loc, feature = vae.posterior.net(x).detach().chunk(2, dim=-1)
    scale = (7 * (feature / 7).tanh()).exp()

    def normal(z, loc, scale):
        return (-(((z - loc) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2).sum(-1)

    def log_q_and_log_p(z):
        rate = vae.likelihood.net(z).sigmoid()
        log_x = (x * rate.log() + (1 - x) * (1 - rate).log()).sum(-1)
        return normal(z, loc, scale), normal(z, torch.zeros(2), torch.ones(2)) + log_x

    def log_pi(z, beta):
        log_q, log_p = log_q_and_log_p(z)
        return (1 - beta) * log_q + beta * log_p

    def slope(z, beta):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(log_pi(z, beta).sum(), z)[0]

    z = loc + scale * torch.randn(C, B, 2, dtype=torch.double)
    log_w = torch.zeros(C, B, dtype=torch.double)
    for t in range(1, T + 1):
        log_q, log_p = log_q_and_log_p(z)
        log_w += (betas[t] - betas[t - 1]) * (log_p - log_q)
        if t == T:
            break
        p, u = torch.randn(C, B, 2, dtype=torch.double), torch.rand(C, B, dtype=torch.double)
        e = (steps[t - 1] * (0.7 + 0.6 * torch.rand(C, B, dtype=torch.double)))[..., None] * scale
        new, q = z, p
        for _ in range(L):
            q = q + e / 2 * slope(new, betas[t])
            new = new + e * q
            q = q + e / 2 * slope(new, betas[t])
        log_a = log_pi(new, betas[t]) - log_pi(z, betas[t]) + ((p**2).sum(-1) - (q**2).sum(-1)) / 2
        z = torch.where((u.log() < log_a)[..., None], new, z)
    assert (ours.acceptance < 0.95).any()
    assert_close(ours.log_w, log_w.detach(), rtol=0, atol=1e-9)
    assert_close(ours.z, z, rtol=0, atol=1e-9)


# --- The sandwich ---


@pytest.mark.thorough
@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("guide", POSTERIORS.values(), ids=POSTERIORS)
def test_the_bounds_enclose_the_evidence_and_close(guide, start):
    torch.manual_seed(0)
    vae = GENERAL.vae(**guide)
    x, z = simulate(vae, 40)
    exact, gaps = GENERAL.log_evidence(x), []
    for num_temperatures in (5, 60 if start == "guide" else 120):
        below, above = _both(vae, x, z, num_temperatures=num_temperatures, start=start)
        (low, low_stderr), (high, high_stderr) = _mean_and_stderr(below - exact), _mean_and_stderr(above - exact)
        assert low < 3 * low_stderr
        assert high > -3 * high_stderr
        gaps.append((high - low, math.hypot(low_stderr, high_stderr)))
    (coarse, coarse_stderr), (fine, fine_stderr) = gaps
    assert fine < coarse + 3 * math.hypot(coarse_stderr, fine_stderr)
    assert abs(fine) < 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("posterior", ["diagonal", "iaf"])
def test_the_lower_bound_comes_to_quadrature(posterior):
    torch.manual_seed(0)
    vae = bernoulli_vae(latent_dim=2)
    if posterior == "iaf":
        flow = inverse_autoregressive_flow(3, context_dim=2, num_layers=2, hidden=(4,))
        vae = bernoulli_vae(latent_dim=3)
        vae.posterior = Conditional(MLP(12, flow.num_features, hidden=()), flow).double()
    x, _ = simulate(vae, 4)
    exact = quadrature_log_evidence(vae, x, latent_dim=3 if posterior == "iaf" else 2, points=60)
    annealing = pilot(vae, x, betas=temperatures(100), num_leapfrogs=3, num_chains=8)
    assert annealing.start == ("normal" if posterior == "iaf" else "guide")
    log_w = lower(vae, x, annealing, num_chains=64).log_w
    ratio = (log_w - exact).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / 8 + 1e-3).all()
    assert (ratio.std(0) < 1).all()


@pytest.mark.thorough
@pytest.mark.parametrize("guide", GUIDES)
def test_so_do_models_of_several_layers(guide):
    torch.manual_seed(0)
    model = TwoLayers.random()
    vae, x = model.vae(guide), model.draw(3)
    annealing = pilot(vae, x, betas=temperatures(60), num_leapfrogs=3, num_chains=8)
    ratio = (lower(vae, x, annealing, num_chains=200).log_w - model.log_evidence(x)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(200) + 1e-9).all()


# --- The pilot ---


@pytest.mark.thorough
def test_step_sizes_come_to_the_acceptance_that_is_asked_for():
    torch.manual_seed(0)
    vae, x = _built(latent_dim=20), _binary()
    annealing = pilot(vae, x, betas=temperatures(200), num_leapfrogs=3, num_chains=32)
    acceptance = lower(vae, x, annealing, num_chains=32).acceptance
    assert ((acceptance.mean(0) > 0.6) & (acceptance.mean(0) < 0.8)).all()


def test_chains_do_not_move_the_step_sizes_that_a_pilot_froze():
    torch.manual_seed(0)
    vae, x = GENERAL.vae(widen=0.4), GENERAL.draw(3)
    annealing = pilot(vae, x, betas=temperatures(30), num_leapfrogs=2, num_chains=4)
    before = annealing.step_sizes.clone()
    accepted = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        accepted.append(lower(vae, x, annealing, num_chains=4).acceptance)
        assert torch.equal(annealing.step_sizes, before)
    assert not torch.equal(*accepted)


@pytest.mark.parametrize("steepness", [0.0, 4.0])
def test_temperatures_rise_from_0_to_1_and_are_symmetric(steepness):
    betas = temperatures(10, steepness=steepness)
    assert (betas[0], betas[-1]) == (0, 1)
    assert (betas.diff() > 0).all()
    assert_close(betas + betas.flip(0), torch.ones(11, dtype=torch.double))
    assert (betas.diff()[0] < 0.99 * betas.diff()[5]) == (steepness > 0)


# --- Graphs ---


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ({}, torch.double),
        ({}, torch.float),
        ({"prior": "flow", "prior_layers": 1, "prior_hidden": (4,)}, torch.double),
        ({"prior": "vamp", "prior_components": 3}, torch.double),
        ({"posterior": "full"}, torch.double),
        ({"posterior": "flow", "posterior_flow": "iaf", "posterior_layers": 1, "posterior_hidden": (4,)}, torch.double),
        ({"upper_latents": (2,), "upper_hidden": (4,)}, torch.double),
    ],
    ids=str,
)
def test_one_graph_gives_what_runs_as_it_stands(graphs, words, dtype):
    vae, x, found = _built(dtype, **words), _binary(dtype=dtype), []
    for compile in (False, True):
        torch.manual_seed(3)
        annealing = pilot(vae, x, betas=temperatures(5), num_leapfrogs=2, num_chains=3, compile=compile)
        below = lower(vae, x, annealing, num_chains=3, compile=compile)
        above = upper(vae, x, below.z[0].clone(), annealing, num_chains=3, compile=compile)
        found.append([annealing.step_sizes, below.log_w, above.log_w])
    for captured, plain in zip(found[1], found[0], strict=True):
        assert_close(captured, plain, rtol=0, atol=1e-8 if dtype == torch.double else 1e-2)
    assert len(graphs) == 1


def test_a_graph_sees_weights_that_change_later(graphs):
    vae, x = _built(), _binary()
    for _ in range(2):
        found = []
        for compile in (False, True):
            torch.manual_seed(3)
            found.append(lower(vae, x, _fixed(4, 2), num_chains=3, compile=compile).log_w)
        assert_close(found[1], found[0])
        with torch.no_grad():
            vae.likelihood.net.output.bias.add_(1)
    assert len(graphs) == 1


# --- What is left as it was, and what is refused ---


def test_a_deterministic_guide_is_refused():
    with pytest.raises(DeterministicGuide, match="an autoencoder has no log-likelihood"):
        pilot(_built(posterior="delta"), _binary(), betas=temperatures(3), num_leapfrogs=1, num_chains=2)


def test_simulated_images_have_the_moments_of_the_model():
    torch.manual_seed(0)
    x, z = simulate(GENERAL.vae(), 5000)
    residual = (x - GENERAL.b - z @ GENERAL.W.T) / GENERAL.scale
    for value in (residual, z):
        assert (value.mean(0).abs() < 4 / math.sqrt(5000)).all()
        assert ((value.var(0) - 1).abs() < 4 * math.sqrt(2 / 5000)).all()
