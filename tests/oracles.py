"""Exact answers: models whose log p(x) is known in closed form or by quadrature, from the public parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints

from ppl_vae import VAE, Conditional
from ppl_vae.parts.likelihoods import Bernoulli
from ppl_vae.parts.networks import MLP
from ppl_vae.parts.posteriors import MAX_LOG_SCALE, DiagonalNormal
from ppl_vae.parts.priors import StandardNormal


class NormalFixed(nn.Module):
    """p(x | h) = prod_d Normal(x_d; h_d, scale), the scale a parameter if asked for: a user's own likelihood."""

    support = constraints.real
    measure = "density"

    def __init__(self, event_shape: tuple[int, ...], scale: float, *, learned: bool = False) -> None:
        super().__init__()
        self.event_shape = event_shape
        self.num_features = math.prod(event_shape)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.double), requires_grad=learned)

    def forward(self, h: Tensor) -> dist.Independent:
        loc = h.reshape(*h.shape[:-1], *self.event_shape)
        return dist.Normal(loc, self.log_scale.exp()).to_event(len(self.event_shape))


@dataclass(frozen=True)
class LinearGaussian:
    """x = W z + b + scale e: log p(x) = log N(x; b, W W' + scale^2 I), and p(z | x) is a known normal."""

    W: Tensor
    b: Tensor
    scale: float

    @classmethod
    def random(
        cls, *, D: int = 6, L: int = 3, scale: float = 0.7, orthogonal: bool = True, seed: int = 0
    ) -> LinearGaussian:
        """With orthogonal columns of W the posterior is diagonal, and a diagonal guide can be exact."""
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(D, L, generator=generator, dtype=torch.double)
        if orthogonal:
            W = torch.linalg.qr(W).Q * torch.linspace(0.8, 1.6, L, dtype=torch.double)
        return cls(W, torch.randn(D, generator=generator, dtype=torch.double), scale)

    def draw(self, num_images: int, *, seed: int = 1) -> Tensor:
        """(N, D) images from the model."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_images, self.W.shape[1], generator=generator, dtype=torch.double)
        noise = torch.randn(num_images, self.W.shape[0], generator=generator, dtype=torch.double)
        return z @ self.W.T + self.b + self.scale * noise

    def log_evidence(self, x: Tensor) -> Tensor:
        """(N,) nats."""
        covariance = self.W @ self.W.T + self.scale**2 * torch.eye(len(self.b), dtype=torch.double)
        return MultivariateNormal(self.b, covariance).log_prob(x)

    def posterior_map(self) -> tuple[Tensor, Tensor]:
        """A and C of p(z | x) = N(A (x - b), C)."""
        precision = torch.eye(self.W.shape[1], dtype=torch.double) + self.W.T @ self.W / self.scale**2
        covariance = torch.linalg.inv(precision)
        return covariance @ self.W.T / self.scale**2, covariance

    def guide_scale(self) -> Tensor:
        """(L,) the scales of the guide at widen = 1: those of the exact conditionals' marginals."""
        return self.posterior_map()[1].diagonal().sqrt()

    def vae(self, *, widen: float = 1.0, shift: float = 0.0) -> VAE:
        """The model with the guide N(posterior mean + shift s_l, (widen s_l)^2), s_l the posterior's own scales."""
        D, L = self.W.shape
        A, _ = self.posterior_map()
        decoder = MLP(L, D, hidden=()).double()
        encoder = MLP(D, 2 * L, hidden=()).double()
        log_scale = (widen * self.guide_scale()).log()
        with torch.no_grad():
            decoder.output.weight.copy_(self.W)
            decoder.output.bias.copy_(self.b)
            encoder.output.weight.copy_(torch.cat([A, torch.zeros_like(A)]))
            loc = -A @ self.b + shift * self.guide_scale()
            encoder.output.bias.copy_(torch.cat([loc, MAX_LOG_SCALE * (log_scale / MAX_LOG_SCALE).atanh()]))
        return VAE(
            StandardNormal(L).double(),
            Conditional(decoder, NormalFixed((D,), self.scale).double()),
            Conditional(encoder, DiagonalNormal(L)),
        )

    def reconstruction(self, x: Tensor, *, widen: float = 1.0, shift: float = 0.0) -> Tensor:
        """(N,) E_q[log p(x | z)] under that guide."""
        A, _ = self.posterior_map()
        scales = self.guide_scale()
        residual = x - self.b - ((x - self.b) @ A.T + shift * scales) @ self.W.T
        spread = (self.W.square() @ (widen * scales).square()).sum()
        D = len(self.b)
        return -(residual.square().sum(-1) + spread) / (2 * self.scale**2) - D / 2 * math.log(
            2 * math.pi * self.scale**2
        )

    def kl(self, x: Tensor, *, widen: float = 1.0, shift: float = 0.0) -> Tensor:
        """(N,) KL(q(z | x) || p(z)) under that guide."""
        A, _ = self.posterior_map()
        scales = self.guide_scale()
        loc = (x - self.b) @ A.T + shift * scales
        variance = (widen * scales).square()
        return (loc.square() + variance - 1 - variance.log()).sum(-1) / 2


