"""Proposals of each image's own: the guide refined, fitted to posterior draws, or defended, for importance sampling.

    q = refined(vae, x, family=FullNormal(L))                  # a normal for each image, no longer the encoder's
    evaluate(with_guide(vae, defensive(q)), x, num_particles=5000, seed=0)

q is made with draws of its own, before the particles that L_S is made of: given q these are independent, so L_S stays a
lower bound on log p(x), whatever q is. The model p(x, z) is what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.capture import compiled, is_capturing, replaced
from ppl_vae.evidence import importance, in_evaluation_mode, particles_a_pass, weighed_a_pass
from ppl_vae.exploration import encode
from ppl_vae.missing import Defended
from ppl_vae.posteriors import MAX_LOG_SCALE, DiagonalNormal, FullNormal, bounded_log_scale, exponential_log_scale
from ppl_vae.posteriors.flow import ConditionedFlow
from ppl_vae.vae import VAE
from ppl_vae.weights import is_deterministic

OBJECTIVES = ("elbo", "importance")

# Adam's, as torch.optim.Adam has them by default.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8

_CHOOSING_PARTICLES = 500  # of each of an image's two q, the start and the refined one, when they are compared


class Proposal(dist.TorchDistribution):
    """q(z | x_n) = family(h_n), n = 1..N: a distribution for each of N images, which it knows.

    Args:
        family: features (..., F) -> a distribution with batch shape (...) and event shape (L,).
        h: features (N, F).
        x: the images (N, *E).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, the name and type that torch asks for
    support = constraints.real_vector

    def __init__(self, family: Any, h: Tensor, x: Tensor) -> None:
        self.family, self.h, self.x = family, h, x
        self._q = family(h)
        super().__init__(self._q.batch_shape, self._q.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """As the family has it."""
        return self._q.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """With another batch shape: the distribution alone, without its images."""
        return self._q.expand(batch_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + (N, L), without gradients."""
        with torch.no_grad():
            return self._q.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + (N, L)."""
        return self._q.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """value: (..., N, L) -> (..., N) nats."""
        return self._q.log_prob(value)


class OfItsImages(nn.Module):
    """x (B, *E) -> q(z | x), for images that are among the N that a proposal was made for.

    They are found by their pixels, so they may come in any order and in any groups.

    Args:
        q: the proposal.
        guide: the VAE's own, kept because a VampPrior uses its weights.

    Raises:
        ValueError: an image that is none of them. A compiled graph cannot raise, and gives NaN in its place.
    """

    pixels: Tensor
    direction: Tensor
    keys: Tensor
    h: Tensor

    def __init__(self, q: Proposal, guide: Any) -> None:
        super().__init__()
        self.family = q.family
        self.guide = guide
        self.event_shape = tuple(q.event_shape)
        pixels = q.x.detach().flatten(1)
        direction = torch.randn(pixels.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.double)
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("direction", direction.to(pixels.device), persistent=False)
        self.register_buffer("keys", pixels.double() @ self.direction, persistent=False)
        self.register_buffer("h", q.h.detach(), persistent=False)

    def forward(self, x: Tensor) -> Any:
        """x: (B, *E) -> batch shape (B,), event shape (L,)."""
        pixels = x.flatten(1)
        if pixels.shape[1] != self.pixels.shape[1]:
            raise ValueError(f"x: expected images of {self.pixels.shape[1]} pixels, got {pixels.shape[1]}")
        # The nearest along one direction, and then every pixel: to compare with all images is N / B times the work.
        nearest = ((pixels.double() @ self.direction)[:, None] - self.keys).abs().argmin(1)
        known = (self.pixels[nearest] == pixels).all(1)
        if not is_capturing() and not known.all():
            raise ValueError(
                f"x: expected images that the proposal was made for, got {int((~known).sum())} of {len(x)} that are "
                f"not among its {len(self.pixels)}"
            )
        return self.family(torch.where(known[:, None], self.h[nearest], math.nan))


def with_guide(vae: Any, q: Proposal) -> VAE:
    """p(x, z) of the VAE with q in the place of its guide, for the images that q was made for.

    ``evidence.evaluate`` and ``importance`` take it as any VAE, compiled or not.

    Args:
        vae: a VAE, or a hierarchical one, whose layers' latents are then one vector and one site.
        q: of ``refined``, ``fitted`` or ``defensive``.

    Returns:
        A VAE that shares the prior and the likelihood.

    Raises:
        ValueError: a q that does not know its images. When it is used: an image that q was not made for; compiled,
            ``NotFinite`` in its place.
    """
    if not isinstance(q, Proposal):
        raise ValueError(f"q: expected a Proposal, which knows its images, got {type(q).__name__}")
    return VAE(vae.prior, vae.likelihood, OfItsImages(q, vae.posterior)).train(vae.training)


# --- Refined ---


def refined(
    vae: Any,
    x: Tensor,
    *,
    steps: int = 300,
    num_particles: int = 8,
    objective: str = "elbo",
    family: Any = None,
    learning_rate: float = 0.05,
    compile: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Proposal:
    """h_n* = argmax_h ELBO_n(h), or E[L_k,n(h)], of q(z | x_n) = family(h), for each image by itself.

    The features h start at the encoder's, net(x_n), and follow Adam at a rate that falls to zero, along reparametrized
    gradients that leave the density's own score out. What images share, the decoder, the prior and the layers of a flow
    guide, stays as it is: of a flow guide only the features are refined. At the end an image keeps the better of the
    start and the refined q, by 500 fresh draws of each, so up to their noise refining never loses. Whoever measures q
    with draws of their own then has an unbiased number.

    Draws come from torch's global generator. The VAE is used in evaluation mode, and left as it was.

    Args:
        vae: with a guide ``Conditional(net, family)``; any, also a hierarchical one, where ``family`` is given.
        x: images (N, *E).
        steps: of Adam.
        num_particles: k, draws an image and a step.
        objective: "elbo", or "importance", which maximizes L_k, and leads to a wider q.
        family: ``DiagonalNormal`` or ``FullNormal`` of L latents, which start at the guide's moments. By default the
            guide's own.
        learning_rate: of Adam at first.
        compile: whether a step is one compiled graph.
        progress: called with the number of images after each step of a group of them, N times ``steps`` in all.

    Returns:
        q, batch shape (N,), event shape (L,).

    Raises:
        ValueError: a guide without features of an image, and no family; a deterministic guide; or an argument out of
            its range.
        CannotCapture: a ValueError; see ``capture.compiled``.

    Reference: Cremer et al. 2018, arXiv 1801.03558, section 4; Kim et al. 2018, arXiv 1802.02550. The gradients: Roeder
    et al. 2017, arXiv 1703.09194 (ELBO), and Tucker et al. 2019, arXiv 1810.04152 (L_k).
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    for name, count in {"steps": steps, "num_particles": num_particles, "len(x)": len(x)}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    with in_evaluation_mode(vae), pyro.validation_enabled(False):
        start = _start(vae, x, family)
        descent = _Descent(vae, start.family, objective=objective, num_particles=num_particles)
        schedule = _schedule(steps, learning_rate, start.h)
        groups = _even_groups(len(x), max(1, weighed_a_pass(vae, x) // num_particles))
        step: Callable[[list[Tensor]], Any] = descent.step
        if compile:
            first = groups[0]
            step = compiled(lambda *state: descent.step(state), descent.begin(x[first], start.h[first]))
        h = start.h.clone()
        for index in groups:
            state = descent.begin(x[index], start.h[index])
            for scalars in schedule:
                state[-1].copy_(scalars)
                step(state)
                if progress is not None:
                    progress(len(index.unique()))
            h[index] = state[-4]
        return _better(vae, start, h, 1 if objective == "elbo" else num_particles)


@torch.no_grad()
def _start(vae: Any, x: Tensor, family: Any) -> Proposal:
    """What refinement starts from."""
    posterior = vae.posterior
    if is_deterministic(posterior(x[:1])):
        raise ValueError("vae: expected a guide with a density, got a deterministic one (Delta)")
    if family is not None:
        codes = encode(vae, x)
        return Proposal(family.to(x.device), _normal_features(family, codes.mean, torch.diag_embed(codes.scale)), x)
    net, own = getattr(posterior, "net", None), getattr(posterior, "family", None)
    if net is None or own is None:
        raise ValueError(
            "vae: expected a guide Conditional(net, family), which has features of each image to refine, got "
            f"{type(posterior).__name__}; with family=FullNormal(L) a normal of all latents takes its place"
        )
    return Proposal(own, torch.cat([net(part) for part in x.split(particles_a_pass(x))]), x)


class _Descent:
    """Steps of Adam in the features h (B, F) of a batch of images."""

    def __init__(self, vae: Any, family: Any, *, objective: str, num_particles: int) -> None:
        self._vae, self._family = vae, family
        self._objective, self._num_particles = objective, num_particles
        self._parts = nn.ModuleList([vae, family])
        values = dict(self._parts.named_parameters()) | dict(self._parts.named_buffers())
        self._names, self._tensors = list(values), [value.detach() for value in values.values()]

    def begin(self, x: Tensor, h: Tensor) -> list[Tensor]:
        """What ``step`` takes: weights and buffers, x, h, Adam's two moments, and the scalars of a step."""
        return [*self._tensors, x.contiguous(), h.clone(), torch.zeros_like(h), torch.zeros_like(h), h.new_zeros(2)]

    def step(self, state: Any) -> tuple[Tensor, ...]:
        """One step, which changes h and its moments in place. Returns what is minimized, (), nats."""
        *tensors, x, h, first, second, scalars = state
        rate, root_of_correction = scalars.unbind()
        with replaced(self._parts, dict(zip(self._names, tensors, strict=True))):
            slope, loss = torch.func.grad_and_value(self._loss)(h, x)
        first.copy_(first + (1 - _BETA_1) * (slope - first))
        second.copy_(second + (1 - _BETA_2) * (slope * slope - second))
        h.copy_(h - rate * first / (second.sqrt() / root_of_correction + _EPSILON))
        return (loss.detach(),)

    def _loss(self, h: Tensor, x: Tensor) -> Tensor:
        """Its slope in h is minus that of the bound's expectation; its value is a weighted mean of log-weights."""
        z = self._family(h).rsample(torch.Size([self._num_particles]))
        log_q = self._family(h.detach()).log_prob(z)  # of another object, which does not know z as its own draw
        log_w = self._vae.prior().log_prob(z) + self._vae.likelihood(z).log_prob(x) - log_q
        if self._objective == "elbo":
            return -log_w.mean(0).sum()
        return -(log_w.detach().softmax(0).square() * log_w).sum()


def _schedule(steps: int, learning_rate: float, like: Tensor) -> Tensor:
    """(steps, 2): rate_t / (1 - beta_1^t), the rate a falling half cosine, and sqrt(1 - beta_2^t)."""
    t = torch.arange(1, steps + 1, dtype=torch.double)
    rate = learning_rate * (1 + (math.pi * (t - 1) / steps).cos()) / 2
    return torch.stack([rate / (1 - _BETA_1**t), (1 - _BETA_2**t).sqrt()], dim=1).to(like)


def _even_groups(num_images: int, most: int) -> list[Tensor]:
    """Places in groups of one size, not above ``most``, since a graph is for one; the last repeats its last image."""
    count = math.ceil(num_images / most)
    size = math.ceil(num_images / count)
    return [torch.arange(g, g + size).clamp(max=num_images - 1) for g in range(0, num_images, size)]


@torch.no_grad()
def _better(vae: Any, start: Proposal, h: Tensor, num_particles: int) -> Proposal:
    """Each image's better one of two, by L_k of fresh draws of both."""
    h = torch.where(h.isfinite().all(1, keepdim=True), h, start.h)
    before, after = (_bound(vae, q, num_particles) for q in (start, Proposal(start.family, h, start.x)))
    return Proposal(start.family, torch.where((after > before)[:, None], h, start.h), start.x)


def _bound(vae: Any, q: Proposal, num_particles: int) -> Tensor:
    """(N,) E[L_k]: the mean over blocks of k particles."""
    guided = with_guide(vae, q)
    if num_particles == 1:
        return importance(guided.model, guided.guide, q.x, num_particles=_CHOOSING_PARTICLES).elbo
    blocks = math.ceil(_CHOOSING_PARTICLES / num_particles)
    bounds = (importance(guided.model, guided.guide, q.x, num_particles=num_particles) for _ in range(blocks))
    return torch.stack([bound.log_evidence for bound in bounds]).mean(0)


# From log-scales to features, for the maps with a known inverse. At 6.99 the bounded one's is 25, where it still bends.
_INVERSES: dict[Any, Callable[[Tensor], Tensor]] = {
    bounded_log_scale: lambda log_scale: MAX_LOG_SCALE * (log_scale.clamp(-6.99, 6.99) / MAX_LOG_SCALE).atanh(),
    exponential_log_scale: lambda log_scale: log_scale,
}


def _normal_features(family: Any, loc: Tensor, T: Tensor) -> Tensor:
    """(N, F) h of Normal(z; loc, T T'), T (N, L, L) lower triangular; a ``DiagonalNormal`` takes its diagonal."""
    inverse = _INVERSES.get(getattr(family, "log_scale", None))
    if inverse is None or not isinstance(family, DiagonalNormal | FullNormal):
        raise ValueError(
            "family: expected DiagonalNormal or FullNormal, with log_scale bounded_log_scale or exponential_log_scale, "
            f"got {type(family).__name__}"
        )
    L = loc.shape[1]
    if tuple(family.event_shape) != (L,):
        raise ValueError(f"family: expected {L} latents, as the guide has, got {family.event_shape[0]}")
    diagonal = T.diagonal(dim1=-2, dim2=-1)
    h = [loc, inverse(diagonal.log())]
    if isinstance(family, FullNormal):
        row, column = torch.tril_indices(L, L, offset=-1)
        h.append((T / diagonal[:, :, None] * math.sqrt(L))[:, row, column])
    return torch.cat(h, dim=-1)


# --- Fitted ---


@torch.no_grad()
def fitted(z: Tensor, x: Tensor, *, shrinkage: float | None = None) -> Proposal:
    """Normal(z; mean, C), C_ij = (1 - a) S_ij for i != j, C_ii = S_ii: mean and covariance S of an image's M draws.

    Draws may come of a pilot's chains. They must not be those whose log-weights a bound takes, since a proposal that
    has seen its particles is none. Scales of a few draws are uncertain: ``defensive`` guards against narrow ones.

    Args:
        z: draws of p(z | x), (M, N, L), about independent of each other.
        x: the images (N, *E).
        shrinkage: a, from 0 to 1; by default what minimizes the correlations' expected squared error, for each image.

    Returns:
        q, batch shape (N,), event shape (L,).

    Raises:
        ValueError: shapes that do not fit, fewer than three draws, or a shrinkage out of its range.

    Reference: Schäfer and Strimmer 2005, Statistical Applications in Genetics and Molecular Biology 4(1), table 1,
    target D, equation 10.
    """
    if z.dim() != 3 or z.shape[1] != len(x) or len(z) < 3:
        raise ValueError(
            f"z: expected shape (M, {len(x)}, L) with at least 3 draws of each image, got {tuple(z.shape)}"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: expected a number from 0 to 1, got {shrinkage}")
    loc, scale = z.double().mean(0), z.double().std(0)
    u = (z.double() - loc) / scale
    r = torch.einsum("mni,mnj->nij", u, u) / (len(z) - 1)
    a = _shrinkage_of_correlations(u, r) if shrinkage is None else r.new_full((len(x),), shrinkage)
    # A trace of the identity: with fewer draws than latents and no shrinkage a correlation matrix is singular.
    a = a.clamp(min=1e-6)[:, None, None]
    r = (1 - a) * r + a * torch.eye(z.shape[2], dtype=r.dtype, device=r.device)
    family = FullNormal(z.shape[2], log_scale=exponential_log_scale).to(z.device)
    h = _normal_features(family, loc, scale[:, :, None] * torch.linalg.cholesky(r))
    return Proposal(family, h.to(z.dtype), x)


def _shrinkage_of_correlations(u: Tensor, r: Tensor) -> Tensor:
    """(N,) sum_{i != j} Var(r_ij) / sum_{i != j} r_ij^2, from 0 to 1. u: standardized (M, N, L), r: (N, L, L)."""
    M, L = len(u), u.shape[2]
    mean = r * (M - 1) / M
    spread = torch.einsum("mni,mnj->nij", u.square(), u.square()) - M * mean.square()
    off = ~torch.eye(L, dtype=torch.bool, device=u.device)
    variance = (M / (M - 1) ** 3 * spread)[:, off].sum(-1)
    return (variance / r.square()[:, off].sum(-1)).nan_to_num(1.0).clamp(0, 1)


# --- Defended ---


class Defensive(nn.Module):
    """h -> (1 - a) q(z | h) + a q_c(z | h), q_c as q with its scales c times as wide.

    Args:
        family: of q, normal or a flow.
        share: a.
        widen: c.
    """

    def __init__(self, family: Any, *, share: float, widen: float) -> None:
        super().__init__()
        self.family, self.share, self.widen = family, share, widen
        self.event_shape, self.num_features = family.event_shape, family.num_features

    def forward(self, h: Tensor) -> Any:
        """h: (..., F) -> batch shape (...), event shape (L,)."""
        return _with_wide_share(self.family(h), self.share, self.widen)


def defensive(q: Any, *, share: float = 0.1, widen: float = 2.0) -> Any:
    """q'(z) = (1 - a) q(z) + a q_c(z), q_c as q with its scales c times as wide.

    Where q is too narrow weights p(x, z) / q(z) have no bound, and may have no variance. Those of q' do not exceed
    p(x, z) / (a q_c(z)), which is bounded where the posterior's tails are lighter than those of q_c; and nowhere are
    they above 1 / (1 - a) times those of q. In many dimensions a little is wide: with 40 latents and c = 2 almost no
    draw of q_c is where the posterior is. Its share of the particles is then the premium of an insurance, and no gain.

    Args:
        q: a ``Proposal``, a normal, diagonal or full, or a flow of one, batch shape (B,).
        share: a, between 0 and 1.
        widen: c, above 1.

    Returns:
        A ``Proposal`` of the same images where q is one, else a distribution, batch shape (B,).

    Raises:
        ValueError: an argument out of its range, or a distribution of another kind.

    Reference: Hesterberg 1995, Technometrics 37(2), 185-194; Owen and Zhou 2000, JASA 95(449), 135-143.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if not widen > 1:
        raise ValueError(f"widen: expected a number above 1, got {widen}")
    if isinstance(q, Proposal):
        return Proposal(Defensive(q.family, share=share, widen=widen), q.h, q.x)
    return _with_wide_share(q, share, widen)


def _with_wide_share(q: Any, share: float, widen: float) -> Any:
    if isinstance(q, ConditionedFlow):  # its noise is widened, and the density stays one pass through the layers
        noise = _with_wide_share(q.base, share, widen)
        noise = _Noise(noise.proposal, noise.prior, noise.share)
        return ConditionedFlow(noise, q.layers, context=q.context, loc=q.loc, log_scale=q.log_scale, checked=False)
    wide = _widened(q, widen)
    return Defended(q, wide, torch.full(q.batch_shape, share, dtype=q.mean.dtype, device=q.mean.device))


def _widened(q: Any, widen: float) -> Any:
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc, scale_tril=widen * q._unbroadcasted_scale_tril)
    base = getattr(q, "base_dist", None)
    if isinstance(q, torch.distributions.Independent) and isinstance(base, torch.distributions.Normal):
        return dist.Normal(base.loc, widen * base.scale).to_event(q.reinterpreted_batch_ndims)
    raise ValueError(f"q: expected a normal or a flow of one, which can be widened, got {type(q).__name__}")


class _Noise(Defended):
    """The mixture as the noise of a flow, which asks for reparametrized draws; nothing in it has a gradient."""

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """sample_shape + batch shape + (L,)."""
        return self.sample(sample_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Noise:
        """With another batch shape."""
        return _Noise(self.proposal.expand(batch_shape), self.prior, self.share.expand(batch_shape))


# --- As many particles as an image asks for ---


class Adaptive(NamedTuple):
    """Estimates of log p(x), no bounds; every field is (N,).

    ``estimate`` is log (1/S_n) sum_s w_s in nats, float64; ``num_particles`` S_n, int64. ``bias`` is the delta method's
    estimate of what it lacks, Var(w) / (2 S E[w]^2), and ``rise`` what the last doubling changed, estimate minus the
    mean of its two halves; NaN where there was none. Both are nats, float64.
    """

    estimate: Tensor
    num_particles: Tensor
    bias: Tensor
    rise: Tensor


@torch.no_grad()
def adaptive(
    vae: Any,
    x: Tensor,
    *,
    num_particles: int = 1000,
    most: int = 64_000,
    tolerance: float = 0.02,
    progress: Callable[[int], None] | None = None,
) -> Adaptive:
    """log (1/S_n) sum_{s <= S_n} w_s, S_n doubled until an image's bias and rise are within the tolerance.

    It is an estimate and no bound: how many particles there are depends on what they were, so that images whose weights
    happen to agree stop early, whether too low or too high. All particles count. Draws come from torch's global
    generator; values are not validated.

    Args:
        vae: any, also ``with_guide``'s.
        x: images (N, *E).
        num_particles: S at first.
        most: where doubling ends, whatever the tolerance says.
        tolerance: nats.
        progress: called with the number of images that are done, N in all.

    Returns:
        ``Adaptive``.

    Raises:
        ValueError: ``most`` below ``num_particles``, or as ``importance``.

    Source: ours.
    """
    if most < num_particles:
        raise ValueError(f"most: expected at least num_particles, {num_particles}, got {most}")
    bias = torch.full((len(x),), math.nan, dtype=torch.double, device=x.device)
    rise, log_mean, log_mean_square = bias.clone(), bias.clone(), bias.clone()
    counts, waiting, old = torch.zeros_like(bias, dtype=torch.long), torch.arange(len(x), device=x.device), 0
    with in_evaluation_mode(vae), pyro.validation_enabled(False):
        while len(waiting):
            fresh = old or num_particles
            result = importance(vae.model, vae.guide, x[waiting], num_particles=fresh)
            before, log_square = log_mean[waiting], 2 * result.log_evidence + (fresh / result.ess).log()
            log_mean[waiting] = _joined(before, old, result.log_evidence, fresh)
            log_mean_square[waiting] = _joined(log_mean_square[waiting], old, log_square, fresh)
            old += fresh
            counts[waiting] = old
            bias[waiting] = ((log_mean_square - 2 * log_mean)[waiting].exp() - 1).clamp(min=0) / (2 * old)
            if old > fresh:
                rise[waiting] = log_mean[waiting] - (before + result.log_evidence) / 2
            done = (bias[waiting] <= tolerance) & ~(rise[waiting] > tolerance) | (2 * old > most)
            if progress is not None and done.any():
                progress(int(done.sum()))
            waiting = waiting[~done]
    return Adaptive(log_mean, counts, bias, rise)


def _joined(a: Tensor, count_a: int, b: Tensor, count_b: int) -> Tensor:
    """The logarithm of the mean over both sets, from those over each."""
    if count_a == 0:
        return b
    total = count_a + count_b
    return torch.logaddexp(a + math.log(count_a / total), b + math.log(count_b / total))
