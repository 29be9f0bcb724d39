"""Training: steps, the NaN guard, validation, exact resume in one process, and a closed-form optimum."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import per_image
import pyro
import pytest
import torch
from capture_cases import copy_state, poison
from fitting import fit
from oracles import LinearGaussian, NormalFixed, bernoulli_vae, quadrature_log_evidence
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from ppl_vae import VAE, Conditional, data, runs
from ppl_vae.evidence.importance import log_evidence
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import TrainingState


def _vae(*, seed=0, D=12, L=2):
    pyro.set_rng_seed(seed)
    return VAE(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=(6,)), Bernoulli((D,))),
        Conditional(MLP(D, 2 * L, hidden=(6,)), DiagonalNormal(L)),
    )


def _levels(num_images=50, D=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, D), generator=generator, dtype=torch.uint8)


def _fit(vae, train, validation=None, *, num_particles=1, **options):
    options = {"epochs": 3, "batch_size": 8, "transform": data.sample_bernoulli, "warmup_epochs": 1} | options

    def objective(model, guide, x, *, beta):
        return per_image.elbo(model, guide, x, beta=beta, num_particles=num_particles)

    return fit(vae, train, validation, objective=objective, **options)


def test_every_step_gets_the_beta_and_the_rate_of_its_number():
    seen = []

    def objective(model, guide, x, *, beta):
        seen.append(poutine.trace(guide).get_trace(x).nodes["z"]["scale"])
        return per_image.elbo(model, guide, x)

    rates = []
    asked = {"epochs": 2, "batch_size": 8, "beta": 3.0, "warmup_epochs": 1, "learning_rate": 0.01}
    fit(
        _vae(),
        _levels(),
        objective=objective,
        transform=data.sample_bernoulli,
        on_step=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]),
        **asked,
    )
    assert seen == pytest.approx([3.0 * min(1, step / 7) for step in range(14)])
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * step / 14)) for step in range(14)])


# --- Steps ---


def test_the_gradient_is_clipped_by_its_global_norm():
    vae = _vae()
    norms = []

    def on_step(state):
        norms.append(float(torch.stack([p.grad.norm() for p in vae.parameters()]).norm()))

    _fit(vae, _levels(), clip_norm=0.5, on_step=on_step)
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-4)


def test_the_reported_loss_is_the_mean_over_images_with_a_ragged_last_batch():
    """Five images in batches of four and one: the mean of the batches' means would weigh the last image four times."""
    x = torch.zeros(5, 12)
    x[0] = 1.0

    def objective(model, guide, x, *, beta):
        # A loss that is known for each image; the parameters enter with weight zero.
        return x.sum(-1).mean() + 0 * sum(p.sum() for p in vae.parameters())

    vae, records = _vae(), []
    fit(vae, x, epochs=3, batch_size=4, objective=objective, on_epoch=records.append)
    assert [record["train_loss_nats_per_image"] for record in records] == pytest.approx([12 / 5] * 3)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    seen = []

    def transform(values, generator):
        seen.append(values[:, 0].tolist())
        return (values > 50).float()

    train = torch.arange(50, dtype=torch.uint8)[:, None].expand(50, 12).contiguous()
    _fit(_vae(), train, transform=transform, epochs=2)
    _, *seen = seen  # the first two images alone, by which fit knows the program's sites
    first, second = list(chain(*seen[:7])), list(chain(*seen[7:]))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_the_validation_elbo_is_at_beta_one_whatever_is_trained():
    vae, x = _vae(), (_levels() > 127).float()
    records = []
    _fit(vae, _levels(), x, beta=20.0, epochs=1, warmup_epochs=0, learning_rate=1e-9, on_epoch=records.append)
    with torch.no_grad():
        torch.manual_seed(0)
        draws = torch.stack([-per_image.elbo(vae.model, vae.guide, x) for _ in range(200)])
    # Both have the noise of one draw an image; the objective at beta = 20 is far outside.
    assert abs(records[0]["validation_elbo_nats_per_image"] - draws.mean()) < 5 * draws.std()
    at_twenty = -per_image.elbo(vae.model, vae.guide, x, beta=20.0).detach()
    assert abs(at_twenty - draws.mean()) > 10 * draws.std()


