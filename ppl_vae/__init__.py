"""Variational autoencoders as probabilistic programs in Pyro, with likelihoods that can be trusted.

Every name below is imported when it is first used, so that a script's ``--help`` needs no torch.
``ppl_vae.estimator``, which needs scikit-learn, is imported by its own name alone.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae.conditional import Conditional
    from ppl_vae.evidence.dequantization import dequantized
    from ppl_vae.evidence.estimate import Estimate
    from ppl_vae.evidence.importance import importance, log_evidence
    from ppl_vae.latent_model import vectorize_latents
    from ppl_vae.pyro_program import PyroProgram
    from ppl_vae.runs.load import load, save
    from ppl_vae.runtime.records import Records
    from ppl_vae.training import fit
    from ppl_vae.vae import VAE
    from ppl_vae.weights import log_weights

__version__ = "0.2.0"

# Torch then asks Linux for huge pages for tensors of 2 MB and more. It reads this once, at the first tensor on the CPU,
# so it has no effect after "import pyro", which makes one.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_NAMES = {
    "conditional": "Conditional",
    "evidence.dequantization": "dequantized",
    "evidence.estimate": "Estimate",
    "evidence.importance": "importance log_evidence",
    "latent_model": "vectorize_latents",
    "pyro_program": "PyroProgram",
    "runs.load": "load save",
    "runtime.records": "Records",
    "training": "fit",
    "vae": "VAE",
    "weights": "log_weights",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
_PARTS = ("parts.likelihoods", "parts.networks", "parts.posteriors", "parts.priors")
_MODULES = {place.rpartition(".")[2]: place for place in ("data", "evidence.missing", "objectives", "runs", *_PARTS)}

__all__ = [
    "VAE",
    "Conditional",
    "Estimate",
    "PyroProgram",
    "Records",
    "data",
    "dequantized",
    "fit",
    "importance",
    "likelihoods",
    "load",
    "log_evidence",
    "log_weights",
    "missing",
    "networks",
    "objectives",
    "posteriors",
    "priors",
    "runs",
    "save",
    "vectorize_latents",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"ppl_vae.{_MODULES[name]}")
    raise AttributeError(f"module 'ppl_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
