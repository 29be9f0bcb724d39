"""A Pyro model and guide of one's own: parameters, several sites, arguments per image, and what is refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import MultivariateNormal, constraints
from torch.testing import assert_close

from ppl_vae import PyroProgram, Records, fit, importance, log_evidence
from ppl_vae.evidence import ais, proposals, refinement
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.guide_calibration import compute_ranks
from ppl_vae.evidence.moments import encode
from ppl_vae.objectives import STL, DReG
from ppl_vae.training import Optimizer, Schedule, Validation

D = 3


def images(N=40, seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).double() + 1


# --- Parameters ---


def model_with_params(x):
    loc = pyro.param("loc", torch.zeros(D).double())
    scale = pyro.param("part.scale", torch.ones(D).double(), constraint=constraints.positive)
    with pyro.plate("images", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] + loc, scale).to_event(1), obs=x)


def guide_with_params(x):
    weight = pyro.param("weight", lambda: 0.1 * torch.randn(D).double())
    shift = pyro.param("shift", torch.zeros((), dtype=torch.double))
    scale = pyro.param("scale", torch.ones((), dtype=torch.double), constraint=constraints.positive)
    with pyro.plate("images", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x @ weight + shift, scale))


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, D)
        self.scale = PyroParam(torch.ones(D), constraint=constraints.positive)

    def forward(self, z):
        return dist.Normal(self.net(z), self.scale).to_event(1)


class OfPyroModules(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = Decoder(), nn.Linear(D, 2)

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def of_functions():
    pyro.clear_param_store()
    torch.manual_seed(0)
    return PyroProgram(model_with_params, guide_with_params, images(2))


def of_pyro_modules():
    torch.manual_seed(0)
    module = OfPyroModules().double()
    return PyroProgram(module.model, module.guide, images(2))


def of_closures():
    """Functions with modules that ``pyro.module`` registers."""
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(1, D).double(), nn.Linear(D, 2).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return PyroProgram(model, guide, images(2))


PROGRAMS = [of_functions, of_pyro_modules, of_closures]


def trained(make, *, objective=None, compile=False):
    program = make()
    pyro.set_rng_seed(1)
    schedule = Schedule(batch_size=15)
    fit(program, images(), epochs=3, objective=objective, schedule=schedule, compile=compile)
    return program


@pytest.mark.parametrize("make", PROGRAMS)
@pytest.mark.parametrize("objective", [None, STL(), DReG(2)], ids=["elbo", "stl", "dreg"])
def test_every_parameter_is_trained_eagerly_and_captured_alike(graphs, make, objective):
    before = make().state_dict()
    ends = [trained(make, objective=objective, compile=compile).state_dict() for compile in (False, True)]
    for name, start in before.items():
        assert not torch.equal(ends[0][name], start), name
        assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_captured_evaluation_is_the_eager_one(graphs, make):
    program = trained(make)
    plain, captured = (evaluate(program, images(), num_particles=5, seed=0, compile=c) for c in (False, True))
    assert_close(captured.log_evidence, plain.log_evidence, rtol=0, atol=1e-9)


def test_training_finds_the_maximum_likelihood_within_its_constraints():
    """x_d = m_d + z + s_d e: the maximum of log N(x; m, 1 1' + diag(s^2)) by gradient ascent on the closed form."""
    x = images(400)
    program = of_functions()
    pyro.set_rng_seed(0)
    fit(program, x, epochs=150, optimizer=Optimizer(learning_rate=0.03), objective=STL(4))
    loc, log_scale = nn.Parameter(torch.zeros(D).double()), nn.Parameter(torch.zeros(D).double())
    adam = torch.optim.LBFGS([loc, log_scale], max_iter=200)

    def loss():
        adam.zero_grad()
        covariance = torch.ones(D, D).double() + torch.diag((2 * log_scale).exp())
        value = -MultivariateNormal(loc, covariance).log_prob(x).mean()
        value.backward()
        return value

    adam.step(loss)
    assert_close(program.param("loc"), loc, rtol=0, atol=0.03)
    assert_close(program.param("part.scale"), log_scale.exp(), rtol=0, atol=0.03)


def test_two_programs_share_no_parameter_and_leave_pyros_store_alone():
    first, second = of_pyro_modules(), of_pyro_modules()
    pyro.clear_param_store()
    fit(first, images(), epochs=2)
    held = {name: w.clone() for name, w in first.state_dict().items()}
    fit(second, images(seed=5), epochs=3)
    for name, w in first.state_dict().items():
        assert torch.equal(held[name], w)
        assert not torch.equal(second.state_dict()[name], w)
    assert len(pyro.get_param_store()) == 0


def test_values_that_svi_trained_are_the_first():
    pyro.clear_param_store()
    pyro.param("loc", torch.full((D,), 5.0).double())
    program = PyroProgram(model_with_params, guide_with_params, images(2))
    assert_close(program.param("loc"), torch.full((D,), 5.0).double())


def test_a_param_outside_the_program_is_refused_and_a_new_one_too():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros((), dtype=torch.double))

        def model(self, x):
            model_with_params(x)

        def guide(self, x):
            guide_with_params(x)

    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"pyro.param 'weight': .*; fit trains it in PyroProgram\(model, guide, x\)"):
        fit(Bare(), images(), epochs=1)

    def changing(x):
        model_with_params(x)
        if len(x) > 2:
            pyro.param("late", torch.zeros(()))

    program = PyroProgram(changing, guide_with_params, images(2))
    with pytest.raises(ValueError, match="'late': expected a parameter that the programs register"):
        log_evidence(program.model, program.guide, images(), num_particles=1)