def test_validation_neither_trains_nor_draws_from_the_global_generator():
    plain, validated = _vae(), _vae()
    _fit(plain, _levels(), epochs=1)
    state = torch.get_rng_state()
    pyro.set_rng_seed(0)
    validated = _vae()
    _fit(validated, _levels(), (_levels() > 127).float(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(plain.parameters(), validated.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_weights_by_validation_are_left_in_the_model():
    vae = _vae()
    snapshots, records = [], []

    def on_epoch(record):
        records.append(record["validation_elbo_nats_per_image"])
        snapshots.append([p.detach().clone() for p in vae.parameters()])

    # Trained on white images and validated on black ones, it gets worse.
    white, black = torch.full((40, 12), 255, dtype=torch.uint8), torch.zeros(40, 12)
    state = _fit(vae, white, black, epochs=12, learning_rate=0.05, on_epoch=on_epoch)
    best = max(range(12), key=records.__getitem__)
    assert best != 11
    assert state.best_validation == records[best]
    assert all(torch.equal(p, b) for p, b in zip(vae.parameters(), snapshots[best], strict=True))


# --- The NaN guard ---


@pytest.mark.parametrize(("site", "program"), [("z", "guide"), ("x", "model")])
def test_a_loss_that_is_not_finite_stops_before_the_first_step_with_the_site(site, program):
    """After later steps: see the tests of captured training."""
    vae = _vae()
    poison(vae, site)
    with pytest.raises(NotFinite, match=rf"step 0: .*site '{site}' of the {program}"):
        _fit(vae, _levels())


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("where", ["train", "validation"])
def test_one_image_off_the_support_is_found_wherever_it_is(graphs, where, compile):
    images = {"train": torch.zeros(50, 12), "validation": torch.zeros(20, 12)}
    images[where][17] = 0.5
    with pytest.raises(ValueError, match="support"):
        _fit(_vae(), images["train"], images["validation"], transform=data.convert_to_float, compile=compile)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[(name, value) for name in ("epochs", "batch_size", "learning_rate", "clip_norm") for value in (0, -1)],
        *[("average_decay", value) for value in (-0.1, 1.0, math.nan)],
    ],
)
def test_arguments_out_of_range_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected .* got {value}"):
        _fit(_vae(), _levels(), **{argument: value})


# --- Exact resume ---


@pytest.mark.parametrize("network", ["conv", "gated-residual"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_a_convolutional_run_resumes_bit_for_bit_from_what_a_file_holds_of_it(network, likelihood, tmp_path):
    """Convolutions' weights are laid out in memory otherwise than in a file; Adam's moments must be as they are."""
    options = Options(**PLAIN, network=network, likelihood=likelihood, channels=(2, 3), hidden=(4,), latent_dim=2)

    def built(seed):
        torch.manual_seed(seed)
        return build_vae(options, (1, 6, 5))

    def keep(state):
        runs.save_tensors(tmp_path / str(state.step), *state.to_tensors())

    images = torch.bernoulli(torch.full((40, 1, 6, 5), 0.5))
    asked = {"epochs": 4, "batch_size": 10, "learning_rate": 0.01}
    end = fit(built(0), images, on_checkpoint=keep, checkpoint_seconds=0.0, **asked)
    final, _ = end.to_tensors()
    for step in (1, 7, 13):
        saved = runs.load_tensors(tmp_path / str(step))
        tensors, _ = fit(built(99), images, saved=saved, **asked).to_tensors()
        assert all(torch.equal(tensors[name], final[name]) for name in final), step


def test_buffers_are_part_of_the_state():
    vae = VAE(
        StandardNormal(2),
        Conditional(MLP(2, 12, hidden=(6,)), Bernoulli((12,))),
        Conditional(nn.Sequential(nn.BatchNorm1d(12), MLP(12, 4, hidden=())), DiagonalNormal(2)),
    )
    _fit(vae, _levels(), epochs=1)
    running = vae.posterior.net[0].running_mean.clone()
    assert running.abs().sum() > 0
    tensors, scalars = copy_state(TrainingState(vae))
    vae.posterior.net[0].running_mean.zero_()
    TrainingState(vae).restore(tensors, scalars)
    assert torch.equal(vae.posterior.net[0].running_mean, running)


def test_a_state_to_go_on_from_is_left_as_it_is():
    saved, ends = {}, []
    _fit(_vae(), _levels(), on_checkpoint=lambda state: saved.setdefault("state", copy_state(state)))
    before = {name: tensor.clone() for name, tensor in saved["state"][0].items()}
    for _ in range(2):
        vae = _vae(seed=1)
        _fit(vae, _levels(), saved=saved["state"])
        ends.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert [name for name, tensor in saved["state"][0].items() if not torch.equal(tensor, before[name])] == []
    assert torch.equal(*ends)


@pytest.mark.parametrize("lost", ["weights/", "adam/", "rng/torch"])
def test_a_state_that_lacks_something_is_refused(lost):
    vae = _vae()
    tensors, scalars = _fit(vae, _levels(), epochs=1).to_tensors()
    with pytest.raises(ValueError, match="damaged"):
        _fit(_vae(), _levels(), saved=({n: t for n, t in tensors.items() if not n.startswith(lost)}, scalars))


# --- Double precision ---


@pytest.fixture
def double_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("compile", [False, True])
def test_a_double_vae_is_trained_on_images_in_double_precision(compile, graphs):
    """With the exact guide every loss is -log p(x); images that went through single precision would miss it by 1e-7."""
    oracle = LinearGaussian.random()
    x, records = oracle.draw(20), []
    arguments = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-15, "compile": compile}
    fit(oracle.vae(), x, x[:5], **arguments, on_epoch=records.append)
    exact = oracle.log_evidence(x)
    assert records[0]["train_loss_nats_per_image"] == pytest.approx(-float(exact.mean()), rel=1e-11)
    assert records[0]["validation_elbo_nats_per_image"] == pytest.approx(float(exact[:5].mean()), rel=1e-11)
    assert len(graphs) == compile


@pytest.mark.thorough
@pytest.mark.parametrize("compile", [False, True])
def test_a_vae_built_in_double_precision_is_trained_on_levels(double_by_default, compile, graphs):
    vae, x = _vae(), _levels()
    state = _fit(vae, x, x.ge(128).double(), epochs=1, batch_size=20, compile=compile)
    assert {w.dtype for w in vae.parameters()} == {torch.double}
    assert state.step == 3


# --- A closed form ---


def test_the_linear_vae_reaches_the_maximum_likelihood_of_probabilistic_pca():
    """Tipping and Bishop 1999, equation 8: ln L from the eigenvalues of the sample covariance, the noise their mean."""
    oracle = LinearGaussian.random(D=6, L=2, scale=0.5)
    x = oracle.draw(400)
    N, D, L = 400, 6, 2
    eigenvalues = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / N).flip(0)
    noise = eigenvalues[L:].mean()
    exact = -0.5 * (D * math.log(2 * math.pi) + eigenvalues[:L].log().sum() + (D - L) * noise.log() + D)

    pyro.set_rng_seed(0)
    likelihood = NormalFixed((D,), 1.0, learned=True)
    vae = VAE(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=()), likelihood),
        Conditional(MLP(D, 2 * L, hidden=()), DiagonalNormal(L)),
    ).double()
    fit(
        vae,
        x,
        epochs=200,
        batch_size=100,
        learning_rate=0.02,
        transform=lambda values, generator: values,
        objective=lambda model, guide, x, *, beta: per_image.elbo(
            model, guide, x, beta=beta, estimator=TraceMeanField_ELBO
        ),
    )
    W, b = vae.likelihood.net.output.weight.detach(), vae.likelihood.net.output.bias.detach()
    reached = LinearGaussian(W, b, float(likelihood.log_scale.exp())).log_evidence(x).mean()
    assert exact - 0.02 < reached <= exact + 1e-9
    assert float(likelihood.log_scale.exp()) == pytest.approx(float(noise.sqrt()), rel=0.03)
    torch.manual_seed(0)
    bound = log_evidence(vae.model, vae.guide, x, num_particles=100).mean()
    assert abs(bound - reached) < 0.02


