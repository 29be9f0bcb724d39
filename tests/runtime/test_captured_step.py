"""One captured step against Pyro's own loss, and torch's own Adam and clipping."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import per_image
import pyro
import pyro.distributions as dist
import pytest
import torch
from capture_cases import (
    ESTIMATORS,
    INDEX,
    NEVER_CLIP,
    OF_LOG_WEIGHTS,
    PRIORS,
    Case,
    TwoLayers,
    as_stored,
    assert_same,
    captured_loss_and_gradient,
    eager_loss_and_gradient,
    flat_weights,
    make_images,
    make_step,
    make_vae,
)
from grids import LIKELIHOODS_AND_NETWORKS, by_default
from pyro import poutine
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae import VAE, data, objectives
from ppl_vae.objectives import loss_per_image
from ppl_vae.parts.registry import KLS
from ppl_vae.runtime import capture
from ppl_vae.runtime.captured_step import CapturedStep, optimizer_obstacle


def _assert_captured_is_eager(case, *, relative):
    step, optimizer = case.step()
    for seed, beta in enumerate((0.0, 0.3, 4.0)):
        captured = captured_loss_and_gradient(case.vae, step, optimizer, INDEX, beta=beta, seed=seed)
        assert_same(captured, case.eager(INDEX, beta=beta, seed=seed), relative=relative)


STEPS = [
    pytest.param(
        kl,
        *pair,
        *numbers,
        marks=()
        if by_default(*pair) and kl == ("analytic" if pair[1] == "gated" else "sampled") and numbers[0] is torch.double
        else pytest.mark.thorough,
    )
    for kl in KLS
    for pair in LIKELIHOODS_AND_NETWORKS
    for numbers in ((torch.double, (2, 3), 3, 1e-10), (torch.float, (2,), 1, 1e-5))
]


@pytest.mark.parametrize(
    ("kl", "likelihood", "network", "dtype", "channels", "num_particles", "relative"), STEPS, ids=str
)
def test_a_captured_step_has_the_loss_and_the_gradient_of_the_eager_one(
    graphs, kl, likelihood, network, dtype, channels, num_particles, relative
):
    words = {"kl": kl, "likelihood": likelihood, "network": network}
    case = Case.of(dtype, channels=channels, num_particles=num_particles, **words)
    _assert_captured_is_eager(case, relative=relative)


def test_what_is_drawn_of_the_stored_images_is_drawn_as_the_eager_step_draws_it(graphs):
    """8-bit levels, binarized anew at every access, before the noise of the sites."""
    vae = make_vae().float()
    levels = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    transform = partial(data.sample_bernoulli, generator=None)
    step, optimizer = make_step(vae, per_image.elbo, levels, batch_size=4, transform=transform)
    captured = captured_loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=3)
    eager = eager_loss_and_gradient(
        vae, lambda values: per_image.elbo(vae.model, vae.guide, transform(values)), levels[INDEX], seed=3
    )
    assert_same(captured, eager, relative=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "relative"), [(torch.double, 1e-8), (torch.float, 1e-5)], ids=["double", "single"])
def test_pixels_that_are_all_but_certain_cost_what_they_cost_eagerly(graphs, dtype, relative):
    """Logits up to 90, where e^h overflows float32, for the right pixels and for the wrong ones."""
    vae, stored = make_vae().to(dtype), make_images().to(dtype)
    sizes = torch.tensor([0.0, 5, 15, 19, 20, 21, 40, 90, -15, -21, -40, -90])
    for sign in (1, -1):
        with torch.no_grad():
            vae.likelihood.net.output.bias.copy_(sign * sizes)
        step, optimizer = make_step(vae, per_image.elbo, stored, batch_size=4)
        captured = captured_loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=0)
        eager = eager_loss_and_gradient(vae, lambda x: per_image.elbo(vae.model, vae.guide, x), stored[INDEX], seed=0)
        assert_same(captured, eager, relative=relative)


# --- Programs of the user ---


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


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")  # TwoLayers: Pyro asks for one order
@pytest.mark.parametrize(("program", "kl"), COMBINATIONS)
def test_a_users_program_has_the_loss_and_the_gradient_of_pyros_own_estimator(graphs, program, kl):
    vae, stored = make_vae(PROGRAMS[program]), make_images()
    objective = partial(per_image.elbo, estimator=ESTIMATORS[kl], num_particles=3)
    step, optimizer = make_step(vae, objective, stored, batch_size=4)
    captured = captured_loss_and_gradient(vae, step, optimizer, INDEX, beta=1.0, seed=2)
    pyros = ESTIMATORS[kl](num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    eager = eager_loss_and_gradient(
        vae, lambda x: pyros.differentiable_loss(vae.model, vae.guide, x) / len(x), stored[INDEX], seed=2
    )
    assert_same(captured, eager, relative=1e-10)


# --- Objectives of log-weights ---


@pytest.mark.thorough
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", OF_LOG_WEIGHTS)
def test_a_captured_step_on_log_weights_has_the_loss_and_the_gradient_of_the_eager_one(
    graphs, name, num_particles, prior
):
    vae, x = PRIORS[prior](), make_images()
    objective = partial(OF_LOG_WEIGHTS[name], num_particles=num_particles)
    step, optimizer = make_step(vae, objective, x, batch_size=4)
    for seed, beta in enumerate((0.0, 0.3, 1.0)):
        captured = captured_loss_and_gradient(vae, step, optimizer, INDEX, beta=beta, seed=seed)
        eager = eager_loss_and_gradient(
            vae, lambda x, beta=beta: objective(vae.model, vae.guide, x, beta=beta), x[INDEX], seed=seed
        )
        assert_same(captured, eager, relative=1e-10)
    assert len(graphs) == 1


# --- Noise ---


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


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "Adam with other constants": partial(torch.optim.Adam, betas=(0.8, 0.95), eps=1e-3),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.3),
}


def _toy_step(toy, *, clip_norm, table=TABLE, optimizer=torch.optim.Adam, averages=None):
    optimizer = optimizer(toy.parameters())
    step = CapturedStep(
        toy.loss, toy, optimizer, table, as_stored, batch_size=10, clip_norm=clip_norm, averages=averages
    )
    return step, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fifty_steps_are_those_of_torchs_optimizer_and_clipping(graphs, kind):
    """The learning rate and beta change at every step, every fifth batch is smaller, and clipping comes and goes."""
    ours, theirs = Toy(), Toy()
    step, optimizer = _toy_step(ours, clip_norm=5.0, optimizer=kind)
    adam = kind(theirs.parameters(), foreach=False, fused=False)
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
    assert_close(flat_weights(ours.net), flat_weights(theirs.net), rtol=0, atol=1e-12)
    for w, v in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            expected = adam.state[v][key] if adam.state[v] else torch.zeros_like(v)
            assert_close(optimizer.state[w][key], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (torch.optim.SGD, "has the optimizers Adam and AdamW, not SGD"),
        (partial(torch.optim.Adam, amsgrad=True), "no amsgrad"),
        (partial(torch.optim.AdamW, maximize=True), "no maximize"),
        (partial(torch.optim.Adam, weight_decay=0.1), "no weight_decay, which AdamW has"),
        (lambda parameters: torch.optim.Adam([{"params": [w]} for w in parameters]), "one group of parameters"),
    ],
)
def test_an_optimizer_that_no_graph_has_is_named(optimizer, reason):
    assert reason in optimizer_obstacle(optimizer(Toy().parameters()))
    assert all(optimizer_obstacle(kind(Toy().parameters())) is None for kind in OPTIMIZERS.values())


def test_a_buffer_that_changes_between_steps_is_seen(graphs):
    toy = Toy()
    step, _ = _toy_step(toy, clip_norm=NEVER_CLIP)
    index, row = torch.arange(10), step.schedule([(0, 1.0, 0.0, 0.0)])[0]
    for target in (0.5, -2.0):
        toy.target.fill_(target)
        step.total.zero_()
        step(index, row)
        assert_close(step.total / 10, toy.loss(TABLE[index], 1.0).detach(), rtol=1e-12, atol=0)


def test_after_a_step_that_was_not_finite_no_step_changes_anything_and_the_finite_ones_are_counted(graphs):
    """What a GPU relies on, whose host sees a failure only later."""
    toy = Toy()
    table = TABLE.clone()
    averages = {name: w.detach().clone() for name, w in toy.named_parameters()}
    step, _ = _toy_step(toy, clip_norm=NEVER_CLIP, table=table, averages=averages)
    table[25] = math.nan
    rows = step.schedule([(t, 1.0, 0.01, 0.5) for t in range(6)])
    good, bad = torch.arange(10), torch.arange(20, 30)
    for index, row in zip((good, good), rows, strict=False):
        step(index, row)
    weights, average, total = flat_weights(toy), averages["net.0.weight"].clone(), step.total.clone()
    for index, row in zip((bad, good, good[:7], good), rows[2:], strict=True):
        step(index, row)
    assert not step.is_finite
    assert int(step.taken) == 2
    assert torch.equal(flat_weights(toy), weights)
    assert torch.equal(averages["net.0.weight"], average)
    assert torch.equal(step.total, total)


# --- The host waits for nothing ---


class ReadNumbers(TorchDispatchMode):
    """Counts where Python reads a number of a tensor: on a GPU, each waits for all that was asked before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [8, 5], ids=["whole batch", "ragged batch"])
