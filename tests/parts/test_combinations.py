"""Priors x guides x likelihoods x objectives, a list of pairs and not all with all: they build, train and are measured.

What each part computes is tested where the part is; here that none of them needs to know of another.
"""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
from grids import images_for
from torch.testing import assert_close

from ppl_vae import runs
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.importance import log_evidence
from ppl_vae.evidence.missing import Observed, impute
from ppl_vae.objectives import loss_per_image
from ppl_vae.runs.build import build_likelihood, build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import build_objective
from ppl_vae.runtime.captured_step import CapturedStep

SHAPE = (1, 8, 8)
SMALL = PLAIN | {"network": "mlp", "hidden": (6,), "latent_dim": 3}

FLOW = {"prior": "flow", "prior_layers": 1, "prior_hidden": (5,)}
PRIORS = {
    "standard normal": {},
    "mixture": {"prior": "mixture", "prior_components": 4},
    "vamp": {"prior": "vamp", "prior_components": 4},
    "affine flow": FLOW,
    "spline flow": FLOW | {"prior_flow": "spline"},
}
POSTERIORS = {
    "diagonal": {},
    "full": {"posterior": "full"},
    "iaf": {"posterior": "flow", "posterior_layers": 1, "posterior_hidden": (7,)},
    "spline": {"posterior": "flow", "posterior_flow": "spline", "posterior_layers": 1, "posterior_hidden": (7,)},
}
LIKELIHOODS = ("bernoulli", "normal-optimal", "discretized-logistic")
OBJECTIVES = {
    "elbo": {"num_particles": 1},
    "dreg": {"objective": "dreg", "num_particles": 3},
    "iwae": {"objective": "iwae", "num_particles": 3},
    "stl": {"objective": "stl", "num_particles": 1},
}
LAYERS = {
    "top-down": {"upper_latents": (2,), "upper_hidden": (5,)},
    "bottom-up": {"upper_latents": (2,), "upper_hidden": (5,), "inference": "bottom-up"},
}


# Every prior with two guides at least, every guide with two priors, and several layers with three priors on top.
PAIRS = [
    ("standard normal", "full"),
    ("standard normal", "spline"),
    ("mixture", "diagonal"),
    ("mixture", "iaf"),
    ("vamp", "diagonal"),
    ("vamp", "full"),
    ("vamp", "spline"),
    ("affine flow", "diagonal"),
    ("affine flow", "iaf"),
    ("spline flow", "diagonal"),
    ("standard normal", "top-down"),
    ("mixture", "bottom-up"),
    ("affine flow", "top-down"),
]


def _cases():
    """Likelihoods and objectives take turns."""
    for i, (prior, guide) in enumerate(PAIRS):
        likelihood, objective = LIKELIHOODS[i % 3], list(OBJECTIVES)[i % 4]
        words = PRIORS[prior] | (POSTERIORS | LAYERS)[guide] | OBJECTIVES[objective] | {"likelihood": likelihood}
        yield pytest.param(words, id=f"{prior}-{guide}-{likelihood}-{objective}")


CASES = list(_cases())


def _built(words):
    """A VAE in float64 off its start, where flows are the identity, 9 images for it, and its objective."""
    options = Options(**(SMALL | words))
    torch.manual_seed(0)
    vae = build_vae(options, SHAPE).double().eval()
    with torch.no_grad():
        for w in vae.parameters():
            w.add_(0.05 * torch.randn_like(w))
    return vae, images_for(build_likelihood(options, SHAPE), 9), partial(loss_per_image, build_objective(options))


def _captured(vae, objective, x, index, *, beta, seed):
    """Loss and gradient of a captured step, from Adam's first moment at learning rate 0."""
    optimizer = torch.optim.Adam(vae.parameters())
    step = CapturedStep(
        lambda images, beta: objective(vae.model, vae.guide, images, beta=beta),
        vae,
        optimizer,
        x,
        lambda values: values,
        batch_size=len(index),
        clip_norm=1e30,
    )
    torch.manual_seed(seed)
    step(index, step.schedule([(0, beta, 0.0, 0.0)])[0])
    return step.total / len(index), [10 * optimizer.state[w]["exp_avg"] for w in vae.parameters()]


