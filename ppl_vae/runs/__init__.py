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
    from ppl_vae.runs.outputs import (
        check_new,
        check_writable,
        describe_environment,
        is_empty,
        lock_folder,
        make_new_folder,
        make_run_dir,
        record_environment,
    )

_HOME = dict.fromkeys(("get_step", "load_step", "load_tensors", "save_tensors"), "checkpoints")
_HOME |= dict.fromkeys(("check_new", "check_writable", "describe_environment", "is_empty", "lock_folder"), "outputs")
_HOME |= dict.fromkeys(("make_new_folder", "make_run_dir", "record_environment"), "outputs")


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.runs.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.runs' has no attribute {name!r}")
