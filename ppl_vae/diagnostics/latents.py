"""What a VAE's latents carry: KL and activity of each, the ELBO's parts, and the beta that its weights imply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ppl_vae.diagnostics.mixture import AggregatePosterior, factors, normal_factors
from ppl_vae.diagnostics.values import PerLatent
from ppl_vae.evidence.estimate import Estimate, ratio_of_means
from ppl_vae.evidence.moments import PosteriorMoments, compute_log_prob, compute_moments
from ppl_vae.hierarchy import Chain
from ppl_vae.parts.priors import VampPrior
from ppl_vae.runtime.batching import images_per_pass, pairs_per_pass
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.support import check_support
from ppl_vae.vae import VAE

# A latent is active where the variance of its posterior mean over images exceeds this, in the prior's unit (Burda et
# al. 2016, section 5).
ACTIVE_VARIANCE = 0.01

# The mutual information of N images' empirical distribution cannot exceed log N; above this share of it, it says
# little but that. Source: ours.
SATURATED_SHARE = 0.9

# Below this KL, nats, the implied beta is a ratio of nothings: a collapsed run of 0.0018 nats gave 0.17 +- 0.05.
# Source: ours.
_LEAST_KL = 0.1

# The rate must fall by this many nats a unit of log c, in magnitude and by three standard errors, for an implied beta:
# about the number of latents that the guide uses. Source: ours.
_LEAST_SLOPE = 0.05
_STDERRS = 3.0


@dataclass(frozen=True)
class LatentKL(PerLatent):
    """KL(q(z_l | x) || p(z_l)), nats a latent.

    Args:
        mean: (L,) nats, the mean over images.
        stderr: (L,) nats.
        num_images: N.
    """

    num_images: int


@dataclass(frozen=True)
class ActiveUnits:
    """Var_n E[z_l | x_n] / Var p(z_l), and whether it is above 0.01.

    Args:
        variance: (L,) float64, on the CPU; in variances of the prior, 1 each where that is a standard normal.
        stderr: (L,) float64; NaN for one image.
        active: (L,) bool.
        count: how many are active.
    """

    variance: Tensor
    stderr: Tensor
    active: Tensor
    count: int

    def to_json(self) -> dict[str, Any]:
        """As reports hold it."""
        return {"count": self.count, "variance": self.variance.tolist(), "stderr": self.stderr.tolist()}


@dataclass(frozen=True)
class ElboSplit:
    """ELBO = reconstruction - kl; kl = mutual information + marginal KL; marginal KL = TC + sum_l KL(q(z_l) || p(z_l)).

    All in nats an image. The three that need the latents' own densities are None where the guide or the prior is no
    product over latents by construction.

    Args:
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)).
        mutual_information: between z and which of the N images it came from, at most ``cap``.
        marginal_kl: KL(q(z) || p(z)), q(z) the aggregate posterior of the N images.
        total_correlation: KL(q(z) || prod_l q(z_l)).
        dimension_kl: (L,) KL(q(z_l) || p(z_l)).
        sum_of_dimension_kl: their sum, with its own error: the latents' errors are not independent.
        num_images: N.
        cap: log N.
    """

    reconstruction: Estimate
    kl: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate | None
    dimension_kl: LatentKL | None
    sum_of_dimension_kl: Estimate | None
    num_images: int
    cap: float

    @property
    def saturated(self) -> bool:
        """Whether the mutual information is within a tenth of its cap log N: then the marginal KL is overstated."""
        return self.mutual_information.mean > SATURATED_SHARE * self.cap

    def to_json(self) -> dict[str, Any]:
        """As reports hold it; None stays None."""
        names = ("reconstruction", "kl", "mutual_information", "marginal_kl", "total_correlation", "dimension_kl")
        found = {name: getattr(self, name) for name in (*names, "sum_of_dimension_kl")}
        held = {name: None if value is None else value.to_json() for name, value in found.items()}
        return held | {"num_images": self.num_images, "cap": self.cap, "saturated": self.saturated}


def _kl_by_latent(q: Any, p: Any) -> Tensor | None:
    """(B, L) KL(q(z_l | x) || p(z_l)): in closed form, else None."""
    q_l, p_l = factors(q), factors(p)
    if q_l is None or p_l is None:
        return None
    try:
        return kl_divergence(q_l, p_l).double()
    except NotImplementedError:
        return None


@serialize_threads()
@torch.no_grad()
def latent_kl(vae: VAE, x: Tensor, *, draws: int = 100) -> LatentKL | None:
    """(1/N) sum_n KL(q(z_l | x_n) || p(z_l)), by latent.

    In closed form where torch has one for the two distributions of a latent, else by draws of q.

    Args:
        vae: the VAE.
        x: images (N, *E), as the model sees them.
        draws: of q(z | x) an image, where there is no closed form.

    Returns:
        Nats a latent, or None where the guide or the prior is no product over latents by construction: then a latent
        has no KL of its own.

    Raises:
        ValueError: no image.
    """
    prior, posteriors = vae.prior(), AggregatePosterior.of(vae, x)
    if factors(prior) is None or not posteriors.is_factorized:
        return None
    kl = torch.cat([_kl_or_draws(q, prior, draws) for q in posteriors.groups])
    each = PerLatent.from_values(kl)
    return LatentKL(each.mean, each.stderr, len(x))


def _kl_or_draws(q: Any, prior: Any, draws: int) -> Tensor:
    closed = _kl_by_latent(q, prior)
    if closed is not None:
        return closed
    z = q.sample((draws,))
    return (factors(q).log_prob(z).double() - factors(prior).log_prob(z).double()).mean(0)


def active_units(codes: PosteriorMoments, prior_scale: Tensor | None = None) -> ActiveUnits:
    """A_l = Var_n E[z_l | x_n] / Var p(z_l), active where above 0.01.

    A prior that is learned sets the unit of its latents, so a variance says something in its unit alone. Where means
    are those of draws, what their error adds to the variance is taken off. The error is sqrt((mean_n d_n^4 - A^2) / N),
    d_n the deviation from the mean: that of a variance of independent images, whatever their distribution.

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
    each = PerLatent.from_values(squares)
    active = each.mean > ACTIVE_VARIANCE
    return ActiveUnits(each.mean, each.stderr, active, int(active.sum()))


