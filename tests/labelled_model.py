"""A conditional model of one linear-Gaussian per class, whose guide is the exact posterior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from oracles import LinearGaussian
from torch import Tensor, nn

from ppl_vae.labels import ConditionalVAE
from ppl_vae.parts.labelled import ClassNormals

K, D, L = 3, 6, 2
CLASSES = [LinearGaussian.random(D=D, L=L, seed=k) for k in range(K)]
PROBS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.double)


class OfClass(nn.Module):
    """One part of the VAE of each class, chosen by the label of each image."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.vaes = [one.vae() for one in CLASSES]

    def forward(self, c: Tensor, y: Tensor) -> dist.Independent:
        """c: (..., C), y: of a shape that broadcasts with (...), also further to the left."""
        normals = [getattr(one, self.part)(c).base_dist for one in self.vaes]
        loc = torch.stack([n.loc for n in normals], dim=-2)
        scale = torch.stack([n.scale.expand(n.loc.shape) for n in normals], dim=-2)
        batch = torch.broadcast_shapes(y.shape, loc.shape[:-2])
        index = y.expand(batch)[..., None, None].expand(*batch, 1, loc.shape[-1])
        picked = (t.expand(*batch, *t.shape[-2:]).gather(-2, index).squeeze(-2) for t in (loc, scale))
        return dist.Normal(*picked).to_event(1)


def exact_vae() -> ConditionalVAE:
    """The model whose log-weights are log p(x | y)."""
    return ConditionalVAE(ClassNormals(K, L).double(), OfClass("likelihood"), OfClass("posterior"), PROBS)


def labelled_images(N: int = 12) -> tuple[Tensor, Tensor]:
    """(N, D) draws of the classes in turn, and their labels."""
    y = torch.arange(N) % K
    return torch.stack([CLASSES[k].draw(1, seed=i)[0] for i, k in enumerate(y)]), y


def log_p_x_given_y(x: Tensor) -> Tensor:
    """(N, K) in closed form."""
    return torch.stack([one.log_evidence(x) for one in CLASSES], dim=1)
