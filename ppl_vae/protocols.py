"""What the package accepts as a model: any torch module with the methods below, such as ``VAE``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol, TypeGuard, runtime_checkable
from weakref import WeakKeyDictionary

import pyro
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.runtime.global_state import Module

# A model or a guide: what Pyro calls a stochastic function, here of images x (B, *E), and of the further tensors of
# ``Records`` where there are any, with one data plate at dim=-1.
StochasticFunction = Callable[..., object]


class _Module(Module, Protocol):
    """The methods of ``torch.nn.Module`` that this package calls."""

    training: bool

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def get_parameter(self, target: str) -> nn.Parameter: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...
    def train(self, mode: bool = True) -> object: ...
    def zero_grad(self) -> None: ...


@runtime_checkable
class Program(_Module, Protocol):
    """A Pyro model and its guide, as the methods of a ``torch.nn.Module``.

    A class of one's own needs these two:

        class Mine(nn.Module):
            def model(self, x): ...   # samples the latents, observes x
            def guide(self, x): ...   # samples the same latents
    """

    def model(self, x: Tensor) -> object:
        """p(x, z). x: (B, *E), observed."""

    def guide(self, x: Tensor) -> object:
        """q(z | x). x: (B, *E)."""


@runtime_checkable
class LatentModel(Program, Protocol):
    """A program with one vector of latents, z ~ p(z), x ~ p(x | z), whose parts can be called on their own.

    Each part takes the further tensors of ``Records`` last, such as labels, if the program does.
    """

    prior: Callable[..., Distribution]  # () -> p(z), event (L,), batch (); with further tensors () or (B,)
    likelihood: Callable[..., Distribution]  # z (..., L) -> p(x | z), batch (...), event E
    posterior: Callable[..., Distribution]  # x (..., *E) -> q(z | x), batch (...), event (L,)


def is_latent_model(vae: object) -> TypeGuard[LatentModel]:
    """Whether a program has the parts of a ``LatentModel``, and no latents but the vector z."""
    return isinstance(vae, LatentModel) and not hasattr(vae, "given_labels")  # which has its label as a latent


def check_latent_model(vae: object, *, images_alone: bool = False) -> None:
    """Refuse, with a ValueError, a program that is no ``LatentModel``.

    Args:
        vae: The program.
        images_alone: Whether the result takes no further tensors.
    """
    if not is_latent_model(vae):
        raise ValueError(
            f"vae: expected a VAE, or a module with prior(), likelihood(z) and posterior(x), got {type(vae).__name__}; "
            "vectorize_latents(vae, x) of ppl_vae.latent_model makes one of a program with a model and a guide"
        )
    if images_alone and hasattr(vae, "fix_label"):
        raise ValueError(
            f"vae: expected a model of images alone, got {type(vae).__name__}, which takes labels; vae.fix_label(y) is "
            "the model of one label"
        )


class Family(Protocol):
    """Features h (..., F) -> a distribution with batch shape (...), as likelihoods and posteriors have them."""

    num_features: int  # F

    @property
    def event_shape(self) -> Sequence[int]:
        """The shape of one image, or of one latent vector."""

    def __call__(self, h: Tensor, /) -> Distribution: ...


class Likelihood(Family, Protocol):
    """p(x | h), a ``Family`` over images. Its package ``parts.likelihoods`` says what each attribute means."""

    support_words: str
    measure: str
    data_kind: str

    @property
    def support(self) -> constraints.Constraint:
        """The values that a pixel can take."""

    def fit_marginals(self, x: Tensor) -> Tensor:
        """(F,) the features of the marginal distributions of the pixels of x (N, *E)."""

    def double(self) -> Likelihood:
        """The same module in float64."""


_names: WeakKeyDictionary[Program, str] = WeakKeyDictionary()
_numbers = count()


def register_programs(program: Program) -> tuple[StochasticFunction, StochasticFunction]:
    """Return a program's model and guide, which register its parameters whenever they run.

    They are for ``pyro.infer.SVI(model, guide, optimizer, loss)``, which trains the parameters that it meets while they
    run; those without ``requires_grad`` are left out. The store has one name for each program, such as ``VAE_0``, so
    two programs never share weights. The parameters stay the module's own: SVI changes them in place.
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