# --- Two continuous sites, against a closed form ---


class TwoSites(nn.Module):
    """z_1 ~ N(0, I), z_2 ~ N(A z_1, I), x ~ N(W z_2, s^2), with its exact guide q(z_2 | x) q(z_1 | z_2)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.A, self.W, self.s = torch.randn(3, 2).double(), torch.randn(D, 3).double(), 0.6
        self.unused = nn.Parameter(torch.zeros(()))

    def covariance(self):
        return torch.eye(3).double() + self.A @ self.A.T

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z_1 = pyro.sample("z_1", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z_2 = pyro.sample("z_2", dist.Normal(z_1 @ self.A.T, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z_2 @ self.W.T, self.s).to_event(1), obs=x)

    def guide(self, x):
        given_x = torch.linalg.inv(torch.linalg.inv(self.covariance()) + self.W.T @ self.W / self.s**2)
        given_z = torch.linalg.inv(torch.eye(2).double() + self.A.T @ self.A)
        with pyro.plate("images", len(x), dim=-1):
            z_2 = pyro.sample("z_2", dist.MultivariateNormal(x @ self.W @ given_x / self.s**2, given_x))
            pyro.sample("z_1", dist.MultivariateNormal(z_2 @ self.A @ given_z, given_z))

    def log_evidence(self, x):
        noise = self.s**2 * torch.eye(D).double()
        return MultivariateNormal(torch.zeros(D).double(), self.W @ self.covariance() @ self.W.T + noise).log_prob(x)


# --- An argument per image ---


class Labeled(nn.Module):
    """x ~ N(z 1 + b_y + c, 1), z ~ N(0, 1), given a label y and a covariate c of each image: log p(x) is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.b = nn.Parameter(torch.randn(4, D).double())
        self.encoder = nn.Linear(D, 2).double()

    def model(self, x, y, c):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + self.b[y] + c, 1.0).to_event(1), obs=x)

    def guide(self, x, y, c):
        loc, log_scale = self.encoder(x - self.b[y] - c).unbind(-1)
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, (0.1 * log_scale).exp()))

    def log_evidence(self, x, y, c):
        covariance = torch.ones(D, D).double() + torch.eye(D).double()
        return MultivariateNormal(self.b[y] + c, covariance).log_prob(x)


def records(N=43):
    g = torch.Generator().manual_seed(3)
    return Records(images(N), torch.randint(4, (N,), generator=g), torch.randn(N, D, generator=g).double())


def test_each_image_is_scored_with_its_own_arguments(monkeypatch):
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 100)  # several groups and chunks
    program, data = Labeled(), records()
    torch.manual_seed(0)
    result = importance(program.model, program.guide, data, num_particles=2000, chunk=30)
    exact = program.log_evidence(data.x, *data.further)
    assert ((result.log_evidence - exact).abs() < 4.5 * result.monte_carlo_stderr).all()


def test_an_evaluation_of_records_is_the_same_compiled(graphs):
    program, data = Labeled(), records()
    plain, captured = (evaluate(program, data, num_particles=5, seed=0, compile=c) for c in (False, True))
    assert_close(captured.log_evidence, plain.log_evidence, rtol=0, atol=1e-9)


