"""Several threads get the numbers that one thread gets, whatever the others do meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from entry_points import OTHERS, SCORES
from fitting import fit
from oracles import bernoulli_vae

from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options
from ppl_vae.runtime.global_state import seeded


def _binary(num_images=4):
    generator = torch.Generator().manual_seed(0)
    return torch.bernoulli(torch.full((num_images, 12), 0.5, dtype=torch.double), generator=generator)


def test_one_vae_scored_from_four_threads_gives_the_serial_numbers():
    """Without the lock most calls raise, and some are off by tenths of a nat."""
    vae, x = bernoulli_vae(latent_dim=2), _binary()

    def score(seed):
        return evaluate(vae, x, num_particles=50, seed=seed).log_evidence

    serial = [score(seed) for seed in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(score, range(60)))
    assert all(torch.equal(a, b) for a, b in zip(found, serial, strict=True))


@pytest.mark.parametrize("name", [*SCORES, *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)])
def test_another_thread_does_not_change_a_score_that_is_being_taken(name):
    """The other thread starts when the guide's network runs: its draws would come before those of the score."""
    vae, other, x = bernoulli_vae(latent_dim=2), bernoulli_vae(latent_dim=2, seed=1), _binary()
    serial = evaluate(vae, x, num_particles=5, seed=0)
    started, errors = [], []

    def meanwhile():
        try:
            (SCORES | OTHERS)[name](other, x)
        except Exception as error:
            errors.append(error)

    def start(module, inputs):
        if not started:
            started.append(Thread(target=meanwhile))
            started[0].start()
            started[0].join(timeout=0.3)  # far longer than the call takes by itself

    hook = vae.posterior.net.register_forward_pre_hook(start)
    found = evaluate(vae, x, num_particles=5, seed=0)
    hook.remove()
    started[0].join()
    assert not errors
    assert torch.equal(found.log_evidence, serial.log_evidence)
    assert torch.equal(found.reconstruction, serial.reconstruction)


def _trained(seed):
    """The weights of a small run of that seed, as the command line and the estimator train it."""
    with seeded(seed, torch.device("cpu")):
        vae = build_vae(Options(latent_dim=2, hidden=(4,), prior="standard-normal"), (12,))
        fit(vae, _binary(20).float(), epochs=2, batch_size=8)
    return torch.cat([w.detach().flatten() for w in vae.parameters()])


def test_runs_trained_in_threads_have_the_weights_of_serial_runs():
    serial = [_trained(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_trained, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(found, serial, strict=True))


def test_a_function_that_calls_back_into_the_library_does_not_wait_for_itself():
    vae, x = bernoulli_vae(latent_dim=2), _binary()
    scores = []
    fit(vae, x, epochs=1, on_epoch=lambda record: scores.append(evaluate(vae, x, num_particles=2, seed=0)))
    assert len(scores) == 1
