"""The run folder: config, environment, metrics, weights, state, evaluation. Written atomically, never pickled.

Every name is imported when it is first used, so that ``ppl_vae.runs.options`` needs no torch.
"""

# ruff: noqa: F401  (the imports under TYPE_CHECKING are for type checkers; __getattr__ makes them when they are used)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppl_vae.runs.checkpoints import get_step, load_step, load_tensors, save_tensors
    from ppl_vae.runs.environment import describe_environment, record_environment
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
        cut_metrics,
        mend_metrics,
        per_image_file,
        read_evaluations,
        read_json,
        read_metrics,
        replace_non_finite,
        write_bytes,
        write_json,
    )
    from ppl_vae.runs.folders import check_new, check_writable, is_empty, lock_folder, make_new_folder, make_run_dir

_NAMES = {
    "checkpoints": ("load_step", "load_tensors", "save_tensors", "get_step"),
    "environment": ("describe_environment", "record_environment"),
    "files": (
        *("CONFIG", "ENVIRONMENT", "EVALUATION", "FIGURES", "LOCK", "METRICS", "MODEL", "PREVIOUS_STATE"),
        *("TRAINING_STATE", "add_file_name", "append_line", "per_image_file", "read_evaluations", "read_json"),
        *("replace_non_finite", "write_bytes", "write_json"),
        *("append_metrics", "cut_metrics", "mend_metrics", "read_metrics"),
    ),
    "folders": ("check_new", "check_writable", "is_empty", "lock_folder", "make_new_folder", "make_run_dir"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"ppl_vae.runs.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ppl_vae.runs' has no attribute {name!r}")
