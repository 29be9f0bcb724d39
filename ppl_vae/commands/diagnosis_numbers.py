"""Every diagnostic of one VAE on one set of images, as one JSON object."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from ppl_vae import diagnostics
from ppl_vae.diagnostics import CannotMeasure, PerLatent
from ppl_vae.diagnostics.pixel_calibration import calibration
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import Importance, evaluate, reconstruction
from ppl_vae.evidence.moments import (
    PosteriorMoments,
    compute_moments,
    decode_mean,
    encode,
    sample_latents,
    sample_posterior,
)
from ppl_vae.runtime.global_state import seeded
from ppl_vae.vae import VAE
from ppl_vae.weights import is_deterministic

# What a number needs more images for costs more than it tells: the pairs of the ELBO's split grow with the square.
_MOST_PAIRED = 2000
_MOST_PAIRED_BY_A_FLOW = 250  # of a guide whose density at another image's draws takes many passes of a network
_MOST_CALIBRATED = 300
_MOST_WEIGHED = 300
_SHOWN = 12  # latents of prior draws that are kept for a picture

Result = TypeVar("Result")


def measure_if_possible(left_out: dict[str, str], name: str, function: Callable[[], Result]) -> Result | None:
    """What the function measures; None where the images do not allow it, with the reason in ``left_out``."""
    try:
        return function()
    except CannotMeasure as error:
        left_out[name] = str(error)
        return None


def measure(
    vae: VAE,
    x: Tensor,
    *,
    gray: Tensor | None = None,
    noise: dict[str, Any] | None = None,
    trained_with: Mapping[str, Any] | None = None,
    importance: dict[str, Any] | None = None,
    num_particles: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Every diagnostic of a VAE, each a mean with its standard error over images.

    An autoencoder (a deterministic guide) has neither KL, ELBO nor log-likelihood: what needs a density is None. So is
    a measure that these images do not allow, such as the sharpness of blank ones; "left_out" has its reason by name.
    Weights, mode and the global generators are afterwards as they were.

    Args:
        vae: in evaluation mode.
        x: images (N, *E) as the VAE sees them, at least 4.
        gray: (N, *E) what reconstructions are compared with, in the unit of the likelihood's mean: the gray images
            where x was binarized. By default x.
        noise: what ``noise_numbers`` says of the likelihood and the training images; it depends on no weight.
        trained_with: what is known of the training, for the verdicts: its "beta", "likelihood", "epochs",
            "warmup_epochs", "objective", "num_particles", "prior", "posterior", and "data" (the kind of data, as
            ``data.Splits`` says it).
        importance: what ``importance_numbers`` says, where it is known; by default it is measured here on 300 images.
        num_particles: S of that.
        seed: of every draw.

    Returns:
        Numbers, lists, None and dicts: ``verdicts`` takes it, and JSON holds it.

    Raises:
        ValueError: fewer than 4 images, or images that do not fit the VAE.
    """
    if len(x) < 4:
        raise ValueError(f"x: expected at least 4 images, got {len(x)}")
    left_out: dict[str, str] = {}
    with torch.no_grad(), pyro.validation_enabled(False):
        with seeded(seed, x.device):
            autoencoder = is_deterministic(vae.posterior(x[:1]))
            codes = encode(vae, x)
            found = _latent_numbers(vae, x, codes, autoencoder) | {
                "aggregate": _aggregate_numbers(vae, x, codes, autoencoder, seed),
                "pictures": _picture_numbers(vae, x, codes, x if gray is None else gray, left_out),
                "calibration": None if autoencoder else _calibration_numbers(vae, x),
            }
        if not autoencoder and importance is None:
            some = _some(x, _MOST_WEIGHED)
            importance = importance_numbers(evaluate(vae, some, num_particles=num_particles, seed=seed), num_particles)
    return {
        "autoencoder": autoencoder,
        "num_images": len(x),
        "num_pixels": math.prod(x.shape[1:]),
        "trained_with": None if trained_with is None else dict(trained_with),
        **found,
        "noise": noise,
        "importance": None if autoencoder else importance,
        "left_out": left_out,
    }


