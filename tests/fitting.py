"""``fit`` with its settings as flat keyword arguments, which tests combine as dictionaries."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor

from ppl_vae import training
from ppl_vae.training import Callbacks, Optimizer, Schedule, TrainingState, Validation


def fit(program: Any, data: Any, validation: Tensor | None = None, **options: Any) -> TrainingState:
    """Options are fields of the four classes of settings (``validation_particles`` is S), and arguments of ``fit``."""
    if "validation_particles" in options:
        options["num_particles"] = options.pop("validation_particles")
    settings: dict[str, Any] = {}
    for kind in (Optimizer, Schedule, Callbacks):
        names = {field.name for field in fields(kind)} & options.keys()
        settings[kind.__name__.lower()] = kind(**{name: options.pop(name) for name in names})
    names = {field.name for field in fields(Validation)} & options.keys()
    chosen = Validation(validation, **{name: options.pop(name) for name in names})
    return training.fit(program, data, validation=chosen, **settings, **options)
