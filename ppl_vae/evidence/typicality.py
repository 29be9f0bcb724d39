"""Compare log p(x) of another data set with that of the model's own: a high density is not typicality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.evidence.estimate import Estimate, ImagesMean
from ppl_vae.evidence.proposals import DefensiveMixture
from ppl_vae.protocols import LatentModel, check_latent_model
from ppl_vae.vae import VAE


class PriorMixtureGuide(nn.Module):
    """x (B, *E) -> q(z | x) / 2 + p(z) / 2, batch shape (B,), event shape (L,)."""

    def __init__(self, posterior: Callable[..., Distribution], prior: Callable[..., Distribution]) -> None:
        super().__init__()
        self.posterior, self.prior = posterior, prior

    def forward(self, x: Tensor, *c: Tensor) -> DefensiveMixture:
        return DefensiveMixture(self.posterior(x, *c), self.prior(*c), x.new_full((len(x),), 0.5))


def mix_prior_into_guide(vae: LatentModel) -> VAE:
    """The same p(x, z) with the guide q(z | x) / 2 + p(z) / 2, to score images that the guide was not trained for.

    The guide may send such images where the prior has almost no density: under a flow prior, images of clothes scored
    by a model of digits came out at -5e13 nats, and at -1,337 with prior draws among the particles. No bound lies below
    that of S / 2 prior draws. The weights are shared. Score both sets with it, to compare the same bound.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194 (defensive mixture).
    """
    check_latent_model(vae)
    return VAE(vae.prior, vae.likelihood, PriorMixtureGuide(vae.posterior, vae.prior)).train(vae.training)


def auroc(low: Tensor, high: Tensor) -> Estimate:
    """P(a < b) + P(a = b) / 2, a of ``low`` and b of ``high``: 1/2 where they are alike, 1 where all b are higher.

    The squared error is Var(F(b)) / n + Var(1 - G(a)) / m, with F and G the empirical distribution functions of a and
    b. The error is at least 1 / (k + 1), k the smaller sample size: where all pairs are in order the variances are 0.
    low: (m,), high: (n,). An empty sample or a NaN raises ValueError.

    Reference: DeLong et al. 1988, Biometrics 44(3), 837-845. The least error: ours.
    """
    low, high = _check_numbers("low", low), _check_numbers("high", high)
    high_shares, low_shares = _share_below(high, low), 1 - _share_below(low, high)
    variance = sum(float(shares.var(correction=0)) / len(shares) for shares in (high_shares, low_shares))
    return Estimate(float(high_shares.mean()), max(math.sqrt(variance), 1 / (min(len(low), len(high)) + 1)))


def _share_below(values: Tensor, among: Tensor) -> Tensor:
    """(n,) the share of ``among`` below each value, plus half of the share equal to it."""
    among = among.sort().values
    below = torch.searchsorted(among, values, right=False)
    at_most = torch.searchsorted(among, values, right=True)
    return (below + at_most).double() / (2 * len(among))


@dataclass(frozen=True)
class Typicality:
    """log p(x) of images from another data set, compared with images like the training data.

    Args:
        dataset: the name of the other data set.
        own, other: the means of L_S, nats per image.
        num_particles: S.
        auroc_of_density: of the classifier "low log p(x) means another set": 1/2 if it knows nothing, below 1/2 if the
            other images have the higher density.
        auroc_of_distance: of the classifier "log p(x) far from the own mean, on either side, means another set".
        words: how to read the numbers, in sentences.
    """

    dataset: str
    own: ImagesMean
    other: ImagesMean
    num_particles: int
    auroc_of_density: Estimate
    auroc_of_distance: Estimate
    words: tuple[str, ...]


def typicality(own: Tensor, other: Tensor, *, dataset: str, num_particles: int) -> Typicality:
    """How high log p(x) is on another data set, and whether it tells the two sets apart.

    Samples of p have log p(x) near its mean, -H(p), and not where it is highest. The distance
    |log p(x) - (1/m) sum_i log p(x_i)|, over m own images, calls an image atypical on either side. Images with a
    typical density need not resemble the data.

    Args:
        own: (m,) log p(x), nats, of images that the model was not trained on; see ``mix_prior_into_guide``. A number
            that is not finite raises ValueError.
        other: (n,) the same of the other set, by the same estimate.
        dataset: the other set's name.
        num_particles: S of the estimates.

    Reference: Nalisnick et al. 2019, arXiv 1810.09136 (higher density elsewhere); Nalisnick et al. 2019, arXiv
    1906.02994 (typicality, for batches; here for single images, with the mean over the own images).
    """
    own, other = _check_numbers("own", own), _check_numbers("other", other)
    if not own.isfinite().all():
        raise ValueError("own: expected finite numbers, got an infinite one, from which nothing has a distance")
    distances = [(values - own.mean()).abs() for values in (own, other)]
    found = (auroc(other, own), auroc(*distances))
    density, distance = (f"{each.mean:.3f} ± {each.stderr:.3f}" for each in found)
    return Typicality(
        dataset=dataset,
        own=ImagesMean.mean_of(own),
        other=ImagesMean.mean_of(other),
        num_particles=num_particles,
        auroc_of_density=found[0],
        auroc_of_distance=found[1],
        words=(
            f"a low log p(x) tells the other images apart with an AUROC of {density} (1: surely, 1/2: not at all, "
            "below: the model gives them the higher density)",
            f"the distance of log p(x) from the own mean, on either side, tells them apart with an AUROC of {distance}",
            "a density is not typicality: a high log p(x) does not say that an image is like the data, and a low bound "
            "may be due to a guide that has seen no such images",
        ),
    )


def _check_numbers(name: str, values: Tensor) -> Tensor:
    if len(values) == 0 or values.isnan().any():
        raise ValueError(f"{name}: expected numbers, got {'a NaN' if len(values) else 'none'}")
    return values.double()
