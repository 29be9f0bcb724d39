"""Bits-back coding: codes as long as the densities say, images that come back, and models that cheat."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from likelihood_cases import CASES, MASSES
from oracles import bernoulli_vae, quadrature_log_evidence
from random_weights import at_random
from torch import nn

from ppl_vae import VAE, Conditional
from ppl_vae.evidence import _bits_back
from ppl_vae.evidence.ans import CELLS, Stack
from ppl_vae.evidence.compression import CannotDecode, compress, compute_fingerprint, decompress
from ppl_vae.evidence.latent_codes import make_latent_codec
from ppl_vae.evidence.pixel_codes import make_pixel_codec
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, HierarchicalVAE, LayeredPrior, TopDown
from ppl_vae.parts import flows, likelihoods
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal, FullNormal, flow_posterior, inverse_autoregressive_flow
from ppl_vae.parts.priors import FlowPrior, Mixture, StandardNormal, VampPrior
from ppl_vae.weights import log_weights

pytest.importorskip("constriction")
L, D = 4, 12


def conditional(inputs, family):
    return Conditional(MLP(inputs, family.num_features, hidden=(6,)), family)


def flow_prior(coupling, seed=0):
    torch.manual_seed(seed)
    return at_random(FlowPrior(L, coupling=coupling, num_layers=3, hidden=(8,)), size=0.1).float()


def vamp(family=DiagonalNormal):
    torch.manual_seed(0)
    return VampPrior(at_random(conditional(D, family(L)), size=0.3).float(), (D,), components=5)


def layered_prior():
    torch.manual_seed(0)
    return at_random(LayeredPrior(StandardNormal(2), [conditional(2, DiagonalNormal(L))])).float()


PRIORS = {
    "standard normal": lambda: StandardNormal(L),
    "mixture": lambda: at_random(Mixture(L, components=3)).float(),
    "vamp": vamp,
    "vamp of full normals": lambda: vamp(FullNormal),
    "affine flow": lambda: flow_prior(flows.affine_coupling),
    "spline flow": lambda: flow_prior(flows.spline_coupling),
    "layers": layered_prior,
}
GUIDES = {"diagonal": DiagonalNormal, "full": FullNormal}


def nats(stack):
    return 32 * stack.num_words * math.log(2)


def in_double(module):
    module = copy.deepcopy(module).double()
    if isinstance(module, VampPrior):
        module._posterior[0].double()
    return module


# --- Latents ---


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_a_code_of_latents_is_as_long_as_the_density_says(name):
    """Within 0.01 nats per vector of -log p(z) for the volume of a cell, in double precision; pop inverts push."""
    torch.manual_seed(1)
    module = PRIORS[name]()
    prior = module()
    z = prior.sample((4000,))
    cells = np.floor(z.double().numpy() * CELLS).astype(np.int64)
    centers = torch.from_numpy((cells + 0.5) / CELLS)
    stack, codec, found = Stack.make_random(10_000, 0), make_latent_codec(prior, is_far=True), np.zeros_like(cells)
    before, words = nats(stack), stack.words
    codec.push(stack, cells)
    length = nats(stack) - before
    expected = -float(in_double(module)().log_prob(centers).sum()) + cells.size * math.log(CELLS)
    assert abs(length - expected) / len(cells) < 0.01
    codec.pop(stack, found)
    assert np.array_equal(found, cells)
    assert np.array_equal(stack.words, words)


@pytest.mark.parametrize("name", GUIDES)
@torch.no_grad()
def test_latents_that_are_popped_follow_the_guide(name):
    """Bits become draws: their noise has mean 0 and covariance I, and they take as many as the density says."""
    torch.manual_seed(0)
    guide = at_random(conditional(D, GUIDES[name](L)), size=0.5).float()
    q = guide(torch.rand(20_000, D))
    found, stack = np.zeros((20_000, L), dtype=np.int64), Stack.make_random(100_000, 0)
    before = nats(stack)
    make_latent_codec(q).pop(stack, found)
    z = torch.from_numpy((found + 0.5) / CELLS)
    assert (before - nats(stack)) / 20_000 == pytest.approx(
        L * math.log(CELLS) - float(q.log_prob(z.float()).mean()), abs=0.01
    )
    loc, tril = q.mean.double(), (q.scale_tril if name == "full" else q.base_dist.scale.diag_embed()).double()
    u = torch.linalg.solve_triangular(tril, (z - loc)[..., None], upper=False)[..., 0]
    assert u.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert (u.T.cov() - torch.eye(L)).abs().max() < 5 * math.sqrt(2 / 20_000)


def test_a_latent_far_from_the_prior_can_be_pushed():
    cells = np.array([[int(500 * CELLS), -int(40 * CELLS), 3, 0]])
    stack, codec = Stack.make_random(100, 0), make_latent_codec(StandardNormal(L)(), is_far=True)
    codec.push(stack, cells)
    found = np.zeros_like(cells)
    codec.pop(stack, found)
    assert np.array_equal(found, cells)


def test_draws_far_from_the_mean_are_as_rare_as_they_should_be():
    """Of 2 million, none beyond 5.7 scales and about 1 beyond 5, whatever the scale: their weights would be huge."""
    scale = np.random.default_rng(0).uniform(0.1, 1, 2_000_000)
    cells = Stack.make_random(1_500_000, 0).pop_normal(np.zeros(len(scale)), scale, is_far=False)
    u = np.abs((cells + 0.5) / CELLS / scale)
    assert u.max() < 5.7
    assert (u > 5).sum() < 20


def test_a_uniform_code_is_exact_at_every_size():
    sizes = np.array([1, 2, 3, 255, 256, 257, 1000, 2**20 + 1, 2**24 - 1, 2**30 + 12345] * 500)
    values = (np.random.default_rng(0).random(len(sizes)) * sizes).astype(np.int64)
    values[:10] = sizes[:10] - 1
    stack = Stack.make_random(10, 0)
    before = nats(stack)
    stack.push_uniform(values, sizes)
    assert nats(stack) - before == pytest.approx(np.log(sizes).sum(), abs=64, rel=1e-4)
    assert np.array_equal(stack.pop_uniform(sizes), values)


# --- Pixels ---


@pytest.mark.parametrize("word", MASSES)
@torch.no_grad()
def test_a_code_of_pixels_is_as_long_as_the_masses_say(word):
    case, R = CASES[word], 50
    event = (3, 2, 3) if word == "color mixture" else case.event
    p = case.make(event).float()(case.draw(R, event=event).float())
    torch.manual_seed(0)
    x = p.sample()
    stack, pixels = Stack.make_random(10, 0), x.flatten(1).long().numpy()
    before, codec = nats(stack), make_pixel_codec(p, R, int(x.max()))
    claimed = codec.push(stack, pixels)
    expected = -p.log_prob(x).double()
    assert nats(stack) - before == pytest.approx(float(expected.sum()), abs=45, rel=1e-3)
    np.testing.assert_allclose(-claimed, expected, rtol=1e-3, atol=1e-3)
    assert np.array_equal(codec.pop(stack, R, pixels.shape[1]), pixels)


# --- Images ---


class Fractions(nn.Module):
    def forward(self, x):
        return x / 255


def plain(prior="standard normal", guide="diagonal", family=likelihoods.Bernoulli):
    torch.manual_seed(0)
    vae = VAE(PRIORS[prior](), conditional(L, family((D,))), conditional(D, GUIDES[guide](L)))
    if family is not likelihoods.Bernoulli:
        vae.posterior.net = nn.Sequential(Fractions(), vae.posterior.net)
    return tame(vae)


def tame(module):
    """With smaller weights: far from its prior, a guide's latents would cost thousands of nats."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    return module.eval()