def _some(x: Tensor, most: int) -> Tensor:
    """At most that many of the images, at equal steps."""
    return x[:: math.ceil(len(x) / most)]


# --- What the latents carry ---


def _latent_numbers(vae: VAE, x: Tensor, codes: PosteriorMoments, autoencoder: bool) -> dict[str, Any]:
    active = diagnostics.active_units(codes, compute_moments(vae.prior()).scale)
    found: dict[str, Any] = {
        "latent_dim": codes.mean.shape[1],
        "active": {"count": active.count} | _per_latent(active.variance, active.stderr),
    }
    if autoencoder:
        log_p_x_given_z = Estimate.from_values(reconstruction(vae, x, seed=0))  # z is no draw, whatever the seed
        of_density = dict.fromkeys(("kl", "kl_by_latent", "implied_beta", "elbo_split"))
        return found | {"reconstruction": log_p_x_given_z.to_json()} | of_density
    some = _some(x, _most_paired(codes))
    split = diagnostics.elbo_split(vae, some)
    by_latent = diagnostics.latent_kl(vae, x)
    implied = diagnostics.implied_beta(vae, x)
    sum_of_kl = split.sum_of_dimension_kl
    return found | {
        "reconstruction": split.reconstruction.to_json(),
        "kl": split.kl.to_json(),
        "kl_by_latent": None if by_latent is None else _per_latent(by_latent.mean, by_latent.stderr),
        "implied_beta": None if implied is None else implied.to_json(),
        "elbo_split": {
            "mutual_information": split.mutual_information.to_json(),
            "marginal_kl": split.marginal_kl.to_json(),
            "total_correlation": None if split.total_correlation is None else split.total_correlation.to_json(),
            "sum_of_dimension_kl": None if sum_of_kl is None else sum_of_kl.to_json(),
            "num_images": split.num_images,
            "cap": split.cap,
            "saturated": split.saturated,
        },
    }


def _most_paired(codes: PosteriorMoments) -> int:
    return _MOST_PAIRED if codes.num_draws is None else _MOST_PAIRED_BY_A_FLOW


def _per_latent(mean: Tensor, stderr: Tensor) -> dict[str, list[float]]:
    return PerLatent(mean.double().cpu(), stderr.double().cpu()).to_json()


# --- The aggregate posterior against the prior ---


def _aggregate_numbers(vae: VAE, x: Tensor, codes: PosteriorMoments, autoencoder: bool, seed: int) -> dict[str, Any]:
    """Every other image makes the aggregate posterior that holes are holes of; the rest say how well it covers."""
    prior = vae.prior()
    z, z_prior = sample_posterior(vae, x), sample_latents(prior, len(x))
    paired, z_paired = (_some(values, 2 * _most_paired(codes)) for values in (x, z))
    reference, held_out = paired[::2], z_paired[1::2]
    moments = diagnostics.latent_moments(z, prior)
    distance = diagnostics.kolmogorov_smirnov(z, prior)
    classified = diagnostics.classifier_test(z, z_prior, seed=seed)
    effect = {"mean": classified.effect, "stderr": 2 * classified.accuracy.stderr}
    return {
        "moments": {
            "mean": _per_latent(moments.mean, moments.mean_stderr),
            "log_scale": _per_latent(moments.log_scale, moments.log_scale_stderr),
        },
        "kolmogorov_smirnov": {"statistic": distance.statistic.tolist(), "p_value": distance.p_value.tolist()},
        "classifier": {"effect": effect, "p_value": classified.p_value, "num_held_out": classified.num_held_out},
        "holes": None if autoencoder else _hole_numbers(vae, reference, held_out, z_prior[: len(held_out)]),
    }


