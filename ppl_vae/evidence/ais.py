"""Annealed importance sampling: log p(x) from below on any images, and from above on images of the model's own.

    pi_t(z) proportional to q_0(z | x)^(1 - beta_t) p(x, z)^beta_t,    0 = beta_0 < ... < beta_T = 1
    log w = sum_{t=1}^T (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q_0(z_{t-1} | x))

z_0 ~ q_0(z | x), and z_t comes of z_{t-1} by a transition of Hamiltonian Monte Carlo that leaves pi_t invariant. Then
E[w] = p(x), so that log w is a lower bound on log p(x) in expectation. Run backward from an exact draw of p(z | x) the
same sum gives E[1/w] = 1/p(x), and an upper bound. Such a draw exists where x came of the model itself: it is the z
that x was made of. Of real images there is no upper bound.

    annealing = pilot(vae, x, betas=temperatures(1000), num_leapfrogs=5, num_chains=16)
    below = lower_bound(lower(vae, x, annealing, num_chains=16).log_w)

Every bound needs step sizes that do not depend on the chain that they move, so ``pilot`` finds them with draws of its
own, and they are frozen. Draws come from torch's global generator. Memory grows with chains times images: callers pass
blocks of images, see ``images_a_block``.

Reference: Neal 2001, arXiv physics/9803008; Grosse et al. 2015 and 2016, arXiv 1511.02543 and 1606.02275; for decoders
Wu et al. 2017, arXiv 1611.04273.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, interpolate

from ppl_vae.conditional import Conditional
from ppl_vae.evidence.hmc import Point, Terms, leapfrog, point_at, transition
from ppl_vae.evidence.moments import compute_moments, sample_latents
from ppl_vae.parts.posteriors.autoregressive import Autoregressive
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.capture import compiled, replaced
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import evaluation_mode, seeded, serialize_threads
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.support import check_support
from ppl_vae.vae import check_batch_shape, check_event_shape
from ppl_vae.weights import Deterministic, is_deterministic

Progress = Callable[[int], None]
Start = str  # "guide", "prior" or "normal"

STARTS = ("guide", "prior", "normal")

_MOST_PASSES = 2  # of a flow guide's network for one density; above, its density costs more than the decoder
_MOMENTS_SEED = 0  # of draws of a guide whose moments have no formula: the same start at every call

# A transition of a chain takes the step size times U(0.7, 1.3). A normal is gone through in circles, and paths of half
# of one take every chain to its mirror image, again and again. Source: Neal 2011, arXiv 1206.1901, section 3.2.
_JITTER = 0.3

# The pilot's rule. Source: ours.
_ACCEPTANCE = 0.7
_FIRST_STEP = 0.3
_GAIN = 0.2
_AT_FIRST = 20  # transitions at the first temperature, where the start is already a draw of nearly the target
_PILOT_TEMPERATURES = 100
_SMOOTHED = 5  # pilot temperatures on either side


class Annealing(NamedTuple):
    """All that a chain needs to run, fixed before it begins.

    Args:
        betas: (T + 1,) float64, rising from 0 to 1.
        step_sizes: (T - 1, B) of the transitions at beta_1..beta_{T-1}, in units of the start's scales.
        num_leapfrogs: of a transition.
        start: q_0, "guide", "prior" or "normal".
    """

    betas: Tensor
    step_sizes: Tensor
    num_leapfrogs: int
    start: Start


class Annealed(NamedTuple):
    """What C chains an image gave.

    Args:
        log_w: (C, B) float64, nats.
        acceptance: (T - 1, B) the mean probability of acceptance over the chains.
        z: (C, B, L) where the chains ended: a forward one about at p(z | x), a reverse one about at q_0(z | x).
    """

    log_w: Tensor
    acceptance: Tensor
    z: Tensor


def temperatures(num_temperatures: int, *, steepness: float = 4.0) -> Tensor:
    """beta_t = (s(u_t) - s(-d)) / (s(d) - s(-d)), u_t = d (2 t / T - 1), t = 0..T, s the logistic function.

    They lie densest at the two ends. With a steepness d of 0 they are evenly spaced.

    Args:
        num_temperatures: T.
        steepness: d.

    Returns:
        (T + 1,) float64, from 0 to 1.

    Raises:
        ValueError: T below 1, or d below 0.

    Reference: Grosse et al. 2015, arXiv 1511.02543, section 6 (there as in Wu et al. 2017, with d = 4).
    """
    num_temperatures = check_count("num_temperatures", num_temperatures)
    if steepness < 0:
        raise ValueError(f"steepness: expected at least 0, got {steepness}")
    even = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.double)
    if steepness == 0:
        return even
    s = (steepness * (2 * even - 1)).sigmoid()
    betas = (s - s[0]) / (s[-1] - s[0])
    betas[0], betas[-1] = 0, 1
    return betas


def lower_bound(log_w: Tensor) -> Tensor:
    """log (1/C) sum_c w_c, in expectation not above log p(x). log_w: (C, B) of ``lower`` -> (B,) nats."""
    return log_mean_exp(log_w)


def upper_bound(log_w: Tensor) -> Tensor:
    """-log (1/C) sum_c 1/w_c, in expectation not below log p(x). log_w: (C, B) of ``upper`` -> (B,) nats."""
    return -log_mean_exp(-log_w)


def start_of(vae: Any, start: Start) -> Start:
    """What chains of this VAE begin with where that start is asked for; see ``pilot``."""
    return "normal" if start == "guide" and _is_slow(vae.posterior) else start


@torch.no_grad()
def images_a_block(vae: Any, x: Tensor, num_chains: int) -> int:
    """How many images of x (N, *E) go into one call with C chains: C times as many z are decoded at once."""
    return max(1, pairs_per_pass(vae, x) // num_chains)


@serialize_threads()
@torch.no_grad()
def simulate(vae: Any, num_images: int) -> tuple[Tensor, Tensor]:
    """z ~ p(z), x ~ p(x | z): images with an exact draw of their posterior. -> x (N, *E) and z (N, L).

    Draws come from torch's global generator, in passes that fit into memory.

    Raises:
        ValueError: no images.
    """
    num_images = check_count("num_images", num_images)
    with _evaluating(vae):
        z = sample_latents(vae.prior(), num_images)
        first = vae.likelihood(z[:1]).sample()
        x = [vae.likelihood(part).sample() for part in z.split(pairs_per_pass(vae, first))]
    return torch.cat(x), z


@serialize_threads()
@torch.no_grad()
def pilot(
    vae: Any,
    x: Tensor,
    *,
    betas: Tensor,
    num_leapfrogs: int,
    num_chains: int,
    start: Start = "guide",
    compile: bool = False,
    progress: Progress | None = None,
) -> Annealing:
    """log step <- log step + 0.2 (acceptance - 0.7) along the temperatures: step sizes for the chains to come.

    For each image by itself, with chains of their own, at no more than 100 temperatures: what they find is smoothed
    over neighbors and interpolated. A step size that followed the chain that it moves would depend on where the chain
    is, which breaks both bounds.

    q_0 is the guide, also of several layers, whose density at any z takes one pass. Of an inverse autoregressive flow
    it takes a pass a latent, one after the other, at each leapfrog; "guide" there becomes "normal", the diagonal normal
    with the guide's means and scales (of draws with a seed of their own, where they have no formula). The annealing
    that is returned says which it is.

    Args:
        vae: with ``prior``, ``likelihood`` and ``posterior``; a ``VAE`` or a ``HierarchicalVAE``.
        x: images (B, *E).
        betas: (T + 1,) from 0 to 1; see ``temperatures``.
        num_leapfrogs: of a transition.
        num_chains: of an image. As many as will be measured, where ``compile`` is asked for: it is then one graph.
        start: q_0.
        compile: whether a leapfrog is one compiled graph. It is made once for each number of images and chains, for
            all temperatures and calls; the VAE's weights may change later, its structure may not.
        progress: called with numbers of temperatures, T in all.

    Returns:
        ``Annealing``.

    Raises:
        ValueError: no images, one off the support of p(x | z), an argument out of its range, discrete latents, or
            densities that draw noise, as those of dequantized levels do.
        Deterministic: a ValueError: the guide has no density.
        CannotCapture: a ValueError: ``compile`` is asked for and impossible.
        NotFinite: a density is NaN.
    """
    _check_betas(betas)
    inner = betas[1:-1].tolist()
    places = _spread(len(inner), _PILOT_TEMPERATURES)
    with _evaluating(vae):
        chains = _Chains(vae, x, start=start, num_chains=num_chains, num_leapfrogs=num_leapfrogs, compile=compile)
        point, reported = chains.begin(), 0
        log_step = point.z.new_full((len(x),), _FIRST_STEP).log()
        found = []
        for index, place in enumerate(places):
            for _ in range(1 if index else _AT_FIRST):
                point, acceptance = chains.move(point, inner[place], log_step.exp())
                log_step = log_step + _GAIN * (acceptance.mean(0) - _ACCEPTANCE)
            found.append(log_step)
            if progress is not None:
                progress(place + 1 - reported)
                reported = place + 1
    if progress is not None:
        progress(len(betas) - 1 - reported)
    log_steps = _interpolated(torch.stack(found), len(inner)) if found else point.z.new_zeros((0, len(x)))
    return Annealing(betas, log_steps.exp(), num_leapfrogs, chains.start)


def lower(
    vae: Any,
    x: Tensor,
    annealing: Annealing,
    *,
    num_chains: int,
    compile: bool = False,
    progress: Progress | None = None,
) -> Annealed:
    """log w of chains from q_0(z | x) to p(z | x): E[w] = p(x).

    Args:
        vae: as for ``pilot``.
        x: images (B, *E), those of the annealing.
        annealing: of ``pilot``.
        num_chains: C.
        compile: as for ``pilot``.
        progress: called with 1 after every temperature, T times.

    Returns:
        ``Annealed``; see ``lower_bound``.

    Raises:
        As ``pilot``.

    Reference: Neal 2001, arXiv physics/9803008, equation 11.
    """
    return _annealed(vae, x, None, annealing, num_chains=num_chains, compile=compile, progress=progress)


def upper(
    vae: Any,
    x: Tensor,
    z: Tensor,
    annealing: Annealing,
    *,
    num_chains: int,
    compile: bool = False,
    progress: Progress | None = None,
) -> Annealed:
    """log w of chains from p(z | x) to q_0(z | x), with the sign of the forward ones: E[1/w] = 1 / p(x).

    All chains of an image begin at its one exact draw, so they depend on each other, which the expectation allows.

    Args:
        vae: as for ``pilot``.
        x: images (B, *E) of the model, those of the annealing.
        z: (B, L) what they were made of; see ``simulate``.
        annealing: of ``pilot``, which never saw z.
        num_chains: C.
        compile: as for ``pilot``.
        progress: called with 1 after every temperature, T times.

    Returns:
        ``Annealed``; see ``upper_bound``.

    Raises:
        As ``pilot``; and z that is not one vector an image.

    Reference: Grosse et al. 2015, arXiv 1511.02543, section 3.
    """
    return _annealed(vae, x, z, annealing, num_chains=num_chains, compile=compile, progress=progress)


@serialize_threads()
@torch.no_grad()
def _annealed(
    vae: Any,
    x: Tensor,
    exact: Tensor | None,
    annealing: Annealing,
    *,
    num_chains: int,
    compile: bool,
    progress: Progress | None,
) -> Annealed:
    betas, T = annealing.betas.tolist(), len(annealing.betas) - 1
    _check_annealing(annealing, x)
    acceptances = annealing.step_sizes.new_zeros((T - 1, len(x)))
    with _evaluating(vae):
        chains = _Chains(
            vae,
            x,
            start=annealing.start,
            num_chains=num_chains,
            num_leapfrogs=annealing.num_leapfrogs,
            compile=compile,
        )
        point = chains.begin(exact)
        log_w = torch.zeros(point.z.shape[:-1], dtype=torch.double, device=x.device)
        for t in range(1, T + 1) if exact is None else range(T, 0, -1):
            log_start, log_joint = point.values.double()
            log_w += (betas[t] - betas[t - 1]) * (log_joint - log_start)
            after = t if exact is None else t - 1  # the transition that follows is at beta_after
            if 0 < after < T:
                point, acceptance = chains.move(point, betas[after], annealing.step_sizes[after - 1])
                acceptances[after - 1] = acceptance.mean(0)
            if progress is not None:
                progress(1)
    if log_w.isnan().any() or log_w.isposinf().any():
        raise NotFinite("log-weights: expected numbers, got NaN or +infinity")
    return Annealed(log_w, acceptances, point.z)


class _Chains:
    """C chains of each image, at any temperature.

    Attributes:
        start: q_0, as it was asked for or what stands in for it.
    """

    def __init__(
        self, vae: Any, x: Tensor, *, start: Start, num_chains: int, num_leapfrogs: int, compile: bool
    ) -> None:
        _check(vae, x, start=start, num_chains=num_chains, num_leapfrogs=num_leapfrogs)
        self.start = start_of(vae, start)
        self._vae, self._x = vae, x
        self._num_chains, self._num_leapfrogs, self._compile = num_chains, num_leapfrogs, compile
        with _nothing_drawn(x.device):
            self._features = _features(vae, x, self.start)
            self._q_0, self._terms = _densities(vae, self.start, x, self._features)
        self._scale = _scale(self._q_0, len(x))
        weights = dict(vae.named_parameters()) | dict(vae.named_buffers())
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] | None = None

    def begin(self, z: Tensor | None = None) -> Point:
        """The chains at draws of q_0, or all chains of an image at its z, (B, L)."""
        C, B = self._num_chains, len(self._x)
        if z is None:
            z = self._q_0.sample((C,) if len(self._q_0.batch_shape) else (C, B))
        elif tuple(z.shape) != tuple(self._scale.shape):
            raise ValueError(
                f"z: expected shape {tuple(self._scale.shape)}, an exact draw an image, got {tuple(z.shape)}"
            )
        else:
            z = z.expand(C, *z.shape).contiguous()
        with _nothing_drawn(self._x.device):
            return point_at(self._terms, z)

    def move(self, point: Point, beta: float, step_size: Tensor) -> tuple[Point, Tensor]:
        """A transition of every chain at that temperature, and its probability of acceptance, (C, B)."""
        return transition(
            self._leap,
            point.z.new_tensor([1 - beta, beta]),
            point,
            momentum=torch.randn_like(point.z),
            uniform=torch.rand_like(point.values[0]),
            scale=self._scale,
            step_size=step_size.to(point.z) * (1 + _JITTER * (2 * torch.rand_like(point.values[0]) - 1)),
            num_leapfrogs=self._num_leapfrogs,
        )

    def _leap(self, coefficients: Tensor, point: Point, momentum: Tensor, step: Tensor) -> tuple[Point, Tensor]:
        if not self._compile:
            return leapfrog(self._terms, coefficients, point, momentum, step)
        inputs = [*self._weights.values(), self._x, self._features, coefficients, momentum, step, *point]
        if self._run is None:
            self._run = self._graph(list(self._weights), inputs)
        *moved, momentum = self._run(inputs)
        return Point(*moved), momentum

    def _graph(self, names: list[str], inputs: list[Tensor]) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """A leapfrog as one graph, captured for the same VAE and shapes before, or now."""
        shapes = tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs)
        known, key = _graphs.setdefault(self._vae, {}), (self.start, tuple(names), shapes)
        if key not in known:
            known[key] = compiled(self._function(names), inputs)
        return known[key]

    def _function(self, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            n = len(names)
            x, features, coefficients, momentum, step, *point = inputs[n:]
            with replaced(self._vae, dict(zip(names, inputs[:n], strict=True))):
                _, terms = _densities(self._vae, self.start, x, features)
                moved, momentum = leapfrog(terms, coefficients, Point(*point), momentum, step)
            return (*moved, momentum)

        return function


_graphs: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def _features(vae: Any, x: Tensor, start: Start) -> Tensor:
    """(B, F) what q_0 needs of the images, so that an encoder runs once an image; (B, 0) where it is part of q_0."""
    if start == "guide" and isinstance(vae.posterior, Conditional):
        return vae.posterior.net(x)
    if start == "normal":
        with seeded(_MOMENTS_SEED, x.device):
            codes = compute_moments(check_batch_shape(vae.posterior(x), x))
        return torch.cat([codes.mean, codes.scale], dim=-1)
    return x.new_zeros((len(x), 0))


def _densities(vae: Any, start: Start, x: Tensor, features: Tensor) -> tuple[Any, Terms]:
    """q_0(z | x), and its logarithm and log p(x, z) as functions of z."""
    prior = vae.prior()
    if start == "prior":
        q_0 = prior
    elif start == "normal":
        q_0 = dist.Normal(*features.chunk(2, dim=-1)).to_event(1)
    else:
        of_features = isinstance(vae.posterior, Conditional)
        q_0 = check_batch_shape(vae.posterior.family(features) if of_features else vae.posterior(x), x)

    def log_joint(z: Tensor) -> Tensor:
        return prior.log_prob(z) + check_event_shape(vae.likelihood(z), x, z).log_prob(x)

    return q_0, (q_0.log_prob, log_joint)


def _scale(q_0: Any, num_images: int) -> Tensor:
    """(B, L) the scales of q_0, of draws with a seed of their own where they have no formula."""
    with seeded(_MOMENTS_SEED, torch.device("cpu")):
        scale = compute_moments(q_0).scale
    return scale.expand(num_images, -1).contiguous()


def _is_slow(posterior: Any) -> bool:
    """Whether its density at any z takes many passes, one after the other."""
    parts = posterior.modules() if isinstance(posterior, nn.Module) else ()
    return any(isinstance(part, Autoregressive) and part.passes > _MOST_PASSES for part in parts)


def _spread(count: int, most: int) -> list[int]:
    """At most so many of 0..count - 1, evenly spread, with both ends."""
    number = min(count, most)
    return [round(index * (count - 1) / max(1, number - 1)) for index in range(number)]


def _interpolated(found: Tensor, count: int) -> Tensor:
    """Smoothed along the first dimension, and linearly interpolated to that many. (V, B) -> (count, B)."""
    rows = found.T[None]
    width = min(2 * _SMOOTHED + 1, (found.shape[0] - 1) // 2 * 2 + 1)
    smooth = avg_pool1d(rows, width, stride=1, padding=width // 2, count_include_pad=False)
    return interpolate(smooth, size=count, mode="linear", align_corners=True)[0].T.contiguous()


@contextmanager
def _evaluating(vae: Any) -> Iterator[None]:
    """In evaluation mode; values are not checked, for a proposal may lie where there is no density, and is rejected."""
    with evaluation_mode(vae), pyro.validation_enabled(False):
        yield


@contextmanager
def _nothing_drawn(device: torch.device) -> Iterator[None]:
    """Refuses a density that is another at every call."""
    before = _generator_state(device)
    yield
    if not torch.equal(before, _generator_state(device)):
        raise ValueError(
            "vae: expected densities that are functions of z, got ones that draw noise, as the mass of dequantized "
            "levels does: no chain of transitions leaves them invariant"
        )


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _check(vae: Any, x: Tensor, *, start: Start, num_chains: int, num_leapfrogs: int) -> None:
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    check_count("num_chains", num_chains)
    check_count("num_leapfrogs", num_leapfrogs)
    if len(x) == 0:
        raise ValueError("x: expected at least one image, got none")
    if vae.prior().support.is_discrete:
        raise ValueError("prior: expected continuous latents, got discrete ones, which no leapfrog moves")
    check_support(vae.model, x)
    if is_deterministic(vae.posterior(x[:1])):
        raise Deterministic(
            "guide: expected a density q(z | x), got a deterministic one (Delta): an autoencoder has no log-likelihood"
        )


def _check_betas(betas: Tensor) -> None:
    rises = betas.dim() == 1 and len(betas) > 1 and bool((betas.diff() > 0).all())
    if not rises or betas[0] != 0 or betas[-1] != 1:
        raise ValueError("betas: expected numbers that rise from 0 to 1, got others")


def _check_annealing(annealing: Annealing, x: Tensor) -> None:
    _check_betas(annealing.betas)
    expected = (len(annealing.betas) - 2, len(x))
    if tuple(annealing.step_sizes.shape) != expected:
        raise ValueError(
            f"annealing: expected step sizes of shape {expected}, a temperature and image each, got "
            f"{tuple(annealing.step_sizes.shape)}"
        )