def hierarchy(upward, *, decoder_input="bottom", num_layers=3):
    torch.manual_seed(0)
    dims = (L, 3, 2)[:num_layers]
    prior = LayeredPrior(
        StandardNormal(dims[-1]), [conditional(above, DiagonalNormal(n)) for n, above in pairwise(dims)]
    )
    if upward:
        guide = BottomUp([conditional(n, DiagonalNormal(m)) for n, m in zip((D, *dims), dims, strict=False)])
    else:
        guide = TopDown(
            [MLP(n, 5, hidden=(6,)) for n in (D, 5, 5)[:num_layers]],
            [conditional(5, DiagonalNormal(m)) for m in dims],
            prior,
        )
    family = likelihoods.Bernoulli((D,))
    whole = MLP(dims[0] if decoder_input == "bottom" else sum(dims), D, hidden=(6,))
    net = BottomLayerOnly(whole, dims) if decoder_input == "bottom" else whole
    vae = HierarchicalVAE(prior, Conditional(net, family), guide)
    return tame(vae)


def draw_images(vae, num_images):
    torch.manual_seed(3)
    with torch.no_grad():
        return vae.likelihood(vae.prior().sample((num_images,))).sample()


MODELS = {
    **{f"prior {name}": lambda name=name: plain(name) for name in PRIORS if name != "layers"},
    "full guide": lambda: plain(guide="full"),
    "categorical": lambda: plain(family=likelihoods.Categorical),
    "upward": lambda: hierarchy(True),
    "upward, decoder of all": lambda: hierarchy(True, decoder_input="all"),
    "ladder": lambda: hierarchy(False),
}


