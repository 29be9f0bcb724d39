"""The images that a run is asked about, as that run sees them: one of its splits, or a person's own."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ppl_vae import data
from ppl_vae.data.registry import SPLITS
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.opening import Run


def _check_support(run: Run, source: str, x: Tensor) -> None:
    """Refuses pixels that the run's likelihood has no probability for; levels and binarized pixels always fit."""
    family = build_likelihood(run.options, run.splits.event_shape)
    seen = x[~x.isnan()]
    if run.evaluated_pixels == "none" and not family.support.check(seen).all():
        raise ValueError(
            f"{source}: expected pixels that are {family.support_words}, got values from {float(seen.min()):.4g} to "
            f"{float(seen.max()):.4g}"
        )


class Images(NamedTuple):
    """Some of the N images of a split or a path.

    Args:
        source: the split's name, or the path as an absolute one.
        x: (n, *E) as the model sees them, NaN where a pixel is missing.
        labels: (n,) int64, or None where there are none.
        names: (n), of files, or places among the N.
        places: (n,) int64, their places among the N, ascending.
        num_found: N.
        notes: sentences for the user about how the images were read.
    """

    source: str
    x: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    places: Tensor
    num_found: int
    notes: tuple[str, ...] = ()


def images_of(run: Run, images_path: str, *, most: int | None, seed: int) -> Images:
    """A split by its name, or a file or folder of images brought to the run's shape by its own --fit.

    Args:
        most: a fixed random subset of that many; None takes all.
        seed: of the binarization, where it draws anew.

    Raises:
        ValueError: a split without images, files that cannot be read, or images that do not fit the run's data.
    """
    notes: tuple[str, ...] = ()
    if images_path in SPLITS:
        source, labels = images_path, run.splits.labels.get(images_path)
        x = data.evaluation_images(run.splits, images_path, run.evaluated_pixels, seed=seed)
        names = tuple(str(i) for i in range(len(x)))
    else:
        source = str(Path(images_path).resolve())
        x, labels, names, notes = data.load_images(
            images_path, run.splits, run.evaluated_pixels, seed=seed, fit=run.options.fit
        )
        _check_support(run, source, x)
    places = data.subset(len(x), most)
    kept = tuple(names[i] for i in places.tolist())
    return Images(source, x[places], None if labels is None else labels[places], kept, places, len(x), notes)
