"""log p(x) and its errors, against closed forms and quadrature."""

from __future__ import annotations

import math
import subprocess
import sys

import pyro
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae, quadrature_log_evidence
from torch import nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, Estimate, importance, log_evidence
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime.errors import NotFinite


@pytest.mark.parametrize("num_particles", [1, 3, 50])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_exact_posterior_gives_the_evidence_for_every_number_of_particles(oracle, num_particles, chunk):
    vae, x = oracle.vae(), oracle.draw(5)
    bound = log_evidence(vae.model, vae.guide, x, num_particles=num_particles, chunk=chunk)
    assert_close(bound, oracle.log_evidence(x), rtol=1e-9, atol=0)


def test_with_the_exact_posterior_elbo_bound_and_evidence_are_one_number(oracle):
    vae, x = oracle.vae(), oracle.draw(5)
    result = importance(vae.model, vae.guide, x, num_particles=10)
    assert_close(result.elbo, result.log_evidence, rtol=1e-9, atol=0)
    assert_close(result.ess, torch.full((5,), 10.0, dtype=torch.double), rtol=1e-9, atol=0)
    assert (result.monte_carlo_stderr < 1e-6).all()
    assert (result.bias < 1e-9).all()
    assert f"L_10 {float(oracle.log_evidence(x).mean()):.2f} ± " in repr(result)


@pytest.mark.parametrize(("widen", "shift"), [(1.4, 0.0), (0.6, 0.0), (1.0, 0.8), (1.2, -0.5)])
def test_a_wrong_guide_lowers_the_elbo_by_its_divergence_from_the_posterior(oracle, widen, shift):
    vae, x = oracle.vae(widen=widen, shift=shift), oracle.draw(5)
    gap = 3 * (widen**2 + shift**2 - 1 - math.log(widen**2)) / 2  # KL(q || p(z | x)), three latents
    torch.manual_seed(0)
    draws = torch.stack([importance(vae.model, vae.guide, x, num_particles=200).elbo for _ in range(50)])
    error = draws.std(0) / math.sqrt(50)
    assert ((draws.mean(0) - (oracle.log_evidence(x) - gap)).abs() < 5 * error).all()


def test_reconstruction_and_kl_are_their_closed_forms(oracle):
    vae, x = oracle.vae(widen=1.3, shift=0.3), oracle.draw(5)
    torch.manual_seed(0)
    draws = [importance(vae.model, vae.guide, x, num_particles=200) for _ in range(50)]
    for name, exact in (
        ("reconstruction", oracle.reconstruction(x, widen=1.3, shift=0.3)),
        ("kl", oracle.kl(x, widen=1.3, shift=0.3)),
    ):
        values = torch.stack([getattr(draw, name) for draw in draws])
        assert ((values.mean(0) - exact).abs() < 5 * values.std(0) / math.sqrt(50)).all(), name


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_bernoulli_decoder_agrees_with_quadrature(latent_dim):
    vae = bernoulli_vae(latent_dim=latent_dim)
    torch.manual_seed(1)
    x = torch.bernoulli(torch.full((12, 12), 0.5, dtype=torch.double))
    exact = quadrature_log_evidence(vae, x, latent_dim=latent_dim)
    assert_close(exact, quadrature_log_evidence(vae, x, latent_dim=latent_dim, points=300), rtol=0, atol=1e-9)
    result = importance(vae.model, vae.guide, x, num_particles=20_000)
    assert ((result.log_evidence - exact).abs() < 5 * result.monte_carlo_stderr).all()
    assert (result.monte_carlo_stderr < 0.05).all()