def decoded(vae, code, x, **options):
    return torch.cat([*decompress(vae, code, event_shape=x.shape[1:], largest=int(x.max()), **options)])


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_images_come_back_and_the_code_is_as_long_as_their_weights_say(name, num_particles):
    vae = MODELS[name]()
    x = draw_images(vae, 300)
    code = compress(vae, x, num_particles=num_particles)
    assert code.net_bits * math.log(2) / len(x) == pytest.approx(-code.log_weights.mean(), abs=64 / len(x) + 0.01)
    assert torch.equal(decoded(vae, code, x, num_particles=num_particles), x)
    assert np.array_equal(compress(vae, x[:9].to(torch.uint8)).words, compress(vae, x[:9]).words)


@pytest.mark.parametrize("name", ["prior mixture", "prior spline flow", "full guide"])
def test_the_rate_is_the_elbo_of_fresh_draws(name):
    """The latents that bits become have the guide's distribution: the mean log-weight is that of its draws."""
    vae = MODELS[name]()
    x = draw_images(vae, 1000)
    torch.manual_seed(0)
    with torch.no_grad():
        fresh = log_weights(vae.model, vae.guide, x, 200)
    found, noise = compress(vae, x).log_weights.mean(), float(fresh.std(0).mean()) / math.sqrt(len(x))
    assert abs(found - float(fresh.mean())) < 5 * noise


def test_the_rate_is_known_where_pixels_do_not_depend_on_latents():
    """-log p(x) + KL(q || p), both in closed form: 12 fair coins, and q = N(1, 1/4) in four dimensions."""

    def guide(x):
        return dist.Normal(torch.ones(len(x), L), 0.5).to_event(1)

    vae = VAE(StandardNormal(L), lambda z: dist.Bernoulli(logits=torch.zeros(*z.shape[:-1], D)).to_event(1), guide)
    code = compress(vae, torch.bernoulli(torch.full((2000, D), 0.5)))
    kl = L * (math.log(2) + (0.25 + 1) / 2 - 0.5)
    # The KL of one draw has a standard deviation: Var[log q - log p] = L (2 (3/8)^2 + (1/2)^2), at most 2.2 nats.
    noise = math.sqrt(L * (2 * 0.375**2 + 0.25) / 2000)
    assert code.net_bits * math.log(2) / 2000 == pytest.approx(D * math.log(2) + kl, abs=5 * noise)


