"""Objectives: (model, guide, x) -> loss, nats an image. What changes only training is here, never in the programs."""

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from ppl_vae.objectives.free_kl import free_bits
from ppl_vae.objectives.importance import dreg, iwae, stl
from ppl_vae.objectives.precision import autocast
from ppl_vae.objectives.tempered import Temper, elbo

__all__ = ["Temper", "TraceMeanField_ELBO", "Trace_ELBO", "autocast", "dreg", "elbo", "free_bits", "iwae", "stl"]
