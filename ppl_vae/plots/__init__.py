"""Figures: arrays in, a matplotlib Figure out. Runs no model, saves nothing."""

from ppl_vae.plots.calibration import PixelHistogram, pixel_calibration
from ppl_vae.plots.comparison import PairShown, paired_bounds
from ppl_vae.plots.images import image_grids, image_plane, image_rows
from ppl_vae.plots.latents import latent_line, latent_plane
from ppl_vae.plots.likelihoods import bound_by_particles, likelihood_histogram
from ppl_vae.plots.training import training_curves

__all__ = [
    "PairShown",
    "PixelHistogram",
    "bound_by_particles",
    "image_grids",
    "image_plane",
    "image_rows",
    "latent_line",
    "latent_plane",
    "likelihood_histogram",
    "paired_bounds",
    "pixel_calibration",
    "training_curves",
]