def bernoulli_vae(*, latent_dim: int, D: int = 12, seed: int = 0) -> VAE:
    """A small Bernoulli VAE in float64 whose guide is wider than its posterior, with 1 or 2 latents for quadrature."""
    torch.manual_seed(seed)
    decoder = MLP(latent_dim, D, hidden=(8,), activation=nn.Tanh)
    encoder = MLP(D, 2 * latent_dim, hidden=())
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2.5)
        encoder.output.weight.mul_(0.2)
        encoder.output.bias.zero_()
    vae = VAE(
        StandardNormal(latent_dim),
        Conditional(decoder, Bernoulli((D,))),
        Conditional(encoder, DiagonalNormal(latent_dim)),
    )
    return vae.double()


def quadrature_log_evidence(vae: VAE, x: Tensor, *, latent_dim: int, points: int = 200) -> Tensor:
    """(N,) log int N(z; 0, I) prod_d Bernoulli(x_d; sigmoid(h_d(z))) dz by the trapezoidal rule on [-9, 9]^L.

    The Bernoulli mass is written out here, so that only the decoder's network is shared with what is tested.
    """
    nodes = torch.linspace(-9, 9, points, dtype=torch.double)
    grid = torch.cartesian_prod(*[nodes] * latent_dim).reshape(-1, latent_dim)
    log_cell = latent_dim * math.log(18 / (points - 1))
    log_weight = log_cell - grid.square().sum(-1) / 2 - latent_dim / 2 * math.log(2 * math.pi)
    with torch.no_grad():
        rate = vae.likelihood.net(grid).sigmoid()
    log_p = x @ rate.log().T + (1 - x) @ (1 - rate).log().T
    return (log_p + log_weight).logsumexp(-1)


# --- Densities over one or two latents ---


def quadrature_grid(p: dist.TorchDistribution, *, points: int) -> tuple[Tensor, Tensor]:
    """Points z (points^L, L) that reach half as far again as many draws, and the volume that each stands for."""
    torch.manual_seed(3)
    draws = p.sample((20_000,))
    middle, radius = draws.mean(0), 1.5 * (draws - draws.mean(0)).abs().amax(0)
    nodes = [torch.linspace(-1, 1, points, dtype=torch.double)] * len(middle)
    return middle + radius * torch.cartesian_prod(*nodes).reshape(-1, len(middle)), (2 * radius / (points - 1)).prod()


def draws_have_the_moments_of_the_density(p: dist.TorchDistribution, *, points: int) -> bool:
    """Whether six expectations of 50,000 draws of z (L,), L 1 or 2, are those by quadrature, in standard errors."""

    def functions(z: Tensor) -> Tensor:
        a, b = z[..., 0], z[..., -1]
        return torch.stack([a, b, a * b, a.square(), (2 * b).cos(), (a - 2 * b).sin().abs()], dim=-1)

    z, cell = quadrature_grid(p, points=points)
    exact = (p.log_prob(z).exp()[:, None] * functions(z)).sum(0) * cell
    torch.manual_seed(0)
    found = functions(p.sample((50_000,)))
    stderr = found.std(0) / math.sqrt(len(found))
    return bool(((found.mean(0) - exact).abs() <= 4.5 * stderr + 1e-3 * exact.abs()).all())
