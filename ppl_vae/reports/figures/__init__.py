"""Figures: arrays in, a matplotlib Figure out. Runs no model, saves nothing."""

from ppl_vae.reports.figures.certificate import (
    EffortCurve,
    RankHistogram,
    against,
    agreement,
    calibration_ranks,
    convergence,
    gap_bars,
    pictured,
    sandwich,
)
from ppl_vae.reports.figures.diagnosis import (
    Bar,
    aggregate_against_prior,
    latents_used,
    noise_spectrum,
    sharpness_strip,
    split_bars,
)
from ppl_vae.reports.figures.images import image_grids, image_plane, image_rows
from ppl_vae.reports.figures.latents import Scales, latent_line, latent_plane
from ppl_vae.reports.figures.likelihoods import (
    PairShown,
    PixelHistogram,
    bound_by_particles,
    likelihood_histogram,
    paired_bounds,
    pixel_calibration,
)
from ppl_vae.reports.figures.training import training_curves

__all__ = [
    "Bar",
    "EffortCurve",
    "PairShown",
    "PixelHistogram",
    "RankHistogram",
    "Scales",
    "against",
    "aggregate_against_prior",
    "agreement",
    "bound_by_particles",
    "calibration_ranks",
    "convergence",
    "gap_bars",
    "image_grids",
    "image_plane",
    "image_rows",
    "latent_line",
    "latent_plane",
    "latents_used",
    "likelihood_histogram",
    "noise_spectrum",
    "paired_bounds",
    "pictured",
    "pixel_calibration",
    "sandwich",
    "sharpness_strip",
    "split_bars",
    "training_curves",
]
