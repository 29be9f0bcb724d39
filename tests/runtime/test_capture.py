"""Functions as compiled graphs: what is refused, what is rewritten, and what stays."""

from __future__ import annotations

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor.compile_fx as compiler
from capture_cases import count_operators, elbo, fit_captured, flat_weights, make_images, make_vae
from pyro.infer import JitTrace_ELBO, RenyiELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch._inductor.utils import clear_caches
from torch.testing import assert_close

from ppl_vae import VAE, objectives
from ppl_vae.runtime import _inductor, capture
from ppl_vae.runtime.errors import CannotCapture

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


@pytest.mark.parametrize("what", REFUSED_PROGRAMS)
def test_a_program_that_no_graph_can_hold_is_refused_with_its_weights_untouched(graphs, clean_store, what):
    kind, reason = REFUSED_PROGRAMS[what]
    vae = make_vae(kind)
    before = flat_weights(vae)
    with pytest.raises(ValueError, match=reason):  # CannotCapture is one
        fit_captured(vae, make_images())
    assert torch.equal(flat_weights(vae), before)
    assert graphs == []


_CLOSED_OVER = torch.full((12,), 0.5, dtype=torch.double)

_FOREIGN = nn.Parameter(torch.ones((), dtype=torch.double))

READ = "reads a number"
SHAPE = "reads a number|IndexError"  # the latter is what torch 2.8 raises for a mask

OUTSIDE = "neither an argument nor made by itself"

REFUSED_OBJECTIVES = {
    "a branch on the loss": (
        lambda m, g, x, *, beta: elbo(m, g, x, beta) if elbo(m, g, x, beta) > 0 else x.sum(),
        READ,
    ),
    "an item of the images": (lambda m, g, x, *, beta: elbo(m, g, x, beta) * x.mean().item(), READ),
    "a float of the images": (lambda m, g, x, *, beta: elbo(m, g, x, beta) * float(x.mean()), READ),
    "a shape by values": (lambda m, g, x, *, beta: elbo(m, g, x[x[:, 6] > 0.5], beta), SHAPE),
    "a tensor from outside": (lambda m, g, x, *, beta: elbo(m, g, x, beta) + (x * _CLOSED_OVER).sum(), OUTSIDE),
    "a number from outside": (lambda m, g, x, *, beta: elbo(m, g, x, beta) * _CLOSED_OVER[0], OUTSIDE),
    "a parameter from outside": (lambda m, g, x, *, beta: elbo(m, g, x, beta) * _FOREIGN, OUTSIDE),
    "a branch on a tensor from outside": (
        lambda m, g, x, *, beta: elbo(m, g, x, beta) * (2 if (_CLOSED_OVER > 0).all() else 1),
        OUTSIDE,
    ),
}


@pytest.mark.parametrize("what", REFUSED_OBJECTIVES)
def test_an_objective_that_no_graph_can_hold_is_refused_with_the_weights_untouched(graphs, what):
    objective, reason = REFUSED_OBJECTIVES[what]
    vae = make_vae()
    before = flat_weights(vae)
    with pytest.raises(CannotCapture, match=reason):
        fit_captured(vae, make_images(), objective=objective)
    assert torch.equal(flat_weights(vae), before)
    assert graphs == []


@pytest.mark.parametrize("estimator", [TraceGraph_ELBO, RenyiELBO, TraceEnum_ELBO, JitTrace_ELBO])
def test_an_estimator_other_than_the_two_is_refused_by_name(graphs, estimator):
    vae = make_vae()
    before = flat_weights(vae)
    with pytest.raises(CannotCapture, match=f"expected Trace_ELBO, TraceMeanField_ELBO .*, got {estimator.__name__}"):
        fit_captured(vae, make_images(), objective=objectives.elbo(estimator))
    assert torch.equal(flat_weights(vae), before)


def test_batch_statistics_are_refused_and_left_as_they_are(graphs):
    vae = make_vae()
    vae.posterior.net = nn.Sequential(nn.BatchNorm1d(12), vae.posterior.net).double()
    with pytest.raises(CannotCapture, match="in-place"):
        fit_captured(vae, make_images())
    assert torch.equal(vae.posterior.net[0].running_mean, torch.zeros(12, dtype=torch.double))


