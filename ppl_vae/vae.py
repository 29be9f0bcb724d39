"""The variational autoencoder: a Pyro model and its guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor, nn


def one_an_image(posterior: Any, x: Tensor) -> Any:
    """The posterior of x (B, *E) as it is, once it is one distribution an image; anything else is refused."""
    if tuple(posterior.batch_shape) != (len(x),):
        raise ValueError(f"x: expected shape (B, *E), one posterior an image, got {tuple(x.shape)}")
    return posterior


def over_event(likelihood: Any, x: Tensor) -> Any:
    """The likelihood as it is, once its event shape is that of an image: a wrong one would broadcast, and be summed.

    Raises:
        ValueError: it is another one.
    """
    if tuple(likelihood.event_shape) != tuple(x.shape[1:]):
        raise ValueError(f"x: expected shape (B, {', '.join(map(str, likelihood.event_shape))}), got {tuple(x.shape)}")
    return likelihood


class VAE(nn.Module):
    """p(x, z) = p(z) p(x | z), with the guide q(z | x).

    Nothing here trains, scales or anneals: objectives put their effect handlers around ``model`` and ``guide``, and
    every reported number comes from these two bare programs. x is (B, *E), images are the plate at dim -1.

    Args:
        prior: () -> p(z), event (L,).
        likelihood: z (..., L) -> p(x | z), batch (...), event E.
        posterior: x (..., *E) -> q(z | x), batch (...), event (L,).

    Raises:
        ValueError: where the shape of an image is not the likelihood's event shape.

    Reference: Kingma and Welling 2014, arXiv 1312.6114; Rezende et al. 2014, arXiv 1401.4082.
    """

    def __init__(
        self,
        prior: Callable[[], Any],
        likelihood: Callable[[Tensor], Any],
        posterior: Callable[[Tensor], Any],
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor) -> None:
        """z ~ p(z), x ~ p(x | z). x: (B, *E), observed."""
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", over_event(self.likelihood(z), x), obs=x)

    def guide(self, x: Tensor) -> None:
        """z ~ q(z | x). x: (B, *E)."""
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", one_an_image(self.posterior(x), x))
