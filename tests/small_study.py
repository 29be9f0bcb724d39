"""A study of a few small runs, which several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from small_run import bars, silent

from ppl_vae.study.plan import Size
from ppl_vae.study.results import StudyNumbers, read_study
from ppl_vae.study.run import collect

TINY = Size(
    epochs=1, betas={"bars": (0.1, 1.0, 100.0)}, latent_dims=(2,), labels=(20,), images=100, num_particles=10, codes=250
)


class Killed(RuntimeError):
    """The stand-in for a killed process."""


def raise_killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


def save_gray_bars(path: Path) -> Path:
    """8 x 8 images of 8-bit levels: bars on a gray ground, in two classes; fewer for validation than are measured."""
    arrays = {}
    for seed, (split, count) in enumerate((("train", 300), ("valid", 80), ("test", 120))):
        images, labels = bars(count, seed=seed)
        noise = np.random.default_rng(seed).integers(0, 40, images.shape)
        arrays[split], arrays[f"{split}_labels"] = (200 * images + noise).astype(np.uint8), labels
    np.savez(path, **arrays)
    return path


def run_tiny_study(folder: Path, dataset: Path, size: Size = TINY) -> StudyNumbers:
    collect(size, [str(dataset)], name="tiny", output=str(folder), say=silent)
    return read_study(folder)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("environment",)
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds") and k not in left_out}
    return [without_times(v) for v in value] if isinstance(value, list) else value
