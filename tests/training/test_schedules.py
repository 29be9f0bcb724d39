"""Schedules against their published tables and closed forms, and that training follows them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import bernoulli_vae

from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import fit_arguments
from ppl_vae.training import Callbacks, fit
from ppl_vae.training.settings import averaging, cosine, stages, warmup

STEPS = 1000


# --- The cosine ---


def test_a_cosine_is_torchs_annealing():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        assert cosine(step, learning_rate=2e-3, total_steps=STEPS, start=0.0) == pytest.approx(
            annealing.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        annealing.step()


# --- The stages ---

STEPS_AN_EPOCH, EPOCHS = 600, 3280
# Burda et al. 2016, section 5: 3^i passes at 0.001 * 10^(-i / 7), i = 0 to 7, with 600 batches of 100 a pass.
TABLE = [(3**i * STEPS_AN_EPOCH, 0.001 * 10 ** (-i / 7)) for i in range(8)]


@pytest.mark.parametrize("stage", range(8))
def test_each_stage_has_its_published_rate_from_its_first_step_to_its_last(stage):
    first = sum(length for length, _ in TABLE[:stage])
    length, rate = TABLE[stage]
    for step in (first, first + 1, first + length // 2, first + length - 1):
        assert stages(step, learning_rate=0.001, total_steps=EPOCHS * STEPS_AN_EPOCH) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("total_steps", [7, 100, 4999])
def test_the_stages_of_another_length_keep_their_shares(total_steps):
    found = np.array([stages(step, learning_rate=1.0, total_steps=total_steps) for step in range(total_steps)])
    assert (np.diff(found) <= 0).all()
    assert found[-1] == pytest.approx(0.1)
    for stage in range(8):
        share = 3**stage / 3280
        assert abs((np.isclose(found, 10 ** (-stage / 7))).sum() - share * total_steps) < 1


# --- The weight of the KL, and the averages ---


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (1, 0.04), (50, 2.0), (99, 3.96), (100, 4.0), (101, 4.0), (9999, 4.0)]
)
def test_a_warm_up_rises_linearly_from_0_and_stays(step, expected):
    assert warmup(step, beta=4.0, warmup_steps=100) == pytest.approx(expected)


def test_an_average_forgets_its_first_weights_fast_and_then_no_faster_than_asked():
    decays = [averaging(step, decay=0.999) for step in range(20_000)]
    assert decays[0] == 0.1
    assert decays[90] == pytest.approx(0.91)
    assert decays[8989] < decays[8990] + 1e-12
    assert decays[-1] == 0.999
    assert (np.diff(decays) >= 0).all()


def test_an_average_is_the_mean_of_what_was_seen_as_long_as_few_were():
    """With decay (1 + t) / (10 + t) alone the weight of the start falls as t^-9: 3e-5 of it after 20 steps."""
    left = math.prod(averaging(step, decay=0.9999) for step in range(20))
    exact = math.factorial(20) * math.factorial(9) / math.factorial(29)
    assert left == pytest.approx(exact)


# --- In training ---


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, lambda step: (1 + math.cos(math.pi * step / 20)) / 2),
        ({"decay_start": 0.5}, lambda step: 1.0 if step <= 10 else (1 + math.cos(math.pi * (step - 10) / 10)) / 2),
        ({"schedule": "stages"}, lambda step: 10 ** (-sum(step >= 20 * (3**i - 1) / 6560 for i in range(1, 8)) / 7)),
    ],
    ids=["cosine", "flat, then a cosine", "stages"],
)
@pytest.mark.parametrize("compile", [False, True])
def test_training_takes_the_rate_of_the_schedule_at_every_step(graphs, compile, asked, expected):
    """The record of an epoch names the rate of its last step; and Adam moves no weight by much more than the rate."""
    options = Options(
        **({"decay_start": 0.0} | asked),
        epochs=5,
        batch_size=5,
        learning_rate=0.01,
        warmup_epochs=0,
        average_decay=0.0,
        keep="last",
        beta=1.0,
    )
    records, vae = [], bernoulli_vae(latent_dim=2)
    x = torch.bernoulli(torch.full((20, 12), 0.3, dtype=torch.double), generator=torch.Generator().manual_seed(0))
    moved = [torch.cat([w.detach().flatten() for w in vae.parameters()])]
    fit(
        vae,
        x,
        **fit_arguments(options, None),
        transform=lambda values, generator: values,
        compile=compile,
        callbacks=Callbacks(
            on_epoch=records.append,
            on_step=lambda state: moved.append(torch.cat([w.detach().flatten() for w in state.program.parameters()])),
        ),
    )
    rates = [0.01 * expected(step) for step in range(20)]
    assert [record["learning_rate"] for record in records] == pytest.approx(rates[3::4])
    largest = [float((after - before).abs().max()) for before, after in pairwise(moved)]
    assert largest[0] == pytest.approx(rates[0], rel=1e-3)  # |m / sqrt(v)| = 1 at Adam's first step
    # It is at most 1.2 in the first twenty, by Cauchy and Schwarz.
    assert all(step <= 1.2 * rate for step, rate in zip(largest, rates, strict=True))
