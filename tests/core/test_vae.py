"""The VAE as a pair of Pyro programs, and its parts."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from ppl_vae import VAE, Conditional
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.parts.registry import NETWORKS
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options


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


@pytest.mark.parametrize(
    "shape", [(12,), (6, 12), (1, 12), (6, 1), (6, 4, 3), (6, 1, 4, 1), (1, 1, 3, 4), (2, 6, 1, 4, 3)]
)
@pytest.mark.parametrize("program", ["model", "guide"])
def test_images_of_another_shape_are_refused_and_never_broadcast(program, shape):
    with pytest.raises(ValueError, match="expected shape"):
        getattr(_vae(), program)(torch.zeros(shape))


def _registered(vae):
    """The manual's lines: SVI finds parameters in the store, where pyro.module puts them."""

    def model(x):
        pyro.module("vae", vae)
        return vae.model(x)

    def guide(x):
        pyro.module("vae", vae)
        return vae.guide(x)

    return model, guide


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


def test_a_prior_and_a_posterior_of_different_sizes_are_refused():
    likelihood = Conditional(MLP(5, 6, hidden=()), Bernoulli((6,)))
    posterior = Conditional(MLP((6,), 8, hidden=()), DiagonalNormal(4))
    with pytest.raises(ValueError, match=r"posterior: expected latents of the prior's shape \(5,\), got \(4,\)"):
        VAE(StandardNormal(5), likelihood, posterior)
