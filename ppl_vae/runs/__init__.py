"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled.

Every name is imported when it is first used, so that ``ppl_vae.runs.options`` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_vae.runs.environment import describe_environment, record_environment
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

_HOME = {
    "CONFIG": "names",
    "ENVIRONMENT": "names",
    "EVALUATION": "names",
    "FIGURES": "names",
    "LOCK": "names",
    "METRICS": "names",
    "MODEL": "names",
    "PREVIOUS_STATE": "names",
    "TRAINING_STATE": "names",
    "append_line": "files",
    "append_metrics": "metrics",
    "check_new": "folders",
    "check_writable": "folders",
    "cut_metrics": "metrics",
    "describe_environment": "environment",
    "finite": "json_files",
    "is_empty": "folders",
    "load_step": "tensors",
    "load_tensors": "tensors",
    "locked": "lock",
    "mend_metrics": "metrics",
    "named": "files",
    "new_folder": "folders",
    "new_run_dir": "folders",
    "per_image": "names",
    "read_evaluations": "json_files",
    "read_json": "json_files",
    "read_metrics": "metrics",
    "record_environment": "environment",
    "save_tensors": "tensors",
    "step_of": "tensors",
    "write_bytes": "files",
    "write_json": "json_files",
}

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
    "describe_environment",
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


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.runs.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.runs' has no attribute {name!r}")
