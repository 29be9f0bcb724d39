"""Hamiltonian Monte Carlo over many chains of many images at once, as functions of tensors that a graph can hold.

The target is a sum of log-densities with coefficients, log pi(z) = sum_k c_k f_k(z) + constant. Values and slopes of
the f_k stay with a point, so that the next transition, of other coefficients too, begins without computing them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Terms = Sequence[Callable[[Tensor], Tensor]]  # K log-densities, each z (C, B, L) -> f_k(z) (C, B), nats


class Point(NamedTuple):
    """Where the chains are, and what the terms of the target are there.

    Args:
        z: (C, B, L), C chains of B images.
        values: (K, C, B) f_k(z), nats.
        slopes: (K, C, B, L) the gradients of f_k.
    """

    z: Tensor
    values: Tensor
    slopes: Tensor


def point_at(terms: Terms, z: Tensor) -> Point:
    """Values and slopes of the terms at z, (C, B, L). Gradients are taken with respect to z alone."""
    values, slopes = zip(*(_value_and_slope(term, z) for term in terms), strict=True)
    return Point(z, torch.stack(values), torch.stack(slopes))


@torch.no_grad()  # around the gradient, so that it is none of what else the terms are made of
def _value_and_slope(term: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    value, pulled_back = torch.func.vjp(term, z)[:2]
    (slope,) = pulled_back(torch.ones_like(value))
    return value, slope


def leapfrog(terms: Terms, coefficients: Tensor, point: Point, momentum: Tensor, step: Tensor) -> tuple[Point, Tensor]:
    """p <- p + (s/2) grad log pi(z);  z <- z + s p;  p <- p + (s/2) grad log pi(z).

    It keeps volumes, and leads back to where it began from its end with the momentum reversed. Along a path of fixed
    length the error of the energy is O(s^2). It takes one gradient, that at its end.

    Args:
        terms: the f_k.
        coefficients: (K,) c_k.
        point: where it begins.
        momentum: p (C, B, L).
        step: s, which broadcasts with z: a step size times the scale of each latent. In coordinates z / scale that is
            the step size alone, with a mass of 1.

    Returns:
        Where it ends, and the momentum there.

    Reference: Neal 2011, arXiv 1206.1901, sections 2.3 and 4.1.
    """
    momentum = momentum + step / 2 * _combined(coefficients, point.slopes)
    point = point_at(terms, point.z + step * momentum)
    return point, momentum + step / 2 * _combined(coefficients, point.slopes)


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
    """One step that leaves pi invariant: p ~ N(0, I), n leapfrogs to (z', p'), and z' is taken with probability a.

        a = min(1, exp(H - H')),  H = p'p / 2 - log pi(z)

    It is reversible: seen backward it is the same step. A place where the energy H' is not finite is never taken.

    Args:
        leap: (coefficients, point, momentum, step) -> point and momentum: ``leapfrog`` of the terms, as it is or
            as a graph.
        coefficients: (K,) c_k.
        point: where the chains are.
        momentum: (C, B, L), a draw of N(0, I).
        uniform: (C, B), a draw of U(0, 1).
        scale: (B, L) how wide the target is along each latent, about; the unit in which steps are taken.
        step_size: (B,), or (C, B) for steps of each chain, in that unit. It must not depend on where the chains are.
        num_leapfrogs: n.

    Returns:
        Where the chains are afterwards, and a, (C, B), for each of them.

    Reference: Duane et al. 1987; Neal 2011, arXiv 1206.1901, section 3.2.
    """
    ahead, its_momentum, step = point, momentum, step_size[..., None] * scale
    for _ in range(num_leapfrogs):
        ahead, its_momentum = leap(coefficients, ahead, its_momentum, step)
    minus_energy = _minus_energy(coefficients, ahead, its_momentum)
    ratio = (minus_energy - _minus_energy(coefficients, point, momentum)).clamp(max=0).exp()
    acceptance = torch.where(minus_energy.isfinite() & ~ratio.isnan(), ratio, torch.zeros_like(ratio))
    taken = uniform < acceptance
    moved = Point(
        torch.where(taken[..., None], ahead.z, point.z),
        torch.where(taken, ahead.values, point.values),
        torch.where(taken[..., None], ahead.slopes, point.slopes),
    )
    return moved, acceptance


def _combined(coefficients: Tensor, of_terms: Tensor) -> Tensor:
    """sum_k c_k f_k. of_terms: (K, ...) -> (...)."""
    first, *further = (c * f for c, f in zip(coefficients.unbind(), of_terms.unbind(), strict=True))
    return sum(further, first)


def _minus_energy(coefficients: Tensor, point: Point, momentum: Tensor) -> Tensor:
    """(C, B) -H = log pi(z) - p'p / 2."""
    return _combined(coefficients, point.values) - momentum.square().sum(-1) / 2
