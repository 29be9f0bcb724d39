"""The captured step against Pyro's own loss, torch's own Adam and clipping, and the eager path of ``fit``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor.compile_fx as compiler
from fitting import fit
from grids import LIKELIHOODS_AND_NETWORKS, images_for
from pyro import poutine
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae import VAE, Conditional, data, objectives, training
from ppl_vae.evidence.importance import evaluate
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.fit_arguments import build_objective, initialize_output_bias
from ppl_vae.runs.options import KLS, LIKELIHOODS, PLAIN, Options
from ppl_vae.runtime import capture
from ppl_vae.runtime.captured_step import CapturedStep
from ppl_vae.runtime.errors import CannotCapture, NotFinite
from ppl_vae.training import CapturedSteps, Optimizer, Resident, TrainingState
from ppl_vae.training.schedules import averaging

ESTIMATORS = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}
SHAPE = (1, 8, 8)
NEVER_CLIP = 1e30


def _vae(kind=VAE, *, seed=0, D=12, L=2):
    pyro.set_rng_seed(seed)
    return kind(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=(6,), activation=nn.Tanh), Bernoulli((D,))),
        Conditional(MLP(D, 2 * L, hidden=(6,), activation=nn.Tanh), DiagonalNormal(L)),
    ).double()


def _images(num_images=37, D=12):
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.1, 0.9, D, dtype=torch.double).expand(num_images, D)
    return torch.bernoulli(rates, generator=generator)


def _as_stored(values, generator=None):
    return values


def _fit(vae, train, validation=None, **options):
    """In float64, with a ragged last batch: five steps an epoch."""
    asked = {"epochs": 4, "batch_size": 8, "transform": _as_stored, "warmup_epochs": 1, "compile": True}
    return fit(vae, train, validation, **(asked | options))


def _flat(module):
    return torch.cat([w.detach().flatten() for w in module.parameters()])


def _copy(state):
    tensors, scalars = state.to_tensors()
    return {name: tensor.clone() for name, tensor in tensors.items()}, scalars


def _step_of(vae, objective, stored, *, batch_size, clip_norm=NEVER_CLIP, observe=_as_stored):
    optimizer = torch.optim.Adam(vae.parameters())
    step = CapturedStep(
        lambda x, beta: objective(vae.model, vae.guide, x, beta=beta),
        vae,
        optimizer,
        stored,
        observe,
        batch_size=batch_size,
        clip_norm=clip_norm,
    )
    return step, optimizer


def _loss_and_gradient(vae, step, optimizer, index, *, beta, seed):
    """Of a step at learning rate 0 from moments of 0: Adam's first moment is then a tenth of the gradient."""
    for moments in optimizer.state.values():
        moments["exp_avg"].zero_()
        moments["exp_avg_sq"].zero_()
    step.total.zero_()
    torch.manual_seed(seed)
    step(index, step.schedule([(0, beta, 0.0, 0.0)])[0])
    return step.total / len(index), [10 * optimizer.state[w]["exp_avg"] for w in vae.parameters()]


def _eager_loss_and_gradient(vae, loss_of, x, *, seed):
    torch.manual_seed(seed)
    loss = loss_of(x)
    found = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(vae.parameters(), found, strict=True)]
    return loss.detach(), gradients


def _assert_same(captured, eager, *, relative):
    assert_close(captured[0], eager[0].double(), rtol=relative, atol=0)
    for g, expected in zip(captured[1], eager[1], strict=True):
        assert_close(g, expected, rtol=relative, atol=relative * float(expected.abs().max()))


# --- The same numbers as Pyro's own loss ---


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
        return cls(vae, drawn.nodes["x"]["value"], build_objective(options))

    def step(self):
        return _step_of(self.vae, self.objective, self.x, batch_size=4)

    def eager(self, index, *, beta, seed):
        return _eager_loss_and_gradient(
            self.vae,
            lambda x: self.objective(self.vae.model, self.vae.guide, x, beta=beta),
            self.x[index],
            seed=seed,
        )


INDEX = torch.tensor([7, 0, 3, 8])


def _assert_captured_is_eager(case, *, relative):
    step, optimizer = case.step()
    for seed, beta in enumerate((0.0, 0.3, 4.0)):
        captured = _loss_and_gradient(case.vae, step, optimizer, INDEX, beta=beta, seed=seed)
        _assert_same(captured, case.eager(INDEX, beta=beta, seed=seed), relative=relative)


@pytest.mark.parametrize(
    ("dtype", "channels", "num_particles", "relative"),
    [(torch.double, (2, 3), 3, 1e-10), (torch.float, (2,), 1, 1e-5)],
    ids=["double", "single"],
)
@pytest.mark.parametrize(("likelihood", "network"), LIKELIHOODS_AND_NETWORKS)
@pytest.mark.parametrize("kl", KLS)
def test_a_captured_step_has_the_loss_and_the_gradient_of_the_eager_one(
    graphs, kl, likelihood, network, dtype, channels, num_particles, relative
):
    words = {"kl": kl, "likelihood": likelihood, "network": network}
    case = Case.of(dtype, channels=channels, num_particles=num_particles, **words)
    _assert_captured_is_eager(case, relative=relative)


@pytest.mark.parametrize(
    ("dtype", "num_particles", "relative"), [(torch.double, 1, 1e-10), (torch.float, 3, 1e-5)], ids=["double", "single"]
)
@pytest.mark.parametrize("kl", KLS)
def test_it_has_them_with_the_other_number_of_particles_too(graphs, kl, dtype, num_particles, relative):
    case = Case.of(dtype, kl=kl, likelihood="normal", network="mlp", num_particles=num_particles)
    _assert_captured_is_eager(case, relative=relative)


def test_what_is_drawn_of_the_stored_images_is_drawn_as_the_eager_step_draws_it(graphs):
    """8-bit levels, binarized anew at every access, before the noise of the sites."""
    vae = _vae().float()
    levels = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    observe = partial(data.sample_bernoulli, generator=None)
    step, optimizer = _step_of(vae, objectives.elbo, levels, batch_size=4, observe=observe)
    captured = _loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=3)
    eager = _eager_loss_and_gradient(
        vae, lambda values: objectives.elbo(vae.model, vae.guide, observe(values)), levels[INDEX], seed=3
    )
    _assert_same(captured, eager, relative=1e-5)


def test_a_batch_of_another_size_has_the_same_loss_and_gradient_too(graphs):
    case = Case.of(torch.double, kl="analytic", likelihood="normal", network="gated", num_particles=3)
    step, optimizer = case.step()
    index = torch.tensor([5, 1, 2])
    captured = _loss_and_gradient(case.vae, step, optimizer, index, beta=0.3, seed=1)
    _assert_same(captured, case.eager(index, beta=0.3, seed=1), relative=1e-10)
    assert len(graphs) == 1


@pytest.mark.parametrize(("dtype", "relative"), [(torch.double, 1e-8), (torch.float, 1e-5)], ids=["double", "single"])
def test_pixels_that_are_all_but_certain_cost_what_they_cost_eagerly(graphs, dtype, relative):
    """Logits up to 90, where e^h overflows float32, for the right pixels and for the wrong ones."""
    vae, stored = _vae().to(dtype), _images().to(dtype)
    sizes = torch.tensor([0.0, 5, 15, 19, 20, 21, 40, 90, -15, -21, -40, -90])
    for sign in (1, -1):
        with torch.no_grad():
            vae.likelihood.net.output.bias.copy_(sign * sizes)
        step, optimizer = _step_of(vae, objectives.elbo, stored, batch_size=4)
        captured = _loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=0)
        eager = _eager_loss_and_gradient(vae, lambda x: objectives.elbo(vae.model, vae.guide, x), stored[INDEX], seed=0)
        _assert_same(captured, eager, relative=relative)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_trains_as_one_graph_on_more_images_than_a_batch(graphs, likelihood):
    """Before the first step all images are compared with its support, several batches of them at once."""
    pyro.set_rng_seed(0)
    vae = build_vae(Options(**PLAIN, likelihood=likelihood, network="mlp", hidden=(5,), latent_dim=3), SHAPE)
    images = images_for(vae.likelihood.family, 30, dtype=torch.float)
    initialize_output_bias(vae, images)
    before = _flat(vae)
    _fit(vae, images, epochs=1)
    assert _flat(vae).isfinite().all()
    assert not torch.equal(_flat(vae), before)
    assert len(graphs) == 1