@serialize_threads()
@torch.no_grad()
def elbo_split(vae: VAE, x: Tensor, *, draws: int = 1) -> ElboSplit:
    """E KL(q(z | x) || p(z)) = I(z; n) + KL(q(z) || p(z)), and KL(q(z) || p(z)) = TC + sum_l KL(q(z_l) || p(z_l)).

    q(z) = (1/N) sum_n q(z | x_n) over exactly these N images, and I is the mutual information between z and the index
    n, uniform on them. I = E[log q(z | x) - log q(z)] is estimated by draws of q(z | x_n); no draw gives more than
    log N. The KL is taken in closed form where there is one, and the marginal KL is what I leaves of it, so both
    identities hold exactly in the numbers returned.

    What N does to them: I is of these N images, and grows with N up to that of the population of images. Where the
    posteriors are so narrow that they hardly overlap, it sits at log N (9.2 nats for 10,000 images) whatever the
    population's is, and the marginal KL is overstated by all that the cap took: see ``ElboSplit.saturated``. Likewise
    by latent, where overlap is far greater. The errors are over images, the mixture q(z) taken as given.

    Args:
        vae: the VAE, whose guide has a density.
        x: images (N, *E), as the model sees them.
        draws: of q(z | x) an image.

    Raises:
        ValueError: no image, one off the support of p(x | z), or no draw.

    Reference: Hoffman and Johnson 2016, ELBO surgery; Chen et al. 2018, arXiv 1802.04942, equation 2 (the total
    correlation; there by minibatches). The closed-form KL with sampled information is ours.
    """
    draws = check_count("draws", draws)
    check_support(vae.model, x)
    q, prior = AggregatePosterior.of(vae, x), vae.prior()
    by_latent = factors(prior) is not None and q.is_factorized
    parts = [_one_draw(vae, x, q, prior, by_latent=by_latent) for _ in range(draws)]
    reconstruction, kl, information = (torch.stack(part).mean(0) for part in zip(*(p[:3] for p in parts), strict=True))
    total = of_latents = sum_of_latents = None
    if by_latent:
        kl_by_latent, information_by_latent = (
            torch.stack(part).mean(0) for part in zip(*(p[3:] for p in parts), strict=True)
        )
        left = kl_by_latent - information_by_latent
        total, sum_of_latents = (
            Estimate.from_values(kl - information - left.sum(-1)),
            Estimate.from_values(left.sum(-1)),
        )
        each = PerLatent.from_values(left)
        of_latents = LatentKL(each.mean, each.stderr, len(x))
    return ElboSplit(
        reconstruction=Estimate.from_values(reconstruction),
        kl=Estimate.from_values(kl),
        mutual_information=Estimate.from_values(information),
        marginal_kl=Estimate.from_values(kl - information),
        total_correlation=total,
        dimension_kl=of_latents,
        sum_of_dimension_kl=sum_of_latents,
        num_images=len(x),
        cap=math.log(len(x)),
    )


