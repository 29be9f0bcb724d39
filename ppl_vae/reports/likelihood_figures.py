"""The figures of a table of likelihoods: reconstructions, samples, and where pixels lie, a row or panel for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae import data
from ppl_vae.reports.display import choose_display
from ppl_vae.reports.figures.images import image_rows
from ppl_vae.reports.figures.likelihoods import pixel_calibration
from ppl_vae.runs.command_results import LikelihoodRow
from ppl_vae.runs.open import Run, Say, load_evaluated_vae
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runtime.global_state import seeded
from ppl_vae.vae import VAE

_FIGURE_SEED = 0
_NUM_SHOWN = 10


def write_likelihood_figures(folder: Path, opened: Sequence[Run], rows: Sequence[LikelihoodRow], say: Say) -> None:
    """Writes calibration.png, and for images reconstructions.png and samples.png, the best likelihood first."""
    folder.mkdir(exist_ok=True)
    by_word = {run.options.likelihood: run for run in opened}
    title = (
        f"{opened[0].splits.name}: where pixels of {rows[0].calibration.num_images:,} test images lie in p(x | z), "
        "z ~ q(z | x)\n(probability integral transform; uniform if the model were right; bars are standard errors)"
    )
    figures = {"calibration.png": pixel_calibration({row.likelihood: row.calibration for row in rows}, title=title)}
    if len(opened[0].splits.event_shape) > 1:
        figures |= _picture_figures([by_word[row.likelihood] for row in rows])
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    say(f"Figures in {folder}: {', '.join(figures)}")


@torch.no_grad()
def _picture_figures(opened: Sequence[Run]) -> dict[str, Figure]:
    first = opened[0]
    display, x = choose_display(first), data.evaluation_images(first.splits, "test", first.evaluated_pixels)
    x = x[data.subset(len(x), _NUM_SHOWN)]
    reconstructions, samples = {"test image x": display(x)}, dict[str, NDArray[np.float32]]()
    for run in opened:
        word, vae = run.options.likelihood, load_evaluated_vae(run)
        reconstructions[word] = display(_reconstructed(vae, x))
        means, draws = _sampled(vae)
        samples |= {f"{word}\nE[x | z]": display(means), f"{word}\nx ~ p(x | z)": display(draws)}
    name = first.splits.name
    return {
        "reconstructions.png": image_rows(
            reconstructions, title=f"{name}: reconstructions E[x | z], z ~ q(z | x)" + display.words
        ),
        "samples.png": image_rows(
            samples,
            title=f"{name}: samples, z ~ p(z) by one seed, in the latents of each model" + display.words,
        ),
    }


def _reconstructed(vae: VAE, x: Tensor) -> Tensor:
    """(n, *E) E[x | z], z ~ q(z | x)."""
    with seeded(_FIGURE_SEED, torch.device("cpu")):
        return vae.likelihood(vae.posterior(x).sample()).mean


def _sampled(vae: VAE) -> tuple[Tensor, Tensor]:
    """E[x | z] and x ~ p(x | z), z ~ p(z): each (n, *E)."""
    with seeded(_FIGURE_SEED, torch.device("cpu")):
        decoded = vae.likelihood(vae.prior().expand((_NUM_SHOWN,)).sample())
        return decoded.mean, decoded.sample()
