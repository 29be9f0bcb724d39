"""Every diagnostic of one VAE on one set of images, and the types that hold their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar, cast

import pyro
import torch
from torch import Tensor

from ppl_vae.diagnostics.aggregate import (
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
    ActiveUnits,
    ElboSplit,
    PerLatent,
    active_units,
    elbo_split,
    implied_beta,
    latent_kl,
)
from ppl_vae.diagnostics.likelihood import NoiseSpectrum, PixelCalibration, calibrate_pixels
from ppl_vae.diagnostics.pictures import Blur, blur, reconstruction_variation
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.evidence.importance import Importance
from ppl_vae.evidence.moments import (
    compute_moments,
    decode_mean,
    encode,
    get_shared_prior,
    sample_latents,
    sample_posterior,
)
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.global_state import evaluation_mode, seeded
from ppl_vae.runtime.records import Data, arguments_of, further_of, images_of
from ppl_vae.weights import is_deterministic

SomeData = TypeVar("SomeData", bound=Data)

FEWEST_IMAGES = 4  # of a diagnosis

# Most images for measures that would take long on more: the pairs of the ELBO's split grow with their square.
_MOST_PAIRED = 2000
_MOST_PAIRED_BY_A_FLOW = 250  # for a guide whose density at another image's draws takes many passes of a network
_MOST_CALIBRATED = 300
_MOST_WEIGHED = 300


@dataclass(frozen=True)
class TrainedWith:
    """What the verdicts need to know of a training; the words are those of the command line.

    Args:
        beta, likelihood, epochs, objective, num_particles, prior: options of the training.
        data: the kind of data, as ``data.Splits`` says it.
        last_rise: what the last epoch added to the validation ELBO, nats; None if it is not known.
    """

    beta: float
    likelihood: str
    epochs: int | None = None
    objective: str = "elbo"
    num_particles: int | None = None
    prior: str = "standard-normal"
    data: str = ""
    last_rise: float | None = None


@dataclass(frozen=True)
class AggregateNumbers:
    """The aggregate posterior against the prior; ``holes`` is None for an autoencoder."""

    moments: LatentMoments
    kolmogorov_smirnov: KolmogorovSmirnov
    classifier: TwoSample
    holes: Holes | None


@dataclass(frozen=True)
class PictureNumbers:
    """Variation of reconstructions, and the sharpness of those of images. NaN where all images are the same."""

    variation: Estimate
    blur: Blur | None


@dataclass(frozen=True)
class EstimateQuality:
    """How far an importance-weighted estimate L_S, ``log_likelihood``, can be trusted. Nats per image.

    Args:
        rise: what ten times the particles gained.
        unreliable: the share of unreliable images.
        num_images, num_particles: N and S.
    """

    log_likelihood: Estimate
    rise: Estimate
    unreliable: Estimate
    num_images: int
    num_particles: int


@dataclass(frozen=True)
class Measurements:
    """Every diagnostic of a VAE. What needs a density is None for an autoencoder (a deterministic guide).

    Args:
        num_images, num_pixels, latent_dim: N, D and L.
        reconstruction, kl: E_q[log p(x | z)] and the KL, nats per image.
        kl_by_latent: nats; None unless latents have a KL of their own.
        implied_beta: the beta that the weights imply, if they do.
        elbo_split, calibration: on at most 2,000 and 300 images.
    """

    autoencoder: bool
    num_images: int
    num_pixels: int
    trained_with: TrainedWith | None
    latent_dim: int
    active: ActiveUnits
    reconstruction: Estimate
    kl: Estimate | None
    kl_by_latent: PerLatent | None
    implied_beta: Estimate | None
    elbo_split: ElboSplit | None
    aggregate: AggregateNumbers
    pictures: PictureNumbers
    calibration: PixelCalibration | None
    noise: NoiseSpectrum | None
    importance: EstimateQuality | None


def measure(
    vae: LatentModel,
    data: Data,
    *,
    gray: Tensor | None = None,
    noise: NoiseSpectrum | None = None,
    trained_with: TrainedWith | None = None,
    importance: EstimateQuality | None = None,
    num_particles: int = 200,
    seed: int = 0,
) -> Measurements:
    """Every diagnostic of a VAE, each a mean with its standard error over images; the global generators do not change.

    Args:
        data: images (N, *E) as the VAE sees them, or ``Records`` under a prior that is the same for all of them; fewer
            than 4 raise ValueError.
        gray: (N, *E) images that reconstructions are compared with, in the unit of the likelihood's mean: the gray
            images of binarized x. By default x.
        noise: ``likelihood.measure_noise`` of the likelihood and the training images; it depends on no weight.
        trained_with: what is known of the training, for the verdicts.
        importance: the quality of an estimate of log p(x); by default it is measured here on 300 images.
        num_particles: S of that estimate.
        seed: of every draw.
    """
    x, further = images_of(data), further_of(data)
    check_latent_model(vae)
    if len(x) < FEWEST_IMAGES:
        raise ValueError(f"x: expected at least {FEWEST_IMAGES} images, got {len(x)}")
    kl = by_latent = implied = split = calibration = None
    with evaluation_mode(vae), torch.no_grad(), pyro.validation_enabled(False):
        with seeded(seed, x.device):  # the order of the measures decides their draws
            autoencoder = is_deterministic(vae.posterior(*arguments_of(data[:1])))
            codes = encode(vae, data)
            active = active_units(codes, compute_moments(get_shared_prior(vae, data)).scale)
            most_paired = _MOST_PAIRED if codes.num_draws is None else _MOST_PAIRED_BY_A_FLOW
            if autoencoder:
                log_p_x_given_z = Estimate.mean_of(reconstruction(vae, data, seed=0))  # z is a function of x
            else:
                split = elbo_split(vae, _take_evenly(data, most_paired))
                by_latent, implied = latent_kl(vae, data), implied_beta(vae, data)
                log_p_x_given_z, kl = split.reconstruction, split.kl
            aggregate = _measure_aggregate(vae, data, most_paired, autoencoder=autoencoder, seed=seed)
            gray, means = x if gray is None else gray, decode_mean(vae, codes.mean, *further)
            variation = reconstruction_variation(means, gray)
            sharp = blur(vae, data, gray=gray) if x.dim() == 4 else None
            if not autoencoder:
                calibration = calibrate_pixels(vae, _take_evenly(data, _MOST_CALIBRATED))
        if not autoencoder and importance is None:
            some = _take_evenly(data, _MOST_WEIGHED)
            result = evaluate(vae, some, num_particles=num_particles, seed=seed)
            importance = summarize_estimate(result, num_particles)
    return Measurements(
        autoencoder=autoencoder,
        num_images=len(x),
        num_pixels=math.prod(x.shape[1:]),
        trained_with=trained_with,
        latent_dim=codes.mean.shape[1],
        active=active,
        reconstruction=log_p_x_given_z,
        kl=kl,
        kl_by_latent=by_latent,
        implied_beta=implied,
        elbo_split=split,
        aggregate=aggregate,
        pictures=PictureNumbers(variation, sharp),
        calibration=calibration,
        noise=noise,
        importance=None if autoencoder else importance,
    )


def _take_evenly(x: SomeData, most: int) -> SomeData:
    """At most that many of the images, at equal steps."""
    return cast(SomeData, x[:: math.ceil(len(x) / most)])


def _measure_aggregate(
    vae: LatentModel, x: Data, most_paired: int, *, autoencoder: bool, seed: int
) -> AggregateNumbers:
    """The aggregate posterior; for holes every other image is a reference image, and the rest are held out."""
    prior = get_shared_prior(vae, x)
    z, z_prior = sample_posterior(vae, x), sample_latents(prior, len(x))
    reference = _take_evenly(x, 2 * most_paired)[::2]
    held_out = _take_evenly(z, 2 * most_paired)[1::2]
    return AggregateNumbers(
        latent_moments(z, prior),
        kolmogorov_smirnov(z, prior),
        classifier_test(z, z_prior, seed=seed),
        None if autoencoder else holes(vae, reference, held_out, z_prior[: len(held_out)]),
    )


def summarize_estimate(result: Importance, num_particles: int) -> EstimateQuality:
    """How far an importance-weighted estimate with S particles can be trusted."""
    return EstimateQuality(
        log_likelihood=Estimate.mean_of(result.log_evidence),
        rise=Estimate.mean_of(result.tenfold_gain),
        unreliable=Estimate.share_of(result.unreliable()),
        num_images=len(result.tenfold_gain),
        num_particles=num_particles,
    )