def test_training_beta_leaks_into_no_reported_number():
    """Two trainings that differ in beta alone end with different weights, each reported by its own exact evidence."""
    x = torch.bernoulli(torch.full((60, 12), 0.3))
    weights = []
    for beta in (0.5, 4.0):
        torch.manual_seed(0)
        vae = bernoulli_vae(latent_dim=1).float()
        for parameter in vae.parameters():
            parameter.requires_grad_(True)
        _fit(vae, x, transform=data.convert_to_float, beta=beta, epochs=2)
        weights.append(vae.likelihood.net.output.weight.detach().clone())
        vae.double()
        torch.manual_seed(0)
        bare = log_evidence(vae.model, vae.guide, x.double(), num_particles=500)
        scaled = log_evidence(
            poutine.scale(vae.model, beta), poutine.scale(vae.guide, beta), x.double(), num_particles=500
        )
        exact = quadrature_log_evidence(vae, x.double(), latent_dim=1)
        assert (bare.mean() - exact.mean()).abs() < 0.05
        assert (scaled.mean() - exact.mean()).abs() < 0.05
    assert not torch.equal(*weights)


# --- What is given from outside ---


def test_weights_that_cannot_be_trained_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="and none with requires_grad"):
        _fit(_vae().requires_grad_(False), _levels())
    with torch.inference_mode():
        vae = _vae()
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        _fit(vae, _levels())


def _weights(vae):
    return torch.cat([w.detach().flatten() for w in vae.parameters()])


def test_an_array_of_the_other_byte_order_trains_as_its_own_values():
    """As FITS and IDX files have it; torch refuses such an array."""
    x = (_levels().numpy() / 255).round().astype(np.float32)
    trained = []
    for array in (x, x.astype(x.dtype.newbyteorder(">")), x.astype(x.dtype.newbyteorder("<"))):
        vae = _vae()
        _fit(vae, array, array[:9], transform=data.convert_to_float, epochs=1)
        trained.append(_weights(vae))
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])


def test_masked_values_are_refused_and_an_empty_mask_is_none():
    x = np.ma.masked_array((_levels().numpy() / 255).round().astype(np.float32))
    _fit(_vae(), x, transform=data.convert_to_float, epochs=1)
    x[3, 4] = np.ma.masked
    with pytest.raises(ValueError, match="data: expected an array without masked values, got 1 masked of 600"):
        _fit(_vae(), x, transform=data.convert_to_float)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_training_within_a_callers_block_without_gradients_trains_as_outside_it(around):
    alone, within = _vae(), _vae()
    pyro.set_rng_seed(1)
    _fit(alone, _levels(), epochs=1)
    pyro.set_rng_seed(1)
    with around():
        _fit(within, _levels(), epochs=1)
    assert torch.equal(_weights(alone), _weights(within))
    assert not torch.equal(_weights(alone), _weights(_vae()))
