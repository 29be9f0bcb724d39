"""One run folder: train it, go on with it, evaluate it, draw it. What every script that needs a run calls."""

from ppl_vae.experiment.comparison import compare_runs
from ppl_vae.experiment.encoding import encode_images
from ppl_vae.experiment.evaluation import evaluate_run
from ppl_vae.experiment.figures import draw_run
from ppl_vae.experiment.imputation import impute_images
from ppl_vae.experiment.likelihood_table import compare_likelihoods
from ppl_vae.experiment.network_table import compare_networks
from ppl_vae.experiment.sampling import sample_run
from ppl_vae.experiment.train import resume, train

__all__ = [
    "compare_likelihoods",
    "compare_networks",
    "compare_runs",
    "draw_run",
    "encode_images",
    "evaluate_run",
    "impute_images",
    "resume",
    "sample_run",
    "train",
]
