"""One run folder: train it, go on with it, evaluate it, draw it. What every script that needs a run calls."""

from ppl_vae.experiment.certificate import certify_run
from ppl_vae.experiment.comparison import compare_runs
from ppl_vae.experiment.diagnosis import diagnose_run
from ppl_vae.experiment.diagnosis_numbers import importance_numbers, measure, noise_numbers
from ppl_vae.experiment.encoding import encode_images
from ppl_vae.experiment.evaluation import evaluate_run
from ppl_vae.experiment.export import export_run
from ppl_vae.experiment.figures import draw_run
from ppl_vae.experiment.imputation import impute_images
from ppl_vae.experiment.likelihood_table import compare_likelihoods
from ppl_vae.experiment.network_table import compare_networks
from ppl_vae.experiment.reproduction import read_rows, reproduce, reproduction_table, seeds_table
from ppl_vae.experiment.run_report import report_run
from ppl_vae.experiment.sampling import sample_run
from ppl_vae.experiment.shipped import ship
from ppl_vae.experiment.train import resume, train

__all__ = [
    "certify_run",
    "compare_likelihoods",
    "compare_networks",
    "compare_runs",
    "diagnose_run",
    "draw_run",
    "encode_images",
    "evaluate_run",
    "export_run",
    "importance_numbers",
    "impute_images",
    "measure",
    "noise_numbers",
    "read_rows",
    "report_run",
    "reproduce",
    "reproduction_table",
    "resume",
    "sample_run",
    "seeds_table",
    "ship",
    "train",
]
