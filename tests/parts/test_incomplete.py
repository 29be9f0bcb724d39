"""Training on images with missing pixels: against the exact log p(x_observed) of a linear-Gaussian model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, NormalFixed
from small_run import SMALL, silent, train_small
from torch import nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, fit, importance, log_evidence, log_weights
from ppl_vae.commands.latents import encode_images, impute_images
from ppl_vae.commands.options import Encode, Impute
from ppl_vae.data.arrays import load_arrays
from ppl_vae.data.splits import fill_from_observed
from ppl_vae.evidence.missing import Observed, impute
from ppl_vae.objectives import IWAE
from ppl_vae.parts.incomplete import IncompleteVAE, ZeroFilled
from ppl_vae.parts.likelihoods import Beta
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs import read_evaluations
from ppl_vae.runs.build import build_vae
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import Optimizer, Schedule, Validation

NAN = math.nan


def with_holes(x, *, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(x.shape, generator=generator) < share, NAN, x)


def exact_log_evidence(oracle, x):
    """(N,) log N(x_observed; b, W W' + s^2 I) of the observed entries of each row."""
    covariance = oracle.W @ oracle.W.T + oracle.scale**2 * torch.eye(len(oracle.b)).double()
    found = []
    for row in x:
        o = ~row.isnan()
        p = MultivariateNormal(oracle.b[o], covariance[o][:, o]) if o.any() else None
        found.append(p.log_prob(row[o]) if p else row.new_zeros(()))
    return torch.stack(found)


class ExactPosterior(nn.Module):
    """x (..., D), NaN where missing -> the linear-Gaussian model's p(z | x_observed), by its decoder's own weights."""

    def __init__(self, decoder, scale):
        super().__init__()
        self.decoder, self.scale = decoder, scale

    def forward(self, x):
        W, b = self.decoder.output.weight, self.decoder.output.bias
        seen = (~x.isnan()).to(x)
        precision = torch.eye(W.shape[1]).to(x) + torch.einsum("di,dj,...d->...ij", W, W, seen) / self.scale**2
        residual = torch.where(x.isnan(), torch.zeros_like(x), x - b)
        mean = torch.linalg.solve(precision, (residual @ W)[..., None] / self.scale**2)[..., 0]
        return dist.MultivariateNormal(mean, precision_matrix=precision)


def exact_vae(oracle):
    D, L = oracle.W.shape
    decoder = MLP(L, D, hidden=()).double()
    with torch.no_grad():
        decoder.output.weight.copy_(oracle.W)
        decoder.output.bias.copy_(oracle.b)
    likelihood = Conditional(decoder, NormalFixed((D,), oracle.scale).double())
    return IncompleteVAE(StandardNormal(L).double(), likelihood, ExactPosterior(decoder, oracle.scale))


def amortized_vae(D=6, L=3, *, with_mask=True):
    torch.manual_seed(0)
    net = ZeroFilled(MLP((2 * D if with_mask else D,), 2 * L, hidden=(16,)), with_mask=with_mask, event_dims=1)
    likelihood = Conditional(MLP(L, D, hidden=(16,)), NormalFixed((D,), 0.7))
    return IncompleteVAE(StandardNormal(L), likelihood, Conditional(net, DiagonalNormal(L))).double()


# --- log p(x_observed) ---


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_weights_under_the_exact_posterior_are_log_p_of_the_observed_entries(share):
    oracle = LinearGaussian.random(orthogonal=False)
    x = with_holes(oracle.draw(12), share=share)
    vae = exact_vae(oracle)
    log_w = log_weights(vae.model, vae.guide, x, 3)
    assert_close(log_w, exact_log_evidence(oracle, x).expand(3, 12), rtol=0, atol=1e-9)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_bound_of_an_encoder_is_log_p_with_many_particles_and_below_it_with_few(with_mask):
    oracle = LinearGaussian.random(orthogonal=False)
    x, vae = with_holes(oracle.draw(8)), amortized_vae(with_mask=with_mask)
    exact = exact_vae(oracle)
    vae.likelihood.net = exact.likelihood.net  # the oracle's model with the guide of an untrained encoder
    with torch.no_grad():
        vae.posterior.net.net.output.weight.mul_(0.1)
    torch.manual_seed(0)
    many = importance(vae.model, vae.guide, x, num_particles=20_000)
    assert ((many.log_evidence - exact_log_evidence(oracle, x)).abs() < 5 * many.monte_carlo_stderr).all()
    few = torch.stack([log_evidence(vae.model, vae.guide, x, num_particles=2) for _ in range(200)])
    assert (few.mean(0) < exact_log_evidence(oracle, x)).all()


def test_without_holes_it_is_the_vae():
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(widen=1.2), oracle.draw(5)
    same = IncompleteVAE(vae.prior, vae.likelihood, vae.posterior)
    found = []
    for program in (vae, same):
        torch.manual_seed(0)
        found.append(log_weights(program.model, program.guide, x, 4))
    assert torch.equal(*found)


def test_a_density_with_a_narrow_support_takes_holes():
    vae = amortized_vae()
    vae = IncompleteVAE(vae.prior, Conditional(MLP(3, 12, hidden=(4,)), Beta((6,))).double(), vae.posterior)
    x = with_holes(torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).double())
    assert log_evidence(vae.model, vae.guide, x, num_particles=3).isfinite().all()


