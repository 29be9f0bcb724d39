"""Small VAEs, images and steps for the tests of captured training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import per_image
import pyro
import torch
from fitting import fit
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional
from ppl_vae.objectives import loss_per_image
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import build_objective
from ppl_vae.runtime.captured_step import CapturedStep

ESTIMATORS = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}

SHAPE = (1, 8, 8)

NEVER_CLIP = 1e30


def make_vae(kind=VAE, *, seed=0, D=12, L=2):
    pyro.set_rng_seed(seed)
    return kind(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=(6,), activation=nn.Tanh), Bernoulli((D,))),
        Conditional(MLP(D, 2 * L, hidden=(6,), activation=nn.Tanh), DiagonalNormal(L)),
    ).double()


def make_images(num_images=37, D=12):
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.1, 0.9, D, dtype=torch.double).expand(num_images, D)
    return torch.bernoulli(rates, generator=generator)


def as_stored(values, generator=None):
    return values


def fit_captured(vae, train, validation=None, **options):
    """In float64, with a ragged last batch: five steps an epoch."""
    asked = {"epochs": 4, "batch_size": 8, "transform": as_stored, "warmup_epochs": 1, "compile": True}
    return fit(vae, train, validation, **(asked | options))


def flat_weights(module):
    return torch.cat([w.detach().flatten() for w in module.parameters()])


def copy_state(state):
    tensors, scalars = state.to_tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}, scalars


def make_step(vae, objective, stored, *, batch_size, clip_norm=NEVER_CLIP, transform=as_stored):
    optimizer = torch.optim.Adam(vae.parameters())
    step = CapturedStep(
        lambda x, beta: objective(vae.model, vae.guide, x, beta=beta),
        vae,
        optimizer,
        stored,
        transform,
        batch_size=batch_size,
        clip_norm=clip_norm,
    )
    return step, optimizer


def captured_loss_and_gradient(vae, step, optimizer, index, *, beta, seed):
    """Of a step at learning rate 0 from moments of 0: Adam's first moment is then a tenth of the gradient."""
    for moments in optimizer.state.values():
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    step.total.zero_()
    torch.manual_seed(seed)
    step(index, step.schedule([(0, beta, 0.0, 0.0)])[0])
    return step.total / len(index), [10 * optimizer.state[w]["exp_avg"] for w in vae.parameters()]


def eager_loss_and_gradient(vae, loss_of, x, *, seed):
    torch.manual_seed(seed)
    loss = loss_of(x)
    found = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(vae.parameters(), found, strict=True)]
    return loss.detach(), gradients


def assert_same(captured, eager, *, relative):
    assert_close(captured[0], eager[0].double(), rtol=relative, atol=0)
    for g, expected in zip(captured[1], eager[1], strict=True):
        assert_close(g, expected, rtol=relative, atol=relative * float(expected.abs().max()))


class Case(NamedTuple):
    """A VAE by its words, images that it could have drawn, and its objective."""

    vae: VAE
    x: torch.Tensor
    objective: Callable[..., torch.Tensor]

    @classmethod
    def of(cls, dtype, **words):
        small = PLAIN | {"hidden": (5,), "channels": (2, 3), "latent_dim": 3}
        options = Options(**(small | words))
        pyro.set_rng_seed(0)
        vae = build_vae(options, SHAPE).to(dtype)
        with torch.no_grad():
            drawn = poutine.trace(poutine.uncondition(vae.model)).get_trace(torch.zeros(9, *SHAPE, dtype=dtype))
        return cls(vae, drawn.nodes["x"]["value"], partial(loss_per_image, build_objective(options)))

    def step(self):
        return make_step(self.vae, self.objective, self.x, batch_size=4)

    def eager(self, index, *, beta, seed):
        return eager_loss_and_gradient(
            self.vae, lambda x: self.objective(self.vae.model, self.vae.guide, x, beta=beta), self.x[index], seed=seed
        )


INDEX = torch.tensor([7, 0, 3, 8])


class TwoLayers(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1), q(z1 | x) q(z2 | z1): not a VAE of the package, only its two methods."""

    def __init__(self, *_):
        super().__init__()
        self.down = Conditional(MLP(2, 4, hidden=(5,)), DiagonalNormal(2))
        self.up = Conditional(MLP(2, 4, hidden=(5,)), DiagonalNormal(2))
        self.likelihood = Conditional(MLP(2, 12, hidden=(5,)), Bernoulli((12,)))
        self.posterior = Conditional(MLP(12, 4, hidden=(5,)), DiagonalNormal(2))
        self.top = StandardNormal(2)

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z2 = pyro.sample("z2", self.top())
            z1 = pyro.sample("z1", self.down(z2))
            pyro.sample("x", self.likelihood(z1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z1 = pyro.sample("z1", self.posterior(x))
            pyro.sample("z2", self.up(z1))


def elbo(model, guide, x, beta):
    return per_image.elbo(model, guide, x, beta=beta)


def poison(vae, site):
    with torch.no_grad():
        {"z": vae.posterior, "x": vae.likelihood}[site].net.output.weight.fill_(math.nan)


def copy_moments(vae, state):
    return [state.optimizer.state[w][key].clone() for w in vae.parameters() for key in ("exp_avg", "exp_avg_sq")]


def count_operators(graph, target):
    return sum(node.target is target for node in graph.graph.nodes)


OF_LOG_WEIGHTS = {"iwae": per_image.iwae, "dreg": per_image.dreg, "stl": per_image.stl}


class SharedPosterior(nn.Module):
    """p(z) = q(z | u): one module at two places of the VAE, as in a VampPrior."""

    def __init__(self, posterior, D=12):
        super().__init__()
        self.posterior = posterior
        self.u = nn.Parameter(torch.linspace(0.1, 0.9, D, dtype=torch.double))

    def forward(self):
        return self.posterior(self.u)


def _with_shared_posterior():
    vae = make_vae()
    vae.prior = SharedPosterior(vae.posterior)
    return vae


PRIORS = {"normal": make_vae, "shared": _with_shared_posterior}
