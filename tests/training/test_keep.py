"""Which weights a run keeps: the best by validation, or the last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from fitting import fit
from small_run import SMALL, save_bars

from ppl_vae.runs.build import build_vae
from ppl_vae.runs.resolve import load_splits, resolve
from ppl_vae.vae import VAE


def trained(
    *, keep_last: bool = False, keep_start: bool = False, average_decay: float = 0.0
) -> tuple[VAE, Any, dict[str, torch.Tensor]]:
    """Four epochs, with the inverse of the training images for validation: the more is learned, the worse it is."""
    pyro.set_rng_seed(0)
    vae = build_vae(replace(SMALL, binarization="none"), (1, 4, 4))
    x = (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    x[:30] = 0  # something to be learned
    last: dict[str, torch.Tensor] = {}

    def on_checkpoint(state: Any) -> None:
        values = state.averages or dict(state.program.named_parameters())
        last.update({name: w.detach().clone() for name, w in values.items()})

    state = fit(
        vae,
        x,
        1 - x,
        epochs=4,
        batch_size=10,
        learning_rate=0.03,
        average_decay=average_decay,
        keep_last=keep_last,
        keep_start=keep_start,
        on_checkpoint=on_checkpoint,
    )
    return vae, state, last


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_the_last_weights_are_kept_where_they_are_asked_for(average_decay):
    vae, state, last = trained(keep_last=True, average_decay=average_decay)
    assert state.best_step == state.step
    for name, w in vae.named_parameters():
        torch.testing.assert_close(w, last[name], rtol=0, atol=0)


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_the_weights_at_the_start_are_kept_where_no_epoch_has_better_ones(average_decay):
    pyro.set_rng_seed(0)
    fresh = build_vae(replace(SMALL, binarization="none"), (1, 4, 4)).state_dict()
    vae, state, _ = trained(keep_start=True, average_decay=average_decay)
    assert state.best_step == 0
    for name, w in vae.state_dict().items():
        torch.testing.assert_close(w, fresh[name], rtol=0, atol=0)
    _, without, _ = trained(average_decay=average_decay)
    assert without.best_step > 0
    assert without.best_validation < state.best_validation


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "best"),
        ({"beta": 4.0}, "last"),
        ({"beta": 4.0, "keep": "best"}, "best"),
        ({"keep": "last"}, "last"),
        ({"beta": 0.0, "posterior": "delta"}, "best"),
    ],
    ids=str,
)
def test_a_beta_is_shown_as_it_ends_unless_asked_otherwise(tmp_path, asked, expected):
    options = replace(SMALL, dataset=str(save_bars(tmp_path / "bars.npz")), **asked)
    assert resolve(options, load_splits(options)).keep == expected
