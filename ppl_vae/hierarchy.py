"""Several stochastic layers: p(x, z_1..z_n) = p(z_n) prod_l p(z_l | z_{l+1}) p(x | z), and guides of as many layers.

    prior = LayeredPrior(StandardNormal(10), [Conditional(MLP(10, 2 * 40, hidden=(100,)), DiagonalNormal(40))])
    posterior = TopDown([MLP(E, 200, hidden=(200,)), MLP(200, 100, hidden=(100,))], [to_40, to_10], prior)
    vae = HierarchicalVAE(prior, Conditional(BottomLayerOnly(decoder, prior.latent_dims), Bernoulli(E)), posterior)

Layer 1 is next to the image, and layer n on top. The latents of all layers are concatenated to one vector,
z = (z_1, ..., z_n), so that prior, posterior and likelihood have the same form as those of a VAE with one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from ppl_vae.conditional import Conditional, restore_precision
from ppl_vae.protocols import StochasticFunction, register_programs
from ppl_vae.vae import check_batch_shape, check_event_shape


class LayeredDistribution(TorchDistribution):
    """p(z_1, ..., z_n) = p(z_a) p(z_b | z_a) p(z_c | z_b) ...: a chain of layers, as one vector (z_1, ..., z_n).

    ``log_prob`` raises ValueError for vectors that are not (..., L_1 + ... + L_n).

    Args:
        first: p(z_a), batch (...), of layer 1 or n.
        links: For each further layer, z of the previous layer (..., L) -> its distribution, reparametrized if ``first``
            is.
        latent_dims: (L_1, ..., L_n).
        upward: Whether the layers are drawn from 1 up to n; otherwise from n down to 1.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.real_vector

    def __init__(
        self,
        first: Distribution,
        links: Sequence[Callable[[Tensor], Distribution]],
        *,
        latent_dims: Sequence[int],
        upward: bool,
    ) -> None:
        self.first, self.links, self.latent_dims, self.upward = first, tuple(links), tuple(latent_dims), upward
        super().__init__(first.batch_shape, Size((sum(self.latent_dims),)))

    @property
    def has_rsample(self) -> bool:
        return self.first.has_rsample

    def draw(self, sample: Callable[[str, Distribution], Tensor]) -> Tensor:
        """z (..., L_1 + ... + L_n), each layer by sample("z_l", p(z_l | ...)), which ``pyro.sample`` makes a site."""
        names = [f"z_{layer + 1}" for layer in range(len(self.latent_dims))]
        first, *further = names if self.upward else names[::-1]
        z = [sample(first, self.first)]
        for name, link in zip(further, self.links, strict=True):
            z.append(sample(name, link(z[-1])))
        return torch.cat(z if self.upward else z[::-1], dim=-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._expanded_by(sample_shape).draw(lambda name, distribution: distribution.rsample())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._expanded_by(sample_shape).draw(lambda name, distribution: distribution.sample())

    def log_prob(self, z: Tensor) -> Tensor:
        """The sum over the layers. z: (..., L_1 + ... + L_n) -> (...), nats."""
        if z.shape[-1:] != self.event_shape:
            raise ValueError(f"z: expected shape (..., {self.event_shape[0]}), got {tuple(z.shape)}")
        given = {f"z_{i + 1}": z_l for i, z_l in enumerate(z.split(self.latent_dims, dim=-1))}
        log_p = []

        def look_up(name: str, distribution: Distribution) -> Tensor:
            log_p.append(distribution.log_prob(given[name]))
            return given[name]

        self.draw(look_up)
        return sum(log_p[1:], log_p[0])

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> LayeredDistribution:
        first = self.first.expand(Size(batch_shape))
        return LayeredDistribution(first, self.links, latent_dims=self.latent_dims, upward=self.upward)

    def _expanded_by(self, sample_shape: Sequence[int]) -> LayeredDistribution:
        return self.expand(Size(sample_shape) + self.batch_shape) if len(sample_shape) else self


class LayeredPrior(nn.Module):
    """p(z_1, ..., z_n) = p(z_n) p(z_{n-1} | z_n) ... p(z_1 | z_2).

    Args:
        top: () -> p(z_n), event (L_n,), with an ``event_shape``: any prior of a VAE with one layer.
        layers: p(z_1 | z_2), ..., p(z_{n-1} | z_n), each (..., L_{l+1}) -> event (L_l,).

    Attributes:
        latent_dims: (L_1, ..., L_n).
        event_shape: (L_1 + ... + L_n,).

    Reference: Rezende et al. 2014, arXiv 1401.4082; Burda et al. 2016, 1509.00519; Sønderby et al. 2016, 1602.02282.
    """

    def __init__(self, top: nn.Module, layers: Sequence[Conditional]) -> None:
        super().__init__()
        self.top = top
        self.layers = nn.ModuleList(layers)
        self.latent_dims = _latent_dims([*layers, top])
        self.event_shape = (sum(self.latent_dims),)

    def forward(self) -> LayeredDistribution:
        """-> batch shape (), event shape (L_1 + ... + L_n,)."""
        return LayeredDistribution(self.top(), [*self.layers][::-1], latent_dims=self.latent_dims, upward=False)


class BottomUp(nn.Module):
    """q(z_1, ..., z_n | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_n | z_{n-1}).

    It draws in the opposite order of the model, so its KL must be sampled: z_2 depends on z_1, so that
    E_q[log q(z_1 | x) - log p(z_1 | z_2)] is not the mean of KL(q(z_1 | x) || p(z_1 | z_2)).

    Args:
        layers: q(z_1 | x), q(z_2 | z_1), ..., each with event (L_l,).

    Attributes:
        latent_dims: (L_1, ..., L_n).

    Reference: Burda et al. 2016, arXiv 1509.00519 (their models with two layers).
    """

    def __init__(self, layers: Sequence[Conditional]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.latent_dims = _latent_dims(layers)

    @property
    def net(self) -> nn.Module:
        """The network that takes the image."""
        return self.get_submodule("layers.0.net")

    def forward(self, x: Tensor) -> LayeredDistribution:
        """x: (B, *E) -> batch shape (B,), event shape (L_1 + ... + L_n,)."""
        first, *further = self.layers
        return LayeredDistribution(first(x), further, latent_dims=self.latent_dims, upward=True)


class TopDown(nn.Module):
    """q(z_1, ..., z_n | x) = q(z_n | x) prod_l q(z_l | x, z_{l+1}): the ladder, in the order of the model.

        d_0 = x,  d_l = a(f_l(d_{l-1}))                                        # upward, deterministic
        q(z_n | x) = r_n(d_n)
        q(z_l | x, z_{l+1}) proportional to r_l(d_l) p(z_l | z_{l+1})          # downward; both diagonal normals

    Args:
        features: f_1, ..., f_n, networks (..., F_{l-1}) -> (..., F_l); f_1 takes images.
        readouts: r_1, ..., r_n, each (..., F_l) -> a diagonal normal, event (L_l,).
        prior: The prior of the same VAE, whose weights are registered only there, with as many layers.
        activation: a, elementwise.

    Attributes:
        latent_dims: (L_1, ..., L_n).

    Raises:
        ValueError: The numbers of layers differ.

    Reference: Sønderby et al. 2016, arXiv 1602.02282 (the ladder VAE), without their batch normalization, with which
    q(z | x) would depend on the other images of the batch.
    """

    def __init__(
        self,
        features: Sequence[nn.Module],
        readouts: Sequence[Conditional],
        prior: LayeredPrior,
        *,
        activation: type[nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        if not len(features) == len(readouts) == len(prior.latent_dims):
            raise ValueError(
                f"features, readouts: expected {len(prior.latent_dims)} of each, one per layer of the prior, "
                f"got {len(features)} and {len(readouts)}"
            )
        self.features = nn.ModuleList(features)
        self.readouts = nn.ModuleList(readouts)
        self.latent_dims = _latent_dims(readouts)
        self.activation = activation()
        self._prior = (prior,)  # in a tuple, so that its weights are not registered, and stored, twice

    @property
    def net(self) -> nn.Module:
        """The network that takes the image."""
        return self.features[0]

    def forward(self, x: Tensor) -> LayeredDistribution:
        """x: (B, *E) -> batch shape (B,), event shape (L_1 + ... + L_n,)."""
        from_x, d = [], x
        for feature, readout in zip(self.features, self.readouts, strict=True):
            d = restore_precision(self.activation(feature(d)), x)
            from_x.append(readout(d))
        links = [
            lambda z_above, r_l=r_l, layer=layer: product_of_normals(layer(z_above), r_l)
            for r_l, layer in zip(from_x, self._prior[0].layers, strict=False)
        ]
        return LayeredDistribution(from_x[-1], links[::-1], latent_dims=self.latent_dims, upward=False)


def product_of_normals(p: Distribution, q: Distribution) -> dist.Independent:
    """The normal proportional to p q: 1 / s^2 = 1 / s_p^2 + 1 / s_q^2 and m / s^2 = m_p / s_p^2 + m_q / s_q^2.

    It is computed from s_p / sqrt(s_p^2 + s_q^2), which is from 0 to 1, since a precision overflows for a small scale.

    Args:
        p, q: Diagonal normals, event (L,), whose batch shapes broadcast; a ValueError refuses others.
    """
    p, q = _normal(p), _normal(q)
    both = torch.hypot(p.scale, q.scale)
    loc = p.loc + (p.scale / both).square() * (q.loc - p.loc)
    return dist.Normal(loc, p.scale * (q.scale / both)).to_event(1)


def _normal(distribution: Distribution) -> torch.distributions.Normal:
    base = getattr(distribution, "base_dist", None)
    if not isinstance(base, torch.distributions.Normal):
        raise ValueError(f"ladder: expected diagonal normals at every layer, got {type(distribution).__name__}")
    return base


def _latent_dims(parts: Sequence[nn.Module]) -> tuple[int, ...]:
    return tuple(part.event_shape[0] for part in parts)  # type: ignore[index, misc]


class BottomLayerOnly(nn.Module):
    """h = net(z_1) for z = (z_1, ..., z_n): the network of a decoder p(x | z) = p(x | z_1) of the lowest layer only.

    With a network of all of z, (..., L_1 + ... + L_n), every layer acts on the image directly, and is lost less easily.
    It raises ValueError for z of another shape.

    Args:
        net: (..., L_1) -> (..., F).
        latent_dims: (L_1, ..., L_n).
    """

    def __init__(self, net: nn.Module, latent_dims: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.latent_dims = tuple(latent_dims)

    @property
    def output(self) -> nn.Module:
        """The network's last layer."""
        return self.net.get_submodule("output")

    def forward(self, z: Tensor) -> Tensor:
        if z.shape[-1:] != (sum(self.latent_dims),):
            raise ValueError(f"z: expected shape (..., {sum(self.latent_dims)}), got {tuple(z.shape)}")
        return self.net(z[..., : self.latent_dims[0]])


class HierarchicalVAE(nn.Module):
    """p(x, z_1..z_n) = p(z_n) prod_l p(z_l | z_{l+1}) p(x | z_1..z_n), with the guide q(z_1..z_n | x).

    The programs are those of ``VAE``, with one site ``z_l`` per layer. x is (B, *E), images are the plate at dim -1.

    Args:
        prior: () -> p(z_1..z_n), a ``LayeredPrior``.
        likelihood: z (..., L_1 + ... + L_n) -> p(x | z), batch (...), event E; see ``BottomLayerOnly``.
        posterior: x (B, *E) -> q(z_1..z_n | x), ``BottomUp`` or ``TopDown``.

    Raises:
        ValueError: Prior and posterior have different layers, or an image has another shape than the likelihood.

    Reference: Burda et al. 2016, arXiv 1509.00519; Sønderby et al. 2016, arXiv 1602.02282.
    """

    def __init__(
        self, prior: LayeredPrior, likelihood: Callable[[Tensor], Distribution], posterior: BottomUp | TopDown
    ) -> None:
        super().__init__()
        if posterior.latent_dims != prior.latent_dims:
            raise ValueError(
                f"posterior: expected layers of {prior.latent_dims} latents, as the prior's, "
                f"got {posterior.latent_dims}"
            )
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor) -> None:
        """z_n ~ p(z_n), z_l ~ p(z_l | z_{l+1}), x ~ p(x | z). x: (B, *E), observed."""
        with pyro.plate("images", len(x), dim=-1):
            z = self.prior().draw(pyro.sample)
            pyro.sample("x", check_event_shape(self.likelihood(z), x, z), obs=x)

    def guide(self, x: Tensor) -> None:
        """z_1..z_n ~ q(z_1..z_n | x), layer by layer. x: (B, *E)."""
        with pyro.plate("images", len(x), dim=-1):
            check_batch_shape(self.posterior(x), x).draw(pyro.sample)

    def programs(self) -> tuple[StochasticFunction, StochasticFunction]:
        """Return model and guide with their parameters registered, for plain ``pyro.infer.SVI``, as ``VAE`` does."""
        return register_programs(self)