def _one_draw(vae: VAE, x: Tensor, q: AggregatePosterior, prior: Any, *, by_latent: bool) -> tuple[Tensor, ...]:
    """Of one z ~ q(z | x_n) an image: reconstruction, KL and information (N,); and by latent the last two, (N, L)."""
    z = q.sample()
    own = q.log_prob_per_image(z)
    information = own - q.log_prob(z)
    reconstruction = _log_likelihood(vae, x, z)
    if not by_latent:
        return reconstruction, own - compute_log_prob(prior, z), information
    own_by_latent = q.log_prob_per_latent(z)
    closed = [_kl_by_latent(group, prior) for group in q.groups]
    found = [kl for kl in closed if kl is not None]
    sampled = own_by_latent - factors(prior).log_prob(z).double()
    kl = torch.cat(found) if len(found) == len(closed) else sampled
    return reconstruction, kl.sum(-1), information, kl, own_by_latent - q.log_prob_by_latent(z)


def _log_likelihood(vae: VAE, x: Tensor, z: Tensor) -> Tensor:
    """(N,) log p(x_n | z_n), nats, float64."""
    size = images_per_pass(x, vae.likelihood)
    passes = zip(x.split(size), z.split(size), strict=True)
    return torch.cat([vae.likelihood(codes).log_prob(images).double() for images, codes in passes])


