"""On levels that were drawn from a likelihood, that one wins: masses and densities ranked on the common scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppl_vae import data
from ppl_vae.evidence.dequantization import mass_of_levels
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.options import Options

D = 16
SOURCES = ("binomial", "discretized-logistic", "beta", "laplace", "normal-per-pixel", "negative-binomial")


def family(word: str):
    return build_likelihood(Options(likelihood=word), (D,))


def truth(word: str) -> Tensor:
    """Features of D different pixels, most of them within the levels."""
    where, width = torch.linspace(-1, 1, D), torch.linspace(0, 1, D).flip(0).roll(5)
    return {
        "binomial": 2 * where,
        "discretized-logistic": torch.cat([0.7 * where, width - 0.5]),
        "beta": torch.cat([2 * where, 3 * width - 3]),
        "laplace": 0.5 + 0.3 * where,
        "normal-per-pixel": torch.cat([0.5 + 0.3 * where, width - 4]),
        "negative-binomial": torch.cat([3.4 + 0.4 * where, 1.5 * width]),
    }[word]


def log_mass(kind, h: Tensor, x: Tensor) -> Tensor:
    """(N,) nats of levels x, a density's by 16 draws a pixel."""
    p_x = kind(h)
    return (p_x if kind.measure == "mass" else mass_of_levels(p_x, 16)).log_prob(x)


@torch.no_grad()
def drawn(word: str, num_images: int) -> Tensor:
    """(N, D) levels."""
    kind = family(word)
    if word == "laplace":
        kind.log_scale.fill_(math.log(0.05))
    p_x = kind(truth(word))
    p_x = mass_of_levels(p_x, 1) if kind.measure == "density" else p_x
    return p_x.sample((num_images,)).clamp(0, 255)


def fitted(word: str, x: Tensor) -> tuple[object, Tensor]:
    """The likelihood and the features of the largest likelihood of training levels, by Adam from the marginals."""
    kind = family(word)
    seen = x if kind.measure == "mass" else data.dequantize_uniformly(x)
    h = torch.nn.Parameter(kind.fit_marginals(seen))
    optimizer = torch.optim.Adam([h, *kind.parameters()], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        batch = x[step % 8 :: 8]
        seen = batch if kind.measure == "mass" else data.dequantize_uniformly(batch)
        optimizer.zero_grad()
        (-kind(h).log_prob(seen).mean()).backward()
        optimizer.step()
        schedule.step()
    return kind, h.detach()


@pytest.mark.thorough
@pytest.mark.parametrize("source", SOURCES)
def test_the_right_assumption_wins_on_the_common_scale(source):
    """By more than three standard errors of the paired difference, on images that nothing was fitted to."""
    torch.manual_seed(0)
    train, test = drawn(source, 8000), drawn(source, 4000)
    with torch.no_grad():
        nats = {}
        for word in SOURCES:
            with torch.enable_grad():
                kind, h = fitted(word, train)
            nats[word] = log_mass(kind, h, test).double()
    for word in SOURCES:
        if word != source:
            lead = nats[source] - nats[word]
            assert lead.mean() > 3 * lead.std() / math.sqrt(len(lead)), word