def test_records_train_the_same_resident_streamed_and_captured(graphs):
    ends = []
    for settings in ({}, {"stream": True}, {"compile": True}, {"compile": True, "stream": True}):
        program = Labeled()
        pyro.set_rng_seed(0)
        validation = Validation(records(10))
        fit(program, records(), epochs=3, schedule=Schedule(batch_size=10), validation=validation, **settings)
        ends.append(torch.cat([w.detach().reshape(-1) for w in program.parameters()]))
    assert torch.equal(ends[0], ends[1])
    for end in ends[2:]:
        assert_close(end, ends[0], rtol=0, atol=1e-10)


def test_training_with_labels_finds_the_mean_of_each():
    """The maximum likelihood b_y is the mean of x - c over the images of a label."""
    data, program = records(600), Labeled()
    y, c = data.further
    pyro.set_rng_seed(0)
    fit(program, data, epochs=200, optimizer=Optimizer(learning_rate=0.03), objective=STL(4))
    expected = torch.stack([(data.x - c)[y == k].mean(0) for k in range(4)])
    assert_close(program.b, expected, rtol=0, atol=0.1)


def test_records_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"Records: expected tensor 1 of shape \(5, ...\), one row for each image"):
        Records(images(5), torch.zeros(4))


def test_a_program_with_labels_says_how_they_are_passed():
    program, x = Labeled(), records().x
    for run in (
        lambda: importance(program.model, program.guide, x, num_particles=2),
        lambda: fit(program, x, epochs=1),
    ):
        with pytest.raises(ValueError, match=r"missing .* required positional arguments.*; pass Records\(x, y\)"):
            run()


def test_a_distribution_of_torch_is_refused_with_where_to_find_another():
    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", torch.distributions.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'Normal' object is not callable; a site takes distributions of pyro"):
        importance(model, model, images(5), num_particles=2)


# --- What is refused, in one line ---


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, D).double(), nn.Linear(D, 1).double()

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


class PlateOfPixels(Plain):
    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            with pyro.plate("pixels", D, dim=-2):
                pyro.sample("x", dist.Normal(self.decoder(z).mT, 1.0), obs=x.T)


class Subsampled(Plain):
    def model(self, x):
        with pyro.plate("images", len(x), subsample_size=5, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x[rows])

    def guide(self, x):
        with pyro.plate("images", len(x), subsample_size=5, dim=-1) as rows:
            pyro.sample("z", dist.Normal(self.encoder(x[rows]), 1.0).to_event(1))


class WithoutPlate(Plain):
    def model(self, x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


class WithAutoGuide(Plain):
    def __init__(self):
        super().__init__()
        self.auto = AutoDiagonalNormal(super().model)

    def guide(self, x):
        self.auto(x)


REFUSED = {
    PlateOfPixels: r"expected the images' plate at dim=-1 alone, .* part of the distributions' events \(to_event\)",
    Subsampled: "got one that subsamples; leave batches to fit",
    WithoutPlate: r"write pyro.plate\(\"images\", len\(x\), dim=-1\) around every site",
    WithAutoGuide: "got AutoDiagonalNormal; .* write a guide with an encoder",
}


@pytest.mark.parametrize("program", REFUSED)
def test_what_cannot_be_taken_is_refused_in_one_line_that_says_what_to_do(program):
    mine = program()
    with pytest.raises(ValueError, match=REFUSED[program]) as caught:
        fit(mine, images(), epochs=1)
    assert "\n" not in str(caught.value)
    if program is not WithAutoGuide:
        with pytest.raises(ValueError, match=REFUSED[program]) as caught:
            log_evidence(mine.model, mine.guide, images(), num_particles=2)
        assert "\n" not in str(caught.value)


NEEDS_PARTS = {
    "ais": lambda p, x: ais.pilot(p, x, betas=ais.temperatures(5), num_leapfrogs=1, num_chains=2),
    "simulate": lambda p, x: ais.simulate(p, 3),
    "refine_proposal": lambda p, x: refinement.refine_proposal(p, x, steps=1),
    "replace_guide": lambda p, x: proposals.replace_guide(p, None),
    "compute_ranks": lambda p, x: compute_ranks(p, num_simulations=2, num_draws=2),
    "encode": encode,
}


@pytest.mark.parametrize("function", NEEDS_PARTS.values(), ids=NEEDS_PARTS)
def test_what_needs_the_parts_of_a_vae_says_so(function):
    with pytest.raises(ValueError, match=r"vae: expected a VAE, or a module with prior\(\).*, got Plain"):
        function(Plain(), images(4))
