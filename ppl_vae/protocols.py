"""What the package accepts as a model: any torch module with the methods below. ``VAE`` is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Distribution

# A model or a guide: what Pyro calls a stochastic function, here of images x (B, *E) with one data plate at dim=-1.
StochasticFunction = Callable[[Tensor], Any]


class _Module(Protocol):
    """The methods of ``torch.nn.Module`` that this package calls: a protocol cannot derive from a class."""

    training: bool

    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def get_parameter(self, target: str) -> nn.Parameter: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def zero_grad(self) -> None: ...


@runtime_checkable
class Program(_Module, Protocol):
    """A Pyro model and its guide, as the methods of a ``torch.nn.Module``.

    A class of one's own needs these two:

        class Mine(nn.Module):
            def model(self, x): ...   # samples the latents, observes x
            def guide(self, x): ...   # samples the same latents
    """

    def model(self, x: Tensor) -> Any:
        """p(x, z). x: (B, *E), observed."""

    def guide(self, x: Tensor) -> Any:
        """q(z | x). x: (B, *E)."""


@runtime_checkable
class LatentModel(Program, Protocol):
    """A program with one vector of latents, z ~ p(z), x ~ p(x | z), whose parts can be called on their own."""

    prior: Callable[[], Distribution]  # () -> p(z), event (L,)
    likelihood: Callable[[Tensor], Distribution]  # z (..., L) -> p(x | z), batch (...), event E
    posterior: Callable[[Tensor], Distribution]  # x (..., *E) -> q(z | x), batch (...), event (L,)