@pytest.mark.parametrize("kl", ESTIMATORS)
def test_a_step_reads_no_number(graphs, kl, size):
    vae = make_vae()
    step, _ = make_step(vae, partial(per_image.elbo, estimator=ESTIMATORS[kl]), make_images(), batch_size=8)
    row = step.schedule([(0, 1.0, 0.01, 0.0)])[0]
    with ReadNumbers() as read:
        torch.ones(()).item()
        step(torch.arange(size), row)
    assert read.count == 1  # the one above: the count works


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


@pytest.mark.thorough
@pytest.mark.parametrize("words", COMPILED)
def test_a_compiled_step_has_the_loss_and_the_gradient_of_the_eager_one(compiled_cases, words):
    case, step, optimizer = compiled_cases(words)
    for seed, beta in enumerate((0.0, 0.3, 4.0)):
        captured = captured_loss_and_gradient(case.vae, step, optimizer, INDEX, beta=beta, seed=seed)
        assert_same(captured, case.eager(INDEX, beta=beta, seed=seed), relative=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("words", COMPILED)
def test_noise_is_fresh_at_every_compiled_step_and_the_same_for_the_same_seed(compiled_cases, words):
    case, step, optimizer = compiled_cases(words)
    again = [captured_loss_and_gradient(case.vae, step, optimizer, INDEX, beta=1.0, seed=4)[0] for _ in range(2)]
    step.total.zero_()
    step(INDEX, step.schedule([(0, 1.0, 0.0, 0.0)])[0])  # without a new seed
    assert torch.equal(*again)
    assert abs(float(step.total / len(INDEX) - again[0])) > 1e-4


# --- Narrower types ---


def _bf16_is_in_hardware():
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8") if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


needs_bf16 = pytest.mark.skipif(not _bf16_is_in_hardware(), reason="this processor has no bfloat16")


def _wide(dtype=torch.float):
    return make_vae(D=64, L=8).to(dtype), make_images(40, D=64).to(dtype)


@pytest.mark.thorough
@needs_bf16
def test_under_autocast_a_captured_step_is_the_eager_one(graphs):
    vae, x = _wide()
    objective = partial(loss_per_image, objectives.autocast(objectives.elbo(), torch.bfloat16))
    step, optimizer = make_step(vae, objective, x, batch_size=len(x))
    index = torch.arange(len(x))
    captured = captured_loss_and_gradient(vae, step, optimizer, index, beta=1.0, seed=0)
    eager = eager_loss_and_gradient(vae, lambda x: objective(vae.model, vae.guide, x, beta=1.0), x, seed=0)
    exact = eager_loss_and_gradient(vae, lambda x: per_image.elbo(vae.model, vae.guide, x), x, seed=0)
    assert_close(captured[0], eager[0].double(), rtol=1e-4, atol=0)
    for g, rounded, whole in zip(captured[1], eager[1], exact[1], strict=True):
        assert (g - rounded).norm() < 0.02 * rounded.norm()
        assert (g - whole).norm() < 0.05 * whole.norm()
    assert any(not torch.equal(g, whole) for g, whole in zip(captured[1], exact[1], strict=True))
