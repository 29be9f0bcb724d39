"""A flow of Zuko as the prior, through Pyro's own adapter: scored by hand, trained eagerly and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from ppl_vae import VAE, Conditional, fit, likelihoods, log_weights, networks, posteriors
from ppl_vae.training import Schedule

zuko = pytest.importorskip("zuko")
E, L = (1, 4, 4), 3


class ZukoPrior(nn.Module):
    """p(z) by a flow of Zuko."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self):
        from pyro.contrib.zuko import ZukoToPyro

        return ZukoToPyro(self.flow())


def make_vae(kind: str) -> VAE:
    torch.manual_seed(0)
    return VAE(
        ZukoPrior(getattr(zuko.flows, kind)(L, transforms=2, hidden_features=[8])),
        Conditional(networks.MLP(L, 16, hidden=(8,)), likelihoods.Bernoulli(E)),
        Conditional(networks.MLP(E, 2 * L, hidden=(8,)), posteriors.DiagonalNormal(L)),
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.bernoulli(torch.full((20, *E), 0.4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["MAF", "NSF"])
def test_log_weights_use_the_flows_own_density(kind, x):
    vae = make_vae(kind)
    torch.manual_seed(2)
    found = log_weights(vae.model, vae.guide, x, 5)
    torch.manual_seed(2)
    q = vae.posterior(x)
    z = q.rsample((5,))
    moments = Independent(Normal(q.base_dist.loc, q.base_dist.scale), 1)
    log_p = vae.prior.flow().log_prob(z) + Independent(Bernoulli(logits=vae.likelihood.net(z)), 1).log_prob(
        x.flatten(1)
    )
    torch.testing.assert_close(found, log_p - moments.log_prob(z), rtol=1e-5, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["MAF", "NSF"])
def test_a_compiled_training_has_the_weights_of_an_eager_one(kind, x):
    weights = []
    for compile in (False, True):
        vae = make_vae(kind)
        torch.manual_seed(3)
        fit(vae, x, epochs=3, schedule=Schedule(batch_size=10), compile=compile)
        weights.append(torch.cat([w.detach().flatten() for w in vae.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights[0], torch.cat([w.detach().flatten() for w in make_vae(kind).parameters()]))
