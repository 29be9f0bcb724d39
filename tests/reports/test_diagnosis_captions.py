"""What a page says under a run's figures: of an autoencoder nothing that holds for a VAE alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_run import SMALL, save_bars, train_small

from ppl_vae.reports.text.captions import figure_caption
from ppl_vae.runs.open import open_run

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def caption(tmp_path_factory):
    """The caption of a figure of a run of that kind."""
    place = tmp_path_factory.mktemp("runs")
    options = replace(SMALL, dataset=str(save_bars(place / "bars.npz")), epochs=1)
    made = {
        "VAE": train_small(place / "vae", options, draw=True),
        "autoencoder": train_small(place / "autoencoder", replace(options, posterior="delta", beta=0.0), draw=True),
    }
    return lambda kind, name: figure_caption(open_run(str(made[kind])), name)


OF_A_VAE = {
    "prior_samples.png": "should look like the data",
    "interpolations.png": "should be one image",
    "latents.png": "should be where the other is",
}


@pytest.mark.parametrize("name", OF_A_VAE)
def test_an_autoencoder_is_not_held_to_what_a_prior_asks(name, caption):
    assert OF_A_VAE[name] in caption("VAE", name)
    assert "should" not in caption("autoencoder", name)


def test_a_flat_bound_is_not_said_to_have_settled_without_its_k_hat(caption):
    assert "k-hat" in caption("VAE", "particles.png")
