"""Likelihoods that are masses as codes of pixels: 8-bit levels, zeros and ones, counts, and colors one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch.distributions import Distribution, constraints

from ppl_vae.evidence.ans import Floats, Ints, Stack
from ppl_vae.parts.likelihoods.base import independent_pixels
from ppl_vae.parts.likelihoods.levels import CENTER, TOP, LevelLogistic, discretized_logistic_log_mass
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
        ValueError: Pixels depend on each other given z, in another way than colors do.
    """
    num_bits = find_num_bits(likelihood, largest)
    if isinstance(likelihood, ColorLogisticMixture):
        return PixelCodec(lambda x: _make_color_masses(likelihood, x), 3, num_bits)
    pixels = independent_pixels(likelihood, "a code needs the masses of each").base_dist
    mass = _make_mass(pixels, num_rows, num_bits, _find_top(likelihood) is not None)
    return PixelCodec(lambda x: iter([mass]), 1, num_bits)


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
        make_masses: Images (R, D) -> P of each group of pixels, made from the groups before it alone. A group is an
            equal part of the D pixels.
        num_groups: The number of groups.
        num_bits: Of every value.
    """

    def __init__(self, make_masses: Callable[[Ints], Iterator[Mass]], num_groups: int, num_bits: int) -> None:
        self._make_masses, self._num_groups, self._num_bits = make_masses, num_groups, num_bits

    def push(self, stack: Stack, x: Ints) -> Floats:
        """Push images (R, D); returns log P(x), (R,) nats, of the probabilities that were used."""
        total, steps = np.zeros(len(x)), []
        for group, mass in self._iterate_groups(x):
            for place in reversed(range(self._num_bits)):
                bit, share = (group >> place) & 1, _find_share(mass, group >> (place + 1), place)
                steps.append((bit.ravel(), share.ravel()))
                total += np.log(np.where(bit == 1, share, 1 - share).clip(2.0**-24)).sum(1)
        for bit, share in reversed(steps):
            stack.push("bits", bit, share)
        return total

    def pop(self, stack: Stack, num_rows: int, num_pixels: int) -> Ints:
        """The inverse of ``push``: (R, D)."""
        x = np.zeros((num_rows, num_pixels), dtype=np.int64)
        for group, mass in self._iterate_groups(x):
            for place in reversed(range(self._num_bits)):
                share = _find_share(mass, group, place)
                group[:] = 2 * group + stack.pop("bits", share.ravel()).reshape(share.shape)
        return x

    def _iterate_groups(self, x: Ints) -> Iterator[tuple[Ints, Mass]]:
        """Each group, a view of x, and its mass, which is made once the groups before it are known."""
        return zip(np.split(x, self._num_groups, axis=1), self._make_masses(x), strict=False)


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
    elif isinstance(pixels, dist.MixtureSameFamily) and isinstance(pixels.component_distribution, LevelLogistic):
        component = pixels.component_distribution
        parts = [pixels.mixture_distribution.logits, component.loc, component.log_scale]
    else:
        return _make_table(pixels, num_rows, num_bits, is_bounded)
    return _LogisticMass(*(part[:num_rows].flatten(1, -2).double().numpy() for part in parts))


def _make_table(pixels: Distribution, num_rows: int, num_bits: int, is_bounded: bool) -> Mass:
    """Sums of masses by ``log_prob``; without a largest value, the last one takes what is beyond."""
    shape = pixels.batch_shape
    value = torch.arange(1 << num_bits, dtype=torch.float).reshape(-1, *[1] * len(shape))
    log_p = pixels.log_prob(value.expand(-1, *shape))[:, :num_rows].flatten(2)
    masses = log_p.double().exp().numpy()  # (values, R, D)
    if not is_bounded:
        masses[-1] += (1 - masses.sum(0)).clip(0)
    tables = [masses]
    for _ in range(num_bits - 1):
        tables.append(tables[-1][::2] + tables[-1][1::2])
    return lambda places, k: np.take_along_axis(tables[k], places[None], axis=0)[0]


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


def _make_color_masses(p: ColorLogisticMixture, x: Ints) -> Iterator[Mass]:
    """Red, then green given red, then blue given both: mixtures whose weights are those of the component so far.

    Args:
        p: Batch (R' >= R,), event (3, H, W).
        x: (R, D), of which a color is read when the mass of the next one is asked for.
    """
    R, (_, H, W) = len(x), p.event_shape
    x = x.reshape(R, 3, 1, H, W)  # a view
    parts = (p.logits, p.locs, p.log_scales, p.coefficients)
    log_share, locs, log_scales, c = (part[:R].double().numpy() for part in parts)
    for color, coefficients in enumerate(((), (0,), (1, 2))):
        shift = sum(c[:, k] * (x[:, other] / CENTER - 1) for other, k in enumerate(coefficients))
        loc, log_scale = locs[:, color] + shift, log_scales[:, color]
        yield _LogisticMass(*(np.moveaxis(part.reshape(R, -1, H * W), 1, -1) for part in (log_share, loc, log_scale)))
        given = (torch.from_numpy(part) for part in (x[:, color].astype(float), loc, log_scale))
        log_share = log_share + discretized_logistic_log_mass(*given).numpy()


def claims_too_much(claimed: Floats, coded: Floats) -> bool:
    """Whether log-probabilities are larger than those of masses that sum to one, (R,) nats each."""
    return bool((claimed - coded > 1e-3 * np.abs(coded) + math.log(2)).any())
