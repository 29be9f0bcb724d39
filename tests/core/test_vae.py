"""The VAE as a pair of Pyro programs, and its parts."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, bernoulli_vae
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.testing import assert_close

from ppl_vae import VAE, Conditional
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import MAX_LOG_SCALE, DiagonalNormal, bounded_log_scale
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import NETWORKS, PLAIN, Options


def _vae(E=(1, 4, 3), L=2):
    return VAE(
        StandardNormal(L),
        Conditional(MLP(L, Bernoulli(E).num_features, hidden=(5,)), Bernoulli(E)),
        Conditional(MLP(E, 2 * L, hidden=(5,)), DiagonalNormal(L)),
    )


def test_model_and_guide_have_one_number_an_image_at_each_site():
    vae, x = _vae(), torch.bernoulli(torch.full((6, 1, 4, 3), 0.5))
    q = poutine.trace(vae.guide).get_trace(x)
    p = poutine.trace(poutine.replay(vae.model, trace=q)).get_trace(x)
    p.compute_log_prob()
    q.compute_log_prob()
    assert q.nodes["z"]["log_prob"].shape == p.nodes["z"]["log_prob"].shape == p.nodes["x"]["log_prob"].shape == (6,)


def test_the_joint_is_prior_times_likelihood():
    vae, x = _vae(), torch.bernoulli(torch.full((6, 1, 4, 3), 0.5))
    p = poutine.trace(vae.model).get_trace(x)
    z = p.nodes["z"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + vae.likelihood(z).log_prob(x).sum()
    assert_close(p.log_prob_sum(), expected)


@pytest.mark.parametrize(
    "shape", [(12,), (6, 12), (1, 12), (6, 1), (6, 4, 3), (6, 1, 4, 1), (1, 1, 3, 4), (2, 6, 1, 4, 3)]
)
@pytest.mark.parametrize("program", ["model", "guide"])
def test_images_of_another_shape_are_refused_and_never_broadcast(program, shape):
    with pytest.raises(ValueError, match="expected shape"):
        getattr(_vae(), program)(torch.zeros(shape))


def test_a_network_with_too_few_features_is_refused():
    wrong = Conditional(MLP(2, 11, hidden=()), Bernoulli((12,)))
    with pytest.raises(ValueError, match="net: expected 12 features for Bernoulli, got 11"):
        wrong(torch.zeros(4, 2))


def test_the_decoder_takes_a_particle_dimension_and_equals_a_loop():
    vae = bernoulli_vae(latent_dim=2)
    z = torch.randn(3, 4, 2, dtype=torch.double)
    x = torch.bernoulli(torch.full((4, 12), 0.5, dtype=torch.double))
    loop = torch.stack([vae.likelihood(one).log_prob(x) for one in z])
    assert_close(vae.likelihood(z).log_prob(x), loop, rtol=1e-12, atol=0)


def test_parts_return_distributions_over_events():
    vae = _vae()
    assert vae.prior().event_shape == vae.posterior(torch.zeros(6, 1, 4, 3)).event_shape == (2,)
    assert vae.likelihood(torch.zeros(5, 6, 2)).event_shape == (1, 4, 3)


def test_the_posterior_starts_at_the_priors_scale():
    assert_close(DiagonalNormal(2)(torch.zeros(4)).base_dist.scale, torch.ones(2))


@pytest.mark.parametrize("feature", [-1e30, -100.0, 0.0, 100.0, 1e30])
def test_the_posterior_scale_is_positive_and_finite_for_any_feature(feature):
    log_scale = bounded_log_scale(torch.tensor(feature))
    assert abs(float(log_scale)) <= MAX_LOG_SCALE
    assert 0 < float(log_scale.exp()) < float("inf")


@pytest.mark.parametrize("feature", [-20.0, -3.0, 0.0, 3.0, 20.0])
def test_the_posterior_scale_has_a_gradient_at_every_usual_feature(feature):
    h = torch.tensor(feature, requires_grad=True)
    gradient = torch.autograd.grad(bounded_log_scale(h), h)[0]
    assert float(gradient) == pytest.approx(1 / torch.cosh(torch.tensor(feature / 7)).item() ** 2, rel=1e-5)
    assert gradient > 0


def _registered(vae):
    """The README's lines: SVI finds parameters in the store, where pyro.module puts them."""

    def model(x):
        pyro.module("vae", vae)
        return vae.model(x)

    def guide(x):
        pyro.module("vae", vae)
        return vae.guide(x)

    return model, guide


def test_plain_pyro_svi_trains_the_same_pair():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(shift=2.0).float(), oracle.draw(64).float()

    svi = SVI(*_registered(vae), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    before = {name: weights.clone() for name, weights in vae.named_parameters() if weights.requires_grad}
    losses = [svi.step(x) / len(x) for _ in range(300)]
    assert all((dict(vae.named_parameters())[name] != weights).any() for name, weights in before.items())
    assert sum(losses[-20:]) / 20 < losses[0] - 5.0
    pyro.clear_param_store()


@pytest.mark.parametrize("network", NETWORKS)
def test_plain_pyro_svi_moves_every_weight_of_every_network(network):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = build_vae(Options(**PLAIN, network=network, hidden=(6,), channels=(3, 4), latent_dim=2), (2, 8, 8))
    x = (torch.rand(16, 2, 8, 8) < 0.5).float()

    before = {name: weights.clone() for name, weights in vae.named_parameters()}
    SVI(*_registered(vae), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()).step(x)
    assert [name for name, w in vae.named_parameters() if torch.equal(w, before[name])] == []
    pyro.clear_param_store()


def test_features_keep_their_type_whatever_the_condition_has():
    """Only under autocast are they brought to the type of the data: a latent mean is no byte."""
    net = MLP(6, 4, hidden=())
    encoder = Conditional(Floats(net), DiagonalNormal(2))
    x = torch.arange(12, dtype=torch.uint8).reshape(2, 6)
    assert_close(encoder(x).base_dist.loc, net(x.float())[:, :2])


class Floats(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.float())
