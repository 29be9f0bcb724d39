"""Training by SVI: the loop, its settings, eager and compiled steps, and a state from which a run continues exactly."""

from ppl_vae.training.loop import TrainingStopped, epoch_batches, fit
from ppl_vae.training.settings import VALIDATION_SEED, Callbacks, Optimizer, Schedule, Validation
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps, Resident, Streamed, exceeds_memory

__all__ = [
    "VALIDATION_SEED",
    "Callbacks",
    "CapturedSteps",
    "EagerSteps",
    "Optimizer",
    "Resident",
    "Schedule",
    "Streamed",
    "TrainingState",
    "TrainingStopped",
    "Validation",
    "epoch_batches",
    "exceeds_memory",
    "fit",
]
