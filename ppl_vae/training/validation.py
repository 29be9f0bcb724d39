"""Validation after an epoch, and the choice of the weights that are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.protocols import Program
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.training.settings import Validation
from ppl_vae.training.state import TrainingState
from ppl_vae.weights import is_autoencoder

VALIDATION_SEED = 20140501


def validate(state: TrainingState, validation: Validation, *, check: bool) -> dict[str, float]:
    """Measure the weights that are evaluated, and keep them if they are the best so far.

    The record holds the validation ELBO at beta = 1, its two terms, and L_S of several particles. For an autoencoder it
    holds the reconstruction log p(x | z(x)). Numbers are nats per image; ``check`` validates values against supports.
    """
    with state.evaluated_weights():
        record = _measure(state, validation, check=check)
        if validation.keep_last:
            state.keep_weights()
    return record


def _measure(state: TrainingState, validation: Validation, *, check: bool) -> dict[str, float]:
    images, S = validation.images, validation.num_particles
    if images is None:
        state.keep_weights()
        return {}
    if _has_deterministic_guide(state.program, images):
        log_p_x_given_z = reconstruction(state.program, images, seed=VALIDATION_SEED, check=check)
        found = Estimate.mean_of(log_p_x_given_z, 1)
        _keep_if_best(state, found.mean, "reconstruction")
        return {
            "validation_reconstruction_nats_per_image": found.mean,
            "validation_reconstruction_stderr_nats_per_image": found.stderr,
        }
    result = evaluate(state.program, images, num_particles=S, seed=VALIDATION_SEED, check=check)
    elbo = Estimate.mean_of(result.elbo, S)
    record = {
        "validation_elbo_nats_per_image": elbo.mean,
        "validation_elbo_stderr_nats_per_image": elbo.stderr,
        "validation_reconstruction_nats_per_image": float(result.reconstruction.mean()),
        "validation_kl_nats_per_image": float(result.kl.mean()),
    }
    if S == 1:
        _keep_if_best(state, elbo.mean, "ELBO")
        return record
    bound = Estimate.mean_of(result.log_evidence, S)
    _keep_if_best(state, bound.mean, f"bound L_{S}")
    return record | {
        "validation_particles": S,
        "validation_bound_nats_per_image": bound.mean,
        "validation_bound_stderr_nats_per_image": bound.stderr,
    }


def _has_deterministic_guide(program: Program, x: Tensor) -> bool:
    with seeded(VALIDATION_SEED, x.device), torch.no_grad(), evaluation_mode(program):
        return is_autoencoder(program.guide, x)


def _keep_if_best(state: TrainingState, value: float, name: str) -> None:
    """Keep the weights if the value, nats per image, is the highest so far; ``name`` says what it is."""
    if not math.isfinite(value):
        raise NotFinite(f"step {state.step}: the validation {name} is {value}")
    if value > state.best_validation:
        state.best_validation = value
        state.keep_weights()
