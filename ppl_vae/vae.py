"""The variational autoencoder: a Pyro model and its guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pyro
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.protocols import StochasticFunction, register_programs
from ppl_vae.runtime.errors import ShapeError

AnyDistribution = TypeVar("AnyDistribution", bound=Distribution)

# A guide from pyro.infer.autoguide has parameters for each training image, and latents outside of the images' plate.
NO_AUTOGUIDE = (
    "a guide from pyro.infer.autoguide holds for one fixed batch and has no density for each image: train it with "
    "pyro.infer.SVI, or write a guide with an encoder, as VAE.guide is"
)


def check_batch_shape(posterior: AnyDistribution, x: Tensor) -> AnyDistribution:
    """Return the posterior after checking that it is one distribution per image.

    Args:
        posterior: q(z | x).
        x: (B, *E).

    Raises:
        ShapeError: A ValueError: it is no distribution, or its batch shape is not (B,).
    """
    _check_distribution("posterior", posterior, "Conditional(encoder, posteriors.DiagonalNormal(L))")
    if tuple(posterior.batch_shape) != (len(x),):
        raise ShapeError(
            f"x: expected shape (B, *E) and a posterior of batch shape ({len(x)},), one for each image, got "
            f"x of shape {tuple(x.shape)} and a posterior of batch shape {tuple(posterior.batch_shape)}"
        )
    return posterior


def check_event_shape(likelihood: AnyDistribution, x: Tensor, z: Tensor) -> AnyDistribution:
    """Return the likelihood after checking that it is one distribution over images per z, without broadcasting.

    Args:
        likelihood: p(x | z).
        x: (B, *E).
        z: (..., B, L).

    Raises:
        ShapeError: A ValueError: it is no distribution, its event shape is not E, or its batch shape is not that of z.
    """
    _check_distribution("likelihood", likelihood, "Conditional(decoder, likelihoods.Bernoulli(E))")
    batch, event, shape = tuple(likelihood.batch_shape), tuple(likelihood.event_shape), tuple(z.shape[:-1])
    if event != tuple(x.shape[1:]):
        cure = f"; .to_event({x.dim() - 1}) makes pixels one event" if not event and x.dim() > 1 else ""
        expected = f"(B, {', '.join(map(str, event))})"
        raise ShapeError(f"x: expected shape {expected}, got {tuple(x.shape)}{cure}")
    if len(batch) > len(shape) or any(a not in (1, b) for a, b in zip(batch[::-1], shape[::-1], strict=False)):
        raise ShapeError(
            f"likelihood: expected batch shape {shape}, that of z {tuple(z.shape)}, got {batch}; a decoder keeps all "
            "dimensions before the last: no z.view(-1, L), but layers on the last dimension, or .flatten and .unflatten"
        )
    return likelihood


def _check_distribution(name: str, found: object, example: str) -> None:
    if not hasattr(found, "event_shape"):
        raise ShapeError(
            f"{name}: expected a function that returns a distribution, such as {example}, got one that "
            f"returns {type(found).__name__}"
        )


class VAE(nn.Module):
    """p(x, z) = p(z) p(x | z), with the guide q(z | x).

    Objectives put effect handlers around ``model`` and ``guide`` to scale or anneal terms; every reported number comes
    from these two bare programs. x is (B, *E), and images are the plate at dim -1. Where the programs are given further
    tensors c of B rows, such as labels, all three parts take them last: p(z | c), p(x | z, c) and q(z | x, c).

    Args:
        prior: () -> p(z), event (L,).
        likelihood: z (..., L) -> p(x | z), batch (...), event E.
        posterior: x (..., *E) -> q(z | x), batch (...), event (L,).

    Raises:
        ValueError: Prior and posterior have latents of different sizes; or, later, the shape of an image is not the
            likelihood's event shape.

    Reference: Kingma and Welling 2014, arXiv 1312.6114; Rezende et al. 2014, arXiv 1401.4082.
    """

    def __init__(
        self,
        prior: Callable[..., Distribution],
        likelihood: Callable[..., Distribution],
        posterior: Callable[..., Distribution],
    ) -> None:
        super().__init__()
        if isinstance(posterior, AutoGuide):
            raise ValueError(
                f"posterior: expected x -> q(z | x), an encoder, got {type(posterior).__name__}; {NO_AUTOGUIDE}"
            )
        expected, got = (getattr(part, "event_shape", None) for part in (prior, posterior))
        if expected is not None and got is not None and tuple(got) != tuple(expected):
            raise ValueError(f"posterior: expected latents of the prior's shape {tuple(expected)}, got {tuple(got)}")
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor, *c: Tensor) -> None:
        """z ~ p(z), x ~ p(x | z). x: (B, *E), observed."""
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior(*c))
            pyro.sample("x", check_event_shape(self.likelihood(z, *c), x, z), obs=x)

    def guide(self, x: Tensor, *c: Tensor) -> None:
        """z ~ q(z | x). x: (B, *E)."""
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", check_batch_shape(self.posterior(x, *c), x))

    def programs(self) -> tuple[StochasticFunction, StochasticFunction]:
        """Return model and guide with their parameters registered, for plain ``pyro.infer.SVI``.

        >>> svi = SVI(*vae.programs(), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())  # doctest: +SKIP
        >>> loss = svi.step(x)  # nats, the sum over the images of x  # doctest: +SKIP

        See ``register_programs``.
        """
        return register_programs(self)
