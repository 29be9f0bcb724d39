"""Parts that take a label y next to their input, for ``labels.ConditionalVAE``. A label enters as a one-hot vector.

encoder = LabelledEncoder(MLP(E, 200, hidden=(200,)), MLP(200 + K, 2 * L, hidden=(200,)), K)
decoder = LabelledDecoder(MLP(L + K, 784, hidden=(200, 200)), K)
likelihood, posterior = Conditional(decoder, Bernoulli(E)), Conditional(encoder, DiagonalNormal(L))
vae = ConditionalVAE(ClassNormals(K, L), likelihood, posterior, class_probs)
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.parts.flows import Flow
from ppl_vae.parts.posteriors import bounded_log_scale
from ppl_vae.parts.priors import Pushforward


def append_label(h: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """(h, one-hot y). h: (..., F), y: integers whose shape broadcasts to (...) -> (..., F + K).

    A label that is no class, such as -1, is all zeros.
    """
    one_hot = (y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)).to(h)
    batch = torch.broadcast_shapes(h.shape[:-1], y.shape)
    return torch.cat([h.expand(*batch, h.shape[-1]), one_hot.expand(*batch, num_classes)], dim=-1)


class LabelledDecoder(nn.Module):
    """h = net(z, one-hot y).

    Args:
        net: (..., L + K) -> (..., F).
        num_classes: K.
    """

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes = net, num_classes

    @property
    def output(self) -> nn.Module:
        """The network's last layer."""
        return self.net.get_submodule("output")

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z: (..., L), y: (...) -> (..., F)."""
        return self.net(append_label(z, y, self.num_classes))


class LabelledEncoder(nn.Module):
    """h = head(a(net(x)), one-hot y), a a leaky ReLU.

    The net of the image does not see the label: where a program tries all labels of an image, it runs once.

    Args:
        net: Images (..., *E) -> features (..., G).
        head: (..., G + K) -> (..., F).
        num_classes: K.
    """

    def __init__(self, net: nn.Module, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net, self.head, self.num_classes = net, head, num_classes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (..., *E), y: (...) -> (..., F)."""
        return self.head(append_label(nn.functional.leaky_relu(self.net(x)), y, self.num_classes))


class Classes:
    """q(y | x) = Categorical(softmax(h)), the family of a classifier over K classes, from features h (..., K).

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_features, self.event_shape = num_classes, ()

    def __call__(self, h: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=h)


class ClassNormals(nn.Module):
    """p(z | y) = prod_l Normal(z_l; loc_yl, scale_yl), with locations and scales that are trained and start at 0 and 1.

    Args:
        num_classes: K.
        latent_dim: L.
    """

    def __init__(self, num_classes: int, latent_dim: int) -> None:
        super().__init__()
        self.event_shape = (latent_dim,)
        self.loc = nn.Parameter(torch.zeros(num_classes, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_classes, latent_dim))

    def forward(self, y: Tensor) -> dist.Independent:
        """y: (...) -> batch shape (...), event shape (L,)."""
        return dist.Normal(self.loc[y], bounded_log_scale(self.log_scale[y]).exp()).to_event(1)


class ClassFlow(nn.Module):
    """p(z | y) of z = f(u), u ~ ``ClassNormals``: one normalizing flow f, on a normal for each class.

    Args:
        num_classes: K.
        flow: f, over (L,).
        latent_dim: L.
    """

    def __init__(self, num_classes: int, flow: Flow, latent_dim: int) -> None:
        super().__init__()
        self.base = ClassNormals(num_classes, latent_dim)
        self.event_shape = (latent_dim,)
        self.flow = flow

    def forward(self, y: Tensor) -> Pushforward:
        """y: (...) -> batch shape (...), event shape (L,)."""
        return Pushforward(self.base(y), self.flow)


class SharedPrior(nn.Module):
    """p(z | y) = p(z): a prior without labels, for all classes.

    Args:
        prior: () -> p(z), event (L,).
    """

    def __init__(self, prior: Callable[[], Distribution]) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, y: Tensor) -> Distribution:
        """-> batch shape (), event shape (L,)."""
        return self.prior()