# --- Training ---


def trained(x, *, compile=False, epochs=3, **settings):
    vae = amortized_vae()
    pyro.set_rng_seed(0)
    fit(vae, x, epochs=epochs, schedule=Schedule(batch_size=20), compile=compile, **settings)
    return torch.cat([w.detach().reshape(-1) for w in vae.parameters()])


@pytest.mark.parametrize("objective", [None, IWAE(3)], ids=["elbo", "iwae"])
def test_a_captured_training_is_the_eager_one(graphs, objective):
    x = with_holes(LinearGaussian.random().draw(50))
    ends = [trained(x, compile=compile, objective=objective, validation=Validation(x[:9])) for compile in (True, False)]
    assert_close(*ends, rtol=0, atol=1e-9)


def test_holes_do_not_touch_the_training_on_complete_images():
    x = LinearGaussian.random().draw(50)
    vae = amortized_vae()
    plain = VAE(vae.prior, vae.likelihood, vae.posterior)
    pyro.set_rng_seed(0)
    fit(plain, x, epochs=3, schedule=Schedule(batch_size=20))
    assert torch.equal(trained(x), torch.cat([w.detach().reshape(-1) for w in plain.parameters()]))


def test_training_on_half_of_the_entries_finds_the_model_that_made_them():
    """log p of held-out complete rows under the trained weights, in closed form, against that of the truth."""
    oracle = LinearGaussian.random(orthogonal=False)
    torch.manual_seed(0)
    start = LinearGaussian(0.3 * torch.randn_like(oracle.W), torch.zeros_like(oracle.b), oracle.scale)
    vae, held_out = exact_vae(start), oracle.draw(2000, seed=5)
    pyro.set_rng_seed(0)
    fit(vae, with_holes(oracle.draw(4000)), epochs=15, optimizer=Optimizer(learning_rate=0.02), objective=IWAE(1))
    net = vae.likelihood.net.output
    found = LinearGaussian(net.weight.detach(), net.bias.detach(), oracle.scale)
    gap = (oracle.log_evidence(held_out) - found.log_evidence(held_out)).mean()
    before = (oracle.log_evidence(held_out) - start.log_evidence(held_out)).mean()
    assert before > 1
    assert abs(gap) < 0.05


def test_holes_under_a_program_that_does_not_take_them_are_refused_with_what_does():
    vae = LinearGaussian.random().vae()
    vae.likelihood.family.log_scale.requires_grad_()
    x = with_holes(LinearGaussian.random().draw(30), share=0.1)
    with pytest.raises(NotFinite, match=r"not finite; missing values \(NaN\) leave the likelihood of an IncompleteVAE"):
        fit(vae, x, epochs=1)


def test_infinity_is_no_missing_value():
    x = with_holes(LinearGaussian.random().draw(30))
    x[3, 2] = math.inf
    with pytest.raises(NotFinite, match="the images of this batch hold values that are not finite"):
        trained(x)