def _eager(vae, objective, x, *, beta, seed):
    torch.manual_seed(seed)
    loss = objective(vae.model, vae.guide, x, beta=torch.tensor(beta, dtype=torch.double))
    found = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(w) if g is None else g for w, g in zip(vae.parameters(), found, strict=True)
    ]


def _assert_captured_is_eager(vae, objective, x):
    index = torch.tensor([7, 0, 3, 8])
    loss, gradients = _captured(vae, objective, x, index, beta=0.3, seed=1)
    expected, of_eager = _eager(vae, objective, x[index], beta=0.3, seed=1)
    assert_close(loss, expected, rtol=1e-9, atol=0)
    for g, e in zip(gradients, of_eager, strict=True):
        assert_close(g, e, rtol=1e-8, atol=1e-9 * max(1.0, float(e.abs().max())))


@pytest.mark.thorough
@pytest.mark.parametrize("words", CASES)
def test_a_captured_step_is_the_eager_one(graphs, words):
    vae, x, objective = _built(words)
    _assert_captured_is_eager(vae.train(), objective, x)


@pytest.mark.parametrize("words", CASES)
def test_every_weight_but_those_of_no_use_gets_a_gradient(words):
    """Of a coupling's last permutation nothing is trained, and all else must be."""
    vae, x, objective = _built(words)
    _, gradients = _eager(vae, objective, x, beta=1.0, seed=0)
    without = [name for (name, _), g in zip(vae.named_parameters(), gradients, strict=True) if not g.any()]
    assert without == []


@pytest.mark.parametrize("words", CASES)
def test_stored_weights_have_the_same_log_weights(tmp_path, words):
    vae, x, _ = _built(words)
    runs.save_tensors(tmp_path / "model.safetensors", vae.state_dict(), {})
    torch.manual_seed(7)
    other = build_vae(Options(**(SMALL | words)), SHAPE).double().eval()
    other.load_state_dict(runs.load_tensors(tmp_path / "model.safetensors")[0])
    found = [evaluate(one, x, num_particles=4, seed=3).log_evidence for one in (vae, other)]
    assert torch.equal(*found)


# --- What a VampPrior's pseudo-images go through ---


VAMPS = {
    "a standardized encoder": {"likelihood": "normal"},
    "a likelihood that is fitted again": {"likelihood": "normal-optimal"},
    "convolutions": {"network": "conv", "channels": (2, 3)},
    "gated convolutions of levels": {"network": "gated-conv", "channels": (2,), "likelihood": "discretized-logistic"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("words", VAMPS.values(), ids=VAMPS)
def test_pseudo_images_pass_through_the_encoder_in_a_captured_step(graphs, words):
    vae, x, objective = _built(words | PRIORS["vamp"] | {"num_particles": 1})
    vae.prior.start_from(x)
    _assert_captured_is_eager(vae.train(), objective, x)
    assert log_evidence(vae.model, vae.guide, x, num_particles=5).isfinite().all()


# --- Missing pixels ---


IMPUTED = [case for case in CASES if case.values[0]["likelihood"] == "bernoulli"]


@pytest.mark.parametrize("words", IMPUTED)
def test_missing_pixels_are_imputed_under_every_prior_and_guide(words):
    vae, x, _ = _built(words)
    x = torch.where(torch.arange(8) < 4, x[:2], torch.nan)
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        found = impute(Observed(vae, rounds=2, num_fillings=3), x, num_particles=20, num_draws=2)
    assert found.log_evidence.isfinite().all()
    assert torch.isin(found.draws, torch.tensor([0.0, 1.0]).double()).all()
