"""A Pyro model and guide of your own as one module, which holds what ``pyro.param`` and ``PyroModule`` register."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.global_state import serialize_threads


class PyroProgram(nn.Module):
    """A Pyro model and guide, with their parameters as the module's own.

    ``fit``, ``log_evidence``, ``importance`` and ``evaluate`` take it, also compiled. The programs run once on the
    example, which creates their parameters. The module then holds these, and the modules that the functions use: those
    whose methods they are, and those of their closures and globals. From there on Pyro's global parameter store is
    neither read nor changed, so that two programs never share a parameter by its name.

    >>> def model(x):
    ...     scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
    ...     with pyro.plate("rows", len(x), dim=-1):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z[..., None], scale).to_event(1), obs=x)
    >>> def guide(x):
    ...     weight = pyro.param("weight", torch.zeros(3))
    ...     with pyro.plate("rows", len(x), dim=-1):
    ...         pyro.sample("z", dist.Normal(x @ weight, 1.0))
    >>> program = PyroProgram(model, guide, torch.zeros(2, 3))
    >>> program.param("scale")
    tensor([1., 1., 1.], grad_fn=<ExpBackward0>)

    Args:
        model: x, and the further tensors of ``Records`` if there are any -> p(x, z), with one data plate at dim=-1.
        guide: The same arguments -> q(z | x).
        *example: Two images or more, (B, *E), and their further tensors.

    Raises:
        ValueError: A parameter belongs to a module that is not found.
    """

    def __init__(self, model: StochasticFunction, guide: StochasticFunction, *example: Tensor) -> None:
        super().__init__()
        self._model, self._guide = model, guide
        self.parts = nn.ModuleList(dict.fromkeys([*_find_modules(model), *_find_modules(guide)]))
        self.own = nn.ParameterDict()
        self._places: dict[str, tuple[str, constraints.Constraint]] = {}  # by name: the key in ``own``, the constraint
        self._create(*example)

    @serialize_threads()
    def _create(self, *example: Tensor) -> None:
        """Run the programs once, and take over the parameters that they register."""
        store = pyro.get_param_store()
        held = {id(w) for w in self.parts.parameters()}
        with store.scope(store.get_state()):  # values that were trained before are kept
            q = poutine.trace(self._guide).get_trace(*example)
            p = poutine.trace(poutine.replay(self._model, trace=q)).get_trace(*example)
            state, names = store.get_state(), dict.fromkeys([*q.param_nodes, *p.param_nodes])
        for name in names:
            value, key = state["params"][name], name.replace(".", "_")  # an attribute's name has no dots
            if id(value) in held:
                continue
            if isinstance(value, nn.Parameter):
                raise ValueError(
                    f"parameter {name!r}: expected it in a module that the model or the guide uses by name, got "
                    "another; write both as methods of one torch.nn.Module that holds it"
                )
            while key in self.own:
                key += "_"
            self.own[key] = nn.Parameter(value.detach().clone())
            self._places[name] = key, state["constraints"][name]

    def param(self, name: str) -> Tensor:
        """The present value of a ``pyro.param``, within its constraint."""
        key, constraint = self._places[name]
        return transform_to(constraint)(self.own[key])

    def has_param(self, name: str) -> bool:
        """Whether the programs have a ``pyro.param`` of that name."""
        return name in self._places

    def model(self, *args: Tensor) -> None:
        """p(x, z). The arguments are those of the model."""
        with pyro.get_param_store().scope(), _OwnParameters(self):
            self._model(*args)

    def guide(self, *args: Tensor) -> None:
        """q(z | x). The arguments are those of the guide."""
        with pyro.get_param_store().scope(), _OwnParameters(self):
            self._guide(*args)


class _OwnParameters(Messenger):
    """Answers ``pyro.param`` with a program's own parameters, and keeps such sites from other effect handlers."""

    def __init__(self, program: PyroProgram) -> None:
        super().__init__()
        self._program = program

    def _pyro_param(self, msg: Message) -> None:
        name, *given = msg["args"]
        msg["stop"] = True
        if self._program.has_param(name):
            msg["value"], msg["done"] = self._program.param(name), True
        elif given and (isinstance(given[0], nn.Parameter) or _OF_MODULE in name):
            msg["value"], msg["done"] = given[0], True  # the module's own
        elif given:
            raise ValueError(
                f"pyro.param {name!r}: expected a parameter that the programs register on the example, got a new one; "
                "PyroProgram(model, guide, x) needs an x that reaches all parameters"
            )


_OF_MODULE = "$$$"  # in the names that pyro.module gives


def _find_modules(program: StochasticFunction) -> Iterator[nn.Module]:
    """The modules that a function uses: itself, its object, the attributes of its object, its closure and globals."""
    bare = unwrap(program)
    owner = getattr(bare, "__self__", bare)
    function = getattr(bare, "__func__", bare)
    if isinstance(owner, nn.Module):
        yield owner
    elif owner is not bare:
        yield from (value for value in vars(owner).values() if isinstance(value, nn.Module))
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        yield from (
            value for value in [*used.nonlocals.values(), *used.globals.values()] if isinstance(value, nn.Module)
        )
