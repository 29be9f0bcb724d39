"""Every objective is a loss of plain Pyro: SVI trains registered programs with it."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from oracles import LinearGaussian
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.testing import assert_close

from ppl_vae import VAE, objectives
from ppl_vae.objectives import Temper, loss_per_image
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options

LOSSES = {
    "Pyro's Trace_ELBO": Trace_ELBO(),
    "Pyro's TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "elbo": objectives.elbo(num_particles=3),
    "STL": objectives.STL(num_particles=2),
    "IWAE": objectives.IWAE(5),
    "DReG": objectives.DReG(5),
    "FreeBits": objectives.FreeBits(free_nats=0.5),
}
IMAGES = torch.bernoulli(torch.full((6, 1, 4, 4), 0.4), generator=torch.Generator().manual_seed(0)).double()


pytestmark = pytest.mark.usefixtures("clean_store")


def _vae(**options) -> VAE:
    pyro.set_rng_seed(0)
    return build_vae(Options(**{"hidden": (5,), "latent_dim": 3} | options), (1, 4, 4)).double()


def _plain_gradient_descent() -> PyroOptim:
    return PyroOptim(torch.optim.SGD, {"lr": 1.0})


@pytest.mark.parametrize("beta", [1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_of_svi_goes_along_the_gradient_of_the_loss(name, beta):
    """One step of gradient descent by plain Pyro is the gradient that torch's autograd finds, for the same noise."""
    vae = _vae(network="mlp", prior="standard-normal")
    expected = copy.deepcopy(vae)
    torch.manual_seed(7)
    loss = len(IMAGES) * loss_per_image(LOSSES[name], expected.model, expected.guide, IMAGES, beta=beta)
    gradients = torch.autograd.grad(loss, list(expected.parameters()))

    model, guide = vae.programs()
    torch.manual_seed(7)
    found = SVI(Temper(beta)(model), Temper(beta)(guide), _plain_gradient_descent(), LOSSES[name]).step(IMAGES)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    for w, before, gradient in zip(vae.parameters(), expected.parameters(), gradients, strict=True):
        assert_close(w.detach(), before.detach() - gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "tolerance"), [("STL", 0.02), ("DReG", 0.02), ("IWAE", 0.2)])
def test_svi_reaches_the_exact_log_likelihood_of_a_linear_model(name, tolerance):
    """The guide's family holds the exact posterior, where each bound is log p(x); that of IWAE is noisy there."""
    oracle = LinearGaussian.random(seed=0)
    x, vae = oracle.draw(50), oracle.vae()
    for w in vae.parameters():
        w.requires_grad_(False)
    for w in vae.posterior.parameters():
        w.requires_grad_(True).data.add_(0.3)
    svi = SVI(*vae.programs(), pyro.optim.Adam({"lr": 0.04}), LOSSES[name])
    for _ in range(300):
        svi.step(x)
    assert -svi.evaluate_loss(x) / 50 == pytest.approx(oracle.log_evidence(x).mean().item(), abs=tolerance)


def test_two_vaes_of_one_process_share_no_weights():
    first, second = _vae(), _vae()
    before = {name: w.clone() for name, w in second.state_dict().items()}
    SVI(*first.programs(), _plain_gradient_descent(), Trace_ELBO()).step(IMAGES)
    SVI(*second.programs(), PyroOptim(torch.optim.SGD, {"lr": 0.0}), Trace_ELBO()).step(IMAGES)
    assert all(torch.equal(w, before[name]) for name, w in second.state_dict().items())
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_a_copy_is_registered_under_a_name_of_its_own():
    vae = _vae()
    SVI(*vae.programs(), _plain_gradient_descent(), Trace_ELBO()).step(IMAGES)
    twin = copy.deepcopy(vae)
    before = next(vae.parameters()).detach().clone()
    SVI(*twin.programs(), _plain_gradient_descent(), Trace_ELBO()).step(IMAGES)
    assert torch.equal(next(vae.parameters()), before)
    assert not torch.equal(next(twin.parameters()), before)


def test_parameters_that_the_store_would_copy_are_trained():
    """The store keeps a contiguous copy of a parameter that is not contiguous."""
    vae = _vae(network="mlp")
    w = vae.posterior.net.output.weight
    w.data = w.data.t().contiguous().t()
    before = w.detach().clone()
    SVI(*vae.programs(), _plain_gradient_descent(), Trace_ELBO()).step(IMAGES)
    assert not torch.equal(w, before)


def test_a_store_with_other_tensors_is_refused():
    vae = _vae()
    model, guide = vae.programs()
    SVI(model, guide, _plain_gradient_descent(), Trace_ELBO()).step(IMAGES)
    stored = {name: w.detach().clone() for name, w in pyro.get_param_store().items()}
    pyro.clear_param_store()
    for name, w in stored.items():
        pyro.param(name, w)
    with pytest.raises(ValueError, match=r"expected the module's own parameter .*clear_param_store"):
        model(IMAGES)


class Subsampled(nn.Module):
    """The programs of a VAE whose images are a part of N."""

    def __init__(self, vae: VAE, size: int) -> None:
        super().__init__()
        self.vae, self.size = vae, size

    def model(self, x: Tensor) -> None:
        with pyro.plate("images", self.size, subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", self.vae.prior())
            pyro.sample("x", self.vae.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("images", self.size, subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", self.vae.posterior(x))


@pytest.mark.parametrize("name", LOSSES)
def test_a_plate_that_subsamples_multiplies_the_loss(name):
    """It stands for N / B images of each kind, and is no power of an importance weight."""
    vae = _vae(prior="standard-normal")
    losses = []
    for programs in (vae, Subsampled(vae, 60)):
        torch.manual_seed(3)
        losses.append(loss_per_image(LOSSES[name], programs.model, programs.guide, IMAGES, beta=2.0).detach())
    assert_close(losses[1], 10 * losses[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["STL", "DReG"])
def test_parameters_outside_of_the_guides_module_are_refused(name):
    vae = _vae()

    class Shifted(VAE):
        def guide(self, x: Tensor) -> None:
            pyro.param("shift", torch.zeros(3, dtype=torch.double))
            super().guide(x)

    shifted = Shifted(vae.prior, vae.likelihood, vae.posterior)
    with pytest.raises(ValueError, match=r"pyro\.param 'shift': expected the guide's parameters in its module"):
        loss_per_image(LOSSES[name], shifted.model, shifted.guide, IMAGES)
