"""Validation after an epoch, and the weights that it keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import evaluate, reconstruction
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.training.state import TrainingState
from ppl_vae.vae import VAE
from ppl_vae.weights import is_autoencoder

VALIDATION_SEED = 20140501


def validate(state: TrainingState, validation: Tensor | None, *, num_particles: int, check: bool) -> dict[str, float]:
    """Validation ELBO at beta = 1, its two terms, and L_S of several particles; or an autoencoder's reconstruction.

    Keeps the best weights, by L_S.
    """
    if validation is None:
        state.keep_weights()
        return {}
    if _is_autoencoder(state.vae, validation):
        log_p_x_given_z = reconstruction(state.vae, validation, seed=VALIDATION_SEED, check=check)
        found = Estimate.from_values(log_p_x_given_z, 1)
        _keep_if_best(state, found.mean, "reconstruction")
        return {
            "validation_reconstruction_nats_per_image": found.mean,
            "validation_reconstruction_stderr_nats_per_image": found.stderr,
        }
    result = evaluate(state.vae, validation, num_particles=num_particles, seed=VALIDATION_SEED, check=check)
    elbo = Estimate.from_values(result.elbo, num_particles)
    record = {
        "validation_elbo_nats_per_image": elbo.mean,
        "validation_elbo_stderr_nats_per_image": elbo.stderr,
        "validation_reconstruction_nats_per_image": float(result.reconstruction.mean()),
        "validation_kl_nats_per_image": float(result.kl.mean()),
    }
    if num_particles == 1:
        _keep_if_best(state, elbo.mean, "ELBO")
        return record
    bound = Estimate.from_values(result.log_evidence, num_particles)
    _keep_if_best(state, bound.mean, f"bound L_{num_particles}")
    return record | {
        "validation_particles": num_particles,
        "validation_bound_nats_per_image": bound.mean,
        "validation_bound_stderr_nats_per_image": bound.stderr,
    }


def _is_autoencoder(vae: VAE, x: Tensor) -> bool:
    with seeded(VALIDATION_SEED, x.device), torch.no_grad(), evaluation_mode(vae):
        return is_autoencoder(vae.guide, x)


def _keep_if_best(state: TrainingState, value: float, word: str) -> None:
    """value: nats an image, higher is better; word: what it is of the validation images."""
    if not math.isfinite(value):
        raise NotFinite(f"step {state.step}: the validation {word} is {value}")
    if value > state.best_validation:
        state.best_validation = value
        state.keep_weights()
