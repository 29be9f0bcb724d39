"""Detect values that repeat, as scaled levels and counts do: their density has no upper bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.data.splits import NUM_LEVELS, abbreviate, pluralize, subset

_MOST_ROWS, _MOST_VALUES, _MOST_GROUPS = 2000, 2**20, 1000
_MOST_IN_GROUP = 2**15  # of more, single precision itself makes many equal where they are far from 0
_MOST_DISTINCT = 0.75  # of the values of continuous data at least 0.99 are distinct in single precision


class Repeats(NamedTuple):
    """Repeated values of a data set.

    Args:
        num_distinct: the largest number of distinct values in a group that repeats.
        columns: of a table, those that repeat; empty for images.
    """

    num_distinct: int
    columns: tuple[int, ...] = ()

    def describe(self) -> str:
        """Describe what repeats, its effect on a density, and which likelihood has a mass instead."""
        some = f" in columns {abbreviate(map(str, self.columns))}" * bool(self.columns)
        words = (
            f"Values repeat{some} (at most {self.num_distinct:,} are distinct), as levels and counts do on any scale: "
            "a density of values on a grid has no upper bound, and its nats compare only with densities of the same "
            "values."
        )
        if self.num_distinct <= NUM_LEVELS:
            words += " Saved as uint8, levels from 0 to 255 have a mass under the likelihood discretized-logistic."
        return words + " Saved as whole numbers, counts have a mass under the likelihood negative-binomial."


def find_repeats(x: Tensor) -> Repeats | None:
    """Find where more than a quarter of the values repeat, in a fixed random subset of rows; None: nowhere.

    The values of a table are compared column by column. Those of images are compared within each channel, then pixel by
    pixel and image by image, since each of these may have a scale of its own: most of them must repeat.

    Args:
        x: (N, *E).
    """
    rows = x[subset(len(x), max(8, min(_MOST_ROWS, _MOST_VALUES // x[0].numel())))]
    if x.ndim == 2:
        columns = _spaced(rows.shape[1], _MOST_GROUPS)
        counts = {column: _count_distinct(rows[:, column]) for column in columns.tolist()}
        few = {column: count for column, count in counts.items() if count}
        return Repeats(max(few.values()), tuple(few)) if few else None
    pixels = rows.flatten(1)
    by_group = (
        rows.transpose(0, 1).flatten(1),
        pixels[:, _spaced(pixels.shape[1], _MOST_GROUPS)].T,
        pixels[_spaced(len(pixels), _MOST_GROUPS)],
    )
    for groups in by_group:
        varying = [group for group in groups if group.min() < group.max()]
        found = [count for group in varying if (count := _count_distinct(group))]
        if 2 * len(found) > len(varying):
            return Repeats(max(found))
    return None


def describe_constant_columns(x: Tensor) -> str | None:
    """Describe the columns of a table (N, D) that hold one value, of which no density is bounded; None without any."""
    if x.ndim != 2:
        return None
    columns = (x == x[:1]).all(0).nonzero().flatten().tolist()
    if not columns:
        return None
    names = abbreviate(map(str, columns))
    return (
        f"Warning: {pluralize(len(columns), 'column')} of the training data (counted from 0: {names}) hold one value: "
        "a density of it has no upper bound, and its nats say nothing of the other columns. Leave them out."
    )


def _spaced(count: int, most: int) -> Tensor:
    """Evenly spaced indices below ``count``, at most ``most`` of them."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.double).round().long()


def _count_distinct(values: Tensor) -> int:
    """Count distinct values (n,), or return 0 where they repeat no more than continuous ones, or are constant.

    The three most frequent values are left aside: continuous values that are clipped at both ends, on a background.
    """
    values = values[_spaced(len(values), _MOST_IN_GROUP)]
    counts = values.unique(return_counts=True)[1].sort(descending=True).values
    others = counts[3:]
    few = len(counts) <= _MOST_DISTINCT * len(values) and len(others) <= _MOST_DISTINCT * others.sum()
    return len(counts) if few and len(counts) > 1 else 0
