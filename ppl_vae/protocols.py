"""What the package accepts as a model: any torch module with the methods below. ``VAE`` is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

# A model or a guide: what Pyro calls a stochastic function, here of images x (B, *E) with one data plate at dim=-1.
StochasticFunction = Callable[[Tensor], Any]


@runtime_checkable
class Program(Protocol):
    """A Pyro model and its guide, as the methods of a ``torch.nn.Module``.

    The other methods are those of the module. A class of one's own needs ``model`` and ``guide`` only:

        class Mine(nn.Module):
            def model(self, x): ...   # samples the latents, observes x
            def guide(self, x): ...   # samples the same latents
    """

    training: bool

    def model(self, x: Tensor) -> Any:
        """p(x, z). x: (B, *E), observed."""

    def guide(self, x: Tensor) -> Any:
        """q(z | x). x: (B, *E)."""

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
class LatentModel(Program, Protocol):
    """A program with one vector of latents, z ~ p(z), x ~ p(x | z), whose parts can be called on their own."""

    prior: Callable[[], Any]  # () -> p(z), event (L,)
    likelihood: Callable[[Tensor], Any]  # z (..., L) -> p(x | z), batch (...), event E
    posterior: Callable[[Tensor], Any]  # x (..., *E) -> q(z | x), batch (...), event (L,)
