"""Variational autoencoders as probabilistic programs in Pyro, with likelihoods that can be trusted.

Every name below is imported when it is first used, so that a script's ``--help`` needs no torch.
``ppl_vae.estimator``, which needs scikit-learn, is imported by its own name alone.
"""
# ruff: noqa: F401 (the imports are for type checkers)

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppl_vae.conditional import Conditional
    from ppl_vae.evidence.dequantization import dequantized
    from ppl_vae.evidence.estimate import Estimate
    from ppl_vae.evidence.importance import importance, log_evidence
    from ppl_vae.runs.load import load, save
    from ppl_vae.training import fit
    from ppl_vae.vae import VAE
    from ppl_vae.weights import log_weights

__version__ = "0.2.0"

_HOME = {
    "VAE": "vae",
    "Conditional": "conditional",
    "Estimate": "evidence.estimate",
    "dequantized": "evidence.dequantization",
    "fit": "training",
    "importance": "evidence.importance",
    "load": "runs.load",
    "log_evidence": "evidence.importance",
    "log_weights": "weights",
    "save": "runs.load",
}
_MODULES = {
    "data": "data",
    "likelihoods": "parts.likelihoods",
    "missing": "evidence.missing",
    "networks": "parts.networks",
    "objectives": "objectives",
    "posteriors": "parts.posteriors",
    "priors": "parts.priors",
    "runs": "runs",
}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"ppl_vae.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"ppl_vae.{_MODULES[name]}")
    raise AttributeError(f"module 'ppl_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
