"""Training by SVI: loop, steps, the guard against NaN, validation, and a state from which a run goes on exactly."""

from ppl_vae.training.loop import Stopped, batches_of, fit
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps
from ppl_vae.training.streaming import Resident, Streamed, does_not_fit
from ppl_vae.training.validation import VALIDATION_SEED

__all__ = [
    "VALIDATION_SEED",
    "CapturedSteps",
    "EagerSteps",
    "Resident",
    "Stopped",
    "Streamed",
    "TrainingState",
    "batches_of",
    "does_not_fit",
    "fit",
]
