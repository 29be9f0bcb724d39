"""Pixel values as the model sees them, converted to gray and color for pictures; the picture of missing pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae import data
from ppl_vae.evidence.missing import Imputation
from ppl_vae.reports.figures.images import image_rows
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.open import Run

_NUM_IMAGES = 500
_SHARES = (0.005, 0.995)
_NUM_SHOWN, _DRAWS_SHOWN = 10, 3  # images and draws in the picture of missing pixels
_MISSING_COLOR = (0.36, 0.55, 0.80)


class Display(NamedTuple):
    """(x - low) / (high - low), cut to [0, 1].

    Args:
        low, high: the pixel values that are drawn black and white.
        words: what a title says of it, with a line break before it; nothing where pixels are drawn as they are.
    """

    low: float = 0.0
    high: float = 1.0
    words: str = ""

    def __call__(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels of any shape -> the same shape, values in [0, 1], float32."""
        return ((x.float() - self.low) / (self.high - self.low)).clamp(0, 1).cpu().numpy()

    def levels(self, x: Tensor) -> NDArray[np.uint8]:
        """The same in 8 bits, 0 to 255, in the shape of x."""
        return np.rint(255 * self(x)).astype(np.uint8)


def choose_display(run: Run, pixels: Tensor | None = None) -> Display:
    """Pixels in [0, 1] as they are, levels by 0 and 255, all others by the range of the training images.

    Densities are over real numbers, and so are their means: for them, and for pixels beyond [0, 1], black and white
    are where 0.5% of the training pixels lie below and above (of 500 images).

    Args:
        run: the run.
        pixels: (N, *E) in the place of the training images, where there are none.
    """
    if run.binarization != "none":
        return Display()
    if run.evaluated_pixels == "levels":
        return Display(0, 255)
    if pixels is None:
        stored, transform = data.training_images(run.splits, run.pixels)
        generator = torch.Generator().manual_seed(0)
        pixels = transform(stored[data.subset(len(stored), _NUM_IMAGES)], generator)
    density = build_likelihood(run.options, run.splits.event_shape).measure == "density"
    if not density and pixels.min() >= 0 and pixels.max() <= 1:
        return Display()
    low, high = np.quantile(pixels.numpy(), _SHARES).tolist()
    high = high if high > low else low + 1
    return Display(low, high, f"\nblack is {low:.3g} and below, white {high:.3g} and above")


def draw_imputations(display: Display, x: Tensor, truth: Tensor, result: Imputation) -> Figure:
    """Draws the first images with missing pixels: observed pixels, mean, three draws and, if known, the truth.

    Args:
        display: from pixels to gray and color.
        x: (n, C, H, W), NaN where missing: drawn blue.
        truth: (n, C, H, W), NaN where nobody knows.
        result: of ``impute`` for x.
    """
    incomplete = x.isnan().flatten(1).any(1)
    first = (incomplete if incomplete.any() else ~incomplete).nonzero()[:_NUM_SHOWN, 0]
    rows = {"observed": _color_missing(display, x[first]), "mean of\nthe missing": display(result.mean[first])}
    for m in range(min(_DRAWS_SHOWN, len(result.draws))):
        rows[f"draw {m + 1}"] = display(result.draws[m, first])
    if (x.isnan() & ~truth.isnan()).any():
        rows["truth"] = _color_missing(display, truth[first])
    ess = [f"ESS {value:.0f}" for value in result.ess[first].tolist()]
    title = "x_missing ~ p(x_missing | x_observed); missing pixels are blue; ESS: effective particles"
    return image_rows(rows, title=title + display.words, columns=ess)


def _color_missing(display: Display, x: Tensor) -> np.ndarray:
    """Images (n, C, H, W) as colors (n, 3, H, W) in [0, 1], with missing pixels in blue."""
    holes = x.isnan().any(1, keepdim=True).numpy()
    shown = np.broadcast_to(display(x.nan_to_num(0.0)), (len(x), 3, *x.shape[2:]))
    return np.where(holes, np.reshape(_MISSING_COLOR, (1, 3, 1, 1)), shown)
