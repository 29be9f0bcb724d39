"""Measurements of a trained VAE with errors: its latents, aggregate posterior, noise and pictures; and its verdicts.

Networks should be in evaluation mode. Draws come from torch's global generator, and no measurement changes a weight.
"""

from ppl_vae.diagnostics.aggregate import classifier_test, holes, kolmogorov_smirnov, latent_moments
from ppl_vae.diagnostics.latents import ACTIVE_VARIANCE, active_units, elbo_split, implied_beta, latent_kl
from ppl_vae.diagnostics.likelihood import calibrate_pixels, live_directions, measure_noise
from ppl_vae.diagnostics.pictures import blur, reconstruction_variation, sharpness
from ppl_vae.evidence.moments import AggregatePosterior

__all__ = [
    "ACTIVE_VARIANCE",
    "AggregatePosterior",
    "active_units",
    "blur",
    "calibrate_pixels",
    "classifier_test",
    "elbo_split",
    "holes",
    "implied_beta",
    "kolmogorov_smirnov",
    "latent_kl",
    "latent_moments",
    "live_directions",
    "measure_noise",
    "reconstruction_variation",
    "sharpness",
]
