"""Small pictures of a run for the report's page: images side by side without margins, a pixel a pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_vae.runs.outputs import write_picture
from ppl_vae.study.material import NUM_PAIRS, NUM_SAMPLES_SHOWN, NUM_SHOWN, StudyData
from ppl_vae.vae import VAE

ORIGINALS = "originals.png"


def strip(images: Tensor, *, columns: int) -> Tensor:
    """(N, C, H, W) -> (C, rows H, columns W), row by row; N a multiple of the columns."""
    N, C, H, W = images.shape
    table = images.reshape(N // columns, columns, C, H, W)
    return table.permute(2, 0, 3, 1, 4).reshape(C, N // columns * H, columns * W)


def write_strip(path: Path, images: Tensor, *, columns: int) -> None:
    """Images (N, C, H, W), values in [0, 1], side by side as one PNG of 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (255 * strip(images.float(), columns=columns)).round().clamp(0, 255)
    write_picture(path, levels.numpy().astype(np.uint8))


@torch.no_grad()
def write_pictures(
    folder: Path,
    vae: VAE,
    material: StudyData,
    codes: Tensor,
    *,
    samples: Tensor,
    fitted: Tensor | None,
    holes: list[list[float]] | None,
) -> dict[str, str]:
    """A run's pictures, each of decoded means.

    Args:
        folder: the run's, among the pictures.
        vae: the run's.
        material: whose images are shown.
        codes: (N, L) the mean of q(z | x) of each test image.
        samples: (M, C, H, W) decoded prior draws.
        fitted: (M, C, H, W) decoded draws of a normal that was fitted to the codes; then there are interpolations too.
        holes: latents of prior draws, those that the posteriors cover worst and as many ordinary ones, or None.

    Returns:
        The file of each picture, by what it shows.
    """
    shown = codes[material.shown]
    images = {"reconstructions": vae.likelihood(shown).mean, "samples": samples[:NUM_SAMPLES_SHOWN]}
    if fitted is not None:
        images |= {"interpolations": interpolations(vae, shown), "fitted_samples": fitted[:NUM_SAMPLES_SHOWN]}
    if holes is not None:
        images["holes"] = vae.likelihood(torch.tensor(holes, dtype=codes.dtype)).mean
    for name, each in images.items():
        columns = len(each) // 2 if name == "holes" else min(NUM_SHOWN, len(each))
        write_strip(folder / f"{name}.png", each[: len(each) // columns * columns], columns=columns)
    return {name: f"{folder.parent.name}/{folder.name}/{name}.png" for name in images}


@torch.no_grad()
def interpolations(vae: VAE, codes: Tensor) -> Tensor:
    """E[x | z] at z = (1 - t) a + t b, ten t from 0 to 1, between neighbors a, b of the codes (n, L), n at least 8."""
    a, b = codes[: 2 * NUM_PAIRS : 2], codes[1 : 2 * NUM_PAIRS : 2]
    t = torch.linspace(0, 1, NUM_SHOWN, dtype=codes.dtype)[:, None]
    return vae.likelihood(((1 - t) * a[:, None] + t * b[:, None]).flatten(0, 1)).mean