@serialize_threads()
def implied_beta(vae: VAE, x: Tensor, *, draws: int = 8) -> Estimate | None:
    """beta = (d/dlog c E_q[log p(x | z)]) / (d/dlog c KL(q || p)) at c = 1, c a factor on all of the guide's scales.

    Training with weight beta stops where no change of the guide improves reconstruction - beta KL; in particular not
    widening every posterior about its mean, z = m + c (z_0 - m), z_0 ~ q(z | x). So the weights say which beta they
    were trained with, in the unit of the likelihood's nats: a mean over D pixels implies D. It is a statement of the
    guide's widths alone. Where training was cut short, or the guide cannot express other widths, it is not the beta
    asked for; free bits, which stop the KL's pressure, imply less. A latent whose posterior is the prior adds nothing
    to either derivative. A VampPrior is made of the guide's posteriors, so its components widen with them.

    d log p(x | z) / d log c is by autograd at the draws, in pairs z_0 and 2 m - z_0, whose linear terms cancel. The
    KL's is in closed form for normals (for a standard normal prior sum_l s_l^2 - 1), else -L - E[d log p(z) / d log c]
    at the draws. The error is the delta method's, over images.

    Args:
        vae: the VAE. Its weights are not changed, and get no gradient.
        x: images (N, *E), as the model sees them.
        draws: pairs of draws an image.

    Returns:
        The implied beta, or None where the KL is not above 0.1 nats or does not respond to the widths by more than 0.05
        nats and three standard errors (the decoder ignores z, or nearly), where the guide has no width (an
        autoencoder), where it has several layers, each with a width of its own, where all images are alike, and where
        the ratio is negative, since wider posteriors would improve both terms or worsen both.

    Raises:
        ValueError: no image, one off the support of p(x | z), or no draw.

    Source: ours.
    """
    draws = check_count("draws", draws)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    check_support(vae.model, x)
    prior = vae.prior()
    if isinstance(prior, Chain):
        return None
    passes = x.split(max(1, pairs_per_pass(vae, x) // (2 * draws)))
    parts = [_slopes(vae, images, prior, draws) for images in passes]
    gain, rate, width, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    slope = Estimate.from_values(rate)
    is_flat = not abs(slope.mean) > max(_LEAST_SLOPE, _STDERRS * slope.stderr)
    says_nothing = not float(kl.mean()) > _LEAST_KL
    if is_flat or says_nothing or not (width > 0).any() or (x == x[:1]).all():
        return None
    beta = ratio_of_means(gain, rate)
    return None if beta.mean < -_STDERRS * (beta.stderr or 0.0) else beta  # no training has a negative weight


def _derivative(total: Tensor, log_c: Tensor) -> Tensor:
    """(B,) d total / d log_c: 0 where the total does not depend on it at all, as with a decoder of no latent."""
    if not total.requires_grad:
        return torch.zeros_like(log_c)
    found = torch.autograd.grad(total, log_c, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(log_c) if found is None else found


def _log_prior(part: Any, prior: Any, z: Tensor, log_c: Tensor) -> Tensor:
    """log p(z) once all of the guide's scales are c times as wide, each about its own mean.

    Of a VampPrior, (1/K) sum_k q_k(m_k + (z - m_k) / c) / c^L; no other prior has the guide's scales.

    Args:
        part: the VAE's prior.
        prior: what it returns.
        z: (S, B, L).
        log_c: (B,).

    Returns:
        (S, B) nats.
    """
    if not isinstance(part, VampPrior):
        return prior.log_prob(z)
    components = prior.component_distribution
    with torch.no_grad():
        mean = compute_moments(components).mean
    nearer = mean + (z[..., None, :] - mean) * (-log_c).exp()[:, None, None]
    log_p = components.log_prob(nearer) + prior.mixture_distribution.logits.log_softmax(-1)
    return log_p.logsumexp(-1) - z.shape[-1] * log_c


def _slopes(vae: VAE, x: Tensor, prior: Any, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) each: d/dlog c of the reconstruction and of the KL, the draws' mean distance from m, and the KL itself."""
    with torch.no_grad():
        q = vae.posterior(x)
        normals, p = normal_factors(q), normal_factors(prior)
        mean = compute_moments(q).mean
        away = q.sample((draws if normals is not None else 2 * draws,)) - mean
        if normals is not None:  # symmetric, so that the mirrored draws are draws too
            away = torch.cat([away, -away])
    with torch.enable_grad():
        log_c = torch.zeros(len(x), dtype=mean.dtype, device=mean.device, requires_grad=True)
        z = mean + log_c.exp()[:, None] * away
        gain = _derivative(vae.likelihood(z).log_prob(x).sum(), log_c) / len(z)
        if normals is None or p is None:
            log_p = _log_prior(vae.prior, prior, z, log_c)
            rate = -z.shape[-1] - _derivative(log_p.sum(), log_c) / len(z)
            kl = (q.log_prob(z) - log_p).mean(0)
        else:
            widened = Normal(normals.loc, log_c.exp()[:, None] * normals.scale)
            kl = kl_divergence(widened, p).sum(-1)
            rate = _derivative(kl.sum(), log_c)
    return gain.double(), rate.double(), away.abs().mean((0, 2)), kl.detach().double()
