"""Objectives are Pyro losses, nats of a batch. They change training; the programs stay bare."""

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from ppl_vae.objectives.importance import IWAE, STL, DReG, EnumeratedELBO
from ppl_vae.objectives.semi_supervised import SemiSupervisedELBO
from ppl_vae.objectives.tempered import FreeBits, Loss, Temper, autocast, elbo, loss_of_batch, loss_per_image

__all__ = [
    "IWAE",
    "STL",
    "DReG",
    "EnumeratedELBO",
    "FreeBits",
    "Loss",
    "SemiSupervisedELBO",
    "Temper",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "autocast",
    "elbo",
    "loss_of_batch",
    "loss_per_image",
]
