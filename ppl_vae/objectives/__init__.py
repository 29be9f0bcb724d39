"""Objectives are Pyro losses, nats of a batch. They change training; the programs stay bare."""
# ruff: noqa: F401 (the public names of the room)

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from ppl_vae.objectives.importance import IWAE, STL, DReG
from ppl_vae.objectives.tempered import FreeBits, Loss, Temper, autocast, elbo, loss_of_batch, loss_per_image
