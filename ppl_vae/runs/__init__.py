"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled.

What needs torch is imported when it is first used, so that ``ppl_vae.runs.options`` needs none.
"""

# ruff: noqa: F401  (these are the public names)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ppl_vae.runs.files import (
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    FIGURES,
    METRICS,
    MODEL,
    PREVIOUS_STATE,
    TRAINING_STATE,
    append_metrics,
    mend_metrics,
    per_image_file,
    read_evaluations,
    read_json,
    read_metrics,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    from ppl_vae.runs.checkpoints import load_step, load_tensors, save_tensors
    from ppl_vae.runs.outputs import check_writable, describe_environment, lock_folder, make_run_dir

_CHECKPOINTS = ("load_step", "load_tensors", "save_tensors")
_OUTPUTS = ("check_writable", "describe_environment", "lock_folder", "make_run_dir")


def __getattr__(name: str) -> object:
    for module, names in (("checkpoints", _CHECKPOINTS), ("outputs", _OUTPUTS)):
        if name in names:
            return getattr(import_module(f"ppl_vae.runs.{module}"), name)
    raise AttributeError(f"module 'ppl_vae.runs' has no attribute {name!r}")
