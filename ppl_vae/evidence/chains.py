"""Chains of annealed importance sampling, and their transitions by Hamiltonian Monte Carlo.

The target of a transition is log pi(z) = sum_k c_k f_k(z) + constant. A point keeps the values and gradients of the
f_k, so that the next transition does not compute them again, even with other coefficients c_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.conditional import Conditional
from ppl_vae.evidence.moments import compute_moments
from ppl_vae.parts.flows import Autoregressive
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.capture import compile_function, detach_tensors, replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.runtime.records import Data, arguments_of, further_of, images_of, join_arguments
from ppl_vae.support import check_support
from ppl_vae.vae import check_batch_shape, check_event_shape
from ppl_vae.weights import DeterministicGuide, is_deterministic

# --- Hamiltonian Monte Carlo, as functions of tensors that a compiled graph can hold ---

Terms = Sequence[Callable[[Tensor], Tensor]]  # K log-densities, each z (C, B, L) -> f_k(z) (C, B), nats


class Point(NamedTuple):
    """Positions of the chains, with the terms of the target there.

    Args:
        z: (C, B, L), C chains of B images.
        values: (K, C, B) f_k(z), nats.
        slopes: (K, C, B, L) the gradients of f_k.
    """

    z: Tensor
    values: Tensor
    slopes: Tensor


def point_at(terms: Terms, z: Tensor) -> Point:
    """Values and gradients of the terms at z, (C, B, L). Gradients are with respect to z alone."""
    values, slopes = zip(*(_value_and_slope(term, z) for term in terms), strict=True)
    return Point(z, torch.stack(values), torch.stack(slopes))


@torch.no_grad()  # so that the parameters of the terms get no gradients
def _value_and_slope(term: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    value, pulled_back = torch.func.vjp(term, z)[:2]
    (slope,) = pulled_back(torch.ones_like(value))
    return value, slope


def leapfrog(terms: Terms, coefficients: Tensor, point: Point, momentum: Tensor, step: Tensor) -> tuple[Point, Tensor]:
    """p <- p + (s/2) grad log pi(z);  z <- z + s p;  p <- p + (s/2) grad log pi(z).

    It preserves volume and is reversible. Along a path of fixed length the error of the energy is O(s^2). ``terms`` are
    the f_k, ``coefficients`` (K,) the c_k, p is (C, B, L), and the step s, which broadcasts with z, is the step size
    times the scale of each latent.

    Reference: Neal 2011, arXiv 1206.1901, sections 2.3 and 4.1.
    """
    momentum = momentum + step / 2 * _combine(coefficients, point.slopes)
    point = point_at(terms, point.z + step * momentum)
    return point, momentum + step / 2 * _combine(coefficients, point.slopes)


def transition(
    leap: Callable[[Tensor, Point, Tensor, Tensor], tuple[Point, Tensor]],
    coefficients: Tensor,
    point: Point,
    *,
    momentum: Tensor,
    uniform: Tensor,
    scale: Tensor,
    step_size: Tensor,
    num_leapfrogs: int,
) -> tuple[Point, Tensor]:
    """A transition that leaves pi invariant: p ~ N(0, I), n leapfrog steps to (z', p'), accept z' with probability a.

        a = min(1, exp(H - H')),  H = p'p / 2 - log pi(z)

    It is reversible. A z' whose energy H' is not finite is never accepted.

    Args:
        leap: (coefficients, point, momentum, step) -> point and momentum: ``leapfrog`` with the terms, compiled or not.
        coefficients: (K,) c_k.
        momentum: (C, B, L), a draw of N(0, I).
        uniform: (C, B), a draw of U(0, 1).
        scale: (B, L) the approximate width of the target along each latent.
        step_size: (B,) or (C, B), in units of ``scale``. It must not depend on the positions.
        num_leapfrogs: n.

    Returns:
        The new positions, and a, (C, B).

    Reference: Duane et al. 1987; Neal 2011, arXiv 1206.1901, section 3.2.
    """
    proposal, end_momentum, step = point, momentum, step_size[..., None] * scale
    for _ in range(num_leapfrogs):
        proposal, end_momentum = leap(coefficients, proposal, end_momentum, step)
    minus_energy = _minus_energy(coefficients, proposal, end_momentum)
    ratio = (minus_energy - _minus_energy(coefficients, point, momentum)).clamp(max=0).exp()
    acceptance = torch.where(minus_energy.isfinite() & ~ratio.isnan(), ratio, torch.zeros_like(ratio))
    is_accepted = uniform < acceptance
    moved = Point(
        torch.where(is_accepted[..., None], proposal.z, point.z),
        torch.where(is_accepted, proposal.values, point.values),
        torch.where(is_accepted[..., None], proposal.slopes, point.slopes),
    )
    return moved, acceptance


def _combine(coefficients: Tensor, terms: Tensor) -> Tensor:
    """sum_k c_k f_k. terms: (K, ...) -> (...)."""
    first, *further = (c * f for c, f in zip(coefficients.unbind(), terms.unbind(), strict=True))
    return sum(further, first)


def _minus_energy(coefficients: Tensor, point: Point, momentum: Tensor) -> Tensor:
    """(C, B) -H = log pi(z) - p'p / 2."""
    return _combine(coefficients, point.values) - momentum.square().sum(-1) / 2


# --- Chains of one VAE and its images ---

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
    """C chains per image (B, *E), with transitions at any temperature. Arguments and errors as ``ais.pilot``."""

    def __init__(
        self, vae: LatentModel, x: Data, *, start: Start, num_chains: int, num_leapfrogs: int, compile: bool
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
        check_latent_model(vae)
        check_count("num_chains", num_chains)
        check_count("num_leapfrogs", num_leapfrogs)
        check_support(vae.model, x)
        if is_deterministic(vae.posterior(*arguments_of(x[:1]))):
            raise DeterministicGuide(
                "guide: expected a density q(z | x), got a deterministic one (Delta): an autoencoder has no "
                "log-likelihood"
            )
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
        """Chains that start at draws of q_0, or all of an image at its z (other than (B, L) raises ValueError)."""
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
        inputs = [*self._weights.values(), *arguments_of(self._x), self._features, coefficients, momentum, step, *point]
        if self._run is None:
            self._run = self._compile_leap(inputs)
        *moved, momentum = self._run(inputs)
        return Point(*moved), momentum

    def _compile_leap(self, inputs: list[Tensor]) -> _Graph:
        """A leapfrog step as one graph, reused for the same VAE and shapes."""
        names, num_arguments = list(self._weights), len(arguments_of(self._x))
        shapes = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)
        known, key = _graphs.setdefault(self._vae, {}), (self.start, tuple(names), shapes)

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            n, m = len(names), len(names) + num_arguments
            x = join_arguments(inputs[n:m])
            features, coefficients, momentum, step, *point = inputs[m:]
            with replace_tensors(self._vae, dict(zip(names, inputs[:n], strict=True))):
                _, terms = _densities(self._vae, self.start, x, features)
                moved, momentum = leapfrog(terms, coefficients, Point(*point), momentum, step)
            return (*moved, momentum)

        if key not in known:
            known[key] = compile_function(function, inputs)
        return known[key]


_graphs: WeakKeyDictionary[LatentModel, dict[object, _Graph]] = WeakKeyDictionary()


def _encode(vae: LatentModel, x: Data, start: Start) -> Tensor:
    """(B, F) the features of q_0, so that an encoder runs once per image; (B, 0) where q_0 runs it itself."""
    if start == "guide" and isinstance(vae.posterior, Conditional):
        return vae.posterior.net(*arguments_of(x))
    if start == "normal":
        with seeded(_MOMENTS_SEED, x.device):
            found = compute_moments(check_batch_shape(vae.posterior(*arguments_of(x)), images_of(x)))
        return torch.cat([found.mean, found.scale], dim=-1)
    return images_of(x).new_zeros((len(x), 0))


def _densities(vae: LatentModel, start: Start, data: Data, features: Tensor) -> tuple[Distribution, Terms]:
    """q_0(z | x), and log q_0(z | x) and log p(x, z) as functions of z."""
    x, further = images_of(data), further_of(data)
    prior = vae.prior(*further)
    if start == "prior":
        q_0 = prior
    elif start == "normal":
        q_0 = dist.Normal(*features.chunk(2, dim=-1)).to_event(1)
    else:
        posterior = vae.posterior
        q = posterior.family(features) if isinstance(posterior, Conditional) else posterior(x, *further)
        q_0 = check_batch_shape(q, x)

    def log_joint(z: Tensor) -> Tensor:
        return prior.log_prob(z) + check_event_shape(vae.likelihood(z, *further), x, z).log_prob(x)

    return q_0, (q_0.log_prob, log_joint)


@contextmanager
def evaluating(vae: LatentModel) -> Iterator[None]:
    """Evaluation mode, without validation: a transition may propose a z without density, and rejects it."""
    check_latent_model(vae)
    with evaluation_mode(vae), pyro.validation_enabled(False):
        yield


@contextmanager
def _refuse_noise(device: torch.device) -> Iterator[None]:
    """Raise ValueError where the densities draw random numbers."""
    get_state = torch.cuda.get_rng_state if device.type == "cuda" else lambda _: torch.get_rng_state()
    before = get_state(device)
    yield
    if not torch.equal(before, get_state(device)):
        raise ValueError(
            "vae: expected densities that are functions of z, got ones that draw noise, as the mass of dequantized "
            "levels does: no chain of transitions leaves them invariant"
        )
