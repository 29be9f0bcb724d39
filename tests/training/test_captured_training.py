"""Whole captured trainings against eager ones: weights, averages, exact resume, and numbers that are not finite."""

from __future__ import annotations

import math
from functools import partial

import per_image
import pyro
import pyro.distributions as dist
import pytest
import torch
from capture_cases import (
    ESTIMATORS,
    NEVER_CLIP,
    as_stored,
    copy_moments,
    copy_state,
    fit_captured,
    flat_weights,
    make_images,
    make_vae,
    poison,
)
from torch import nn
from torch.testing import assert_close

from ppl_vae import VAE, Conditional
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import DiagonalNormal
from ppl_vae.parts.priors import StandardNormal
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.training import CapturedSteps, Optimizer, Resident, TrainingState


def test_a_support_with_parameters_of_its_own_is_checked_on_its_batch_alone(graphs):
    """Pixels from 0 to what the decoder says of each image."""

    class Within(nn.Module):
        event_shape, num_features = (12,), 12

        def forward(self, h):
            return dist.Uniform(torch.zeros_like(h) - 1, 2 + h.sigmoid()).to_event(1)

    pyro.set_rng_seed(0)
    vae = VAE(
        StandardNormal(3),
        Conditional(MLP(3, 12, hidden=(6,)), Within()),
        Conditional(MLP(12, 6, hidden=(6,)), DiagonalNormal(3)),
    ).double()
    fit_captured(vae, make_images(), epochs=1)
    assert flat_weights(vae).isfinite().all()


# --- Captured and eager training ---


@pytest.mark.thorough
@pytest.mark.parametrize(("kl", "average_decay", "clip_norm"), [("sampled", 0.9, 1.8), ("analytic", 0.0, 1.1)])
def test_two_hundred_steps_end_where_the_eager_ones_do(graphs, kl, average_decay, clip_norm):
    """With a warm-up, a cosine, a ragged last batch, and clipping in some of the steps and not in others."""
    ends, clipped = {}, []
    for compile in (True, False):
        vae = make_vae()

        def on_step(state, vae=vae, compile=compile):
            if not compile:
                norm = torch.stack([w.grad.norm() for w in vae.parameters()]).norm()
                clipped.append(bool(norm > 0.9999 * clip_norm))

        fit_captured(
            vae,
            make_images(),
            compile=compile,
            epochs=40,
            warmup_epochs=10,
            learning_rate=0.01,
            clip_norm=clip_norm,
            average_decay=average_decay,
            objective=partial(per_image.elbo, estimator=ESTIMATORS[kl]),
            on_step=on_step,
            on_checkpoint=lambda state, compile=compile: ends.update({compile: copy_state(state)}),
        )
    assert len(clipped) == 200
    assert 20 < sum(clipped) < 180
    (captured, numbers), (eager, expected) = ends[True], ends[False]
    assert numbers["step"] == expected["step"] == 200
    assert captured.keys() == eager.keys()
    assert any(name.startswith("average/") for name in eager) == (average_decay > 0)
    for name in eager:
        assert_close(captured[name], eager[name], rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_one_graph_serves_a_whole_training(graphs):
    """beta, the learning rate and the decay change at every step, and the last batch of an epoch is smaller."""
    fit_captured(make_vae(), make_images(), make_images(20), epochs=6, warmup_epochs=3, average_decay=0.9)
    assert len(graphs) == 1


def _freeze(vae):
    vae.likelihood.net.output.bias.requires_grad_(False)


def _share(vae):
    vae.posterior.net.layers[0].weight = vae.likelihood.net.layers[0].weight  # both (6, 12)


def _drop_out(vae):
    vae.posterior.net = nn.Sequential(nn.Dropout(0.5), vae.posterior.net)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda vae: None, {"factory": partial(torch.optim.AdamW, weight_decay=0.3)}),
        (_freeze, {"average_decay": 0.5}),
        (_share, {}),
        (_drop_out, {}),
    ],
    ids=["AdamW", "a frozen weight", "a shared weight", "dropout"],
)
def test_a_training_ends_where_the_eager_one_does(graphs, change, options):
    ends = []
    for compile in (True, False):
        vae = make_vae(D=12, L=12)
        change(vae)
        frozen = [(w, w.clone()) for w in vae.parameters() if not w.requires_grad]
        fit_captured(vae, make_images(), compile=compile, **options)
        assert all(torch.equal(w, before) for w, before in frozen)
        ends.append(flat_weights(vae))
    assert len(graphs) == 1
    assert_close(*ends, rtol=0, atol=1e-10)


# --- Other optimizers ---


