"""Likelihoods that are masses as codes of pixels: 8-bit levels, zeros and ones, counts, and colors one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch.distributions import Distribution, constraints

from ppl_vae.evidence.ans import Floats, Ints, Stack
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.parts.likelihoods.levels import CENTER, TOP, LevelLogistic
from ppl_vae.parts.likelihoods.mixture import ColorLogisticMixture

# (places (R, D), k) -> the probability of the values [place 2^k, (place + 1) 2^k) of each pixel, (R, D)
Mass = Callable[[Ints, int], Floats]


def make_pixel_codec(likelihood: Distribution, num_rows: int, largest: int) -> PixelCodec:
    """The first rows of p(x | z), batch (R,), as a code of whole numbers.

    Args:
        likelihood: Independent pixels whose ``log_prob`` is a mass, or a ``ColorLogisticMixture``.
        num_rows: How many rows are coded.
        largest: The largest value of a pixel, where the likelihood sets none.

    Raises:
        ValueError: Pixels depend on each other given z, in another way than colors do; or there are too many values.
    """
    if isinstance(likelihood, ColorLogisticMixture):
        return ColorCodec(likelihood, num_rows)
    pixels = independent_pixels(likelihood, "a code needs the masses of each").base_dist
    num_bits = find_num_bits(likelihood, largest)
    return PixelCodec([_make_mass(pixels, num_rows, num_bits, _find_top(likelihood) is not None)], num_bits)


def find_num_bits(likelihood: Distribution, largest: int) -> int:
    """The number of bits that every value of a pixel has: 1 for zeros and ones, 8 for levels.

    Where the likelihood sets no largest value, it is one more than the largest that occurs has.
    """
    top = _find_top(likelihood)
    return largest.bit_length() + 1 if top is None else max(1, top.bit_length())


def _find_top(likelihood: Distribution) -> int | None:
    """The largest value of a pixel, None where there is none."""
    support: Any = likelihood.support
    while hasattr(support, "base_constraint"):  # of independent pixels, and of a mixture
        support = support.base_constraint
    if support is constraints.boolean:
        return 1
    return int(support.upper_bound) if hasattr(support, "upper_bound") else None


class PixelCodec:
    """Whole numbers, from their highest to their lowest bit, each given the bits above it.

        P(bit = 1 | bits above it) = P(upper half) / [P(lower half) + P(upper half)]

    of the values that the bits above it leave. The probabilities of a pixel's values sum to one, whatever ``log_prob``
    says.

    Args:
        masses: P of each group of pixels; a pixel is in one group, and later groups may depend on earlier ones.
        num_bits: Of every value.
    """

    def __init__(self, masses: Sequence[Mass], num_bits: int) -> None:
        self._masses, self._num_bits = masses, num_bits

    def push(self, stack: Stack, x: Ints) -> Floats:
        """Push images (R, D); returns log P(x), (R,) nats, of the probabilities that were used."""
        total, steps = np.zeros(len(x)), []
        for mass, group in zip(self._find_masses(x), np.split(x, len(self._masses), axis=1), strict=True):
            for place in reversed(range(self._num_bits)):
                bit, share = (group >> place) & 1, _find_share(mass, group >> (place + 1), place)
                steps.append((bit.ravel(), share.ravel()))
                total += np.log(np.where(bit == 1, share, 1 - share).clip(2.0**-24)).sum(1)
        for bit, share in reversed(steps):
            stack.push_bits(bit, share)
        return total

    def pop(self, stack: Stack, num_rows: int, num_pixels: int) -> Ints:
        """The inverse of ``push``: (R, D)."""
        x = np.zeros((num_rows, num_pixels), dtype=np.int64)
        for index, group in enumerate(np.split(x, len(self._masses), axis=1)):  # views
            mass = self._find_masses(x)[index]
            for place in reversed(range(self._num_bits)):
                share = _find_share(mass, group, place)
                group[:] = 2 * group + stack.pop_bits(share.ravel()).reshape(share.shape)
        return x

    def _find_masses(self, x: Ints) -> Sequence[Mass]:
        return self._masses


def _find_share(mass: Mass, above: Ints, place: int) -> Floats:
    """P(bit = 1) for the bit at a place, given the number that the bits above it make."""
    lower, upper = mass(2 * above, place), mass(2 * above + 1, place)
    total = lower + upper
    return np.divide(upper, total, out=np.full_like(total, 0.5), where=total > 0)


# --- Masses of intervals ---


def _make_mass(pixels: Distribution, num_rows: int, num_bits: int, is_bounded: bool) -> Mass:
    """The masses of the first rows of independent pixels, batch (R, *E)."""
    if isinstance(pixels, LevelLogistic):
        parts = [part[..., None] for part in (torch.zeros_like(pixels.loc), pixels.loc, pixels.log_scale)]
        return _LogisticMass(*(part[:num_rows].flatten(1, -2).double().numpy() for part in parts))
    if isinstance(pixels, dist.MixtureSameFamily) and isinstance(pixels.component_distribution, LevelLogistic):
        component = pixels.component_distribution
        parts = [pixels.mixture_distribution.logits, component.loc, component.log_scale]
        return _LogisticMass(*(part[:num_rows].flatten(1, -2).double().numpy() for part in parts))
    return _TableMass(pixels, num_rows, num_bits, is_bounded)


class _TableMass:
    """Sums of masses by ``log_prob``; without a largest value, the last one takes what is beyond."""

    def __init__(self, pixels: Distribution, num_rows: int, num_bits: int, is_bounded: bool) -> None:
        shape = pixels.batch_shape
        value = torch.arange(1 << num_bits, dtype=torch.float).reshape(-1, *[1] * len(shape))
        log_p = pixels.log_prob(value.expand(-1, *shape))[:, :num_rows].flatten(2)
        masses = log_p.double().exp().numpy()  # (values, R, D)
        if not is_bounded:
            masses[-1] += (1 - masses.sum(0)).clip(0)
        self._masses = [masses]
        for _ in range(num_bits - 1):
            self._masses.append(self._masses[-1][::2] + self._masses[-1][1::2])

    def __call__(self, places: Ints, num_bits: int) -> Floats:
        found: Floats = np.take_along_axis(self._masses[num_bits], places[None], axis=0)[0]
        return found


@dataclass(frozen=True)
class _LogisticMass:
    """sum_k pi_k [sigmoid(b_k) - sigmoid(a_k)], a_k and b_k the ends of an interval, open at 0 and 255.

    The difference is sigmoid(b) sigmoid(-a) (1 - e^(a - b)), without cancellation. The parameters are (R, D, K), in
    units of t = level / 127.5 - 1.
    """

    logits: Floats
    loc: Floats
    log_scale: Floats

    def __call__(self, places: Ints, num_bits: int) -> Floats:
        first, precision = (places << num_bits)[..., None], np.exp(-self.log_scale)
        last = first + (1 << num_bits) - 1
        a = np.where(first <= 0, -np.inf, ((first - 0.5 - CENTER) / CENTER - self.loc) * precision)
        b = np.where(last >= TOP, np.inf, ((last + 0.5 - CENTER) / CENTER - self.loc) * precision)
        shares = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        masses = -np.expm1(a - b) / (1 + np.exp(-b.clip(-700, 700))) / (1 + np.exp(a.clip(-700, 700)))
        return (shares * masses).sum(-1) / shares.sum(-1)


class ColorCodec(PixelCodec):
    """Red, then green given red, then blue given both: mixtures whose weights are those of the component so far."""

    def __init__(self, likelihood: ColorLogisticMixture, num_rows: int) -> None:
        self._p, self._num_rows = likelihood, num_rows
        super().__init__([_LogisticMass(*[np.zeros(0)] * 3)] * 3, 8)

    def _find_masses(self, x: Ints) -> Sequence[Mass]:
        R, (_, H, W) = self._num_rows, self._p.event_shape
        t = x.reshape(R, 3, 1, H, W) / CENTER - 1
        parts = (self._p.logits, self._p.locs, self._p.log_scales, self._p.coefficients)
        log_share, locs, log_scales, c = (part[:R].double().numpy() for part in parts)
        shifts = (0.0, c[:, 0] * t[:, 0], c[:, 1] * t[:, 0] + c[:, 2] * t[:, 1])
        found: list[Mass] = []
        for color, shift in enumerate(shifts):
            loc, log_scale = locs[:, color] + shift, log_scales[:, color]
            mass = _LogisticMass(
                *(np.moveaxis(part.reshape(R, -1, H * W), 1, -1) for part in (log_share, loc, log_scale))
            )
            found.append(mass)
            log_share = log_share + _log_mass(x.reshape(R, 3, 1, H, W)[:, color], loc, log_scale)
        return found


def _log_mass(x: Ints, loc: Floats, log_scale: Floats) -> Floats:
    from ppl_vae.parts.likelihoods.levels import discretized_logistic_log_mass

    given = (torch.from_numpy(part) for part in (x.astype(float), loc, log_scale))
    found: Floats = discretized_logistic_log_mass(*given).numpy()
    return found


def claims_too_much(claimed: Floats, coded: Floats) -> bool:
    """Whether log-probabilities are larger than those of masses that sum to one, (R,) nats each."""
    return bool((claimed - coded > 1e-3 * np.abs(coded) + math.log(2)).any())
