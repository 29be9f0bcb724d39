"""log p(x) through a captured graph against the pass that runs as it stands, and against exact answers."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from grids import LIKELIHOODS_AND_NETWORKS, by_default, images_for
from torch.testing import assert_close

from ppl_vae import VAE
from ppl_vae.evidence.dequantization import dequantized
from ppl_vae.evidence.evaluation import CapturedTerms, evaluate
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import CannotCapture, NotFinite
from ppl_vae.weights import log_weight_terms

SHAPE = (1, 8, 8)
PAIRS = 10  # (particle, image) pairs a pass
# Chunks of 10, 10 and 3 particles, an image at a time; then groups of 2, 2 and 1 images, all particles at once.
REMAINDERS = {"last chunk": 23, "last group": 4}
NUM_IMAGES = 5


@pytest.fixture
def small_passes(monkeypatch):
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: PAIRS)


@pytest.fixture
def real_compiler():
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)


def _vae(dtype=torch.double, **words):
    small = PLAIN | {"hidden": (5,), "channels": (2, 3), "latent_dim": 3, "network": "mlp"}
    pyro.set_rng_seed(0)
    return build_vae(Options(**(small | words)), SHAPE).to(dtype)


def _images(dtype=torch.double, num_images=NUM_IMAGES):
    generator = torch.Generator().manual_seed(1)
    return torch.bernoulli(torch.full((num_images, *SHAPE), 0.3), generator=generator).to(dtype)


def _assert_same(captured, plain, *, relative):
    """Nats by their size; what is computed from the weights' ratios by the change that such errors make there."""
    assert captured.log_evidence.dtype == torch.double
    size = plain.log_evidence.abs().max()
    for name in ("log_evidence", "elbo", "reconstruction", "kl"):
        assert_close(getattr(captured, name), getattr(plain, name), rtol=relative, atol=float(relative * size))
    assert_close(captured.ess, plain.ess, rtol=float(10 * relative * size), atol=0)


def _both(vae, x, *, num_particles, **asked):
    return [evaluate(vae, x, num_particles=num_particles, seed=3, compile=c, **asked) for c in (True, False)]


CASES = [
    pytest.param(
        *pair,
        dtype,
        relative,
        REMAINDERS[remainder],
        marks=()
        if by_default(*pair)
        and remainder == ("last chunk" if pair[1] == "gated" else "last group")
        and dtype is torch.double
        else pytest.mark.thorough,
    )
    for pair in LIKELIHOODS_AND_NETWORKS
    for dtype, relative in ((torch.double, 1e-10), (torch.float, 1e-6))
    for remainder in REMAINDERS
]


@pytest.mark.parametrize(("likelihood", "network", "dtype", "relative", "num_particles"), CASES, ids=str)
def test_the_captured_estimate_is_the_plain_one(
    graphs, small_passes, likelihood, network, dtype, relative, num_particles
):
    vae = _vae(dtype, network=network, likelihood=likelihood)
    x = images_for(vae.likelihood.family, NUM_IMAGES, dtype=dtype)
    _assert_same(*_both(vae, x, num_particles=num_particles), relative=relative)
    assert len(graphs) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "relative"), [(torch.double, 1e-10), (torch.float, 1e-6)], ids=["double", "single"])
@pytest.mark.parametrize("likelihood", ["normal", "beta"])
def test_so_is_the_mass_of_levels_under_a_density(graphs, small_passes, likelihood, dtype, relative):
    vae = dequantized(_vae(dtype, likelihood=likelihood), num_draws=3)
    x = (256 * torch.rand(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1))).floor().to(dtype)
    _assert_same(*_both(vae, x, num_particles=4), relative=relative)
    assert len(graphs) == 1


@pytest.mark.parametrize("network", ["gated"])
def test_the_compiled_estimate_is_the_plain_one(real_compiler, small_passes, network):
    vae, x = _vae(torch.float, network=network), _images(torch.float)
    told = []
    captured, plain = _both(vae, x, num_particles=REMAINDERS["last chunk"], on_compiled=told.append)
    _assert_same(captured, plain, relative=1e-6)
    assert len(told) == 1
    assert 0 < told[0] < 600


