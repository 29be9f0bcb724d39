"""Which parts are tested with which others, and images that any likelihood can have drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl_vae import data
from ppl_vae.parts.registry import LIKELIHOODS, NETWORKS

# Every likelihood with one network, and every network with one mass and one density: not all with all.
LIKELIHOODS_AND_NETWORKS = list(
    dict.fromkeys(
        [(likelihood, "gated") for likelihood in LIKELIHOODS]
        + [(likelihood, network) for network in NETWORKS for likelihood in ("bernoulli", "normal")]
        + [("discretized-logistic-mixture", "conv")]
    )
)


def by_default(likelihood: str, network: str) -> bool:
    """Whether the default tests capture the pair: each likelihood once, and each network under a Bernoulli."""
    return network == "gated" or likelihood == "bernoulli"


def images_for(family: Any, num_images: int, *, dtype: torch.dtype = torch.double) -> Tensor:
    """(N, *E) of what the likelihood asks for: zeros and ones, levels, numbers inside (0, 1), or counts."""
    generator = torch.Generator().manual_seed(1)
    u = torch.rand((num_images, *family.event_shape), generator=generator, dtype=torch.double)
    made = {data.LEVELS: (256 * u).floor(), data.UNIT_INTERVAL: 0.05 + 0.9 * u, data.COUNTS: (20 * u * u).floor()}.get(
        family.data_kind, (u < 0.3).double()
    )
    return made.to(dtype)
