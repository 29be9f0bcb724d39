"""Objectives: (model, guide, x, *, beta) -> loss, nats per image. They change training; the programs stay bare."""

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from ppl_vae.objectives.free_kl import free_bits
from ppl_vae.objectives.importance import dreg, iwae, stl
from ppl_vae.objectives.tempered import Temper, autocast, elbo

__all__ = ["Temper", "TraceMeanField_ELBO", "Trace_ELBO", "autocast", "dreg", "elbo", "free_bits", "iwae", "stl"]
