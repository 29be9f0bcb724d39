"""Labels that are known for some of the training images only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.records import UNKNOWN, Records


def keep_labels(labels: Tensor, number: int, *, seed: int) -> Tensor:
    """Keep ``number`` of the labels (N,), equally many of each class or one more; the others become -1.

    Raises:
        ValueError: There are more classes than labels to keep, or a class has too few images.
    """
    classes = labels.unique().tolist()
    if number < len(classes):
        raise ValueError(f"number: expected at least one label for each of {len(classes)} classes, got {number}")
    kept = torch.full_like(labels, UNKNOWN)
    generator = torch.Generator().manual_seed(seed)
    for i, label in enumerate(classes):
        places = (labels == label).nonzero()[:, 0]
        share = number // len(classes) + (i < number % len(classes))
        if share > len(places):
            raise ValueError(
                f"number: expected at most one label for each image of a class, got {share} of class {label}, which "
                f"has {len(places)}"
            )
        kept[places[torch.randperm(len(places), generator=generator)[:share]]] = label
    return kept


def add_labelled_images(
    stored: Tensor, y: Tensor, transform: Callable[[Tensor, torch.Generator | None], Tensor], *, seed: int
) -> Records:
    """Training images with what ``objectives.SemiSupervisedELBO`` takes: (x, y, a labelled image, its label).

    Labelled images are taken in turn, in an order by the seed. They are as the model sees them: where pixels are drawn
    from gray levels, each turn has a draw of its own, which all epochs share.

    Args:
        stored: (N, *E) training images.
        y: (N,) their labels, -1 where unknown.
        transform: stored images -> images as the model sees them; see ``training_images``.
        seed: The seed of the order and of the draws.
    """
    known = (y != UNKNOWN).nonzero()[:, 0]
    with seeded(seed, stored.device):
        rows = known.repeat(-(-len(y) // len(known)))[torch.randperm(len(y))]
        x = torch.cat([_narrow(transform(stored[part], None)) for part in rows.split(_CHUNK)])
    return Records(stored, y, x, y[rows])


_CHUNK = 1000  # images


def _narrow(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 255 as one byte each."""
    return x.byte() if ((x >= 0) & (x <= 255) & (x == x.round())).all() else x
