"""Priors p(z): called without arguments, they return a distribution over one latent vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ppl_vae.parts.flows import ElementwiseAffine, Flow, Permutation
from ppl_vae.parts.posteriors import bounded_log_scale
from ppl_vae.runtime.errors import Widths


class StandardNormal(nn.Module):
    """p(z) = prod_l Normal(z_l; 0, 1), l = 1..L."""

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.Independent:
        """-> batch shape (), event shape (L,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class Mixture(nn.Module):
    """p(z) = sum_k pi_k prod_l Normal(z_l; loc_kl, scale_kl), with weights, locations and scales that are trained.

    The weights start equal, the scales at 1, and the locations at draws of a standard normal.

    Args:
        latent_dim: L.
        components: K.

    Reference: Dilokthanakul et al. 2016, arXiv 1611.02648; as a baseline in Tomczak and Welling 2018, 1705.07120.
    """

    def __init__(self, latent_dim: int, *, components: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self) -> dist.MixtureSameFamily:
        """-> batch shape (), event shape (L,)."""
        normals = dist.Normal(self.loc, bounded_log_scale(self.log_scale).exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)


class VampPrior(nn.Module):
    """p(z) = (1/K) sum_k q(z | u_k): the guide's own posteriors of K trained pseudo-images, equally weighted.

    The pseudo-images are unconstrained numbers of an image's shape. ``start_from`` sets them to images.

    Args:
        posterior: x (..., *E) -> q(z | x), the guide's; its weights stay in the guide and are not registered here.
        event_shape: E.
        components: K.

    Reference: Tomczak and Welling 2018, arXiv 1705.07120, equation 9 (there the pseudo-images are clamped to [0, 1]).
    """

    def __init__(
        self, posterior: Callable[[Tensor], Distribution], event_shape: Sequence[int], *, components: int
    ) -> None:
        super().__init__()
        self._posterior = (posterior,)  # in a tuple, so that the guide's weights are not this module's too
        self.pseudo_images = nn.Parameter(torch.rand(components, *event_shape))

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Sets the pseudo-images to some of the images x, (N, *E), drawn from torch's global generator."""
        K, N = len(self.pseudo_images), len(x)
        self.pseudo_images.copy_(x[torch.randint(N, (K,)) if N < K else torch.randperm(N)[:K]])

    def forward(self) -> dist.MixtureSameFamily:
        """-> batch shape (), event shape (L,)."""
        equal = self.pseudo_images.new_zeros(len(self.pseudo_images))
        mixture = VampMixture(dist.Categorical(logits=equal), self._posterior[0](self.pseudo_images))
        mixture.posterior, mixture.pseudo_images = self._posterior[0], self.pseudo_images
        return mixture


class VampMixture(dist.MixtureSameFamily):
    """(1/K) sum_k q(z | u_k), drawn by choosing k first and encoding it alone; torch would draw from all K."""

    posterior: Callable[[Tensor], Distribution]
    pseudo_images: Tensor

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> VampMixture:
        mixture = super().expand(batch_shape, _instance)
        mixture.posterior, mixture.pseudo_images = self.posterior, self.pseudo_images
        return mixture

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            index = torch.randint(len(self.pseudo_images), (shape[:-1].numel(),), device=self.pseudo_images.device)
            return self.posterior(self.pseudo_images[index]).sample().reshape(shape)


class FlowPrior(nn.Module):
    """p(z) of z = f(u), u ~ N(0, I), f a normalizing flow: log p(z) = log N(f^-1(z)) + log |det df^-1/dz|.

    Args:
        latent_dim: L, at least 2.
        coupling, num_layers, hidden: Of f, as in ``stack_couplings``.

    Reference: Dinh et al. 2017, arXiv 1605.08803; as a prior Chen et al. 2017, arXiv 1611.02731, Xu et al. 2019,
    arXiv 1905.13452.
    """

    def __init__(
        self, latent_dim: int, *, coupling: Callable[..., nn.Module], num_layers: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.base = StandardNormal(latent_dim)
        self.event_shape = (latent_dim,)
        self.flow = stack_couplings(latent_dim, coupling=coupling, num_layers=num_layers, hidden=hidden)

    def forward(self) -> Pushforward:
        """-> batch shape (), event shape (L,)."""
        return Pushforward(self.base(), self.flow)


def stack_couplings(dim: int, *, coupling: Callable[..., nn.Module], num_layers: int, hidden: Widths) -> Flow:
    """num_layers times an elementwise affine map, a coupling and a permutation, and an affine map at the end.

    It is for L = dim latents, with ``affine_coupling`` or ``spline_coupling`` and the hidden widths of its networks.
    """
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [ElementwiseAffine(dim), coupling(dim, hidden=hidden), Permutation(dim)]
    return Flow([*layers, ElementwiseAffine(dim)])


class Pushforward(TorchDistribution):
    """The distribution of z = f(u), u ~ base: log p(z) = log base(f^-1(z)) + log |det df^-1/dz|.

    The base is reparametrized, event (L,), and the flow is f.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's name and form)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Distribution, flow: Flow) -> None:
        self.base = base
        self.flow = flow
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Pushforward:
        return Pushforward(self.base.expand(torch.Size(batch_shape)), self.flow)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.flow(self.base.rsample(torch.Size(sample_shape)))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        u, log_volume = self.flow.inverse(value)
        return self.base.log_prob(u) + log_volume
