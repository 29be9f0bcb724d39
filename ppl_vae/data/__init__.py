"""Checked bytes to tensors: data sets, splits, labels, binarization. Knows of no model.

Every split, draw and subset here comes from a constant, never from a run's seed, so that two runs are measured on the
same images; the iwae protocol alone draws its test images from the seed of an evaluation.
"""

from ppl_vae.data.binarization import (
    as_floats,
    as_fractions,
    bernoulli_draw,
    binarization_entropy,
    evaluation_images,
    expected_images,
    probabilities,
    resolve_binarization,
    training_images,
)
from ppl_vae.data.further_images import OwnImages, own_images
from ppl_vae.data.loading import DATASETS, load
from ppl_vae.data.splits import BINARY, LEVELS, PROBABILITIES, REAL, Splits, subset

__all__ = [
    "BINARY",
    "DATASETS",
    "LEVELS",
    "PROBABILITIES",
    "REAL",
    "OwnImages",
    "Splits",
    "as_floats",
    "as_fractions",
    "bernoulli_draw",
    "binarization_entropy",
    "evaluation_images",
    "expected_images",
    "load",
    "own_images",
    "probabilities",
    "resolve_binarization",
    "subset",
    "training_images",
]
