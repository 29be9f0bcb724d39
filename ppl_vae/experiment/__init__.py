"""One run folder: train it, go on with it, evaluate it, draw it. What every script that needs a run calls."""

from ppl_vae.experiment.evaluation import evaluate_run
from ppl_vae.experiment.figures import draw_run
from ppl_vae.experiment.train import resume, train

__all__ = ["draw_run", "evaluate_run", "resume", "train"]
