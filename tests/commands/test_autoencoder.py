"""The plain autoencoder, a VAE with a deterministic guide: closed forms, training, and what is refused of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import per_image
import pyro
import pytest
import scipy.stats
import torch
from capture_cases import as_stored
from fitting import fit
from oracles import NormalFixed
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from small_run import SMALL, save_bars, silent, train_small
from torch import nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional, data, load, runs
from ppl_vae.commands.compare_runs import compare_runs
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.latents import encode_images, impute_images
from ppl_vae.commands.options import CompareRuns, Encode, Evaluate, Impute
from ppl_vae.evidence.evaluation import reconstruction
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import Delta
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runs.open import open_run
from ppl_vae.runs.options import Options

D, L, SCALE = 6, 2, 0.5
KLS = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}


def _linear(*, seed: int = 0) -> VAE:
    """x = W z + b + SCALE e, z(x) = A x + a."""
    pyro.set_rng_seed(seed)
    return VAE(
        StandardNormal(L),
        Conditional(MLP(L, D, hidden=()), NormalFixed((D,), SCALE)),
        Conditional(MLP(D, L, hidden=()), Delta(L)),
    ).double()


def _bernoulli(*, seed: int = 0) -> VAE:
    pyro.set_rng_seed(seed)
    return VAE(
        StandardNormal(L),
        Conditional(MLP(L, 12, hidden=(6,), activation=nn.Tanh), Bernoulli((12,))),
        Conditional(MLP(12, L, hidden=(6,), activation=nn.Tanh), Delta(L)),
    ).double()


def _points(num_images: int = 200) -> torch.Tensor:
    """(N, D) float64 with three strong directions, so that two latents leave something."""
    generator = np.random.default_rng(0)
    spread = generator.normal(size=(num_images, 3)) @ generator.normal(size=(3, D))
    return torch.from_numpy(spread + 0.3 * generator.normal(size=(num_images, D)) + 1.0)


def _binary(num_images: int = 37) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.bernoulli(torch.linspace(0.1, 0.9, 12, dtype=torch.double).expand(num_images, 12), generator=generator)


def _fit(vae: VAE, train: torch.Tensor, validation: torch.Tensor | None = None, **options: Any) -> Any:
    asked = {"epochs": 4, "batch_size": 8, "transform": as_stored, "beta": 0.0, "learning_rate": 0.02}
    return fit(vae, train, validation, **(asked | options))


def _by_hand(vae: VAE, x: torch.Tensor) -> np.ndarray:
    """(N,) log p(x | z(x)) of a linear one, by scipy from its four arrays."""
    with torch.no_grad():
        encoder, decoder = vae.posterior.net.output, vae.likelihood.net.output
        A, a, W, b = (w.numpy() for w in (encoder.weight, encoder.bias, decoder.weight, decoder.bias))
    decoded = (x.numpy() @ A.T + a) @ W.T + b
    return scipy.stats.norm(decoded, SCALE).logpdf(x.numpy()).sum(1)


# --- Closed forms ---


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_loss_at_beta_zero_is_minus_log_p_of_x_given_its_own_code(kl, num_particles):
    vae, x = _linear(), _points(5)
    loss = per_image.elbo(vae.model, vae.guide, x, beta=0.0, estimator=KLS[kl], num_particles=num_particles)
    assert float(loss) == pytest.approx(-_by_hand(vae, x).mean(), rel=1e-12)


@pytest.mark.thorough
def test_the_trained_linear_autoencoder_reconstructs_as_pca_does():
    """Baldi and Hornik 1989: the least squared error of L latents is what the other principal directions hold."""
    vae, x = _linear(), _points()
    centered = x.numpy() - x.numpy().mean(0)
    least = (np.linalg.svd(centered, compute_uv=False)[L:] ** 2).sum() / len(x)
    _fit(vae, x, epochs=500, batch_size=len(x), learning_rate=0.1)
    with torch.no_grad():
        decoded = vae.likelihood(vae.posterior(x).mean).mean
    reached = float((x - decoded).square().sum(1).mean())
    assert least <= reached < 1.001 * least


def test_reconstruction_in_passes_is_that_of_all_at_once(monkeypatch):
    vae, x, told = _linear(), _points(7), []
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 3)
    found = reconstruction(vae, x, seed=0, progress=told.append)
    np.testing.assert_allclose(found.numpy(), _by_hand(vae, x), rtol=1e-12)
    assert told == [3, 3, 1]


# --- Training ---


def test_the_best_weights_by_validation_reconstruction_are_left_in_the_model():
    vae, snapshots, values = _bernoulli(), [], []

    def on_epoch(record):
        values.append(record["validation_reconstruction_nats_per_image"])
        snapshots.append([w.detach().clone() for w in vae.parameters()])

    # Trained on white images and validated on black ones, it gets worse.
    white, black = torch.ones(40, 12, dtype=torch.double), torch.zeros(40, 12, dtype=torch.double)
    state = _fit(vae, white, black, epochs=6, on_epoch=on_epoch)
    best = max(range(6), key=values.__getitem__)
    assert best != 5
    assert state.best_validation == values[best]
    assert all(torch.equal(w, b) for w, b in zip(vae.parameters(), snapshots[best], strict=True))


@pytest.mark.parametrize("kl", KLS)
def test_captured_steps_end_where_the_eager_ones_do(graphs, kl):
    ends, records = {}, {True: [], False: []}
    for compile in (True, False):
        vae = _bernoulli()
        _fit(
            vae,
            _binary(),
            _binary(20),
            compile=compile,
            on_epoch=records[compile].append,
            objective=lambda model, guide, x, *, beta: per_image.elbo(model, guide, x, beta=beta, estimator=KLS[kl]),
        )
        ends[compile] = vae.state_dict()
    assert len(graphs) > 0
    assert_close(ends[True], ends[False], rtol=1e-8, atol=1e-10)
    key = "validation_reconstruction_nats_per_image"
    assert [r[key] for r in records[True]] == pytest.approx([r[key] for r in records[False]], rel=1e-9)


# --- A run ---

AUTOENCODER = replace(SMALL, posterior="delta", beta=0.0)


class Trained:
    """A run, and what was said of it."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.said: list[str] = []
        self.folder = train_small(folder, options, say=self.said.append, draw=True)
        self.entry = runs.read_evaluations(self.folder)["test"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """On labelled images, with three latents."""
    place = tmp_path_factory.mktemp("autoencoder")
    options = replace(AUTOENCODER, dataset=str(save_bars(place / "bars.npz")), latent_dim=3)
    return Trained(place / "run", options)


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    """On 8-bit levels under a density, with two latents."""
    place = tmp_path_factory.mktemp("gray")
    np.save(place / "gray.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    return Trained(place / "run", replace(AUTOENCODER, dataset=str(place / "gray.npy"), likelihood="normal"))


def test_the_evaluation_is_the_log_mass_of_each_image_given_its_code(trained):
    vae, splits = load(trained.folder), open_run(str(trained.folder)).splits
    x = splits.test[data.subset(len(splits.test), 25)].float()
    with torch.no_grad():
        logits = vae.likelihood.net(vae.posterior.net(x)).reshape(x.shape).double().numpy()
    expected = scipy.stats.bernoulli(1 / (1 + np.exp(-logits))).logpmf(x.numpy()).sum((1, 2, 3))
    found = trained.entry["reconstruction"]
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["stderr"] == pytest.approx(expected.std(ddof=1) / 5, rel=1e-4)
    tensors, _ = runs.load_tensors(trained.folder / runs.per_image_file("test"))
    np.testing.assert_allclose(tensors["reconstruction"].numpy(), expected, rtol=1e-5)


def test_dequantized_levels_are_reconstructed_as_training_saw_them(gray):
    """(level + u) / 256 with the u of the evaluation's seed; its scale says so, and is not that of the levels' mass."""
    vae, splits = load(gray.folder), open_run(str(gray.folder)).splits
    x = data.evaluation_images(splits, "test", "dequantized", seed=0)
    with torch.no_grad():
        decoded = vae.likelihood(vae.posterior(x).mean)
    loc, scale = decoded.base_dist.loc.double().numpy(), decoded.base_dist.scale.double().numpy()
    expected = scipy.stats.norm(loc, scale).logpdf(x.double().numpy()).sum((1, 2, 3))
    assert gray.entry["reconstruction"]["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    assert gray.entry["scale"] == "density of (level + u) / 256"


def _ask(**more):
    return {"num_particles": 5, "images": None, "device": "cpu", "seed": 0} | more


REFUSED = {
    "evaluate": (lambda run, place: evaluate_run(Evaluate(run, **_ask(split="test")), say=silent), "log-likelihood"),
    "compare": (
        lambda run, place: compare_runs(
            CompareRuns([run, _copy(run, place)], **_ask(split="test", output=None)), say=silent
        ),
        "bound on log p\\(x\\) to compare",
    ),
    "impute": (
        lambda run, place: impute_images(
            Impute(run, "test", **_ask(mask=None, hide="top", num_draws=2, output=None)), say=silent
        ),
        "p\\(x_missing \\| x_observed\\) to draw from",
    ),
}


def _copy(run: str, place: Path) -> str:
    for path in Path(run).glob("*.*"):
        (place / path.name).write_bytes(path.read_bytes())
    return str(place)


@pytest.mark.parametrize("what", REFUSED)
def test_what_takes_a_density_refuses_the_run_in_one_line_and_writes_nothing(trained, tmp_path, what):
    call, words = REFUSED[what]
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    with pytest.raises(ValueError, match=words) as refusal:
        call(str(trained.folder), tmp_path)
    assert "expected a run with a density q(z | x), got an autoencoder (--posterior delta)" in str(refusal.value)
    assert str(refusal.value).endswith("its reconstructions are in evaluation.json")
    assert "\n" not in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def test_encoding_gives_codes_and_reconstructions(trained, tmp_path):
    said: list[str] = []
    folder = encode_images(Encode(str(trained.folder), "test", **_ask(output=str(tmp_path / "codes"))), say=said.append)
    arrays = np.load(folder / "encoded.npz")
    assert set(arrays) == {"mean", "reconstruction", "names", "labels"}
    vae, x = load(trained.folder), open_run(str(trained.folder)).splits.test.float()
    with torch.no_grad():
        np.testing.assert_allclose(arrays["mean"], vae.posterior.net(x).numpy(), atol=1e-6)
    np.testing.assert_allclose(arrays["reconstruction"], reconstruction(vae, x, seed=5).numpy(), rtol=1e-6)
    written = json.loads((folder / "encoded.json").read_text(encoding="utf-8"))
    assert written["log_likelihood"] is None
    assert written["reconstruction"]["mean"] == pytest.approx(arrays["reconstruction"].mean(), rel=1e-9)
    assert "not a log-likelihood" in said[0]
