"""Chains of annealed importance sampling: their starts, their densities, and transitions at any temperature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.conditional import Conditional
from ppl_vae.evidence.hmc import Point, Terms, leapfrog, point_at, transition
from ppl_vae.evidence.moments import compute_moments
from ppl_vae.parts.posteriors.flow import Autoregressive
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.capture import compile_function, detach_tensors, replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.support import check_support
from ppl_vae.vae import check_batch_shape, check_event_shape
from ppl_vae.weights import DeterministicGuide, is_deterministic

_Graph = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Start = str  # "guide", "prior" or "normal"
STARTS = ("guide", "prior", "normal")

_MAX_PASSES = 2  # of a flow guide's network per density; with more, the density costs more than the decoder
_MOMENTS_SEED = 0  # for guides whose moments have no formula, so that every call has the same start

# Each transition uses the step size times U(0.7, 1.3). A normal target is traversed in circles, and paths of half a
# circle would take every chain to its mirror image, again and again. Source: Neal 2011, arXiv 1206.1901, section 3.2.
_JITTER = 0.3


def resolve_start(vae: LatentModel, start: Start) -> Start:
    """The start that chains of this VAE use for the requested one; see ``ais.pilot``."""
    parts = vae.posterior.modules() if isinstance(vae.posterior, nn.Module) else ()
    is_slow = any(isinstance(part, Autoregressive) and part.passes > _MAX_PASSES for part in parts)
    return "normal" if start == "guide" and is_slow else start


class Chains:
    """C chains per image, with transitions at any temperature.

    Args:
        vae: with ``prior``, ``likelihood`` and ``posterior``.
        x: images (B, *E).
        start: q_0, one of ``STARTS``; the attribute ``start`` is the resolved one.
        num_chains: C.
        num_leapfrogs: per transition.
        compile: whether a leapfrog step is one compiled graph.
    """

    def __init__(
        self, vae: LatentModel, x: Tensor, *, start: Start, num_chains: int, num_leapfrogs: int, compile: bool
    ) -> None:
        _check_arguments(vae, x, start=start, num_chains=num_chains, num_leapfrogs=num_leapfrogs)
        self.start = resolve_start(vae, start)
        self._vae, self._x = vae, x
        self._num_chains, self._num_leapfrogs, self._compile = num_chains, num_leapfrogs, compile
        with _refuse_noise(x.device):
            self._features = _encode(vae, x, self.start)
            self._q_0, self._terms = _densities(vae, self.start, x, self._features)
        with seeded(_MOMENTS_SEED, torch.device("cpu")):  # for scales that have no formula
            self._scale = compute_moments(self._q_0).scale.expand(len(x), -1).contiguous()
        self._weights = detach_tensors(vae)
        self._run: _Graph | None = None

    def begin(self, z: Tensor | None = None) -> Point:
        """Chains that start at draws of q_0, or all chains of an image at its z, (B, L).

        Raises:
            ValueError: z of another shape, or densities that draw noise.
        """
        C, B = self._num_chains, len(self._x)
        if z is None:
            z = self._q_0.sample((C,) if len(self._q_0.batch_shape) else (C, B))
        elif tuple(z.shape) != tuple(self._scale.shape):
            raise ValueError(
                f"z: expected shape {tuple(self._scale.shape)}, an exact draw per image, got {tuple(z.shape)}"
            )
        else:
            z = z.expand(C, *z.shape).contiguous()
        with _refuse_noise(self._x.device):
            return point_at(self._terms, z)

    def move(self, point: Point, beta: float, step_size: Tensor) -> tuple[Point, Tensor]:
        """One transition of every chain at temperature beta, and its acceptance probability, (C, B)."""
        return transition(
            self._leap,
            point.z.new_tensor([1 - beta, beta]),
            point,
            momentum=torch.randn_like(point.z),
            uniform=torch.rand_like(point.values[0]),
            scale=self._scale,
            step_size=step_size.to(point.z) * (1 + _JITTER * (2 * torch.rand_like(point.values[0]) - 1)),
            num_leapfrogs=self._num_leapfrogs,
        )

    def _leap(self, coefficients: Tensor, point: Point, momentum: Tensor, step: Tensor) -> tuple[Point, Tensor]:
        if not self._compile:
            return leapfrog(self._terms, coefficients, point, momentum, step)
        inputs = [*self._weights.values(), self._x, self._features, coefficients, momentum, step, *point]
        if self._run is None:
            self._run = self._graph(list(self._weights), inputs)
        *moved, momentum = self._run(inputs)
        return Point(*moved), momentum

    def _graph(self, names: list[str], inputs: list[Tensor]) -> _Graph:
        """A leapfrog step as one graph, reused for the same VAE and shapes."""
        shapes = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)
        known, key = _graphs.setdefault(self._vae, {}), (self.start, tuple(names), shapes)
        if key not in known:
            known[key] = compile_function(self._function(names), inputs)
        return known[key]

    def _function(self, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            n = len(names)
            x, features, coefficients, momentum, step, *point = inputs[n:]
            with replace_tensors(self._vae, dict(zip(names, inputs[:n], strict=True))):
                _, terms = _densities(self._vae, self.start, x, features)
                moved, momentum = leapfrog(terms, coefficients, Point(*point), momentum, step)
            return (*moved, momentum)

        return function


_graphs: WeakKeyDictionary[LatentModel, dict[object, _Graph]] = WeakKeyDictionary()


def _encode(vae: LatentModel, x: Tensor, start: Start) -> Tensor:
    """(B, F) the features of q_0, so that an encoder runs once per image; (B, 0) where q_0 runs it itself."""
    if start == "guide" and isinstance(vae.posterior, Conditional):
        return vae.posterior.net(x)
    if start == "normal":
        with seeded(_MOMENTS_SEED, x.device):
            found = compute_moments(check_batch_shape(vae.posterior(x), x))
        return torch.cat([found.mean, found.scale], dim=-1)
    return x.new_zeros((len(x), 0))


def _densities(vae: LatentModel, start: Start, x: Tensor, features: Tensor) -> tuple[Distribution, Terms]:
    """q_0(z | x), and log q_0(z | x) and log p(x, z) as functions of z."""
    prior = vae.prior()
    if start == "prior":
        q_0 = prior
    elif start == "normal":
        q_0 = dist.Normal(*features.chunk(2, dim=-1)).to_event(1)
    else:
        posterior = vae.posterior
        q = posterior.family(features) if isinstance(posterior, Conditional) else posterior(x)
        q_0 = check_batch_shape(q, x)

    def log_joint(z: Tensor) -> Tensor:
        return prior.log_prob(z) + check_event_shape(vae.likelihood(z), x, z).log_prob(x)

    return q_0, (q_0.log_prob, log_joint)


@contextmanager
def evaluating(vae: LatentModel) -> Iterator[None]:
    """Evaluation mode, without validation: a transition may propose a z without density, and rejects it."""
    with evaluation_mode(vae), pyro.validation_enabled(False):
        yield


@contextmanager
def _refuse_noise(device: torch.device) -> Iterator[None]:
    """Raise ValueError where the densities draw random numbers."""
    before = _generator_state(device)
    yield
    if not torch.equal(before, _generator_state(device)):
        raise ValueError(
            "vae: expected densities that are functions of z, got ones that draw noise, as the mass of dequantized "
            "levels does: no chain of transitions leaves them invariant"
        )


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _check_arguments(vae: LatentModel, x: Tensor, *, start: Start, num_chains: int, num_leapfrogs: int) -> None:
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    check_count("num_chains", num_chains)
    check_count("num_leapfrogs", num_leapfrogs)
    check_support(vae.model, x)
    if is_deterministic(vae.posterior(x[:1])):
        raise DeterministicGuide(
            "guide: expected a density q(z | x), got a deterministic one (Delta): an autoencoder has no log-likelihood"
        )