def test_a_support_with_parameters_of_its_own_is_checked_on_its_batch_alone(graphs):
    """Pixels from 0 to what the decoder says of each image."""

    class Within(nn.Module):
        event_shape, num_features = (12,), 12

        def forward(self, h):
            return dist.Uniform(torch.zeros_like(h) - 1, 2 + h.sigmoid()).to_event(1)

    pyro.set_rng_seed(0)
    vae = VAE(
        StandardNormal(3),
        Conditional(MLP(3, 12, hidden=(6,)), Within()),
        Conditional(MLP(12, 6, hidden=(6,)), DiagonalNormal(3)),
    ).double()
    _fit(vae, _images(), epochs=1)
    assert _flat(vae).isfinite().all()


# --- Programs of the user's ---


class MaskedImages(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            with poutine.mask(mask=x[:, 2] > 0.5):
                pyro.sample("x", self.likelihood(z), obs=x)


class MaskedLatents(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            with poutine.mask(mask=x[:, 5] > 0.5):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1), poutine.mask(mask=x[:, 5] > 0.5):
            pyro.sample("z", self.posterior(x))


class ScaledImages(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            with poutine.scale(scale=0.25):
                pyro.sample("x", self.likelihood(z), obs=x)


class ScaledLatents(VAE):
    def model(self, x):
        with poutine.scale(scale=3.0):
            super().model(x)

    def guide(self, x):
        with poutine.scale(scale=2.0):
            super().guide(x)


class Factor(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.factor("penalty", -z.pow(4).sum(-1))
            pyro.sample("x", self.likelihood(z), obs=x)


class FactorOfTheGuide(VAE):
    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.posterior(x))
            pyro.factor("penalty", z.pow(4).sum(-1), has_rsample=True)


class Deterministic(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(pyro.deterministic("h", 2 * z, event_dim=1)), obs=x)


class Auxiliary(VAE):
    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            q = self.posterior(x)
            a = pyro.sample("a", q, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a.tanh(), 0.5).to_event(1))


class Subsampled(VAE):
    """The plate stands for 100 images, of which these are some."""

    def model(self, x):
        with pyro.plate("images", 100, subsample=torch.arange(len(x)), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("images", 100, subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("z", self.posterior(x))


class WithoutFormula(VAE):
    """A transformed distribution, for whose KL there is no formula."""

    def guide(self, x):
        loc, scale = self.posterior(x).base_dist.loc, self.posterior(x).base_dist.scale
        affine = dist.transforms.AffineTransform(loc, scale, event_dim=1)
        with pyro.plate("images", len(x), dim=-1):
            unit = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(unit, [affine]))


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


PROGRAMS = {
    kind.__name__: kind
    for kind in (
        VAE,
        MaskedImages,
        MaskedLatents,
        ScaledImages,
        ScaledLatents,
        Factor,
        FactorOfTheGuide,
        Deterministic,
        Auxiliary,
        Subsampled,
        WithoutFormula,
        TwoLayers,
    )
}
# Pyro's analytic estimator knows no such site of a guide, and ``elbo`` refuses a KL without a formula.
REFUSED = {("FactorOfTheGuide", "analytic"), ("WithoutFormula", "analytic")}
COMBINATIONS = [(p, kl) for p in PROGRAMS for kl in ESTIMATORS if (p, kl) not in REFUSED]


@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")  # TwoLayers: Pyro asks for one order
@pytest.mark.parametrize(("program", "kl"), COMBINATIONS)
def test_a_users_program_has_the_loss_and_the_gradient_of_pyros_own_estimator(graphs, program, kl):
    vae, stored = _vae(PROGRAMS[program]), _images()
    objective = partial(objectives.elbo, estimator=ESTIMATORS[kl], num_particles=3)
    step, optimizer = _step_of(vae, objective, stored, batch_size=4)
    captured = _loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=2)
    pyros = ESTIMATORS[kl](num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    eager = _eager_loss_and_gradient(
        vae, lambda x: pyros.differentiable_loss(vae.model, vae.guide, x) / len(x), stored[INDEX], seed=2
    )
    _assert_same(captured, eager, relative=1e-10)


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "VAE"])
def test_each_of_those_programs_has_a_loss_of_its_own(program):
    """Else the test above would not see whether its mask, scale or site were left out."""
    losses = []
    for kind in (VAE, PROGRAMS[program]):
        vae = _vae(kind)
        torch.manual_seed(2)
        losses.append(float(objectives.elbo(vae.model, vae.guide, _images()[INDEX]).detach()))
    # An affine map of the same noise is the same draw: only the estimator differs (no formula for its KL).
    assert program == "WithoutFormula" or abs(losses[0] - losses[1]) > 1e-3


def test_a_users_module_with_two_latent_sites_trains_as_it_does_eagerly(graphs):
    ends = []
    for compile in (True, False):
        module = _vae(TwoLayers)
        _fit(module, _images(), compile=compile)
        ends.append(_flat(module))
    assert_close(*ends, rtol=0, atol=1e-10)


# --- Whole trainings ---