def test_pixels_that_depend_on_each_other_are_refused():
    vae = amortized_vae()

    def likelihood(z):
        return dist.MultivariateNormal(vae.likelihood(z).base_dist.loc, torch.eye(6).double())

    incomplete = IncompleteVAE(vae.prior, likelihood, vae.posterior)
    with pytest.raises(ValueError, match="missing pixels cannot be left out"):
        log_evidence(incomplete.model, incomplete.guide, torch.zeros(2, 6).double(), num_particles=1)


# --- Imputation ---


def test_imputed_means_are_those_of_the_linear_gaussian():
    oracle = LinearGaussian.random(orthogonal=False)
    x = with_holes(oracle.draw(5))
    torch.manual_seed(0)
    found = impute(Observed(exact_vae(oracle)), x, num_particles=20_000, num_draws=1)
    joint = oracle.W @ oracle.W.T + oracle.scale**2 * torch.eye(6).double()
    for row, mean in zip(x, found.mean, strict=True):
        o = ~row.isnan()
        exact = oracle.b[~o] + joint[~o][:, o] @ torch.linalg.solve(joint[o][:, o], row[o] - oracle.b[o])
        assert_close(mean[~o], exact, rtol=0, atol=0.05)


def test_fillings_are_observed_values_of_the_same_pixel_and_keep_its_marginal():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 5.0, 9.0])
    holes = with_holes(x)
    filled = fill_from_observed(holes)
    assert torch.equal(filled[~holes.isnan()], holes[~holes.isnan()])
    for d in range(3):
        seen = holes[:, d][~holes[:, d].isnan()]
        drawn = filled[:, d][holes[:, d].isnan()]
        assert torch.isin(drawn, seen).all()
        assert abs(drawn.mean() - seen.mean()) < 5 * seen.std() / math.sqrt(len(drawn))
    assert fill_from_observed(torch.full((3, 2), NAN)).eq(0).all()


# --- Files and the command line ---


def test_a_file_with_nan_is_refused_with_the_option_that_takes_it(tmp_path):
    path = tmp_path / "table.npy"
    np.save(path, with_holes(torch.randn(40, 3)).numpy())
    with pytest.raises(ValueError, match="; --missing train takes NaN as missing values"):
        load_arrays(path)


@pytest.mark.parametrize(("values", "kind"), [("binary", "binary"), ("unit", "probabilities"), ("real", "real values")])
def test_the_kind_of_a_file_is_that_of_its_observed_values(tmp_path, values, kind):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x = {"binary": (x > 0).float(), "unit": x.sigmoid(), "real": x}[values]
    holes = with_holes(x)
    np.save(tmp_path / "table.npy", holes.numpy())
    splits = load_arrays(tmp_path / "table.npy", missing="train")
    assert splits.kind == kind
    assert splits.train.dtype == torch.float32
    rows = torch.cat([splits.train, splits.validation, splits.test])
    assert int(rows.isnan().sum()) == int(holes.isnan().sum())


@pytest.mark.parametrize("mask", ["off", "on"])
def test_the_commands_train_evaluate_and_impute(tmp_path, mask):
    np.save(tmp_path / "table.npy", with_holes(LinearGaussian.random().draw(300)).numpy())
    words = {"likelihood": "normal-per-pixel", "missing": "train", "missing_mask": mask}
    folder = train_small(tmp_path / "run", replace(SMALL, dataset=str(tmp_path / "table.npy"), **words))
    assert math.isfinite(read_evaluations(folder)["test"]["log_likelihood"]["mean"])
    impute_images(Impute(str(folder), "test", num_particles=20, device="cpu", output=str(tmp_path / "out")), say=silent)
    with np.load(tmp_path / "out" / "imputed.npz") as stored:
        assert np.isfinite(stored["mean"]).all()
    words = Encode(str(folder), "test", num_particles=20, device="cpu", output=str(tmp_path / "codes"))
    with np.load(encode_images(words, say=silent) / "encoded.npz") as stored:
        assert np.isfinite(stored["mean"]).all()
        assert np.isfinite(stored["log_likelihood"]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"missing_mask": "on"}, "--missing-mask: expected off without --missing train"),
        ({"missing": "train", "upper_latents": (2,)}, "--missing train: expected one layer of latents"),
    ],
)
def test_options_at_odds_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        build_vae(replace(SMALL, likelihood="normal-per-pixel", **words), (6,))
