"""Figures: arrays in, a matplotlib Figure out. Runs no model, saves nothing."""

from ppl_vae.plots.calibration import PixelHistogram, pixel_calibration
from ppl_vae.plots.comparison import PairShown, paired_bounds
from ppl_vae.plots.diagnosis import (
    Bar,
    aggregate_against_prior,
    latents_used,
    noise_spectrum,
    sharpness_strip,
    split_bars,
)
from ppl_vae.plots.images import image_grids, image_plane, image_rows
from ppl_vae.plots.latents import Scales, latent_line, latent_plane
from ppl_vae.plots.likelihoods import bound_by_particles, likelihood_histogram
from ppl_vae.plots.training import training_curves

__all__ = [
    "Bar",
    "PairShown",
    "PixelHistogram",
    "Scales",
    "aggregate_against_prior",
    "bound_by_particles",
    "image_grids",
    "image_plane",
    "image_rows",
    "latent_line",
    "latent_plane",
    "latents_used",
    "likelihood_histogram",
    "noise_spectrum",
    "paired_bounds",
    "pixel_calibration",
    "sharpness_strip",
    "split_bars",
    "training_curves",
]
