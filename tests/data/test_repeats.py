"""Data: levels and counts are known as such on any scale, and continuous values are not taken for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl_vae.data.transforms import describe_repeats

RNG = np.random.default_rng(0)


def smooth(num_images: int, channels: int = 1, size: int = 12) -> np.ndarray:
    """(N, C, H, W) random waves from -1 to 1."""
    grid = np.linspace(0, 2 * np.pi, size)
    phase, speed = RNG.uniform(0, 6, (2, num_images, channels, 1, 1))
    return np.sin(speed * grid[:, None] + phase + np.cos(phase * grid))


def float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


LEVELS = np.round(255 * (smooth(500, 3) + 1) / 2)
COUNTS = RNG.poisson(np.exp(1.5 + smooth(500)))
MEANS, SCALES = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # of ImageNet

ON_A_GRID = {
    "level / 255": LEVELS / 255,
    "level / 127.5 - 1": LEVELS / 127.5 - 1,
    "level / 16": np.round(LEVELS / 16) / 16,
    "standardized as a whole": (LEVELS - LEVELS.mean()) / LEVELS.std(),
    "standardized by channel": (LEVELS / 255 - MEANS) / SCALES,
    "standardized by pixel": (LEVELS - LEVELS.mean(0)) / LEVELS.std(0),
    "standardized by image": (LEVELS - LEVELS.mean((1, 2, 3), keepdims=True)) / LEVELS.std((1, 2, 3), keepdims=True),
    "of few images": LEVELS[:10] / 127.5 - 1,
    "in single precision": (LEVELS.astype(np.float32) - np.float32(127.3)) / np.float32(61.7),
    "with gamma": (LEVELS / 255) ** 2.2,
    "of 12 bits": np.round(4095 * (smooth(500, size=24) + 1) / 2) / 4095,
    "counts": COUNTS / COUNTS.mean(),
    "log counts": np.log1p(COUNTS),
}
CONTINUOUS = {
    "normal": RNG.normal(size=(500, 3, 12, 12)),
    "smooth": smooth(500, 3),
    "few": smooth(10),
    "between 0 and 1": RNG.random((500, 1, 12, 12)),
    "far from 0": 280 + 10 * RNG.normal(size=(2000, 1, 32, 32)),
    "clipped at both ends": np.clip(smooth(500), -0.7, 0.7),
    "on a background": np.where(np.arange(12) < 8, 0.0, smooth(500)),
    "heavy tails": RNG.standard_cauchy((500, 1, 12, 12)),
}


@pytest.mark.parametrize("what", ON_A_GRID)
def test_levels_and_counts_are_known_on_any_scale(what: str) -> None:
    assert describe_repeats(float32(ON_A_GRID[what])) is not None


@pytest.mark.parametrize("what", CONTINUOUS)
def test_continuous_values_are_not_taken_for_a_grid(what: str) -> None:
    assert describe_repeats(float32(CONTINUOUS[what])) is None


def test_columns_with_few_values_are_named() -> None:
    ages, noise, bits = RNG.integers(20, 60, 300), RNG.normal(size=(2, 300)), RNG.integers(0, 2, 300)
    table = np.stack([noise[0], (ages - ages.mean()) / ages.std(), noise[1], bits - bits.mean(), np.ones(300)], 1)
    repeats = describe_repeats(float32(table))
    assert repeats is not None
    assert f"columns 1, 3 (at most {len(np.unique(ages))} are distinct)" in repeats
    assert describe_repeats(float32(noise.T)) is None


@pytest.mark.parametrize(("levels", "takes_uint8"), [(256, True), (4096, False)])
def test_uint8_is_advised_for_as_many_levels_as_it_has(levels: int, takes_uint8: bool) -> None:
    repeats = describe_repeats(float32(RNG.integers(0, levels, (500, 1, 12, 12)) / levels))
    assert repeats is not None
    assert ("uint8" in repeats) == takes_uint8
    assert "negative-binomial" in repeats
