"""Posteriors q(z | h): features to a distribution over latents.

Each has ``event_shape``, ``num_features`` (what the network's last layer must give) and ``forward(h)``, which returns a
distribution with batch shape ``h.shape[:-1]`` and event shape (L,).
"""

from ppl_vae.parts.posteriors.flow import FlowPosterior, flow_posterior, inverse_autoregressive_flow, spline_flow
from ppl_vae.parts.posteriors.normal import (
    MAX_LOG_SCALE,
    Delta,
    DiagonalNormal,
    FullNormal,
    bounded_log_scale,
    exponential_log_scale,
    softplus_log_scale,
)

__all__ = [
    "MAX_LOG_SCALE",
    "Delta",
    "DiagonalNormal",
    "FlowPosterior",
    "FullNormal",
    "bounded_log_scale",
    "exponential_log_scale",
    "flow_posterior",
    "inverse_autoregressive_flow",
    "softplus_log_scale",
    "spline_flow",
]
