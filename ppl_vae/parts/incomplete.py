"""A VAE that trains on images with missing pixels, which are NaN.

    log p(x_observed | z) = sum_{d observed} log p(x_d | z)

Pixels are independent given z, so a missing pixel only leaves the sum. Whether a pixel is missing must not depend on
its value. The encoder sees zeros in place of missing pixels and, if asked, which pixels are observed:

    encoder = ZeroFilled(networks.MLP((2 * D,), 2 * L), with_mask=True, event_dims=1)
    posterior = Conditional(encoder, posteriors.DiagonalNormal(L))
    vae = IncompleteVAE(priors.StandardNormal(L), Conditional(decoder, likelihoods.NormalPerPixel((D,))), posterior)

Reference: Mattei and Frellsen 2019, arXiv 1812.02633 (MIWAE, with ``objectives.IWAE``); Nazabal et al. 2020, arXiv
1807.03653 (zeros in the encoder).
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.parts.likelihoods.base import mask_missing
from ppl_vae.vae import VAE, check_event_shape

_FILLINGS = (0.0, 0.5, 1.0)  # one of them is on the support of every likelihood


class IncompleteVAE(VAE):
    """p(x_observed, z) = p(z) prod_{d observed} p(x_d | z), with the guide q(z | x_observed). x: (B, *E), NaN: missing.

    Where all of x is observed it is a ``VAE``. Bounds of ``log_evidence`` are on log p(x_observed); an image without an
    observed pixel has log p = 0.

    Args:
        prior: () -> p(z), event (L,).
        likelihood: z (..., L) -> p(x | z), batch (...), event E, pixels independent given z.
        posterior: x (..., *E), NaN where missing -> q(z | x_observed); see ``ZeroFilled``.

    Raises:
        ValueError: When called: pixels are not independent given z, or as ``VAE``.

    Reference: Mattei and Frellsen 2019, arXiv 1812.02633, equation 4.
    """

    def __init__(
        self,
        prior: Callable[..., Distribution],
        likelihood: Callable[..., Distribution],
        posterior: Callable[..., Distribution],
    ) -> None:
        super().__init__(prior, likelihood, posterior)
        support = getattr(getattr(likelihood, "family", likelihood), "support", None)
        support = getattr(support, "base_constraint", support)
        fits = (v for v in _FILLINGS if support is None or support.check(torch.tensor(v, device="cpu")).all())
        self._filling = next(fits, 0.0)

    def model(self, x: Tensor, *c: Tensor) -> None:
        """z ~ p(z), x_observed ~ p(x_observed | z). x: (B, *E), NaN where missing."""
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.prior(*c))
            p_x = mask_missing(check_event_shape(self.likelihood(z, *c), x, z), x)
            pyro.sample("x", p_x, obs=torch.where(x.isnan(), self._filling, x))


class ZeroFilled(nn.Module):
    """h = net(x with zeros where it is NaN), or net(the same, and which pixels are observed).

    Args:
        net: Images (..., *E) -> features. With the mask its images have twice the channels, (2C, H, W), or twice the
            columns, (2D,): first the pixels and then ones where they are observed.
        with_mask: Whether the net sees the mask.
        event_dims: The number of dimensions of E.
    """

    def __init__(self, net: nn.Module, *, with_mask: bool, event_dims: int) -> None:
        super().__init__()
        self.net, self.with_mask, self.event_dims = net, with_mask, event_dims

    def forward(self, x: Tensor) -> Tensor:
        missing = x.isnan()
        filled = torch.where(missing, torch.zeros_like(x), x)
        return self.net(torch.cat([filled, (~missing).to(x)], dim=-self.event_dims) if self.with_mask else filled)
