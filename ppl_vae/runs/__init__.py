"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled."""

from ppl_vae.runs.environment import environment, record_environment
from ppl_vae.runs.files import append_line, named, write_bytes
from ppl_vae.runs.folders import check_new, check_writable, is_empty, new_folder, new_run_dir
from ppl_vae.runs.json_files import finite, read_evaluations, read_json, write_json
from ppl_vae.runs.lock import locked
from ppl_vae.runs.metrics import append_metrics, cut_metrics, mend_metrics, read_metrics
from ppl_vae.runs.names import (
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    FIGURES,
    LOCK,
    METRICS,
    MODEL,
    PREVIOUS_STATE,
    TRAINING_STATE,
    per_image,
)
from ppl_vae.runs.tensors import load_step, load_tensors, save_tensors, step_of

__all__ = [
    "CONFIG",
    "ENVIRONMENT",
    "EVALUATION",
    "FIGURES",
    "LOCK",
    "METRICS",
    "MODEL",
    "PREVIOUS_STATE",
    "TRAINING_STATE",
    "append_line",
    "append_metrics",
    "check_new",
    "check_writable",
    "cut_metrics",
    "environment",
    "finite",
    "is_empty",
    "load_step",
    "load_tensors",
    "locked",
    "mend_metrics",
    "named",
    "new_folder",
    "new_run_dir",
    "per_image",
    "read_evaluations",
    "read_json",
    "read_metrics",
    "record_environment",
    "save_tensors",
    "step_of",
    "write_bytes",
    "write_json",
]