def test_a_buffer_that_is_replaced_is_refused(graphs):
    """In its own place a buffer changes for good; another in its place is forgotten when the module is put back."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(12, dtype=torch.double))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    vae = make_vae()
    vae.posterior.net = nn.Sequential(Mean(), vae.posterior.net)
    with pytest.raises(CannotCapture, match=r"replaces a buffer of the module, posterior\.net\.0\.mean"):
        fit_captured(vae, make_images())


def test_after_a_refusal_the_same_model_trains_eagerly(graphs):
    """Nothing of the capture is left behind: neither its mark nor Pyro's validation switched off."""
    vae, other = make_vae(), make_vae()
    with pytest.raises(CannotCapture, match=READ):
        fit_captured(vae, make_images(), objective=lambda m, g, x, *, beta: elbo(m, g, x, float(x.mean())))
    assert not capture.is_capturing()
    pyro.set_rng_seed(1)
    fit_captured(vae, make_images(), compile=False)
    pyro.set_rng_seed(1)
    fit_captured(other, make_images(), compile=False)
    assert torch.equal(flat_weights(vae), flat_weights(other))


# --- Compilers ---


@pytest.mark.parametrize(
    ("named", "present", "obstacle"),
    [
        (None, (), "no C++ compiler (g++ or clang++) is installed"),
        (None, ("g++",), None),
        (None, ("clang++",), None),
        ("ccache g++", ("ccache", "g++"), None),
        ("g++ -m64", ("g++",), None),
        ("/nonexistent/c++", ("g++",), "CXX names /nonexistent/c++, which is not there"),
    ],
)
def test_a_compiler_is_looked_for_by_its_name(monkeypatch, named, present, obstacle):
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setattr(capture.shutil, "which", lambda name: name if name in present else None)
    assert capture.capture_obstacle(torch.device("cpu")) == obstacle


def test_a_compiler_that_fails_is_a_reason_and_trains_nothing(monkeypatch):
    def fail(graph, inputs, **_):
        raise RuntimeError("g++ was killed\nand a long log")

    monkeypatch.setattr(compiler, "compile_fx_inner", fail)
    vae = make_vae()
    before = flat_weights(vae)
    with pytest.raises(CannotCapture, match=r"^the compiler failed: RuntimeError: g\+\+ was killed$"):
        fit_captured(vae, make_images())
    assert torch.equal(flat_weights(vae), before)


# --- One logarithm for many pixels ---


def _bernoulli_sum(logits, x):
    return (dist.Bernoulli(logits=logits).to_event(3).log_prob(x),)


@pytest.mark.thorough
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
    assert (
        count_operators(graphs[0], torch.ops.aten.prod.dim_int)
        == count_operators(graphs[1], torch.ops.aten.prod.dim_int)
        == 1
    )
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
    assert count_operators(graphs[0], torch.ops.aten.prod.dim_int) == 0
    assert_close(value, function(h)[0], rtol=1e-12, atol=0)


# --- What a program computes again ---


def test_what_is_computed_twice_is_computed_once(graphs):
    def function(x):
        return (x @ x).exp() + 1, (x.detach() @ x).exp().sum()

    x = torch.rand(3, 3, dtype=torch.double)
    values = capture.compile_function(function, [x])([x])
    assert (
        count_operators(graphs[0], torch.ops.aten.mm.default)
        == count_operators(graphs[0], torch.ops.aten.exp.default)
        == 1
    )
    for value, expected in zip(values, function(x), strict=True):
        assert torch.equal(value, expected)


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


# --- The real compiler ---


@pytest.mark.thorough
def test_kernels_share_files_that_a_later_call_finds_again(tmp_path, monkeypatch):
    """Four kernels, with products between them, in two files: a second one begins once the first is long enough."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_inductor, "_FILE_LENGTH", 6000)  # a kernel has some 4,000
    x, w = torch.randn(8, 8).double(), torch.randn(8, 8).double()

    def function(x, w):
        h = (x.exp() @ w).sin()
        return [((h @ w).cos() + 1) @ w, (h.tanh() @ w).sum(-1)]

    found = []
    for _ in range(2):
        clear_caches()
        run = capture.compile_function(function, [x, w])
        assert_close(run([x, w]), tuple(function(x, w)))
        assert gc.isenabled()
        found.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")})
    assert len(found[0]) == 2
    assert found[0] == found[1]


@pytest.mark.thorough
def test_products_are_the_same_wherever_they_are_written(tmp_path, monkeypatch):
    """Flattened into one vector or two, transposed before, in part, and used elsewhere too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    a, b = torch.randn(6, 4).double(), torch.randn(4, 8).double()

    def function(a, b):
        products = [(k * a) @ b for k in (1, 2, 3, 4, 5)]
        parts = [products[0], products[1].T, products[2][1:], products[3], products[4]]
        flat = torch.cat([part.reshape(-1) for part in parts])
        return [flat, torch.cat([flat[:8], products[3].reshape(-1)]), products[4].exp(), torch.cat(products[:2])]

    run = capture.compile_function(function, [a, b])
    assert_close(run([a, b]), tuple(function(a, b)))
