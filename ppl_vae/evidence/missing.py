"""Images with missing pixels: bounds on log p(x_observed), and draws of the missing pixels.

    log p(x_observed | z) = sum_{d observed} log p(x_d | z)

Pixels are independent given z, so a missing pixel only leaves the sum. Missing pixels are NaN in x (B, *E). Whether a
pixel is missing must not depend on its value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.evidence.proposals import DefensiveMixture
from ppl_vae.parts.incomplete import IncompleteVAE
from ppl_vae.parts.likelihoods.base import mask_missing
from ppl_vae.parts.likelihoods.mixture import ColorLogisticMixture
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.runtime.batching import images_per_pass, latents_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.support import check_support
from ppl_vae.vae import check_event_shape

_FILLING_SEED = 0  # a constant, so that the guide is a function of x


class Observed(nn.Module):
    """p(x_observed, z) = p(z) prod_{d observed} p(x_d | z), with a guide for images with missing pixels.

    ``log_evidence(observed.model, observed.guide, x, ...)`` bounds log p(x_observed). The programs are for evaluation
    only: the guide has no reparametrized draws. It mixes the encoder's posteriors of K fillings of the image with the
    prior,

        q(z | x_observed) = (1 - a) (1/K) sum_k q(z | x_observed, x_missing^k) + a p(z),

    since p(z | x_observed) = E[p(z | x_observed, x_missing)]. Fillings come from pseudo-Gibbs sampling (encode, decode,
    refill) with a correction in each round: K particles z from the mixture so far (at first from the prior) are
    resampled by their importance weights, and x_missing ~ p(x | z). Each image uses the same noise, whatever else is in
    x, and torch's global generator does not change (apart from the u of a dequantized VAE). Where all of x is observed,
    both programs are those of the VAE; for an image without an observed pixel the guide is the prior.

    Measured on MNIST (15 epochs, S = 500), L_S in nats with the lower half missing, and with nine of ten pixels
    missing: ten rounds of plain pseudo-Gibbs -55.4 and -31.5; this guide -48.7 and -19.6.

    Args:
        vae: A VAE whose likelihood's pixels are independent given z (``to_event`` over the whole image). The guide of
            an ``IncompleteVAE``, which was trained on missing pixels, is used as it is. Under a mixture of colors
            (``ColorLogisticMixture``) positions are independent, and all three colors of one are missing or none.
        rounds: The rounds of refilling.
        num_fillings: K. A pass of the guide holds K copies of each of its images.
        prior_share: a, above 0 and below 1.

    Reference: Rezende et al. 2014, arXiv 1401.4082, appendix F (pseudo-Gibbs); Cappé et al. 2004, JCGS 13(4)
    (population Monte Carlo). Their combination: ours.
    """

    def __init__(self, vae: LatentModel, *, rounds: int = 10, num_fillings: int = 30, prior_share: float = 0.2) -> None:
        super().__init__()
        check_latent_model(vae, images_alone=True)
        if not 0 < prior_share < 1:
            raise ValueError(f"prior_share: expected a number between 0 and 1, got {prior_share}")
        self.vae = vae
        self.rounds = check_count("rounds", rounds)
        self.num_fillings = check_count("num_fillings", num_fillings)
        self.prior_share = prior_share

    def model(self, x: Tensor) -> None:
        """z ~ p(z), x_observed ~ p(x_observed | z). x: (B, *E), NaN where missing."""
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.vae.prior())
            pyro.sample("x", self.likelihood(z, x), obs=_in_support(x))

    def guide(self, x: Tensor) -> None:
        """z ~ q(z | x_observed). x: (B, *E), NaN where missing."""
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))

    def prior(self) -> Distribution:
        """p(z), the VAE's."""
        return self.vae.prior()

    def likelihood(self, z: Tensor, x: Tensor) -> dist.TorchDistribution:
        """p(x_observed | z), batch (..., B), event E; its draws and its mean are of all pixels. z: (..., B, L)."""
        p_x = check_event_shape(self.vae.likelihood(z), x, z)
        return p_x.mask_missing(x) if isinstance(p_x, ColorLogisticMixture) else mask_missing(p_x, x)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x_observed), batch (B,), event (L,). x: (B, *E), NaN where missing."""
        missing = x.isnan().flatten(1)
        if not missing.any() or isinstance(self.vae, IncompleteVAE):
            return self.vae.posterior(x)
        partly = torch.full_like(x[:, :1].flatten(1)[:, 0], self.prior_share)
        share = torch.where(missing.all(1), 1.0, torch.where(missing.any(1), partly, 0.0))
        return self._mixture(torch.stack([self._fillings(image) for image in x.split(1)]), share)

    def particles(
        self, q: Distribution, x: Tensor, num_particles: int
    ) -> tuple[Tensor, dist.TorchDistribution, Tensor]:
        """z_s ~ q, p(x_observed | z_s), and log w_s = log p(x_observed | z_s) + log p(z_s) - log q(z_s).

        -> z (S, B, L), batch shape (S, B), and log w (S, B) nats. Draws come from torch's global generator.
        """
        z = q.sample((num_particles,))
        p_x = self.likelihood(z, x)
        log_w = p_x.log_prob(_in_support(x)) + self.vae.prior().log_prob(z) - q.log_prob(z)
        if not log_w.amax(0).isfinite().all():
            raise NotFinite("log-weights: expected numbers, got NaN, infinity, or none above -infinity for an image")
        return z, p_x, log_w

    def _mixture(self, fillings: Tensor, share: Tensor) -> DefensiveMixture:
        """fillings: (B, K, *E), share: (B,)."""
        posteriors = self.vae.posterior(fillings)
        weights = dist.Categorical(logits=torch.zeros(fillings.shape[:2], dtype=share.dtype, device=share.device))
        return DefensiveMixture(dist.MixtureSameFamily(weights, posteriors), self.vae.prior(), share)

    @torch.no_grad()
    def _fillings(self, x: Tensor) -> Tensor:
        """One image (1, *E) -> K copies (K, *E) with the missing pixels filled."""
        missing, K = x.isnan(), self.num_fillings
        if not missing.any():
            return x.expand(K, *x.shape[1:])
        share = torch.full_like(x.flatten()[:1], self.prior_share)
        q: Distribution = self.vae.prior().expand((1,))
        with seeded(_FILLING_SEED, x.device):
            for _ in range(self.rounds):
                z, _, log_w = self.particles(q, x, K)
                chosen = z[log_w[:, 0].softmax(0).multinomial(K, replacement=True)]
                fillings = torch.where(missing, self.likelihood(chosen, x).sample(), x)[:, 0]
                q = self._mixture(fillings[None], share)
        return fillings


def _in_support(x: Tensor) -> Tensor:
    """x with the value of an observed pixel in place of NaN, which would fail validation although it is masked."""
    missing = x.isnan()
    values = x[~missing]
    return torch.where(missing, values[0] if len(values) else torch.zeros_like(x[:1].sum()), x)


@dataclass(frozen=True, repr=False)
class Imputation:
    """Missing pixels of each image, imputed with S particles.

    Args:
        draws: (M, B, *E) x ~ p(x_missing | x_observed), approximately; observed pixels do not change.
        mean: (B, *E) E[x | x_observed]; observed pixels do not change.
        log_evidence: (B,) float64 nats, the bound L_S on log p(x_observed).
        ess: (B,) float64 from 1 to S. Near 1 all draws come from one z, however many there are.
    """

    draws: Tensor
    mean: Tensor
    log_evidence: Tensor
    ess: Tensor

    def __repr__(self) -> str:
        ess = self.ess.double()
        return (
            f"Imputation of {len(self.mean):,} image(s), {len(self.draws):,} draw(s) of each: log p(x_observed) "
            f"{float(self.log_evidence.mean()):.2f} nats per image by its bound\n  effective particles: median "
            f"{float(ess.median()):.1f}, least {float(ess.min()):.1f}; near 1, all draws of an image are of one z"
        )


@serialize_threads(gradients=False)
def impute(
    observed: Observed, x: Tensor, *, num_particles: int, num_draws: int, progress: Callable[[int], None] | None = None
) -> Imputation:
    """p(x_missing | x_observed) ~ sum_s v_s p(x_missing | z_s), v_s = w_s / sum_t w_t, z_s ~ q(z | x_observed).

    The mean is that of the sum. A draw takes z_s with probability v_s, and then x_missing ~ p(x | z_s) (sampling
    importance resampling). Both are consistent as S grows, and no better than the effective sample size. Draws come
    from torch's global generator.

    Args:
        observed: The VAE for images with missing pixels, in evaluation mode.
        x: (B, *E), NaN where missing.
        num_particles, num_draws: S and M.
        progress: Called with 1 after each image.

    Reference: Mattei and Frellsen 2019, arXiv 1812.02633 (single imputation by self-normalized importance sampling,
    multiple imputation by sampling importance resampling).
    """
    num_particles, num_draws = check_count("num_particles", num_particles), check_count("num_draws", num_draws)
    check_support(observed.model, x)
    result = Imputation(
        x.new_empty(num_draws, *x.shape),
        torch.empty_like(x),
        *torch.empty(2, len(x), dtype=torch.double, device=x.device),
    )
    for i, image in enumerate(x.split(1)):
        draws, mean, result.log_evidence[i], result.ess[i] = _impute_one(observed, image, num_particles, num_draws)
        missing = image.isnan()
        result.draws[:, i] = torch.where(missing, draws, image)
        result.mean[i] = torch.where(missing, mean, image)[0]
        if progress is not None:
            progress(1)
    return result


def _impute_one(
    observed: Observed, x: Tensor, num_particles: int, num_draws: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws (M, *E), the mean (*E), the bound and the effective sample size for one image (1, *E)."""
    q = observed.posterior(x)
    held = [latents_per_pass(distribution, x.device.type) for distribution in (q, observed.prior())]
    chunk = min(images_per_pass(x, observed.vae.likelihood), *held)
    z = x.new_empty(num_particles, 1, *q.event_shape)
    log_w = torch.empty(num_particles, dtype=torch.double, device=x.device)
    top = log_w.new_full((), -torch.inf)
    total = x.new_zeros(x.shape[1:], dtype=torch.double)  # sum_s exp(log w_s - top) E[x | z_s]
    for place, log_w_place in zip(z.split(chunk), log_w.split(chunk), strict=True):
        drawn, p_x, log_w_drawn = observed.particles(q, x, len(place))
        place.copy_(drawn)
        log_w_place.copy_(log_w_drawn[:, 0])
        highest = torch.maximum(top, log_w_place.max())
        means = torch.einsum("s,s...->...", (log_w_place - highest).exp().to(x.dtype), p_x.mean[:, 0])
        top, total = highest, total * (top - highest).exp() + means
    v = log_w.softmax(0)
    chosen = z[v.multinomial(num_draws, replacement=True)]
    draws = torch.cat([observed.likelihood(part, x).sample()[:, 0] for part in chosen.split(chunk)])
    mean = total / (log_w - top).exp().sum()
    return draws, mean.to(x.dtype), log_mean_exp(log_w), 1 / v.square().sum()
