"""The public functions that take a VAE, each as a call: what one test then holds against all of them."""

from __future__ import annotations

import per_image
import torch
from fitting import fit as fit_vae

from ppl_vae import diagnostics
from ppl_vae.commands import latents as sampling
from ppl_vae.evidence import ais, chains, evaluation, guide_calibration, missing, moments
from ppl_vae.evidence import importance as evidence
from ppl_vae.evidence.refinement import measure_gaps, refine_proposal
from ppl_vae.weights import is_autoencoder, log_reconstruction, log_weight_terms, log_weights


def _annealing(x):
    betas = ais.temperatures(3)
    return ais.Annealing(betas, torch.full((2, len(x)), 0.1), 2, "guide")


def _upper(vae, x):
    z = torch.zeros(len(x), *vae.prior().event_shape, dtype=torch.double)
    return ais.upper(vae, x, z, _annealing(x), num_chains=2).log_w


# Functions of images that give numbers about log p(x) or log p(x | z): (vae, x) -> anything.
SCORES = {
    "ais.lower": lambda vae, x: ais.lower(vae, x, _annealing(x), num_chains=2).log_w,
    "ais.pilot": lambda vae, x: ais.pilot(vae, x, betas=ais.temperatures(3), num_leapfrogs=2, num_chains=2).step_sizes,
    "ais.upper": _upper,
    "diagnostics.calibrate_pixels": lambda vae, x: diagnostics.calibrate_pixels(vae, x, num_draws=9),
    "diagnostics.elbo_split": lambda vae, x: diagnostics.elbo_split(vae, x),
    "diagnostics.implied_beta": lambda vae, x: diagnostics.implied_beta(vae, x),
    "evaluation.evaluate": lambda vae, x: evaluation.evaluate(vae, x, num_particles=10, seed=0).log_evidence,
    "evidence.importance": lambda vae, x: evidence.importance(vae.model, vae.guide, x, num_particles=10).elbo,
    "evidence.log_evidence": lambda vae, x: evidence.log_evidence(vae.model, vae.guide, x, num_particles=10),
    "evaluation.reconstruction": lambda vae, x: evaluation.reconstruction(vae, x, seed=0),
    "evidence.gather_log_weights": lambda vae, x: evidence.gather_log_weights(vae, x, 10),
    "refinement.measure_gaps": lambda vae, x: measure_gaps(
        vae, x, torch.zeros(len(x)), steps=1, evaluation_particles=10
    ),
    "missing.impute": lambda vae, x: missing.impute(missing.Observed(vae), x, num_particles=4, num_draws=1).mean,
    "refinement.refine_proposal": lambda vae, x: refine_proposal(vae, x, steps=1).h,
    "weights.log_weights": lambda vae, x: log_weights(vae.model, vae.guide, x, 3),
}

# The others: they draw, decode or encode, or are losses, whose images ``fit`` checks.
OTHERS = {
    "ais.images_per_block": lambda vae, x: ais.images_per_block(vae, x, 2),
    "ais.simulate": lambda vae, x: ais.simulate(vae, 3),
    "chains.resolve_start": lambda vae, x: chains.resolve_start(vae, "guide"),
    "diagnostics.holes": lambda vae, x: diagnostics.holes(vae, x, torch.zeros(9, 2).to(x), torch.zeros(9, 2).to(x)),
    "diagnostics.latent_kl": lambda vae, x: diagnostics.latent_kl(vae, x),
    "moments.decode_mean": lambda vae, x: moments.decode_mean(vae, torch.zeros(3, 2).to(x)),
    "moments.get_shared_prior": lambda vae, x: moments.get_shared_prior(vae, x),
    "moments.sample_prior": lambda vae, x: moments.sample_prior(vae, 3),
    "moments.sample_posterior": lambda vae, x: moments.sample_posterior(vae, x),
    "moments.encode": lambda vae, x: moments.encode(vae, x),
    "fit": lambda vae, x: fit_vae(vae, x, epochs=1, batch_size=2),
    "guide_calibration.compute_ranks": lambda vae, x: guide_calibration.compute_ranks(
        vae, num_simulations=3, num_draws=2
    ),
    "objectives.dreg": lambda vae, x: per_image.dreg(vae.model, vae.guide, x, num_particles=2),
    "objectives.elbo": lambda vae, x: per_image.elbo(vae.model, vae.guide, x),
    "objectives.free_bits": lambda vae, x: per_image.free_bits(vae.model, vae.guide, x, free_nats=0.1),
    "objectives.iwae": lambda vae, x: per_image.iwae(vae.model, vae.guide, x, num_particles=2),
    "objectives.stl": lambda vae, x: per_image.stl(vae.model, vae.guide, x),
    "experiment.sampling.sample": lambda vae, x: sampling.sample(vae, 3),
    "weights.is_autoencoder": lambda vae, x: is_autoencoder(vae.guide, x),
    "weights.log_reconstruction": lambda vae, x: log_reconstruction(vae.model, vae.guide, x),
    "weights.log_weight_terms": lambda vae, x: log_weight_terms(vae.model, vae.guide, x, 3),
}