@pytest.mark.parametrize(("kl", "average_decay", "clip_norm"), [("sampled", 0.9, 1.8), ("analytic", 0.0, 1.1)])
def test_two_hundred_steps_end_where_the_eager_ones_do(graphs, kl, average_decay, clip_norm):
    """With a warm-up, a cosine, a ragged last batch, and clipping in some of the steps and not in others."""
    ends, clipped = {}, []
    for compile in (True, False):
        vae = _vae()

        def on_step(state, vae=vae, compile=compile):
            if not compile:
                norm = torch.stack([w.grad.norm() for w in vae.parameters()]).norm()
                clipped.append(bool(norm > 0.9999 * clip_norm))

        _fit(
            vae,
            _images(),
            compile=compile,
            epochs=40,
            warmup_epochs=10,
            learning_rate=0.01,
            clip_norm=clip_norm,
            average_decay=average_decay,
            objective=partial(objectives.elbo, estimator=ESTIMATORS[kl]),
            on_step=on_step,
            on_checkpoint=lambda state, compile=compile: ends.update({compile: _copy(state)}),
        )
    assert len(clipped) == 200
    assert 20 < sum(clipped) < 180
    (captured, numbers), (eager, expected) = ends[True], ends[False]
    assert numbers["step"] == expected["step"] == 200
    assert captured.keys() == eager.keys()
    assert any(name.startswith("average/") for name in eager) == (average_decay > 0)
    for name in eager:
        assert_close(captured[name], eager[name], rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_the_records_of_an_epoch_are_those_of_the_eager_path(graphs):
    """With validation: beta, the rate, the mean loss over a ragged epoch, and the validation ELBO."""
    seen = {}
    for compile in (True, False):
        records = seen[compile] = []
        _fit(_vae(), _images(), _images(20), compile=compile, average_decay=0.5, on_epoch=records.append)
    for captured, eager in zip(seen[True], seen[False], strict=True):
        for key in eager.keys() - {"seconds", "train_images_per_second"}:
            assert captured[key] == pytest.approx(eager[key], rel=1e-9), key


def test_one_graph_serves_a_whole_training(graphs):
    """beta, the learning rate and the decay change at every step, and the last batch of an epoch is smaller."""
    _fit(_vae(), _images(), _images(20), epochs=6, warmup_epochs=3, average_decay=0.9)
    assert len(graphs) == 1


def test_the_time_that_it_took_to_compile_is_told_once(graphs):
    told = []
    _fit(_vae(), _images(), epochs=1, on_compiled=told.append)
    assert len(told) == 1
    assert 0 < told[0] < 600


# --- Noise ---


def _losses_of_two_steps(*, seed):
    case = Case.of(torch.float, kl="sampled", likelihood="bernoulli", network="mlp")
    step, optimizer = case.step()
    first, _ = _loss_and_gradient(case.vae, step, optimizer, INDEX, beta=1.0, seed=seed)
    step.total.zero_()
    step(INDEX, step.schedule([(0, 1.0, 0.0, 0.0)])[0])  # without a new seed
    return float(first), float(step.total / len(INDEX))


def test_noise_is_fresh_at_every_step(graphs):
    first, second = _losses_of_two_steps(seed=5)
    assert abs(first - second) > 1e-4


def test_the_same_seed_gives_the_same_losses_bit_for_bit(graphs):
    assert _losses_of_two_steps(seed=5) == _losses_of_two_steps(seed=5)
    assert _losses_of_two_steps(seed=5) != _losses_of_two_steps(seed=6)


def test_to_capture_a_step_draws_no_random_numbers_and_changes_no_weight(graphs):
    case = Case.of(torch.float, kl="sampled", likelihood="bernoulli", network="mlp")
    before, state = _flat(case.vae), torch.get_rng_state()
    case.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(_flat(case.vae), before)


# --- Exact resume ---


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
@pytest.mark.parametrize("with_validation", [True, False])
def test_a_captured_run_resumed_from_any_step_ends_bit_for_bit_where_the_undisturbed_one_does(
    graphs, with_validation, average_decay
):
    asked = {"validation": _images(20) if with_validation else None, "average_decay": average_decay}
    states = {}
    end = _fit(
        _vae(),
        _images(),
        on_checkpoint=lambda state: states.update({state.step: _copy(state)}),
        checkpoint_seconds=0.0,
        **asked,
    )
    assert sorted(states) == list(range(1, 21))
    final, numbers = _copy(end)
    last, _ = states[20]
    for step in (1, 4, 5, 13, 19):
        resumed_states = {}
        torch.manual_seed(12345)
        resumed = _fit(
            _vae(seed=99),
            _images(),
            saved=states[step],
            on_checkpoint=lambda state, kept=resumed_states: kept.update({state.step: _copy(state)}),
            **asked,
        )
        tensors, scalars = _copy(resumed)
        for found, expected in ((tensors, final), (resumed_states[20][0], last)):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], step
        del scalars["seconds"]
        assert scalars == {key: value for key, value in numbers.items() if key != "seconds"}