def test_more_particles_bring_the_rate_towards_log_p():
    """With one latent log p(x) is known by quadrature; the rate of K = 30 is between it and the ELBO's."""
    vae = bernoulli_vae(latent_dim=1)
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((400, D), 0.5, dtype=torch.double))
    log_p = float(quadrature_log_evidence(vae, x, latent_dim=1).mean())
    single = vae.float()
    one, many = (compress(single, x.float(), num_particles=K).net_bits * math.log(2) / 400 for K in (1, 30))
    assert -log_p - 0.1 < many < -log_p + (one + log_p) / 4


def test_layers_that_are_drawn_upward_need_fewer_initial_bits():
    """Those of one layer (Bit-Swap), where a ladder needs those of all."""
    x = draw_images(hierarchy(True), 5)
    assert compress(hierarchy(True), x).initial_words < compress(hierarchy(False), x).initial_words


@pytest.mark.parametrize("name", MODELS)
def test_a_fingerprint_is_repeatable_and_notices_the_last_bits_of_weights(name):
    vae = MODELS[name]()
    first, again = compute_fingerprint(vae, largest=1), compute_fingerprint(vae, largest=1)
    assert all(map(np.array_equal, first, again))
    for part in (vae.prior, vae.likelihood, vae.posterior):
        other = copy.deepcopy(vae)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1 + 1e-6)
        changed = compute_fingerprint(vae, largest=1)
        assert not all(map(np.array_equal, first, changed)) or not list(part.parameters())
        vae.load_state_dict(other.state_dict())


# --- Refused, and caught ---


class Inflated(dist.Bernoulli):
    """Every pixel claims 0.1 nats more than it has."""

    def log_prob(self, value):
        return super().log_prob(value) + 0.1


def test_masses_that_do_not_sum_to_one_are_caught(monkeypatch):
    """They are refused; without the check, the code is longer than they claim, by just what they claim too much."""
    whole = plain()
    net = whole.likelihood.net
    vae, x = VAE(whole.prior, lambda z: Inflated(logits=net(z)).to_event(1), whole.posterior), draw_images(whole, 100)
    with pytest.raises(ValueError, match="expected masses that sum to one"):
        compress(vae, x)
    monkeypatch.setattr(_bits_back, "claims_too_much", lambda claimed, coded: False)
    code = compress(vae, x)
    claimed = -code.log_weights.mean()
    assert code.net_bits * math.log(2) / len(x) - claimed == pytest.approx(0.1 * D, abs=64 / len(x) + 0.01)


class BatchStatistics(nn.Module):
    """Batch normalization as in training, by the batch at hand."""

    def forward(self, h):
        return (h - h.mean(-2, keepdim=True)) / (h.std(-2, keepdim=True) + 1e-3)


def test_a_decoder_with_batch_statistics_cannot_be_decoded():
    """Its masses depend on what is decoded later: the statistics of a batch hold the other images' latents."""
    vae = plain()
    vae.likelihood.net = nn.Sequential(vae.likelihood.net, BatchStatistics())
    x = draw_images(plain(), 100)
    with pytest.raises(CannotDecode):
        assert torch.equal(decoded(vae, compress(vae, x), x), x)


def test_other_weights_cannot_decode():
    vae, other = plain(), plain("mixture")
    other.load_state_dict(vae.state_dict() | {k: v for k, v in other.state_dict().items() if "prior" in k})
    x = draw_images(vae, 50)
    with pytest.raises(CannotDecode):
        decoded(other, compress(vae, x), x)


def test_what_has_no_code_is_refused():
    vae, x = plain(), draw_images(plain(), 5)
    vae.posterior = conditional(D, flow_posterior(L, flow=inverse_autoregressive_flow, num_layers=1, hidden=(4,)))
    with pytest.raises(ValueError, match="expected normals"):
        compress(vae, x)
    with pytest.raises(ValueError, match="single precision"):
        compress(plain().double(), x.double())
    with pytest.raises(ValueError, match="outside"):
        compress(plain(), x + 0.5)