def _hole_numbers(vae: VAE, reference: Tensor, z_held_out: Tensor, z_prior: Tensor) -> dict[str, Any]:
    found = diagnostics.holes(vae, reference, z_held_out, z_prior)
    middle = len(found.worst) // 2
    ordinary = found.worst[max(0, middle - _SHOWN // 2) :][:_SHOWN]
    return {
        "share": found.share.to_json(),
        "expected": diagnostics.HOLE_QUANTILE,
        "threshold": found.threshold,
        "bandwidth": found.bandwidth,
        "num_reference": len(reference),
        "num_prior": len(z_prior),
        "median_score": {
            "prior": float(found.prior_scores.median()),
            "held_out": float(found.held_out_scores.median()),
        },
        "worst": _latents(z_prior, found.worst[:_SHOWN]),
        "ordinary": _latents(z_prior, ordinary),
    }


def _latents(z: Tensor, index: Tensor) -> list[list[float]]:
    return z[index.to(z.device)].double().cpu().tolist()


# --- Pictures, pixels, and the estimate ---


def _picture_numbers(
    vae: VAE, x: Tensor, codes: PosteriorMoments, gray: Tensor, left_out: dict[str, str]
) -> dict[str, Any]:
    reconstructions = decode_mean(vae, codes.mean)
    variation = measure_if_possible(
        left_out, "variation", lambda: diagnostics.reconstruction_variation(reconstructions, gray)
    )
    found: dict[str, Any] = {"variation": None if variation is None else variation.to_json()}
    parts = None
    if x.dim() == 4:
        parts = measure_if_possible(left_out, "blur", lambda: diagnostics.blur(vae, x, gray=gray))
    if parts is None:
        return found | {"blur": None}
    names = ("at_mean", "at_draw", "averaged", "error", "posterior_noise", "bias")
    return found | {"blur": {name: getattr(parts, name).to_json() for name in names}}


def _calibration_numbers(vae: VAE, x: Tensor) -> dict[str, Any]:
    return calibration(vae, _some(x, _MOST_CALIBRATED)).to_json()


def importance_numbers(result: Importance, num_particles: int) -> dict[str, Any]:
    """What an importance-weighted estimate says of itself."""
    known = result.pareto_k[~result.pareto_k.isnan()]
    return {
        "log_likelihood": Estimate.from_values(result.log_evidence).to_json(),
        "elbo": Estimate.from_values(result.elbo).to_json(),
        "rise": Estimate.from_values(result.tenfold_gain).to_json(),
        "unreliable": Estimate.from_flags(result.unreliable()).to_json(),
        "pareto_k": float(known.median()) if len(known) else None,
        "num_images": len(result.tenfold_gain),
        "num_particles": num_particles,
    }


# --- The noise ---


def noise_numbers(family: Any, train: Tensor) -> dict[str, Any] | None:
    """The data's covariance in units of the likelihood's noise, at the state where the decoder ignores z.

    Args:
        family: the likelihood. It is copied, and stays as it is.
        train: training images (N, *E) as the model sees them.

    Returns:
        JSON-able, or None where the likelihood's first feature is no location. "edge" is what independent pixels reach
        by chance, and "live_by_sum" and "live_by_mean" count above it.

    Raises:
        CannotMeasure: no training pixel varies.
    """
    if not diagnostics.has_location(family):
        return None
    fitted = copy.deepcopy(family)
    with torch.no_grad(), seeded(0, train.device):
        fitted.fit_marginals(train)
        eigenvalues = diagnostics.eigenvalues_in_noise_units(fitted, train)
        edge = diagnostics.noise_edge(fitted, train)
        variance = diagnostics.gaussian_variance(fitted, train)
    D = math.prod(train.shape[1:])
    return {
        "eigenvalues": eigenvalues.tolist(),
        "edge": edge,
        "num_images": len(train),
        "gaussian_variance": variance,
        "live_by_sum": diagnostics.live_directions(eigenvalues, edge=edge),
        "live_by_mean": diagnostics.live_directions(eigenvalues, reduction="mean", num_pixels=D, edge=edge),
    }
