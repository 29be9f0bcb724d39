"""Steps that are left out for their gradient, and weights chosen by an importance-weighted bound."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import per_image
import pyro
import pytest
import torch
from fitting import fit
from small_run import SMALL
from torch import Tensor

from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runs.build import build_vae
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import VALIDATION_SEED, TrainingState, epoch_batches
from ppl_vae.vae import VAE

STEPS = 6  # an epoch of 60 images, ten a step


def images() -> Tensor:
    return (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def fresh() -> VAE:
    pyro.set_rng_seed(0)
    return build_vae(SMALL, (1, 4, 4))


def steep(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
    """The ELBO; of batches with a mark in their first image a loss that is steep, or not finite."""
    loss = per_image.elbo(model, guide, x, beta=beta)
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


@pytest.mark.thorough
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("factor", [1e6, torch.inf, torch.nan], ids=str)
def test_a_step_whose_gradient_is_astronomical_is_left_out_and_counted(graphs, monkeypatch, factor, compile):
    monkeypatch.setitem(globals(), "FACTOR", factor)
    before: list[dict[str, Tensor]] = []
    changed: list[bool] = []

    def on_step(state: TrainingState) -> None:
        now = {name: w.detach().clone() for name, w in state.program.named_parameters()}
        changed.append(not before or any(not torch.equal(w, before[-1][name]) for name, w in now.items()))
        before.append(now)

    records, state = trained(marked(), skip_norm=1e3, objective=steep, compile=compile, on_step=on_step)
    assert state.skipped == records[-1]["skipped_steps"] == 1
    assert changed.count(False) == 1
    assert 5 < records[-1]["train_loss_nats_per_image"] < 20  # 16 pixels: the mean of the steps that were taken


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("first", [True, False], ids=["the first step too", "not the first"])
def test_after_steps_that_are_left_out_the_weights_are_those_of_adam_with_a_count_of_all_steps(graphs, first, compile):
    """Adam written out, in float64."""
    left_out = {0, 1, 4} if first else {2, 4}
    x = torch.ones(STEPS, 1, 4, 4)
    order = epoch_batches(STEPS, 1, seed=0, epoch=0, device=torch.device("cpu"))
    for step in left_out:
        x[order[step]] = 0
    vae = fresh().double()
    name, w = next(iter(vae.named_parameters()))
    for other in vae.parameters():
        other.requires_grad_(other is w)

    def objective(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
        """(w + w^2) summed, and infinite for images of zeros."""
        w = attrgetter(name)(vae)
        return (w + w * w).sum() / x.mean()

    weights = w.detach().clone()
    state = fit(
        vae,
        x,
        epochs=1,
        batch_size=1,
        skip_norm=1e3,
        objective=objective,
        transform=lambda values, _: values.double(),
        rate=lambda step, **_: 0.1,
        clip_norm=1e9,
        compile=compile,
    )
    m, v = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(STEPS):
        if step in left_out:
            continue
        g = 1 + 2 * weights
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        weights = weights - 0.1 * corrected[0] / (corrected[1].sqrt() + 1e-8)
    assert state.skipped == len(left_out)
    torch.testing.assert_close(w.detach(), weights, rtol=1e-6, atol=1e-8)


class Fragile(torch.nn.Module):
    """A guide's parameters, NaN for a batch with an image of ones: what Pyro's validation raises on."""

    def __init__(self, posterior: torch.nn.Module) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, x: Tensor) -> Any:
        mark = (x == 1).all(dim=(1, 2, 3)).any()
        return self.posterior(torch.where(mark, torch.nan, x))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_a_value_that_is_not_finite_in_the_first_epoch_is_left_out_and_no_error(graphs, compile):
    vae = fresh()
    x = images()
    order = epoch_batches(60, 10, seed=0, epoch=0, device=torch.device("cpu"))
    x[next(i for i in order[2].tolist() if i >= 10)] = 1  # the first ten are checked before any step
    state = fit(
        VAE(vae.prior, vae.likelihood, Fragile(vae.posterior)),
        x,
        epochs=1,
        batch_size=10,
        skip_norm=1e3,
        compile=compile,
    )
    assert state.skipped == 1
    assert all(w.isfinite().all() for w in state.program.parameters())


def all_but_one(model: Any, guide: Any, x: Tensor, *, beta: Any) -> Tensor:
    """The ELBO of a batch with the mark; of all others a loss that is steep."""
    loss = per_image.elbo(model, guide, x, beta=beta)
    return loss * torch.where((x == 1).all(dim=(1, 2, 3)).any(), 1.0, 1e9)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "captured"])
def test_a_training_that_leaves_too_much_out_ends(graphs, compile):
    with pytest.raises(NotFinite, match=r"step 126: 105 steps so far had a gradient above skip_norm"):
        trained(marked(), skip_norm=1e3, objective=all_but_one, epochs=30, compile=compile)


def test_what_was_left_out_is_said_and_known_after_a_resumption(tmp_path):
    _, state = trained(marked(), skip_norm=1e3, objective=steep, epochs=2)
    tensors, scalars = state.to_tensors()
    again = TrainingState(fresh())
    again.restore(tensors, scalars)
    assert (again.skipped, again.epoch_images) == (2, 0)


# --- The bound that chooses ---


def test_the_weights_of_an_importance_weighted_training_are_chosen_by_its_bound():
    x, vae, records = images(), fresh(), []
    state = fit(
        vae,
        x,
        1 - x,
        epochs=4,
        batch_size=10,
        learning_rate=0.03,
        objective=partial(per_image.dreg, num_particles=5),
        validation_particles=5,
        on_epoch=records.append,
    )
    bounds = [record["validation_bound_nats_per_image"] for record in records]
    assert state.best_validation == max(bounds)
    assert state.best_step == STEPS * (1 + bounds.index(max(bounds)))
    assert all(r["validation_particles"] == 5 for r in records)
    assert all(r["validation_bound_nats_per_image"] > r["validation_elbo_nats_per_image"] for r in records)
    again = evaluate(vae, 1 - x, num_particles=5, seed=VALIDATION_SEED).log_evidence.mean()
    assert float(again) == pytest.approx(max(bounds), abs=1e-5)
