"""``fit`` with its settings as flat keyword arguments, which tests combine as dictionaries."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

import per_image
from pyro.infer import ELBO
from torch import Tensor

from ppl_vae import training
from ppl_vae.training import Callbacks, Optimizer, Schedule, TrainingState, Validation


def fit(program: Any, data: Any, validation: Tensor | None = None, **options: Any) -> TrainingState:
    """Options are fields of the four classes of settings (``validation_particles`` is S), and arguments of ``fit``.

    An objective with an argument beta is one of ``per_image``, or its like.
    """
    objective = options.get("objective")
    if objective is not None and not isinstance(objective, ELBO) and "beta" in signature(objective).parameters:
        options["objective"] = per_image.as_loss(objective)
    if "validation_particles" in options:
        options["num_particles"] = options.pop("validation_particles")
    settings: dict[str, Any] = {}
    for kind in (Optimizer, Schedule, Callbacks):
        names = {field.name for field in fields(kind)} & options.keys()
        settings[kind.__name__.lower()] = kind(**{name: options.pop(name) for name in names})
    names = {field.name for field in fields(Validation)} & options.keys()
    chosen = Validation(validation, **{name: options.pop(name) for name in names})
    return training.fit(program, data, validation=chosen, **settings, **options)