@pytest.mark.thorough
def test_memory_grows_neither_with_particles_nor_with_images():
    """In a process of its own: the default decoder, 100 times the particles, then 60 times the images."""
    program = """
import resource, torch
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options
vae = build_vae(Options(), (1, 28, 28)).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
evaluate(vae, torch.zeros(5, 1, 28, 28), num_particles=2000, seed=0)
before = peak()
evaluate(vae, torch.zeros(1, 1, 28, 28), num_particles=200_000, seed=0)
evaluate(vae, torch.zeros(300, 1, 28, 28), num_particles=2000, seed=0)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 150  # MB


def test_the_monte_carlo_error_is_the_spread_over_repeated_draws():
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(widen=1.4), oracle.draw(6)
    torch.manual_seed(0)
    draws = [importance(vae.model, vae.guide, x, num_particles=400) for _ in range(200)]
    spread = torch.stack([draw.log_evidence for draw in draws]).std(0)
    claimed = torch.stack([draw.monte_carlo_stderr for draw in draws]).mean(0)
    # The spread of 200 draws has a relative standard error of 5%.
    assert ((claimed / spread - 1).abs() < 0.25).all()


def test_an_image_is_unreliable_where_the_guide_misses_its_posterior():
    oracle = LinearGaussian.random()
    x = oracle.draw(200)
    near_vae, far_vae = oracle.vae(widen=1.1), oracle.vae(shift=6.0)
    torch.manual_seed(0)
    near = importance(near_vae.model, near_vae.guide, x, num_particles=1000)
    far = importance(far_vae.model, far_vae.guide, x, num_particles=1000)
    assert not near.unreliable().any()
    assert far.unreliable().double().mean() > 0.3  # with a weight or two that matter the jackknife is noisy itself
    assert far.ess.median() < 4


def test_k_hat_above_its_alarm_does_not_make_an_image_unreliable():
    """The jackknife decides, in nats: a narrow guide in one dimension has k = 1 - 0.5^2, and loses next to nothing."""
    oracle = LinearGaussian.random(D=4, L=1)
    vae, x = oracle.vae(widen=0.5), oracle.draw(100)
    torch.manual_seed(0)
    result = importance(vae.model, vae.guide, x, num_particles=20_000)
    assert (result.pareto_k > 0.7).double().mean() > 0.2
    assert not result.unreliable().any()


def test_with_heavy_tails_the_jackknife_sees_only_part_and_the_rise_shows_it():
    """Why neither is called what is lacking: with k near 1 the bias falls far more slowly than 1 / S."""
    oracle = LinearGaussian.random(D=12, L=8)
    vae, x = oracle.vae(widen=0.4), oracle.draw(200)
    torch.manual_seed(0)
    result = importance(vae.model, vae.guide, x, num_particles=1000)
    lacking = (oracle.log_evidence(x) - result.log_evidence).mean()
    assert result.bias.mean() < lacking / 2
    assert result.tenfold_gain.mean() > lacking / 5
    assert result.pareto_k.median() > 0.5


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_weights_at_infinity_are_never_called_reliable(oracle, value):
    vae, x = oracle.vae(), oracle.draw(3)

    def model(x):
        vae.model(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.factor("f", torch.full((len(x),), value))

    if value > 0:
        with pytest.raises(NotFinite, match=r"got NaN or \+infinity"):
            importance(model, vae.guide, x, num_particles=30)
    else:
        result = importance(model, vae.guide, x, num_particles=30)
        assert (result.log_evidence == -math.inf).all()
        assert result.unreliable().all()


def test_one_particle_claims_no_error_of_its_own(oracle):
    vae = oracle.vae()
    result = importance(vae.model, vae.guide, oracle.draw(3), num_particles=1)
    assert result.monte_carlo_stderr.isnan().all()
    assert result.bias.isnan().all()
    assert result.unreliable().all()


@pytest.mark.parametrize(
    ("argument", "value"), [("num_particles", 0), ("num_particles", -3), ("chunk", 0), ("chunk", -1)]
)
def test_numbers_out_of_range_are_refused(oracle, argument, value):
    vae = oracle.vae()
    options = {"num_particles": 3, "chunk": None} | {argument: value}
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got {value}"):
        importance(vae.model, vae.guide, oracle.draw(2), **options)


def test_an_estimate_is_the_mean_over_images_with_its_standard_error():
    values = torch.tensor([1.0, 2.0, 6.0])
    estimate = Estimate.mean_of(values, 5)
    assert (estimate.mean, estimate.n, estimate.num_particles) == (3.0, 3, 5)
    assert estimate.stderr == pytest.approx(math.sqrt(7.0 / 3))


def test_a_ragged_last_group_weighs_by_its_images_and_not_as_a_group(monkeypatch):
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(), oracle.draw(5)
    x[4] += 30.0  # alone in its group: the mean of the groups' means would weigh it as much as the other four
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 4 * 3)
    bound = log_evidence(vae.model, vae.guide, x, num_particles=3)
    assert Estimate.mean_of(bound, 3).mean == pytest.approx(float(oracle.log_evidence(x).sum() / 5), rel=1e-9)


class _BatchNormNet(nn.Module):
    """A network that an evaluation would change if it ran in training mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(inputs), nn.Dropout(0.5), nn.Linear(inputs, outputs)

    def forward(self, x):
        flat = self.norm(x.reshape(-1, x.shape[-1]))
        return self.linear(self.dropout(flat)).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_weights_buffers_mode_and_random_numbers_as_they_were(training):
    vae = VAE(
        StandardNormal(2),
        Conditional(_BatchNormNet(2, 12), Bernoulli((12,))),
        Conditional(_BatchNormNet(12, 4), DiagonalNormal(2)),
    ).train(training)
    x = torch.bernoulli(torch.full((9, 12), 0.5))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    rng = torch.get_rng_state()
    first = evaluate(vae, x, num_particles=10, seed=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert vae.training == training
    assert all(module.training == training for module in vae.modules())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert torch.equal(evaluate(vae, x, num_particles=10, seed=3).log_evidence, first.log_evidence)
