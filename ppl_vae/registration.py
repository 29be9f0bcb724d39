"""A program's parameters in Pyro's parameter store, where ``pyro.infer.SVI`` finds what it trains."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import pyro
from pyro.poutine.messenger import Messenger

from ppl_vae.protocols import Program, StochasticFunction

_names: WeakKeyDictionary[Program, str] = WeakKeyDictionary()
_numbers = count()


def register_programs(program: Program) -> tuple[StochasticFunction, StochasticFunction]:
    """Return a program's model and guide, which register its parameters whenever they run.

    ``pyro.infer.SVI`` trains the parameters that it meets while the model and the guide run. The store has one name for
    each program, such as ``VAE_0``, so two programs never share weights. The parameters stay the module's own: SVI
    changes them in place.

    Args:
        program: Such as a ``VAE``. Parameters without ``requires_grad`` are left out.

    Returns:
        The model and the guide, for ``SVI(model, guide, optimizer, loss)``.
    """
    if program not in _names:
        _names[program] = f"{type(program).__name__}_{next(_numbers)}"
    for w in program.parameters():
        w.data = w.data.contiguous()  # the store would train copies of other layouts
    register = _RegisterParameters(_names[program], program)
    return register(program.model), register(program.guide)  # each within the handler


class _RegisterParameters(Messenger):
    """An effect handler that registers a module's parameters, as ``pyro.module`` does, whenever a program starts."""

    def __init__(self, name: str, module: Program) -> None:
        super().__init__()
        self._name, self._module = name, module

    def __enter__(self) -> Any:
        entered = super().__enter__()
        for name, w in self._module.named_parameters():
            if w.requires_grad and pyro.param(f"{self._name}.{name}", w) is not w:
                raise ValueError(
                    f"{self._name}.{name}: expected the module's own parameter in Pyro's parameter store, got another; "
                    "pyro.clear_param_store() empties it"
                )
        return entered
