"""Annealed importance sampling: lower bounds on log p(x) for any images, upper bounds for images from the model.

    pi_t(z) proportional to q_0(z | x)^(1 - beta_t) p(x, z)^beta_t,    0 = beta_0 < ... < beta_T = 1
    log w = sum_{t=1}^T (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q_0(z_{t-1} | x))

z_0 ~ q_0(z | x), and a transition of Hamiltonian Monte Carlo that leaves pi_t invariant takes z_{t-1} to z_t. Then
E[w] = p(x), so log w is a lower bound on log p(x) in expectation. Run backward from an exact draw of p(z | x), the same
sum gives E[1/w] = 1/p(x), and an upper bound. An exact draw exists for images that the model made: the z that the image
was made from. Real images have no upper bound.

    annealing = pilot(vae, x, betas=temperatures(1000), num_leapfrogs=5, num_chains=16)
    log_p_x = lower_bound(lower(vae, x, annealing, num_chains=16).log_w)

Both bounds need step sizes that do not depend on the chain that they move: ``pilot`` finds them with other chains.
Draws come from torch's global generator. Memory grows with chains times images; see ``images_per_block``.

Reference: Neal 2001, arXiv physics/9803008; Grosse et al. 2015 and 2016, arXiv 1511.02543 and 1606.02275; for decoders
Wu et al. 2017, arXiv 1611.04273.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, interpolate

from ppl_vae.evidence.chains import Chains, Start, evaluating
from ppl_vae.evidence.moments import sample_prior
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.errors import NotFinite, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.runtime.records import Data, Records, arguments_of

# The rule of the pilot. Source: ours.
_ACCEPTANCE = 0.7
_FIRST_STEP_SIZE = 0.3
_GAIN = 0.2
_FIRST_TRANSITIONS = 20  # at the first temperature, where the start is already nearly a draw of the target
_PILOT_TEMPERATURES = 100
_SMOOTHING = 5  # pilot temperatures on either side


@dataclass(frozen=True)
class Annealing:
    """What a chain needs to run, fixed before it starts.

    Args:
        betas: (T + 1,) float64, rising from 0 to 1.
        step_sizes: (T - 1, B) for the transitions at beta_1..beta_{T-1}, in units of the start's scales.
        num_leapfrogs: per transition.
        start: q_0, "guide", "prior" or "normal".
    """

    betas: Tensor
    step_sizes: Tensor
    num_leapfrogs: int
    start: Start


@dataclass(frozen=True)
class AnnealedChains:
    """The results of C chains per image.

    Args:
        log_w: (C, B) float64, nats.
        acceptance: (T - 1, B) the mean acceptance probability over the chains.
        z: (C, B, L) the last positions: about p(z | x) for forward chains, about q_0(z | x) for backward ones.
    """

    log_w: Tensor
    acceptance: Tensor
    z: Tensor


def temperatures(num_temperatures: int, *, steepness: float = 4.0) -> Tensor:
    """beta_t = (s(u_t) - s(-d)) / (s(d) - s(-d)), u_t = d (2 t / T - 1), t = 0..T, s the logistic function.

    They are densest at both ends, and evenly spaced for a steepness d of 0. -> (T + 1,) float64, from 0 to 1.

    Reference: Grosse et al. 2015, arXiv 1511.02543, section 6, with d = 4 as in Wu et al. 2017.
    """
    num_temperatures = check_count("num_temperatures", num_temperatures)
    even = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.double)
    if steepness == 0:
        return even
    s = (steepness * (2 * even - 1)).sigmoid()
    betas = (s - s[0]) / (s[-1] - s[0])
    betas[0], betas[-1] = 0, 1
    return betas


def lower_bound(log_w: Tensor) -> Tensor:
    """log (1/C) sum_c w_c, in expectation at most log p(x). log_w: (C, B) from ``lower`` -> (B,) nats."""
    return log_mean_exp(log_w)


def upper_bound(log_w: Tensor) -> Tensor:
    """-log (1/C) sum_c 1/w_c, in expectation at least log p(x). log_w: (C, B) from ``upper`` -> (B,) nats."""
    return -log_mean_exp(-log_w)


@torch.no_grad()
def images_per_block(vae: LatentModel, x: Data, num_chains: int) -> int:
    """The number of images of x (N, *E) per call with C chains, which decode C times as many z at once."""
    return max(1, pairs_per_pass(vae, x) // num_chains)


@serialize_threads(gradients=False)
def simulate(vae: LatentModel, num_images: int, *further: Tensor) -> tuple[Tensor, Tensor]:
    """z ~ p(z), x ~ p(x | z): images with an exact draw of their posterior. -> x (N, *E) and z (N, L).

    ``further`` are N rows each of what the model takes beside the images, such as labels.
    """
    num_images = check_count("num_images", num_images)
    with evaluating(vae):
        rows = Records(sample_prior(vae, num_images, *further), *further)
        first = Records(vae.likelihood(*arguments_of(rows[:1])).sample(), *rows[:1].further)
        x = [vae.likelihood(*arguments_of(part)).sample() for part in rows.split(pairs_per_pass(vae, first))]
    return torch.cat(x), rows.x


@serialize_threads(gradients=False)
def pilot(
    vae: LatentModel,
    x: Data,
    *,
    betas: Tensor,
    num_leapfrogs: int,
    num_chains: int,
    start: Start = "guide",
    compile: bool = False,
) -> Annealing:
    """Find step sizes: log step <- log step + 0.2 (acceptance - 0.7) along the temperatures.

    Each image has its own step sizes, found at no more than 100 temperatures, then smoothed over neighbors and
    interpolated.

    Args:
        vae: A VAE of one layer or several.
        x: Images (B, *E), or ``Records``.
        betas: (T + 1,) from 0 to 1; see ``temperatures``.
        num_leapfrogs: The leapfrog steps per transition.
        num_chains: The chains per image. With ``compile``, use the number of the chains to come: they share one graph.
        start: q_0. "guide" becomes "normal", the diagonal normal with the guide's means and scales, for an inverse
            autoregressive flow, whose density at any z takes L sequential passes.
        compile: Whether a leapfrog step is one compiled graph, made once for each number of images and chains. The
            weights may change later, the structure may not.

    Raises:
        ValueError: An image is off the support of p(x | z), or the densities draw noise, as those of dequantized levels
            may.
        DeterministicGuide: A ValueError: the guide has no density.
        CannotCapture: A ValueError: ``compile`` is asked for and impossible.
        NotFinite: A density is NaN.
    """
    _check_betas(betas)
    inner = betas[1:-1].tolist()
    count = min(len(inner), _PILOT_TEMPERATURES)
    places = [round(index * (len(inner) - 1) / max(1, count - 1)) for index in range(count)]
    with evaluating(vae):
        chains = Chains(vae, x, start=start, num_chains=num_chains, num_leapfrogs=num_leapfrogs, compile=compile)
        point = chains.begin()
        log_step = point.z.new_full((len(x),), _FIRST_STEP_SIZE).log()
        found = []
        for index, place in enumerate(places):
            for _ in range(1 if index else _FIRST_TRANSITIONS):
                point, acceptance = chains.move(point, inner[place], log_step.exp())
                log_step = log_step + _GAIN * (acceptance.mean(0) - _ACCEPTANCE)
            found.append(log_step)
    log_steps = _interpolate(torch.stack(found), len(inner)) if found else point.z.new_zeros((0, len(x)))
    return Annealing(betas, log_steps.exp(), num_leapfrogs, chains.start)


def lower(vae: LatentModel, x: Data, annealing: Annealing, *, num_chains: int, compile: bool = False) -> AnnealedChains:
    """log w of C chains from q_0(z | x) to p(z | x): E[w] = p(x). See ``lower_bound``.

    ``annealing`` is from ``pilot`` with the same images x (B, *E). Other arguments and errors as there.

    Reference: Neal 2001, arXiv physics/9803008, equation 11.
    """
    return _anneal(vae, x, None, annealing, num_chains=num_chains, compile=compile)


def upper(
    vae: LatentModel, x: Data, z: Tensor, annealing: Annealing, *, num_chains: int, compile: bool = False
) -> AnnealedChains:
    """log w of chains from p(z | x) to q_0(z | x), with the sign of the forward ones: E[1/w] = 1 / p(x).

    All chains of an image start at its one exact draw. See ``upper_bound``. x (B, *E) are images from the model, and
    z (B, L) the latents that they were made from; see ``simulate``. Other arguments and errors as for ``lower``.

    Reference: Grosse et al. 2015, arXiv 1511.02543, section 3.
    """
    return _anneal(vae, x, z, annealing, num_chains=num_chains, compile=compile)


@serialize_threads(gradients=False)
def _anneal(
    vae: LatentModel, x: Data, exact: Tensor | None, annealing: Annealing, *, num_chains: int, compile: bool
) -> AnnealedChains:
    """Forward chains where ``exact`` is None, else backward chains from it."""
    _check_betas(annealing.betas)
    betas, T = annealing.betas.tolist(), len(annealing.betas) - 1
    expected = (T - 1, len(x))
    if tuple(annealing.step_sizes.shape) != expected:
        raise ValueError(f"annealing: expected step sizes {expected}, got {tuple(annealing.step_sizes.shape)}")
    acceptances = annealing.step_sizes.new_zeros((T - 1, len(x)))
    start, num_leapfrogs = annealing.start, annealing.num_leapfrogs
    with evaluating(vae):
        chains = Chains(vae, x, start=start, num_chains=num_chains, num_leapfrogs=num_leapfrogs, compile=compile)
        point = chains.begin(exact)
        log_w = torch.zeros(point.z.shape[:-1], dtype=torch.double, device=x.device)
        for t in range(1, T + 1) if exact is None else range(T, 0, -1):
            log_q_0, log_joint = point.values.double()
            log_w += (betas[t] - betas[t - 1]) * (log_joint - log_q_0)
            after = t if exact is None else t - 1  # the temperature of the transition that follows
            if 0 < after < T:
                point, acceptance = chains.move(point, betas[after], annealing.step_sizes[after - 1])
                acceptances[after - 1] = acceptance.mean(0)
    if log_w.isnan().any() or log_w.isposinf().any():
        raise NotFinite("log-weights: expected numbers, got NaN or +infinity")
    return AnnealedChains(log_w, acceptances, point.z)


def _interpolate(found: Tensor, count: int) -> Tensor:
    """Smoothed along the first dimension, then linearly interpolated. (V, B) -> (count, B)."""
    rows = found.T[None]
    width = min(2 * _SMOOTHING + 1, (found.shape[0] - 1) // 2 * 2 + 1)
    smooth = avg_pool1d(rows, width, stride=1, padding=width // 2, count_include_pad=False)
    return interpolate(smooth, size=count, mode="linear", align_corners=True)[0].T.contiguous()


def _check_betas(betas: Tensor) -> None:
    rises = betas.dim() == 1 and len(betas) > 1 and bool((betas.diff() > 0).all())
    if not rises or betas[0] != 0 or betas[-1] != 1:
        raise ValueError("betas: expected numbers that rise from 0 to 1, got others")