def test_another_optimizer_trains_eagerly_with_a_warning_and_resumes_bit_for_bit(graphs):
    kind = partial(torch.optim.SGD, momentum=0.9)
    states = {}
    with pytest.warns(UserWarning, match="Falling back to eager training: .* not SGD"):
        end = fit_captured(
            make_vae(),
            make_images(),
            factory=kind,
            on_checkpoint=lambda state: states.update({state.step: copy_state(state)}),
            checkpoint_seconds=0.0,
        )
    assert graphs == []
    resumed = fit_captured(make_vae(seed=99), make_images(), factory=kind, compile=False, saved=states[7])
    (found, _), (expected, _) = copy_state(resumed), copy_state(end)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert any(name.endswith("/momentum_buffer") for name in expected)


# --- Exact resume ---


@pytest.mark.thorough
@pytest.mark.parametrize("average_decay", [0.0, 0.9])
@pytest.mark.parametrize("with_validation", [True, False])
@pytest.mark.parametrize(("compile", "num_particles"), [(True, 1), (False, 1), (False, 3)])
def test_a_run_resumed_from_any_step_ends_bit_for_bit_where_the_undisturbed_one_does(
    graphs, compile, num_particles, with_validation, average_decay
):
    asked = {"validation": make_images(20) if with_validation else None, "average_decay": average_decay}
    asked |= {"compile": compile, "objective": partial(per_image.elbo, num_particles=num_particles)}
    states = {}
    end = fit_captured(
        make_vae(),
        make_images(),
        on_checkpoint=lambda state: states.update({state.step: copy_state(state)}),
        checkpoint_seconds=0.0,
        **asked,
    )
    assert sorted(states) == list(range(1, 21))
    final, numbers = copy_state(end)
    last, _ = states[20]
    for step in (1, 4, 5, 13, 19):
        resumed_states = {}
        torch.manual_seed(12345)
        resumed = fit_captured(
            make_vae(seed=99),
            make_images(),
            saved=states[step],
            on_checkpoint=lambda state, kept=resumed_states: kept.update({state.step: copy_state(state)}),
            **asked,
        )
        tensors, scalars = copy_state(resumed)
        for found, expected in ((tensors, final), (resumed_states[20][0], last)):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], step
        assert scalars | {"seconds": 0} == numbers | {"seconds": 0}


def test_a_run_that_began_eagerly_goes_on_captured(graphs):
    states, ends = {}, {}
    for compile, saved in ((False, None), (True, 7)):
        vae = make_vae(seed=0 if saved is None else 99)
        fit_captured(
            vae,
            make_images(),
            compile=compile,
            saved=None if saved is None else states[saved],
            on_checkpoint=lambda state: states.update({state.step: copy_state(state)}),
            checkpoint_seconds=0.0,
        )
        ends[compile] = flat_weights(vae)
    assert_close(ends[True], ends[False], rtol=0, atol=1e-10)


# --- Averages ---


@pytest.mark.parametrize("compile", [True, False])
def test_averages_follow_their_recursion(graphs, compile):
    """average <- d average + (1 - d) weights, d = min(0.5, (1 + t) / (10 + t)), which is 0.5 from t = 8."""
    vae = make_vae()
    expected, kept = flat_weights(vae), []

    def on_step(state):
        nonlocal expected
        t = state.step - 1
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * flat_weights(vae)

    state = fit_captured(
        vae,
        make_images(),
        compile=compile,
        average_decay=0.5,
        learning_rate=0.05,
        on_step=on_step,
        on_checkpoint=lambda state: kept.append(flat_weights(vae)),
    )
    averages = torch.cat([average.flatten() for average in state.averages.values()])
    assert_close(averages, expected, rtol=0, atol=1e-12)
    assert (kept[-1] - expected).abs().max() > 1e-4  # the last weights are not their average


# --- Numbers that are not finite ---


def _flatten_root(vae):
    """Where sqrt |b| has an infinite gradient."""
    with torch.no_grad():
        vae.likelihood.net.output.bias[0] = 0.0


FAULTS = {
    "weights of the guide": (lambda vae, x: poison(vae, "z"), "site 'z' of the guide"),
    "weights of the model": (lambda vae, x: poison(vae, "x"), "site 'x' of the model"),
    "images that are NaN": (lambda vae, x: x[:, 3].fill_(math.nan), "site 'x': the images of this batch"),
    "infinite images": (lambda vae, x: x[:, 3].fill_(math.inf), "site 'x': the images of this batch"),
    "a gradient": (lambda vae, x: _flatten_root(vae), "the gradient is not finite, in likelihood.net.output.bias"),
}


