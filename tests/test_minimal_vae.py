"""docs/minimal_vae.py, which uses nothing of the package, and the package give the same numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import per_image
import pyro
import pytest
import torch
from torch import Tensor

from ppl_vae import data, log_evidence, log_weights

PATH = Path(__file__).parent.parent / "docs" / "minimal_vae.py"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_vae", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(minimal: ModuleType) -> tuple[torch.nn.Module, Tensor]:
    """A model after two epochs of 1,000 images, its start's losses, and zeros and ones to score."""
    pyro.set_rng_seed(0)
    vae = minimal.VAE(num_latents=5, num_hidden=50)
    images = minimal.read_images("train-images-idx3-ubyte.xz")[:1000]
    first = minimal.train(vae, images, epochs=1, warmup_epochs=0)
    last = minimal.train(vae, images, epochs=2, warmup_epochs=0)
    assert last < first - 50
    return vae, torch.bernoulli(minimal.read_images("t10k-images-idx3-ubyte.xz")[:50])


def test_it_is_short_and_imports_only_torch_and_pyro() -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    roots = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert roots - set(sys.stdlib_module_names) == {"torch", "pyro"}


def test_it_reads_the_images_that_the_package_reads(minimal: ModuleType) -> None:
    read = minimal.read_images("t10k-images-idx3-ubyte.xz")
    assert torch.equal(read, data.load("mnist").test.flatten(1).float() / 255)


def test_its_log_weights_are_those_of_the_package(minimal: ModuleType, trained) -> None:
    vae, x = trained
    pyro.set_rng_seed(1)
    ours = log_weights(vae.model, vae.guide, x, 20)
    pyro.set_rng_seed(1)
    assert torch.allclose(minimal.log_weights(vae, x, 20), ours, rtol=1e-5)


def test_its_log_evidence_is_that_of_the_package_within_the_monte_carlo_error(minimal: ModuleType, trained) -> None:
    vae, x = trained
    repeats = torch.stack([minimal.log_evidence(vae, x, 500).mean() for _ in range(5)])
    theirs = log_evidence(vae.model, vae.guide, x, num_particles=500).mean()
    error = float(repeats.std()) * math.sqrt(1 + 1 / 5)
    assert abs(float(repeats.mean() - theirs)) < 5 * error


def test_its_tempered_loss_is_the_objective_of_the_package(minimal: ModuleType, trained) -> None:
    """``poutine.scale`` around the latent site of both programs is what the package's handler does."""
    vae, x = trained
    losses = {}
    for beta in (0.5, 4.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        tempered = pyro.infer.Trace_ELBO().loss(lambda x, b=beta: vae.model(x, b), lambda x, b=beta: vae.guide(x, b), x)
        pyro.set_rng_seed(2)
        ours = per_image.elbo(vae.model, vae.guide, x, beta=beta)
        assert tempered / len(x) == pytest.approx(ours.item(), rel=1e-5)
        losses[beta] = tempered
    assert losses[4.0] > losses[0.5]
    pyro.clear_param_store()
