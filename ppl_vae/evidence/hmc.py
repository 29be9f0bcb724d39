"""Hamiltonian Monte Carlo for many chains of many images at once, as functions of tensors that a graph can hold.

The target is log pi(z) = sum_k c_k f_k(z) + constant. A point keeps the values and gradients of the f_k, so that the
next transition does not compute them again, even with other coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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

    It preserves volume and is reversible. Along a path of fixed length the error of the energy is O(s^2).

    Args:
        terms: The f_k.
        coefficients: (K,) c_k.
        point: The start.
        momentum: p (C, B, L).
        step: s, which broadcasts with z: the step size times the scale of each latent.

    Returns:
        The end, and the momentum there.

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
        point: The positions.
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
