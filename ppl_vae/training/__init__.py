"""Training by SVI: loop, steps, the guard against NaN, validation, and a state from which a run goes on exactly."""

from ppl_vae.training.loop import batches_of, fit
from ppl_vae.training.state import TrainingState
from ppl_vae.training.steps import CapturedSteps, EagerSteps
from ppl_vae.training.validation import VALIDATION_SEED

__all__ = ["VALIDATION_SEED", "CapturedSteps", "EagerSteps", "TrainingState", "batches_of", "fit"]