# Whole batch, ragged batch, next epoch: by default each fault at one of them.
FAULTS_AT = [
    pytest.param(fault, step, marks=() if step == 3 + i % 3 else pytest.mark.thorough)
    for i, fault in enumerate(FAULTS)
    for step in (3, 4, 5)
]


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(("fault", "at_step"), FAULTS_AT)
def test_a_fault_is_named_with_its_step_and_changes_nothing(graphs, at_step, fault, compile):
    """Neither weights nor moments nor averages; and no checkpoint holds it."""
    vae, train, kept, saved = make_vae(), make_images(), {}, []
    inflict, words = FAULTS[fault]
    words = words if compile else words.replace("in likelihood", "in .*likelihood")  # clipping spreads what is NaN

    def objective(model, guide, x, *, beta):
        root = vae.likelihood.net.output.bias[0].abs().sqrt() if fault == "a gradient" else 0.0
        return per_image.elbo(model, guide, x, beta=beta) + root

    def snapshot(state):
        averages = [average.clone() for average in state.averages.values()]
        return [flat_weights(vae), *copy_moments(vae, state), *averages]

    def on_step(state):
        if state.step == at_step:
            inflict(vae, train)
            kept.update(state=state, values=snapshot(state))

    with pytest.raises(NotFinite, match=rf"step {at_step}: .*{words}"):
        fit_captured(
            vae,
            train,
            compile=compile,
            objective=objective,
            on_step=on_step,
            on_checkpoint=saved.append,
            average_decay=0.5,
        )
    assert saved == [] or at_step == 5  # the end of an epoch, whose checkpoint comes after on_step
    for now, before in zip(snapshot(kept["state"]), kept["values"], strict=True):
        assert torch.equal(now.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.thorough
def test_a_failure_that_the_host_sees_late_is_told_with_its_own_step_and_images(graphs):
    vae, train = make_vae(), make_images()
    batches = torch.arange(37).split(8)
    train[batches[2][0], 3] = math.nan
    state = TrainingState(vae)
    source = Resident(train, state.device)
    steps = CapturedSteps(
        state, per_image.elbo, source, as_stored, batch_size=8, optimizer=Optimizer(clip_norm=NEVER_CLIP)
    )
    state.device = torch.device("cuda")  # as it is there: the host looks only in settle
    weights = [flat_weights(vae) for _ in steps.epoch(batches, [(1.0, 0.01, 0.0)] * 5, validate=False)]
    with pytest.raises(NotFinite, match=r"step 2: .*the images of this batch"):
        steps.settle()
    assert len(weights) == 5
    assert state.step == 2
    assert torch.equal(flat_weights(vae), weights[1])
    assert not torch.equal(weights[0], weights[1])


# --- The real compiler ---


@pytest.mark.thorough
def test_a_compiled_training_ends_where_the_eager_one_does_and_resumes_bit_for_bit():
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    asked = {"average_decay": 0.5, "clip_norm": 2.0, "learning_rate": 0.01}
    states, ends = {}, {}
    for name, options in {
        "eager": {"compile": False},
        "compiled": {
            "on_checkpoint": lambda state: states.update({state.step: copy_state(state)}),
            "checkpoint_seconds": 0.0,
        },
        "resumed": {},
    }.items():
        resumed = {"saved": states[7]} if name == "resumed" else {}
        vae = make_vae(seed=99 if resumed else 0)
        ends[name] = copy_state(fit_captured(vae, make_images(), **asked, **options, **resumed))[0]
    assert [name for name in ends["compiled"] if not torch.equal(ends["resumed"][name], ends["compiled"][name])] == []
    for name, expected in ends["eager"].items():
        assert_close(ends["compiled"][name], expected, rtol=0, atol=1e-10)


# --- On a GPU ---


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _gpu_run(*, compile, seed=0, **options):
    vae = make_vae(seed=seed).float().to("cuda")
    states = {}
    fit_captured(
        vae,
        make_images(40).float(),
        compile=compile,
        on_checkpoint=lambda state: states.update({state.step: copy_state(state)}),
        checkpoint_seconds=0.0,
        average_decay=0.5,
        **options,
    )
    return vae, states


@needs_gpu
def test_steps_as_a_cuda_graph_are_the_eager_ones_on_the_gpu():
    (_, captured), (_, eager) = _gpu_run(compile=True), _gpu_run(compile=False)
    for name, expected in eager[20][0].items():
        if not name.startswith("rng/"):
            assert_close(captured[20][0][name], expected, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_on_a_gpu_a_captured_run_resumes_bit_for_bit():
    _, states = _gpu_run(compile=True)
    for step in (3, 5, 12):
        _, resumed = _gpu_run(compile=True, seed=99, saved=states[step])
        final, expected = resumed[20][0], states[20][0]
        assert [name for name in expected if not torch.equal(final[name], expected[name])] == [], step


@needs_gpu
def test_on_a_gpu_the_host_waits_for_nothing_within_an_epoch():
    vae = make_vae().float().to("cuda")
    device = torch.device("cuda")
    train = make_images(37).float().to(device)  # four whole batches and a ragged one
    steps = CapturedSteps(
        TrainingState(vae),
        per_image.elbo,
        Resident(train, device),
        as_stored,
        batch_size=8,
        optimizer=Optimizer(clip_norm=100.0),
    )
    batches = torch.randperm(37).to(device).split(8)
    epoch = steps.epoch(batches, [(1.0, 1e-3, 0.0)] * 5, validate=False)
    next(epoch)  # the epoch's schedule is brought to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = 1 + sum(1 for _ in epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps.settle()
    assert taken == 5
    assert math.isfinite(float(steps._state.epoch_loss))