@pytest.mark.thorough
def test_compiled_images_may_lie_in_memory_in_any_order(real_compiler, small_passes):
    """The graph is for one layout of its inputs: a transposed array holds the same images."""
    vae, x = _vae(), _images()
    transposed = x.mT.contiguous().mT
    assert not transposed.is_contiguous()
    captured, plain = _both(vae, transposed, num_particles=4)
    _assert_same(captured, plain, relative=1e-10)


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("num_particles", [1, PAIRS, PAIRS + 1])
def test_so_it_is_at_the_edges_of_a_pass(graphs, small_passes, num_particles, num_images):
    captured, plain = _both(_vae(), _images(num_images=num_images), num_particles=num_particles)
    assert_close(captured.log_evidence, plain.log_evidence, rtol=1e-10, atol=0)


def test_weights_that_change_after_the_capture_are_seen(graphs):
    vae, x = _vae().eval(), _images()
    terms, found = CapturedTerms(vae, x, 4), []
    for change in (lambda w: w, lambda w: 1.5 * w + 0.1):
        with torch.no_grad():
            for w in vae.parameters():
                w.copy_(change(w))
            for function in (terms, log_weight_terms):
                torch.manual_seed(2)
                found.append(function(vae.model, vae.guide, x, 4))
    assert_close(found[0], found[1], rtol=1e-10, atol=0)
    assert_close(found[2], found[3], rtol=1e-10, atol=0)
    assert not torch.isclose(found[0][0], found[2][0]).any()


# --- What is left behind ---


class ReadsANumber(VAE):
    def model(self, x):
        if float(x.sum()) >= 0:
            super().model(x)


def _of_class(kind, vae):
    return kind(vae.prior, vae.likelihood, vae.posterior)


def _all(vae):
    return {
        "weights": {name: tensor.clone() for name, tensor in vae.state_dict().items()},
        "gradients": [w.grad for w in vae.parameters()],
        "trained": [w.requires_grad for w in vae.parameters()],
        "modes": [module.training for module in vae.modules()],
        "noise": torch.get_rng_state(),
        "validation": pyro.infer.util.is_validation_enabled(),
        "capturing": capture.is_capturing(),
        "gradients are kept": torch.is_grad_enabled(),
    }


def _assert_nothing_changed(vae, before):
    after = _all(vae)
    assert_close(after.pop("weights"), before["weights"], rtol=0, atol=0)
    assert torch.equal(after.pop("noise"), before["noise"])
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("checked", [True, False])
def test_a_captured_evaluation_leaves_everything_as_it_was(graphs, small_passes, checked):
    vae = _vae(network="residual").train()
    vae.likelihood.eval()  # not all modules in one mode
    with pyro.validation_enabled(checked):
        before = _all(vae)
        evaluate(vae, _images(), num_particles=23, seed=3, compile=True)
        _assert_nothing_changed(vae, before)


def test_a_program_that_reads_a_number_is_refused_with_everything_as_it_was(graphs, small_passes):
    vae = _of_class(ReadsANumber, _vae()).train()
    before = _all(vae)
    with pytest.raises(CannotCapture, match="it reads a number of a tensor"):
        evaluate(vae, _images(), num_particles=4, seed=3, compile=True)
    _assert_nothing_changed(vae, before)
    assert graphs == []
    assert evaluate(vae, _images(), num_particles=4, seed=3).log_evidence.isfinite().all()


@pytest.mark.parametrize("compile", [True, False])
def test_weights_that_are_not_finite_are_told_in_the_same_words(graphs, compile):
    vae = _vae()
    with torch.no_grad():
        vae.posterior.net.output.bias[0] = math.nan
    with pytest.raises(NotFinite, match="log-weights"):
        evaluate(vae, _images(), num_particles=4, seed=3, compile=compile)
