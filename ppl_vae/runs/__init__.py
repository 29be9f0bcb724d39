"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled.

What needs torch is imported when it is first used, so that ``ppl_vae.runs.options`` needs none.
"""

# ruff: noqa: F401  (names of this room)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ppl_vae.runs.files import (
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    FIGURES,
    LOCK,
    METRICS,
    MODEL,
    PREVIOUS_STATE,
    TRAINING_STATE,
    add_file_name,
    append_line,
    append_metrics,
    mend_metrics,
    per_image_file,
    read_evaluations,
    read_json,
    read_metrics,
    replace_non_finite,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    from ppl_vae.runs.checkpoints import get_step, load_step, load_tensors, save_tensors
    from ppl_vae.runs.folders import check_new, check_writable, is_empty, lock_folder, make_new_folder, make_run_dir
    from ppl_vae.runs.outputs import describe_environment, record_environment


_NAMES = {
    "checkpoints": "get_step load_step load_tensors save_tensors",
    "outputs": "describe_environment record_environment",
    "folders": "check_new check_writable is_empty lock_folder make_new_folder make_run_dir",
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(import_module(f"ppl_vae.runs.{module}"), name)
    raise AttributeError(f"module 'ppl_vae.runs' has no attribute {name!r}")
