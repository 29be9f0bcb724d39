"""Samples of a run: drawn from its model, seeded, and written as arrays and pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import LinearGaussian
from small_run import SMALL, bars, nothing_changes, train_small
from torch.testing import assert_close

from ppl_vae import load
from ppl_vae.commands import latents as sampling
from ppl_vae.commands.latents import sample_run
from ppl_vae.commands.options import Sample


@pytest.fixture
def sample(bars_run, tmp_path):
    """Samples into a new folder; returns it, and what was said."""

    def call(run_dir=bars_run, *, num_samples=5, seed=0, output=tmp_path / "out"):
        said = []
        words = {"device": "cpu", "output": None if output is None else str(output)}
        return sample_run(Sample(str(run_dir), num_samples=num_samples, seed=seed, **words), say=said.append), said

    return call


def arrays(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        return dict(stored)


# --- The draws ---


def test_samples_have_the_models_mean_and_covariance():
    """x ~ N(b, W W' + scale^2 I): the sums of squares of 20,000 draws within 5 standard errors."""
    oracle = LinearGaussian.random()
    torch.manual_seed(0)
    x = sampling.sample(oracle.vae(), 20_000).images
    covariance = oracle.W @ oracle.W.T + oracle.scale**2 * torch.eye(6, dtype=torch.double)
    variance = covariance.diagonal()
    assert ((x.mean(0) - oracle.b).abs() < 5 * (variance / 20_000).sqrt()).all()
    error = ((variance[:, None] * variance + covariance.square()) / 20_000).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error).all()


def test_the_mean_is_that_of_its_own_latent(monkeypatch):
    monkeypatch.setattr("ppl_vae.runtime.batching.items_per_pass", lambda *_, **__: 4)
    oracle = LinearGaussian.random()
    samples = sampling.sample(oracle.vae(), 10)
    assert_close(samples.mean, samples.z @ oracle.W.T + oracle.b)
    residual = (samples.images - samples.mean) / oracle.scale
    assert 0.5 < residual.std() < 1.5


# --- The files ---


def test_the_arrays_are_the_runs_own_decoder(sample, bars_run):
    stored = arrays(sample()[0])
    with torch.no_grad():
        mean = load(bars_run).likelihood(torch.from_numpy(stored["z"])).mean
    assert_close(torch.from_numpy(stored["mean"]), mean)
    assert stored["images"].shape == (5, 1, 8, 8)
    assert set(np.unique(stored["images"])) <= {0.0, 1.0}


def test_the_same_seed_draws_the_same(sample, tmp_path):
    one, two = (arrays(sample(output=tmp_path / name)[0]) for name in "ab")
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_sampling_leaves_the_random_state_and_the_run(sample, bars_run):
    with nothing_changes(bars_run):
        sample()


def test_a_table_has_arrays_and_no_pictures(sample, tmp_path):
    np.save(tmp_path / "table.npy", bars(60)[0].reshape(60, 64))
    table = train_small(tmp_path / "table", replace(SMALL, dataset=str(tmp_path / "table.npy"), epochs=1))
    folder, said = sample(table)
    assert [path.name for path in folder.iterdir()] == ["samples.npz"]
    assert "The data is a table, (N, D): there are no pictures." in said