def test_a_run_that_began_eagerly_goes_on_captured(graphs):
    states, ends = {}, {}
    for compile, saved in ((False, None), (True, 7)):
        vae = _vae(seed=0 if saved is None else 99)
        _fit(
            vae,
            _images(),
            compile=compile,
            saved=None if saved is None else states[saved],
            on_checkpoint=lambda state: states.update({state.step: _copy(state)}),
            checkpoint_seconds=0.0,
        )
        ends[compile] = _flat(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


# --- Averages ---


@pytest.mark.parametrize("compile", [True, False])
def test_averages_follow_their_recursion(graphs, compile):
    """average <- d average + (1 - d) weights, d = min(0.5, (1 + t) / (10 + t)), which is 0.5 from t = 8."""
    vae = _vae()
    expected, kept = _flat(vae), []

    def on_step(state):
        nonlocal expected
        t = state.step - 1
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * _flat(vae)

    state = _fit(
        vae,
        _images(),
        compile=compile,
        average_decay=0.5,
        learning_rate=0.05,
        on_step=on_step,
        on_checkpoint=lambda state: kept.append(_flat(vae)),
    )
    averages = torch.cat([average.flatten() for average in state.averages.values()])
    assert_close(averages, expected, rtol=0, atol=1e-12)
    assert (kept[-1] - expected).abs().max() > 1e-4  # the last weights are not their average


@pytest.mark.parametrize("compile", [True, False])
def test_without_validation_the_averages_are_left_in_the_model(graphs, compile):
    vae = _vae()
    state = _fit(vae, _images(), compile=compile, average_decay=0.5)
    assert all(torch.equal(vae.get_parameter(name), average) for name, average in state.averages.items())


@pytest.mark.parametrize("compile", [True, False])
def test_what_is_validated_and_kept_are_the_averages(graphs, compile):
    vae, records, averages = _vae(), [], []
    validation = 1 - _images(20)  # other images than those that are trained on: it gets worse
    state = _fit(
        vae,
        _images(),
        validation,
        compile=compile,
        average_decay=0.5,
        learning_rate=0.05,
        on_epoch=records.append,
        on_checkpoint=lambda state: averages.append({name: a.clone() for name, a in state.averages.items()}),
    )
    other = _vae(seed=1)
    for record, values in zip(records, averages, strict=True):
        other.load_state_dict(values)
        exact = evaluate(other, validation, num_particles=1, seed=training.VALIDATION_SEED, check=False).elbo.mean()
        assert record["validation_elbo_nats_per_image"] == pytest.approx(float(exact), rel=1e-12)
    best = state.best_step // 5 - 1
    assert best != len(records) - 1
    assert all(torch.equal(vae.get_parameter(name), value) for name, value in averages[best].items())


@pytest.mark.parametrize("compile", [True, False])
def test_to_keep_averages_changes_nothing_of_the_training(graphs, compile):
    last = {}
    for decay in (0.0, 0.9):
        vae = _vae()
        _fit(
            vae,
            _images(),
            _images(20),
            compile=compile,
            average_decay=decay,
            on_checkpoint=lambda state, decay=decay, vae=vae: last.update({decay: _flat(vae)}),
        )
    assert_close(last[0.9], last[0.0], rtol=0, atol=1e-12)


def test_the_decay_of_the_averages_rises_to_what_is_asked():
    assert [averaging(t, decay=0.9) for t in (0, 8, 80, 1000)] == pytest.approx([0.1, 0.5, 0.9, 0.9])


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_its_range_is_refused(value):
    with pytest.raises(ValueError, match=f"average_decay: expected a number from 0 to below 1, got {value}"):
        _fit(_vae(), _images(), average_decay=value)


# --- The optimizer in the graph ---


class Toy(nn.Module):
    """Regression on a table of numbers; one parameter is in no loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("target", torch.tensor(0.5))
        self.double()

    def loss(self, x, beta):
        return beta * (self.net(x) - self.target).square().sum()


TABLE = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def _toy_step(toy, *, clip_norm, batch_size=10, averages=None):
    optimizer = torch.optim.Adam(toy.parameters())
    step = CapturedStep(
        toy.loss, toy, optimizer, TABLE, _as_stored, batch_size=batch_size, clip_norm=clip_norm, averages=averages
    )
    return step, optimizer


def test_fifty_steps_are_those_of_torchs_adam_and_clipping(graphs):
    """The learning rate and beta change at every step, every fifth batch is smaller, and clipping comes and goes."""
    ours, theirs = Toy(), Toy()
    step, optimizer = _toy_step(ours, clip_norm=5.0)
    adam = torch.optim.Adam(theirs.parameters(), foreach=False, fused=False)
    rows = [(t, 1 + math.sin(t), 0.05 / (1 + t), 0.0) for t in range(50)]
    clipped = 0
    for (t, beta, rate, _), row in zip(rows, step.schedule(rows), strict=True):
        size = 7 if t % 5 == 4 else 10
        index = torch.randperm(30, generator=torch.Generator().manual_seed(t))[:size]
        step(index, row)
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        theirs.loss(TABLE[index], beta).backward()
        clipped += int(clip_grad_norm_(theirs.parameters(), 5.0) > 5.0)
        adam.step()
    assert 5 < clipped < 45
    assert_close(_flat(ours), _flat(theirs), rtol=0, atol=1e-12)
    for w, v in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            expected = adam.state[v][key] if adam.state[v] else torch.zeros_like(v)
            assert_close(optimizer.state[w][key], expected, rtol=0, atol=1e-12)
    assert torch.equal(ours.unused, torch.ones(2, dtype=torch.double))


@pytest.mark.parametrize("clip_norm", [0.01, 1e3])
def test_the_gradient_is_clipped_by_its_global_norm_as_torch_does_it(graphs, clip_norm):
    ours, theirs = Toy(), Toy()
    step, optimizer = _toy_step(ours, clip_norm=clip_norm)
    index = torch.arange(10)
    step(index, step.schedule([(0, 1.0, 0.0, 0.0)])[0])
    theirs.loss(TABLE[index], 1.0).backward()
    norm = clip_grad_norm_(theirs.parameters(), clip_norm)
    assert (norm > clip_norm) == (clip_norm < 1)
    for w, v in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        assert_close(10 * optimizer.state[w]["exp_avg"], v.grad, rtol=1e-12, atol=1e-15)


def test_the_optimizer_is_told_how_many_steps_it_has_taken(graphs):
    """Adam's own count is what a saved state holds, and what eager steps go on from."""
    vae, counts = _vae(), []

    def keep(state):
        counts.append({int(value) for name, value in state.to_tensors()[0].items() if name.endswith("/step")})

    _fit(vae, _images(), on_checkpoint=keep, checkpoint_seconds=0.0, epochs=2)
    assert counts == [{t} for t in range(1, 11)]


def test_a_weight_that_is_frozen_stays_as_it_is(graphs):
    ends = {}
    for compile in (True, False):
        vae = _vae()
        bias = vae.likelihood.net.output.bias.requires_grad_(False)
        before = bias.clone()
        _fit(vae, _images(), compile=compile, average_decay=0.5)
        assert torch.equal(bias, before), compile
        ends[compile] = _flat(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


def test_weights_that_are_shared_are_one_weight(graphs):
    ends = {}
    for compile in (True, False):
        vae = _vae(D=12, L=12)
        vae.posterior.net.layers[0].weight = vae.likelihood.net.layers[0].weight  # both (6, 12)
        _fit(vae, _images(), compile=compile)
        ends[compile] = _flat(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


def test_a_buffer_that_changes_between_steps_is_seen(graphs):
    toy = Toy()
    step, _ = _toy_step(toy, clip_norm=NEVER_CLIP)
    index, row = torch.arange(10), step.schedule([(0, 1.0, 0.0, 0.0)])[0]
    for target in (0.5, -2.0):
        toy.target.fill_(target)
        step.total.zero_()
        step(index, row)
        assert_close(step.total / 10, toy.loss(TABLE[index], 1.0).detach(), rtol=1e-12, atol=0)


def test_dropout_draws_the_same_units_as_it_does_eagerly(graphs):
    ends = {}
    for compile in (True, False):
        vae = _vae()
        vae.posterior.net = nn.Sequential(nn.Dropout(0.5), vae.posterior.net)
        _fit(vae, _images(), compile=compile, learning_rate=0.01)
        ends[compile] = _flat(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


# --- What is refused ---


class PoissonLatents(VAE):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(torch.ones(2, dtype=x.dtype)).to_event(1))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Poisson(self.posterior(x).base_dist.scale).to_event(1))


class NotReparametrized(dist.Normal):
    has_rsample = False


class Detached(VAE):
    """A normal distribution whose draws are not to be differentiated."""

    def guide(self, x):
        q = self.posterior(x).base_dist
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", NotReparametrized(q.loc, q.scale).to_event(1))


class WithParam(VAE):
    def model(self, x):
        s = pyro.param("slope", torch.ones((), dtype=x.dtype))
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(s * z), obs=x)


class WithModule(VAE):
    def model(self, x):
        pyro.module("decoder", self.likelihood)
        super().model(x)


REFUSED_PROGRAMS = {
    "a count": (PoissonLatents, r"site 'z': .* is not reparametrized"),
    "a detached draw": (Detached, r"site 'z': .* is not reparametrized"),
    "pyro.param": (WithParam, "pyro.param"),
    "pyro.module": (WithModule, "pyro.param 'decoder.*parameters belong to modules"),
}


@pytest.fixture
def clean_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize("what", REFUSED_PROGRAMS)
def test_a_program_that_no_graph_can_hold_is_refused_with_its_weights_untouched(graphs, clean_store, what):
    kind, reason = REFUSED_PROGRAMS[what]
    vae = _vae(kind)
    before = _flat(vae)
    with pytest.raises(CannotCapture, match=reason):
        _fit(vae, _images())
    assert torch.equal(_flat(vae), before)
    assert graphs == []


def _elbo(model, guide, x, beta):
    return objectives.elbo(model, guide, x, beta=beta)


_CLOSED_OVER = torch.full((12,), 0.5, dtype=torch.double)
_FOREIGN = nn.Parameter(torch.ones((), dtype=torch.double))

READ = "reads a number"
OUTSIDE = "neither an argument nor made by itself"
REFUSED_OBJECTIVES = {
    "a branch on the loss": (
        lambda m, g, x, *, beta: _elbo(m, g, x, beta) if _elbo(m, g, x, beta) > 0 else x.sum(),
        READ,
    ),
    "a branch on beta": (lambda m, g, x, *, beta: _elbo(m, g, x, beta if beta > 0 else 1.0), READ),
    "a float of the images": (lambda m, g, x, *, beta: _elbo(m, g, x, beta) * float(x.mean()), READ),
    "a float of beta": (lambda m, g, x, *, beta: _elbo(m, g, x, float(beta)), READ),
    "a shape by values": (lambda m, g, x, *, beta: _elbo(m, g, x[x[:, 6] > 0.5], beta), READ),
    "a tensor from outside": (lambda m, g, x, *, beta: _elbo(m, g, x, beta) + (x * _CLOSED_OVER).sum(), OUTSIDE),
    "a number from outside": (lambda m, g, x, *, beta: _elbo(m, g, x, beta) * _CLOSED_OVER[0], OUTSIDE),
    "a parameter from outside": (lambda m, g, x, *, beta: _elbo(m, g, x, beta) * _FOREIGN, OUTSIDE),
    "a branch on a tensor from outside": (
        lambda m, g, x, *, beta: _elbo(m, g, x, beta) * (2 if (_CLOSED_OVER > 0).all() else 1),
        OUTSIDE,
    ),
}


@pytest.mark.parametrize("what", REFUSED_OBJECTIVES)
def test_an_objective_that_no_graph_can_hold_is_refused_with_the_weights_untouched(graphs, what):
    objective, reason = REFUSED_OBJECTIVES[what]
    vae = _vae()
    before = _flat(vae)
    with pytest.raises(CannotCapture, match=reason):
        _fit(vae, _images(), objective=objective)
    assert torch.equal(_flat(vae), before)
    assert graphs == []


def test_a_weight_that_is_held_from_before_is_refused(graphs):
    """Not as a parameter of the module, by whose name it is passed in, but as itself."""
    vae = _vae()
    held = vae.likelihood.net.output.weight
    with pytest.raises(CannotCapture, match=OUTSIDE):
        _fit(vae, _images(), objective=lambda m, g, x, *, beta: _elbo(m, g, x, beta) + held.square().sum())


@pytest.mark.parametrize("read", [float, torch.Tensor.item, torch.Tensor.tolist], ids=["float", "item", "tolist"])
def test_a_number_of_a_tensor_from_outside_is_refused_or_read_anew_at_every_step(graphs, read):
    temperature = torch.ones((), dtype=torch.double)
    ends = {}
    for compile in (True, False):
        vae = _vae()
        temperature.fill_(1.0)

        def on_step(state):
            temperature.fill_(1.0 + state.step)

        try:
            _fit(
                vae,
                _images(),
                compile=compile,
                clip_norm=1.0,
                objective=lambda m, g, x, *, beta: _elbo(m, g, x, read(temperature)),
                on_step=on_step,
            )
        except CannotCapture as error:
            assert compile
            assert "reads a number" in str(error)  # noqa: PT017
            return
        ends[compile] = _flat(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


def test_a_number_that_the_objective_reads_of_its_images_is_refused(graphs):
    def objective(m, g, x, *, beta):
        return _elbo(m, g, x, beta) * x.mean().item()

    with pytest.raises(CannotCapture, match="reads a number"):
        _fit(_vae(), _images(), objective=objective)


@pytest.mark.parametrize("estimator", [TraceGraph_ELBO, RenyiELBO, TraceEnum_ELBO, JitTrace_ELBO])
def test_an_estimator_that_is_neither_of_the_two_is_refused_by_name(graphs, estimator):
    vae = _vae()
    reason = f"expected Trace_ELBO or TraceMeanField_ELBO, got {estimator.__name__}"
    with pytest.raises(CannotCapture, match=reason):
        _step_of(vae, partial(objectives.elbo, estimator=estimator), _images(), batch_size=8)


@pytest.mark.parametrize("estimator", [TraceGraph_ELBO, RenyiELBO, TraceEnum_ELBO, JitTrace_ELBO])
def test_training_by_such_an_estimator_is_refused_in_those_words(graphs, estimator):
    vae = _vae()
    before = _flat(vae)
    with pytest.raises(CannotCapture, match="expected Trace_ELBO or TraceMeanField_ELBO"):
        _fit(vae, _images(), objective=partial(objectives.elbo, estimator=estimator))
    assert torch.equal(_flat(vae), before)


def test_batch_statistics_are_refused_and_left_as_they_are(graphs):
    vae = _vae()
    vae.posterior.net = nn.Sequential(nn.BatchNorm1d(12), vae.posterior.net).double()
    with pytest.raises(CannotCapture, match="in-place"):
        _fit(vae, _images())
    assert torch.equal(vae.posterior.net[0].running_mean, torch.zeros(12, dtype=torch.double))


def test_observations_that_hold_a_tensor_are_refused(graphs):
    threshold = torch.full((12,), 0.5, dtype=torch.double)
    with pytest.raises(CannotCapture, match=OUTSIDE):
        _fit(_vae(), _images(), transform=lambda values, generator: (values > threshold).double())


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    assert capture.capture_obstacle(torch.device("cpu")) is None or "installed" in capture.capture_obstacle(
        torch.device("cpu")
    )
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(capture.shutil, "which", lambda name: None)
    assert capture.capture_obstacle(torch.device("cpu")) == "no C++ compiler (g++ or clang++) is installed"


def test_a_machine_with_a_compiler_has_no_reason_against_it(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for present in ("g++", "clang++"):
        monkeypatch.setattr(capture.shutil, "which", lambda name, present=present: name if name == present else None)
        assert capture.capture_obstacle(torch.device("cpu")) is None


def test_a_compiler_that_fails_is_a_reason_and_trains_nothing(monkeypatch):
    def fail(graph, inputs, **_):
        raise RuntimeError("g++ was killed\nand a long log")

    monkeypatch.setattr(compiler, "compile_fx_inner", fail)
    vae = _vae()
    before = _flat(vae)
    with pytest.raises(CannotCapture, match=r"^the compiler failed: RuntimeError: g\+\+ was killed$"):
        _fit(vae, _images())
    assert torch.equal(_flat(vae), before)


def test_after_a_refusal_the_same_model_trains_eagerly(graphs):
    """Nothing of the capture is left behind: neither its mark nor Pyro's validation switched off."""
    vae, other = _vae(), _vae()
    with pytest.raises(CannotCapture, match=READ):
        _fit(vae, _images(), objective=lambda m, g, x, *, beta: _elbo(m, g, x, float(beta)))
    assert not capture.is_capturing()
    pyro.set_rng_seed(1)
    _fit(vae, _images(), compile=False)
    pyro.set_rng_seed(1)
    _fit(other, _images(), compile=False)
    assert torch.equal(_flat(vae), _flat(other))


# --- Numbers that are not finite ---


def _poison(vae, site):
    with torch.no_grad():
        {"z": vae.posterior, "x": vae.likelihood}[site].net.output.weight.fill_(math.nan)


def _moments(vae, state):
    return [state.optimizer.state[w][key].clone() for w in vae.parameters() for key in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize(("site", "program"), [("z", "guide"), ("x", "model")])
@pytest.mark.parametrize("at_step", [3, 4, 5], ids=["whole batch", "ragged batch", "next epoch"])
def test_a_weight_that_is_not_finite_stops_with_the_step_and_the_site(graphs, site, program, at_step):
    vae, kept = _vae(), {}

    def on_step(state):
        if state.step == at_step:
            _poison(vae, site)
            kept["weights"], kept["moments"], kept["state"] = _flat(vae), _moments(vae, state), state

    with pytest.raises(NotFinite, match=rf"step {at_step}: .*site '{site}' of the {program}"):
        _fit(vae, _images(), on_step=on_step)
    assert torch.equal(_flat(vae).nan_to_num(7.0), kept["weights"].nan_to_num(7.0))
    now = _moments(vae, kept["state"])
    assert all(torch.equal(a, b) for a, b in zip(now, kept["moments"], strict=True))


@pytest.mark.parametrize(("site", "program"), [("z", "guide"), ("x", "model")])
def test_a_weight_that_is_not_finite_from_the_start_is_told_as_it_is_without_compiling(graphs, site, program):
    vae = _vae()
    _poison(vae, site)
    with pytest.raises(NotFinite, match=rf"step 0: .*site '{site}' of the {program}"):
        _fit(vae, _images())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at_step", [3, 4], ids=["whole batch", "ragged batch"])
def test_an_image_that_is_not_finite_stops_with_the_step_and_leaves_the_weights_of_the_step_before(
    graphs, value, at_step
):
    vae, train, kept = _vae(), _images(), {}

    def on_step(state):
        if state.step == at_step:
            train[:, 3] = value
            kept["weights"], kept["moments"], kept["state"] = _flat(vae), _moments(vae, state), state

    with pytest.raises(NotFinite, match=rf"step {at_step}: .*site 'x': the images of this batch"):
        _fit(vae, train, on_step=on_step)
    assert torch.equal(_flat(vae), kept["weights"])
    assert all(torch.equal(a, b) for a, b in zip(_moments(vae, kept["state"]), kept["moments"], strict=True))


def _steep(vae):
    """A finite loss with a gradient that is not: sqrt |b| at b = 0."""

    def objective(model, guide, x, *, beta):
        return objectives.elbo(model, guide, x, beta=beta) + vae.likelihood.net.output.bias[0].abs().sqrt()

    return objective


@pytest.mark.parametrize("at_step", [3, 4], ids=["whole batch", "ragged batch"])
@pytest.mark.parametrize("average_decay", [0.0, 0.5])
def test_a_gradient_that_is_not_finite_stops_before_it_reaches_weights_moments_and_averages(
    graphs, at_step, average_decay
):
    vae, kept = _vae(), {}

    def on_step(state):
        if state.step == at_step:
            with torch.no_grad():
                vae.likelihood.net.output.bias[0] = 0.0
            kept["weights"], kept["moments"], kept["state"] = _flat(vae), _moments(vae, state), state
            kept["averages"] = {name: average.clone() for name, average in state.averages.items()}

    with pytest.raises(NotFinite, match=rf"step {at_step}: the gradient is not finite, in likelihood.net.output.bias"):
        _fit(vae, _images(), objective=_steep(vae), on_step=on_step, average_decay=average_decay)
    assert torch.equal(_flat(vae), kept["weights"])
    assert all(torch.equal(a, b) for a, b in zip(_moments(vae, kept["state"]), kept["moments"], strict=True))
    assert all(torch.equal(kept["state"].averages[name], average) for name, average in kept["averages"].items())


def test_after_a_step_that_was_not_finite_no_step_changes_anything_and_the_finite_ones_are_counted(graphs):
    """What a GPU relies on, whose host sees a failure only later."""
    toy = Toy()
    table = TABLE.clone()
    optimizer = torch.optim.Adam(toy.parameters())
    averages = {name: w.detach().clone() for name, w in toy.named_parameters()}
    step = CapturedStep(
        toy.loss, toy, optimizer, table, _as_stored, batch_size=10, clip_norm=NEVER_CLIP, averages=averages
    )
    table[25] = math.nan
    rows = step.schedule([(t, 1.0, 0.01, 0.5) for t in range(6)])
    good, bad = torch.arange(10), torch.arange(20, 30)
    for index, row in zip((good, good), rows, strict=False):
        step(index, row)
    weights, average, total = _flat(toy), averages["net.0.weight"].clone(), step.total.clone()
    for index, row in zip((bad, good, good[:7], good), rows[2:], strict=True):
        step(index, row)
    assert not step.is_finite
    assert int(step.taken) == 2
    assert torch.equal(_flat(toy), weights)
    assert torch.equal(averages["net.0.weight"], average)
    assert torch.equal(step.total, total)


def test_a_failure_that_the_host_sees_late_is_told_with_its_own_step_and_images(graphs):
    vae, train = _vae(), _images()
    batches = torch.arange(37).split(8)
    train[batches[2][0], 3] = math.nan
    state = TrainingState(vae)
    source = Resident(train, state.device)
    steps = CapturedSteps(
        state, objectives.elbo, source, _as_stored, batch_size=8, optimizer=Optimizer(clip_norm=NEVER_CLIP)
    )
    state.device = torch.device("cuda")  # as it is there: the host looks only in settle
    weights = [_flat(vae) for _ in steps.epoch(batches, [(1.0, 0.01, 0.0)] * 5, validate=False)]
    with pytest.raises(NotFinite, match=r"step 2: .*the images of this batch"):
        steps.settle()
    assert len(weights) == 5
    assert state.step == 2
    assert torch.equal(_flat(vae), weights[1])
    assert not torch.equal(weights[0], weights[1])


def test_a_nan_never_reaches_a_checkpoint(graphs):
    vae, saved = _vae(), []

    def on_step(state):
        if state.step == 4:
            _poison(vae, "x")

    with pytest.raises(NotFinite, match="step 4"):
        _fit(vae, _images(), on_step=on_step, on_checkpoint=saved.append)
    assert saved == []


# --- Values off the support ---


@pytest.mark.parametrize("where", ["train", "validation"])
def test_one_image_off_the_support_is_found_wherever_it_is(graphs, where):
    images = {"train": torch.zeros(50, 12), "validation": torch.zeros(20, 12)}
    images[where][17] = 0.5
    with pytest.raises(ValueError, match="support"):
        _fit(_vae().float(), images["train"], images["validation"], epochs=1)


def test_one_training_image_off_the_support_is_found_before_anything_is_trained_or_compiled(graphs):
    images = torch.zeros(3000, 12, dtype=torch.double)
    images[2718] = 0.5
    vae = _vae()
    before, state = _flat(vae), torch.get_rng_state()
    with pytest.raises(ValueError, match="site 'x': expected images within the support"):
        _fit(vae, images)
    assert torch.equal(_flat(vae), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert graphs == []


# --- The real compiler ---


COMPILED = {
    "mlp": {"network": "mlp", "likelihood": "bernoulli", "kl": "sampled"},
    "gated": {"network": "gated", "likelihood": "normal", "kl": "analytic", "num_particles": 3},
    "conv": {"network": "conv", "likelihood": "bernoulli", "kl": "sampled", "channels": (2,)},
    "gated-residual": {"network": "gated-residual", "likelihood": "bernoulli", "kl": "sampled", "channels": (2,)},
}


@pytest.fixture(scope="module")
def compiled_cases():
    """Each case's step, compiled once for all tests that look at it."""
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    made = {}

    def of(words):
        if words not in made:
            case = Case.of(torch.float, **COMPILED[words])
            made[words] = (case, *case.step())
        return made[words]

    return of


@pytest.mark.parametrize("words", COMPILED)
def test_a_compiled_step_has_the_loss_and_the_gradient_of_the_eager_one(compiled_cases, words):
    case, step, optimizer = compiled_cases(words)
    for seed, beta in enumerate((0.0, 0.3, 4.0)):
        captured = _loss_and_gradient(case.vae, step, optimizer, INDEX, beta=beta, seed=seed)
        _assert_same(captured, case.eager(INDEX, beta=beta, seed=seed), relative=1e-5)


@pytest.mark.parametrize("words", COMPILED)
def test_noise_is_fresh_at_every_compiled_step_and_the_same_for_the_same_seed(compiled_cases, words):
    case, step, optimizer = compiled_cases(words)
    again = [_loss_and_gradient(case.vae, step, optimizer, INDEX, beta=1.0, seed=4)[0] for _ in range(2)]
    step.total.zero_()
    step(INDEX, step.schedule([(0, 1.0, 0.0, 0.0)])[0])  # without a new seed
    assert torch.equal(*again)
    assert abs(float(step.total / len(INDEX) - again[0])) > 1e-4


def test_a_compiled_training_ends_where_the_eager_one_does_and_resumes_bit_for_bit():
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    asked = {"average_decay": 0.5, "clip_norm": 2.0, "learning_rate": 0.01}
    states, ends = {}, {}
    for name, options in {
        "eager": {"compile": False},
        "compiled": {
            "on_checkpoint": lambda state: states.update({state.step: _copy(state)}),
            "checkpoint_seconds": 0.0,
        },
        "resumed": {},
    }.items():
        resumed = {"saved": states[7]} if name == "resumed" else {}
        vae = _vae(seed=99 if resumed else 0)
        ends[name] = _copy(_fit(vae, _images(), **asked, **options, **resumed))[0]
    assert [name for name in ends["compiled"] if not torch.equal(ends["resumed"][name], ends["compiled"][name])] == []
    for name, expected in ends["eager"].items():
        assert_close(ends["compiled"][name], expected, rtol=0, atol=1e-10)


# --- Narrower types ---


def _bf16_is_in_hardware():
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8") if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


needs_bf16 = pytest.mark.skipif(not _bf16_is_in_hardware(), reason="this processor has no bfloat16")


def _wide(dtype=torch.float):
    return _vae(D=64, L=8).to(dtype), _images(40, D=64).to(dtype)


@needs_bf16
def test_under_autocast_the_loss_differs_by_rounding_and_not_by_nothing():
    vae, x = _wide()
    narrow = objectives.autocast(objectives.elbo, torch.bfloat16)
    losses = []
    for objective in (objectives.elbo, narrow):
        torch.manual_seed(0)
        losses.append(float(objective(vae.model, vae.guide, x, beta=1.0).detach()))
    relative = abs(losses[1] - losses[0]) / losses[0]
    assert 0 < relative < 2**-8  # the spacing of bfloat16 near one


@needs_bf16
def test_under_autocast_distributions_stay_in_the_type_of_the_data():
    vae, x = _wide()
    seen = {}

    def objective(model, guide, x, *, beta):
        q = poutine.trace(guide).get_trace(x)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
        seen["product"] = vae.posterior.net(x).dtype
        for program, trace in (("guide", q), ("model", p)):
            for name in ("z", "x"):
                if name in trace.nodes:
                    site = trace.nodes[name]["fn"]
                    seen[program, name] = {site.mean.dtype, site.variance.dtype, trace.nodes[name]["value"].dtype}
        return x.sum()

    objectives.autocast(objective, torch.bfloat16)(vae.model, vae.guide, x, beta=1.0)
    assert seen.pop("product") == torch.bfloat16  # else nothing was narrowed
    assert set(seen) == {("guide", "z"), ("model", "z"), ("model", "x")}
    assert all(types == {torch.float} for types in seen.values())


@needs_bf16
def test_under_autocast_a_captured_step_is_the_eager_one(graphs):
    vae, x = _wide()
    objective = objectives.autocast(objectives.elbo, torch.bfloat16)
    step, optimizer = _step_of(vae, objective, x, batch_size=len(x))
    index = torch.arange(len(x))
    captured = _loss_and_gradient(vae, step, optimizer, index, beta=1.0, seed=0)
    eager = _eager_loss_and_gradient(vae, lambda x: objective(vae.model, vae.guide, x, beta=1.0), x, seed=0)
    exact = _eager_loss_and_gradient(vae, lambda x: objectives.elbo(vae.model, vae.guide, x), x, seed=0)
    assert_close(captured[0], eager[0].double(), rtol=1e-4, atol=0)
    for g, rounded, whole in zip(captured[1], eager[1], exact[1], strict=True):
        assert (g - rounded).norm() < 0.02 * rounded.norm()
        assert (g - whole).norm() < 0.05 * whole.norm()
    assert any(not torch.equal(g, whole) for g, whole in zip(captured[1], exact[1], strict=True))


# --- The host waits for nothing ---


class ReadNumbers(TorchDispatchMode):
    """Counts where Python reads a number of a tensor: on a GPU, each waits for all that was asked before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [8, 5], ids=["whole batch", "ragged batch"])
@pytest.mark.parametrize("kl", ESTIMATORS)
def test_a_step_reads_no_number(graphs, kl, size):
    vae = _vae()
    step, _ = _step_of(vae, partial(objectives.elbo, estimator=ESTIMATORS[kl]), _images(), batch_size=8)
    row = step.schedule([(0, 1.0, 0.01, 0.0)])[0]
    with ReadNumbers() as read:
        torch.ones(()).item()
        step(torch.arange(size), row)
    assert read.count == 1  # the one above: the count works


def test_a_buffer_that_is_replaced_is_refused(graphs):
    """In its own place a buffer changes for good; another in its place is forgotten when the module is put back."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(12, dtype=torch.double))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    vae = _vae()
    vae.posterior.net = nn.Sequential(Mean(), vae.posterior.net)
    with pytest.raises(CannotCapture, match=r"replaces a buffer of the module, posterior\.net\.0\.mean"):
        _fit(vae, _images())


def test_two_parameters_over_one_memory_are_refused(graphs):
    vae = _vae(D=12, L=12)
    vae.posterior.net.layers[0].weight = nn.Parameter(vae.likelihood.net.layers[0].weight.data)
    with pytest.raises(CannotCapture, match="share their memory"):
        _fit(vae, _images())


def test_a_reason_is_one_line(graphs):
    """Pyro adds the shapes of a trace's sites to any error."""
    vae = _vae()

    def objective(m, g, x, *, beta):
        def model(x):
            m(x)
            float(x.sum())

        return _elbo(model, g, x, beta)

    with pytest.raises(CannotCapture) as refused:
        _fit(vae, _images(), objective=objective)
    assert str(refused.value).startswith("it reads a number")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["ccache g++", "g++ -m64"])
def test_a_compiler_may_have_arguments(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(capture.shutil, "which", lambda name: name if name in ("g++", "ccache") else None)
    assert capture.capture_obstacle(torch.device("cpu")) is None


def test_a_compiler_that_is_named_and_not_there_is_named_again(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert capture.capture_obstacle(torch.device("cpu")) == "CXX names /nonexistent/c++, which is not there"


def test_a_cache_that_cannot_be_used_is_a_reason(monkeypatch):
    def fail(graph, inputs, **_):
        raise FileNotFoundError(2, "No such file or directory", "/proc/nope")

    monkeypatch.setattr(capture, "_compile", lambda *arguments: fail(None, None))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nope")
    with pytest.raises(CannotCapture, match="the compiler's cache, /proc/nope, cannot be used"):
        capture.compile_function(lambda x: (x + 1,), [torch.ones(2)])


@pytest.mark.parametrize("word", ["on", "off", 1])
def test_whether_to_compile_is_yes_or_no(word):
    with pytest.raises(ValueError, match="compile: expected True or False"):
        fit(_vae(), _images(), epochs=1, compile=word)


# --- One logarithm for many pixels ---


def _bernoulli_sum(logits, x):
    return (dist.Bernoulli(logits=logits).to_event(3).log_prob(x),)


def _uses(graph, target):
    return sum(node.target is target for node in graph.graph.nodes)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0, 90.0])
@pytest.mark.parametrize("event", [(1, 28, 28), (3, 5, 7), (1, 1, 64)])
def test_joined_logarithms_lose_no_more_than_they_may(graphs, scale, event):
    """The loss that is stated: 6e-8 a pixel for a lost exponential, and rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(50, *event, generator=generator)
    x = (torch.rand(50, *event, generator=generator) < 0.3).float()
    softplus = torch.logaddexp(logits.double(), torch.zeros(()).double())
    exact = (x.double() * logits.double() - softplus).sum((-3, -2, -1))
    D = math.prod(event)
    with torch.no_grad():
        (joined,) = capture.compile_function(_bernoulli_sum, [logits, x])([logits, x])
        (in_double,) = capture.compile_function(_bernoulli_sum, [logits.double(), x.double()])(
            [logits.double(), x.double()]
        )
    assert _uses(graphs[0], torch.ops.aten.prod.dim_int) == _uses(graphs[1], torch.ops.aten.prod.dim_int) == 1
    assert ((joined - exact).abs() <= 6e-8 * D + 1e-6 * exact.abs()).all()
    assert_close(in_double, exact, rtol=1e-12, atol=1e-12 * D)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: (h.log1p().sum(-1),),  # not of an exponential
        lambda h: (h.exp().log1p().sum(-1),),  # of one that may be large
        lambda h: ((-h.abs()).exp().log1p().sum(),),  # over everything
        lambda h: ((2 * (-h.abs()).exp().log1p()).sum(-1),),  # weighted
        lambda h: ((-h.abs()).exp().log1p().sum(-1, keepdim=True),),
    ],
)
def test_other_sums_stay_as_they_are(graphs, function):
    h = 3 * torch.rand(5, 28, dtype=torch.double)
    (value,) = capture.compile_function(function, [h])([h])
    assert _uses(graphs[0], torch.ops.aten.prod.dim_int) == 0
    assert_close(value, function(h)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_logarithms(graphs, dtype):
    logits, x = torch.zeros(3, 1, 28, 28, dtype=dtype), torch.ones(3, 1, 28, 28, dtype=dtype)
    with torch.no_grad():
        (value,) = capture.compile_function(_bernoulli_sum, [logits, x])([logits, x])
    assert_close(value.float(), torch.full((3,), -784 * math.log(2)), rtol=0.01, atol=0)


def test_a_logarithm_that_is_used_twice_is_kept(graphs):
    def function(h):
        logarithm = (-h.abs()).exp().log1p()
        return (h - logarithm).sum(-1), logarithm

    h = torch.randn(5, 28, dtype=torch.double)
    for value, expected in zip(capture.compile_function(function, [h])([h]), function(h), strict=True):
        assert_close(value, expected, rtol=1e-12, atol=0)


def test_a_subtracted_logarithm_keeps_its_sign(graphs):
    def function(h, k):
        return ((h - (h.square() - (-h.abs()).exp().log1p())).sum(-1), (k - (-k.abs()).exp().log1p()).sum(-1))

    h, k = torch.randn(2, 5, 28, dtype=torch.double)
    for value, expected in zip(capture.compile_function(function, [h, k])([h, k]), function(h, k), strict=True):
        assert_close(value, expected, rtol=1e-12, atol=0)
    assert _uses(graphs[0], torch.ops.aten.prod.dim_int) == 2


# --- What a program computes again ---


OF_LOG_WEIGHTS = {"iwae": objectives.iwae, "dreg": objectives.dreg, "stl": objectives.stl}


class SharedPosterior(nn.Module):
    """p(z) = q(z | u): one module at two places of the VAE, as in a VampPrior."""

    def __init__(self, posterior, D=12):
        super().__init__()
        self.posterior = posterior
        self.u = nn.Parameter(torch.linspace(0.1, 0.9, D, dtype=torch.double))

    def forward(self):
        return self.posterior(self.u)


def _with_shared_posterior():
    vae = _vae()
    vae.prior = SharedPosterior(vae.posterior)
    return vae


PRIORS = {"normal": _vae, "shared": _with_shared_posterior}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", OF_LOG_WEIGHTS)
def test_a_captured_step_on_log_weights_has_the_loss_and_the_gradient_of_the_eager_one(
    graphs, name, num_particles, prior
):
    vae, x = PRIORS[prior](), _images()
    objective = partial(OF_LOG_WEIGHTS[name], num_particles=num_particles)
    step, optimizer = _step_of(vae, objective, x, batch_size=4)
    for seed, beta in enumerate((0.0, 0.3, 1.0)):
        captured = _loss_and_gradient(vae, step, optimizer, INDEX, beta=beta, seed=seed)
        eager = _eager_loss_and_gradient(
            vae, lambda x, beta=beta: objective(vae.model, vae.guide, x, beta=beta), x[INDEX], seed=seed
        )
        _assert_same(captured, eager, relative=1e-10)
    assert len(graphs) == 1


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", OF_LOG_WEIGHTS)
def test_a_captured_run_on_log_weights_ends_where_the_eager_one_does(graphs, name, prior):
    weights = {}
    for compile in (True, False):
        vae = PRIORS[prior]()
        pyro.set_rng_seed(5)
        _fit(vae, _images(), objective=partial(OF_LOG_WEIGHTS[name], num_particles=3), compile=compile)
        weights[compile] = _flat(vae)
    assert len(graphs) > 0
    assert_close(weights[True], weights[False], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective", [objectives.elbo, partial(objectives.dreg, num_particles=2)])
def test_a_module_at_two_places_has_its_parameters_back(graphs, objective):
    vae = _with_shared_posterior()
    before = dict(vae.named_parameters())
    step, _ = _step_of(vae, objective, _images(), batch_size=4)
    step(INDEX[:3], step.schedule([(0, 1.0, 0.01, 0.0)])[0])
    after = dict(vae.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is w for name, w in before.items())


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@pytest.mark.parametrize(("name", "plain", "num_particles"), [("stl", "elbo", 1), ("dreg", "iwae", 3)])
def test_the_second_pass_adds_no_matrix_product(graphs, name, plain, num_particles):
    vae = _vae()
    for objective in (name, plain):
        _step_of(vae, partial(getattr(objectives, objective), num_particles=num_particles), _images(), batch_size=4)
    second, once = (sum(_uses(graph, product) for product in PRODUCTS) for graph in graphs)
    assert second == once > 0


def test_what_is_computed_twice_is_computed_once(graphs):
    def function(x):
        return (x @ x).exp() + 1, (x.detach() @ x).exp().sum()

    x = torch.rand(3, 3, dtype=torch.double)
    values = capture.compile_function(function, [x])([x])
    assert _uses(graphs[0], torch.ops.aten.mm.default) == _uses(graphs[0], torch.ops.aten.exp.default) == 1
    for value, expected in zip(values, function(x), strict=True):
        assert torch.equal(value, expected)


def test_of_several_results_the_same_is_computed_once(graphs):
    x = torch.rand(3, 4, dtype=torch.double)
    (value,) = capture.compile_function(lambda x: (x.max(0)[1].double().exp() + x.max(0)[1].double().exp(),), [x])([x])
    assert _uses(graphs[0], torch.ops.aten.exp.default) == 1
    assert torch.equal(value, 2 * x.argmax(0).double().exp())


def test_draws_stay_apart(graphs):
    def function(x):
        return torch.randn_like(x), torch.randn_like(x), torch.rand_like(x), torch.rand_like(x)

    x = torch.zeros(100, dtype=torch.double)
    torch.manual_seed(0)
    drawn = capture.compile_function(function, [x])([x])
    torch.manual_seed(0)
    for value, expected in zip(drawn, function(x), strict=True):
        assert torch.equal(value, expected)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[2], drawn[3])


def test_what_is_read_before_a_change_is_not_what_is_read_after(graphs):
    def function(x):
        before = x.exp()
        x.add_(1)
        return before, x.exp()

    x = torch.rand(3, dtype=torch.double)
    expected = function(x.clone())
    for value, other in zip(capture.compile_function(function, [x])([x]), expected, strict=True):
        assert torch.equal(value, other)


def test_numbers_that_are_equal_and_of_other_types_stay_apart(graphs):
    def function(x):
        return x + 1, x + 1.0, x * True, torch.full((2,), 1), torch.full((2,), 1.0), torch.full((2,), True)

    x = torch.arange(3)
    for value, expected in zip(capture.compile_function(function, [x])([x]), function(x), strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


# --- On a GPU ---


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _gpu_run(*, compile, seed=0, **options):
    vae = _vae(seed=seed).float().to("cuda")
    states = {}
    _fit(
        vae,
        _images(40).float(),
        compile=compile,
        on_checkpoint=lambda state: states.update({state.step: _copy(state)}),
        checkpoint_seconds=0.0,
        average_decay=0.5,
        **options,
    )
    return vae, states


@needs_gpu
def test_steps_as_a_cuda_graph_are_the_eager_ones_on_the_gpu():
    (_, captured), (_, eager) = _gpu_run(compile=True), _gpu_run(compile=False)
    for name, expected in eager[20][0].items():
        if not name.startswith("rng/"):
            assert_close(captured[20][0][name], expected, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_on_a_gpu_a_captured_run_resumes_bit_for_bit():
    _, states = _gpu_run(compile=True)
    for step in (3, 5, 12):
        _, resumed = _gpu_run(compile=True, seed=99, saved=states[step])
        final, expected = resumed[20][0], states[20][0]
        assert [name for name in expected if not torch.equal(final[name], expected[name])] == [], step


@needs_gpu
def test_on_a_gpu_the_host_waits_for_nothing_within_an_epoch():
    vae = _vae().float().to("cuda")
    device = torch.device("cuda")
    train = _images(37).float().to(device)  # four whole batches and a ragged one
    steps = CapturedSteps(
        TrainingState(vae),
        objectives.elbo,
        Resident(train, device),
        _as_stored,
        batch_size=8,
        optimizer=Optimizer(clip_norm=100.0),
    )
    batches = torch.randperm(37).to(device).split(8)
    epoch = steps.epoch(batches, [(1.0, 1e-3, 0.0)] * 5, validate=False)
    next(epoch)  # the epoch's schedule is brought to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = 1 + sum(1 for _ in epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps.settle()
    assert taken == 5
    assert math.isfinite(float(steps._state.epoch_loss))
