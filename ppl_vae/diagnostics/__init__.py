"""What a trained VAE did, in numbers with errors: its latents, its aggregate posterior, its noise, its pictures.

Networks should be in evaluation mode. Draws come from torch's global generator, and no number here changes a weight.
Nothing here judges; ``verdicts`` does.
"""

from ppl_vae.diagnostics.aggregate import (
    HOLE_QUANTILE,
    Holes,
    KolmogorovSmirnov,
    LatentMoments,
    TwoSample,
    classifier_test,
    holes,
    kolmogorov_smirnov,
    latent_moments,
)
from ppl_vae.diagnostics.latents import (
    ACTIVE_VARIANCE,
    ActiveUnits,
    ElboSplit,
    LatentKL,
    active_units,
    elbo_split,
    implied_beta,
    latent_kl,
)
from ppl_vae.diagnostics.mixture import AggregatePosterior
from ppl_vae.diagnostics.noise import (
    eigenvalues_in_noise_units,
    gaussian_variance,
    has_location,
    live_directions,
    noise_edge,
    predicted_live,
    threshold,
    variance_of_mean_squared_error,
)
from ppl_vae.diagnostics.pictures import Blur, blur, reconstruction_variation, sharpness
from ppl_vae.diagnostics.values import CannotMeasure, PerLatent, plus_minus
from ppl_vae.evidence.estimate import ratio_of_means

__all__ = [
    "ACTIVE_VARIANCE",
    "HOLE_QUANTILE",
    "ActiveUnits",
    "AggregatePosterior",
    "Blur",
    "CannotMeasure",
    "ElboSplit",
    "Holes",
    "KolmogorovSmirnov",
    "LatentKL",
    "LatentMoments",
    "PerLatent",
    "TwoSample",
    "active_units",
    "blur",
    "classifier_test",
    "eigenvalues_in_noise_units",
    "elbo_split",
    "gaussian_variance",
    "has_location",
    "holes",
    "implied_beta",
    "kolmogorov_smirnov",
    "latent_kl",
    "latent_moments",
    "live_directions",
    "noise_edge",
    "plus_minus",
    "predicted_live",
    "ratio_of_means",
    "reconstruction_variation",
    "sharpness",
    "threshold",
    "variance_of_mean_squared_error",
]
