"""KL and activity of each latent, the parts of the ELBO, and the beta that the weights imply."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from ppl_vae.evidence.estimate import Estimate, ratio_of_means
from ppl_vae.evidence.moments import (
    AggregatePosterior,
    PosteriorMoments,
    compute_log_prob,
    compute_moments,
    factors,
    get_shared_prior,
    normal_factors,
)
from ppl_vae.hierarchy import LayeredDistribution
from ppl_vae.parts.priors import VampMixture
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import images_per_pass, pairs_per_pass
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.records import Data, arguments_of, further_of, images_of
from ppl_vae.support import check_support

ACTIVE_VARIANCE = 0.01  # of the posterior mean over images, in variances of the prior (Burda et al. 2016, section 5)

# The mutual information of N images cannot exceed log N; above this share of log N it says little else. Source: ours.
SATURATED_SHARE = 0.9

# Below this KL in nats the implied beta means nothing: a collapsed run of 0.0018 nats gave 0.17 +- 0.05. Source: ours.
_LEAST_KL = 0.1

# For an implied beta, |d KL / d log c| must exceed this many nats and three standard errors; it is about the number of
# latents that the guide uses. Source: ours.
_LEAST_SLOPE = 0.05
_STDERRS = 3.0

_KL_DRAWS = 100  # per image, for a KL without a closed form
_BETA_DRAWS = 8  # pairs per image, for an implied beta


@dataclass(frozen=True)
class PerLatent:
    """A mean over images and its standard error (NaN for one image) for each latent, (L,) float64, on the CPU."""

    mean: Tensor
    stderr: Tensor

    @classmethod
    def mean_of(cls, values: Tensor) -> PerLatent:
        """From one number for each image and latent, (N, L)."""
        values = values.double().cpu()
        N = len(values)
        stderr = values.std(0) / math.sqrt(N) if N > 1 else values.new_full(values.shape[1:], math.nan)
        return cls(values.mean(0), stderr)


@dataclass(frozen=True)
class ActiveUnits:
    """Var_n E[z_l | x_n] / Var p(z_l) for each latent, mean and stderr (L,), and how many of them exceed 0.01."""

    count: int
    mean: Tensor
    stderr: Tensor


def _closed_kl(q: Distribution | None, p: Distribution) -> Tensor | None:
    """(B, L) KL(q(z_l | x) || p(z_l)) of the factors of a guide and a prior, in closed form, else None."""
    try:
        return None if q is None else kl_divergence(q, p).double()
    except NotImplementedError:
        return None


@serialize_threads(gradients=False)
def latent_kl(vae: LatentModel, x: Data) -> PerLatent | None:
    """(1/N) sum_n KL(q(z_l | x_n) || p(z_l)) for each latent, (L,) nats: closed if torch has it, or by 100 draws each.

    None unless guide and prior are products over latents by construction. x: (N, *E), as the model sees images; none
    raise ValueError.
    """
    p, found = factors(get_shared_prior(vae, x)), []
    for group in AggregatePosterior.encode(vae, x).groups:
        q = factors(group)
        if p is None or q is None:
            return None
        kl = _closed_kl(q, p)
        if kl is None:
            z = group.sample((_KL_DRAWS,))
            kl = (q.log_prob(z).double() - p.log_prob(z).double()).mean(0)
        found.append(kl)
    return PerLatent.mean_of(torch.cat(found))


def active_units(codes: PosteriorMoments, prior_scale: Tensor | None = None) -> ActiveUnits:
    """A_l = Var_n E[z_l | x_n] / Var p(z_l); a latent is active if A_l exceeds 0.01.

    If the means are those of draws, the variance that their error adds is subtracted. The standard error is
    sqrt((mean_n d_n^4 - A^2) / N) for the deviations d_n from the mean.

    Args:
        codes: of N images, as ``moments.encode`` gives them.
        prior_scale: (L,) of each latent under p(z), such as ``moments.compute_moments`` gives it; None for ones.

    Reference: Burda et al. 2016, arXiv 1509.00519, section 5, for a standard normal prior; its unit: ours.
    """
    unit = codes.mean.new_ones(()).double() if prior_scale is None else prior_scale.double()
    squares = ((codes.mean.double() - codes.mean.double().mean(0)) / unit).square()
    squares = squares * len(squares) / max(1, len(squares) - 1)
    if codes.num_draws is not None:
        squares = squares - (codes.scale.double() / unit).square() / codes.num_draws
    variance = PerLatent.mean_of(squares)
    return ActiveUnits(int((variance.mean > ACTIVE_VARIANCE).sum()), variance.mean, variance.stderr)


@dataclass(frozen=True)
class ElboSplit:
    """ELBO = reconstruction - kl; kl = mutual information + marginal KL; marginal KL = TC + sum_l KL(q(z_l) || p(z_l)).

    All estimates are in nats per image. Those that need densities of single latents are None unless guide and prior are
    products over latents by construction.

    Args:
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)).
        mutual_information: between z and the index of its image among the N, at most ``cap``.
        marginal_kl: KL(q(z) || p(z)) for the aggregate posterior q(z) of the N images.
        total_correlation: KL(q(z) || prod_l q(z_l)).
        dimension_kl: (L,) KL(q(z_l) || p(z_l)).
        sum_of_dimension_kl: their sum, with its own error: the errors of the latents are not independent.
        cap: log N.
        saturated: whether the mutual information is above 0.9 of its cap, so that the marginal KL is overstated.
    """

    reconstruction: Estimate
    kl: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate | None
    dimension_kl: PerLatent | None
    sum_of_dimension_kl: Estimate | None
    cap: float
    saturated: bool


@serialize_threads(gradients=False)
def elbo_split(vae: LatentModel, x: Data) -> ElboSplit:
    """E KL(q(z | x) || p(z)) = I(z; n) + KL(q(z) || p(z)), and KL(q(z) || p(z)) = TC + sum_l KL(q(z_l) || p(z_l)).

    q(z) = (1/N) sum_n q(z | x_n) over exactly these images x (N, *E), and I is the mutual information between z and the
    index n, uniform on them. I = E[log q(z | x) - log q(z)] is estimated from one draw of each q(z | x_n). The KL is
    computed in closed form if there is one, and the marginal KL as KL - I, so that both identities hold exactly in the
    returned numbers. The errors are over images, for a fixed mixture q(z).

    I grows with N, up to that of the population of images. If the posteriors hardly overlap, I is log N (9.2 nats for
    10,000 images) whatever the population's value is: see ``ElboSplit.saturated``. Single latents overlap far more.

    Raises:
        ValueError: no image, or one off the support of p(x | z).

    Reference: Hoffman and Johnson 2016, ELBO surgery; Chen et al. 2018, arXiv 1802.04942, equation 2 (the total
    correlation; there by minibatches). The closed-form KL with sampled information is ours.
    """
    check_support(vae.model, x)
    q, prior = AggregatePosterior.encode(vae, x), get_shared_prior(vae, x)
    latents = factors(prior) if q.is_factorized else None
    z = q.sample()
    log_q = q.log_prob_per_image(z)
    information = log_q - q.log_prob(z)
    size = images_per_pass(x, vae.likelihood)
    passes = zip(x.split(size), z.split(size), strict=True)
    reconstruction = torch.cat([_log_likelihood(vae, images, part).double() for images, part in passes])
    total_correlation = dimension_kl = sum_of_dimension_kl = None
    if latents is None:
        kl = log_q - compute_log_prob(prior, z)
    else:
        log_q_by_latent = q.log_prob_per_latent(z)
        found = [closed for group in q.groups if (closed := _closed_kl(factors(group), latents)) is not None]
        sampled = log_q_by_latent - latents.log_prob(z).double()
        kl_by_latent = torch.cat(found) if len(found) == len(q.groups) else sampled
        kl = kl_by_latent.sum(-1)
        remainder = kl_by_latent - (log_q_by_latent - q.log_prob_by_latent(z))
        total_correlation = Estimate.mean_of(kl - information - remainder.sum(-1))
        sum_of_dimension_kl = Estimate.mean_of(remainder.sum(-1))
        dimension_kl = PerLatent.mean_of(remainder)
    mutual_information, cap = Estimate.mean_of(information), math.log(len(x))
    return ElboSplit(
        reconstruction=Estimate.mean_of(reconstruction),
        kl=Estimate.mean_of(kl),
        mutual_information=mutual_information,
        marginal_kl=Estimate.mean_of(kl - information),
        total_correlation=total_correlation,
        dimension_kl=dimension_kl,
        sum_of_dimension_kl=sum_of_dimension_kl,
        cap=cap,
        saturated=mutual_information.mean > SATURATED_SHARE * cap,
    )


@serialize_threads()
def implied_beta(vae: LatentModel, x: Data) -> Estimate | None:
    """beta = (d/dlog c E_q[log p(x | z)]) / (d/dlog c KL(q || p)) at c = 1, for a factor c on all scales of the guide.

    Training with weight beta ends where no change of the guide improves reconstruction - beta KL. One such change is to
    widen every posterior about its mean, z = m + c (z_0 - m), z_0 ~ q(z | x). So the weights show which beta they were
    trained with, in the unit of the likelihood's nats: a mean over D pixels implies D. If training was cut short, or
    the guide cannot express other widths, the result is not the beta of training; free bits, which limit the KL's
    pressure, imply less.

    d log p(x | z) / d log c is computed by autograd at pairs of draws z_0 and 2 m - z_0, whose linear terms cancel. The
    KL's derivative is closed for normals (sum_l s_l^2 - 1 for a standard normal prior), else
    -L - E[d log p(z) / d log c] at the draws. The error is the delta method's, over images.

    Args:
        vae: its weights are not changed, and get no gradient.
        x: (N, *E), as the model sees images.

    Returns:
        The implied beta. None if the KL is at most 0.1 nats, or its derivative at most 0.05 nats or three standard
        errors (the decoder nearly ignores z); if the guide has no width (an autoencoder), or several layers, each with
        its own width; under a VampPrior, which widens with the guide; if all images are the same; and if the ratio is
        negative, since wider posteriors would then improve both terms or worsen both.

    Source: ours.
    """
    check_support(vae.model, x)
    prior = get_shared_prior(vae, x)
    if isinstance(prior, LayeredDistribution | VampMixture):
        return None
    passes = x.split(max(1, pairs_per_pass(vae, x) // (2 * _BETA_DRAWS)))
    parts = [_slopes(vae, images, prior, _BETA_DRAWS) for images in passes]
    gain, rate, width, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    slope = Estimate.mean_of(rate)
    is_flat = not abs(slope.mean) > max(_LEAST_SLOPE, _STDERRS * slope.stderr)
    says_nothing = not float(kl.mean()) > _LEAST_KL
    if is_flat or says_nothing or not (width > 0).any() or (images_of(x) == images_of(x[:1])).all():
        return None
    beta = ratio_of_means(gain, rate)
    return None if beta.mean < -_STDERRS * beta.stderr else beta  # no training has a negative weight


def _log_likelihood(vae: LatentModel, x: Data, z: Tensor) -> Tensor:
    """(..., B) log p(x | z), nats. x: (B, *E), z: (..., B, L)."""
    return vae.likelihood(z, *further_of(x)).log_prob(images_of(x))


def _derivative(total: Tensor, log_c: Tensor) -> Tensor:
    """(B,) d total / d log_c; 0 if the total does not depend on it, as for a decoder that ignores z."""
    if not total.requires_grad:
        return torch.zeros_like(log_c)
    found = torch.autograd.grad(total, log_c, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(log_c) if found is None else found


def _slopes(vae: LatentModel, x: Data, prior: Distribution, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) each: d/dlog c of the reconstruction and of the KL, the draws' mean distance from m, and the KL."""
    with torch.no_grad():
        q = vae.posterior(*arguments_of(x))
        normals, p = normal_factors(q), normal_factors(prior)
        mean = compute_moments(q).mean
        away = q.sample((draws if normals is not None else 2 * draws,)) - mean
        if normals is not None:  # the mirror images of draws of a symmetric distribution are draws too
            away = torch.cat([away, -away])
    with torch.enable_grad():
        log_c = torch.zeros(len(x), dtype=mean.dtype, device=mean.device, requires_grad=True)
        z = mean + log_c.exp()[:, None] * away
        gain = _derivative(_log_likelihood(vae, x, z).sum(), log_c) / len(z)
        if normals is None or p is None:
            log_p = prior.log_prob(z)
            rate = -z.shape[-1] - _derivative(log_p.sum(), log_c) / len(z)
            kl = (q.log_prob(z) - log_p).mean(0)
        else:
            widened = Normal(normals.loc, log_c.exp()[:, None] * normals.scale)
            kl = kl_divergence(widened, p).sum(-1)
            rate = _derivative(kl.sum(), log_c)
    return gain.double(), rate.double(), away.abs().mean((0, 2)), kl.detach().double()
