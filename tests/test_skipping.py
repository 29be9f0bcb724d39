"""Steps that are left out for their gradient, and weights chosen by an importance-weighted bound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from small_run import SMALL, save_bars
from torch import Tensor

from ppl_vae import build, experiment, objectives, runs
from ppl_vae.evidence import NotFinite, evaluate
from ppl_vae.options import Options
from ppl_vae.training import _VALIDATION_SEED, TrainingState, fit
from ppl_vae.vae import VAE

STEPS = 6  # an epoch of 60 images, ten a step


def images() -> Tensor:
    return (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def fresh() -> VAE:
    pyro.set_rng_seed(0)
    return build.vae(SMALL, (1, 4, 4))


def steep(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
    """The ELBO; of batches with a mark in their first image a loss that is steep, or not finite."""
    loss = objectives.elbo(model, guide, x, beta=beta)
    return loss * torch.where((x == 1).all(dim=(1, 2, 3)).any(), FACTOR, 1.0)


FACTOR = 1e6


def marked() -> Tensor:
    """One image of ones, which only steep batches hold."""
    x = images()
    x[7] = 1
    return x


def trained(x: Tensor, *, skip_norm: float | None, epochs: int = 1, **options: Any) -> tuple[list[Any], TrainingState]:
    records: list[Any] = []
    state = fit(fresh(), x, epochs=epochs, batch_size=10, skip_norm=skip_norm, on_epoch=records.append, **options)
    return records, state


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("factor", [1e6, torch.inf, torch.nan], ids=str)
def test_a_step_whose_gradient_is_astronomical_is_left_out_and_counted(
    graphs: Any, monkeypatch: pytest.MonkeyPatch, factor: float, compile: bool
) -> None:
    monkeypatch.setitem(globals(), "FACTOR", factor)
    before: list[dict[str, Tensor]] = []
    changed: list[bool] = []

    def on_step(state: TrainingState) -> None:
        now = {name: w.detach().clone() for name, w in state.vae.named_parameters()}
        changed.append(not before or any(not torch.equal(w, before[-1][name]) for name, w in now.items()))
        before.append(now)

    records, state = trained(marked(), skip_norm=1e3, objective=steep, compile=compile, on_step=on_step)
    assert state.skipped == records[-1]["skipped_steps"] == 1
    assert changed.count(False) == 1
    assert 5 < records[-1]["train_loss_nats_per_image"] < 20  # 16 pixels: the mean of the steps that were taken


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_without_a_step_to_leave_out_the_weights_are_those_of_a_training_that_leaves_none_out(
    graphs: Any, compile: bool
) -> None:
    (plain, _), (asked, state) = (trained(images(), skip_norm=norm, epochs=2, compile=compile) for norm in (None, 1e6))
    assert [{k: v for k, v in r.items() if "second" not in k} for r in plain] == [
        {k: v for k, v in r.items() if "second" not in k} for r in asked
    ]
    assert state.skipped == 0


def test_a_step_that_is_not_finite_ends_a_training_that_leaves_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", torch.inf)
    with pytest.raises(NotFinite, match="the loss is inf"):
        trained(marked(), skip_norm=None, objective=steep)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_a_training_that_leaves_too_much_out_ends(graphs: Any, compile: bool) -> None:
    with pytest.raises(NotFinite, match=r"step 102: 102 steps so far had a gradient above skip_norm"):
        trained(images(), skip_norm=1e-9, epochs=30, compile=compile)


def test_what_was_left_out_is_said_and_known_after_a_resumption(tmp_path: Path) -> None:
    _, state = trained(marked(), skip_norm=1e3, objective=steep, epochs=2)
    tensors, scalars = state.to_tensors()
    again = TrainingState(fresh(), device=torch.device("cpu"))
    again.restore(tensors, scalars)
    assert (again.skipped, again.epoch_images) == (2, 0)


def test_a_state_of_before_steps_were_left_out_goes_on(tmp_path: Path) -> None:
    """In the middle of an epoch its loss is of the images so far."""
    held: list[Any] = []

    def on_step(state: TrainingState) -> None:
        if state.step == STEPS + 3:
            tensors, scalars = state.to_tensors()
            held.append(({name: w.clone() for name, w in tensors.items()}, dict(scalars)))

    whole, _ = trained(images(), skip_norm=None, epochs=2, on_step=on_step)
    tensors, scalars = held[0]
    del scalars["epoch_images"], scalars["skipped"]
    rest, _ = trained(images(), skip_norm=None, epochs=2, saved=(tensors, scalars))
    assert rest[-1]["train_loss_nats_per_image"] == pytest.approx(whole[-1]["train_loss_nats_per_image"], rel=1e-12)


# --- The bound that chooses ---


def test_the_weights_of_an_importance_weighted_training_are_chosen_by_its_bound() -> None:
    x, vae, records = images(), fresh(), []
    state = fit(
        vae,
        x,
        1 - x,
        epochs=4,
        batch_size=10,
        learning_rate=0.03,
        objective=partial(objectives.dreg, num_particles=5),
        validation_particles=5,
        on_epoch=records.append,
    )
    bounds = [record["validation_bound_nats_per_image"] for record in records]
    assert state.best_validation == max(bounds)
    assert state.best_step == STEPS * (1 + bounds.index(max(bounds)))
    assert all(r["validation_particles"] == 5 for r in records)
    assert all(r["validation_bound_nats_per_image"] > r["validation_elbo_nats_per_image"] for r in records)
    again = evaluate(vae, 1 - x, num_particles=5, seed=_VALIDATION_SEED).log_evidence.mean()
    assert float(again) == pytest.approx(max(bounds), abs=1e-5)


@pytest.mark.parametrize(("objective", "expected"), [("elbo", 1), ("stl", 1), ("iwae", 3), ("dreg", 3)])
def test_only_an_importance_weighted_objective_is_chosen_by_several_particles(objective: str, expected: int) -> None:
    options = Options(objective=objective, num_particles=3)
    assert build.schedule(options)["validation_particles"] == expected


def test_a_run_of_several_particles_says_by_which_bound_its_weights_were_chosen(tmp_path: Path) -> None:
    options = replace(SMALL, dataset=str(save_bars(tmp_path / "bars.npz")), objective="iwae", num_particles=4)
    said: list[str] = []
    experiment.train(options, str(tmp_path / "run"), say=said.append)
    records = runs.read_metrics(tmp_path / "run")
    best = max(record["validation_bound_nats_per_image"] for record in records)
    assert any(f"best validation bound L_4 {best:.2f} nats" in line for line in said)
