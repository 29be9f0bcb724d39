"""The stages of a certificate: images in, numbers of each image out, block by block."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.commands.evaluate import evaluate_with_progress
from ppl_vae.evidence import ais, proposals
from ppl_vae.evidence import gaps as gaps_of
from ppl_vae.evidence.exploration import gather_log_weights
from ppl_vae.evidence.guide_calibration import Ranks, ranks
from ppl_vae.evidence.importance import Importance, evaluate
from ppl_vae.parts.posteriors import FullNormal
from ppl_vae.runs.certificate_blocks import Progress, StageContext, Tensors, block, compute_blocks, even_block, seed_of
from ppl_vae.runs.fit_arguments import decide_compile
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.numerics import LogWeightSummary, bound_by_particles, smoothed_log_mean_exp
from ppl_vae.vae import VAE

# Images and simulations a block: an interruption loses as many at most. Refining compiles
# a graph a block.
CHAINED_A_BLOCK, REFINED_A_BLOCK, WEIGHED_A_BLOCK, SIMULATED_A_BLOCK = 25, 100, 1000, 250
BLOCKS = [CHAINED_A_BLOCK, REFINED_A_BLOCK, WEIGHED_A_BLOCK, SIMULATED_A_BLOCK]

_REFINING_STEPS, _REFINING_PARTICLES = 300, 8
_HELD = 5_000_000  # log-weights at once, of which bounds by fewer particles are made


class Chain(NamedTuple):
    """How chains are annealed.

    Args:
        temperatures: T.
        leapfrogs: of each transition.
        chains: C, of each image.
        start: "guide", "prior" or "normal".
    """

    temperatures: int
    leapfrogs: int
    chains: int
    start: str


class AISSummary(NamedTuple):
    """What the chains say of each image; every field is (N,), float64.

    ``bound`` is the bound on log p(x) in nats, from below or from above; ``monte_carlo_stderr`` the delta method's
    error of it and ``bias`` the jackknife's estimate of how far its expectation is from log p(x), both NaN for one
    chain; ``ess`` is from 1 to C, and ``acceptance`` the mean over chains and temperatures (NaN where none moved).
    """

    bound: Tensor
    monte_carlo_stderr: Tensor
    bias: Tensor
    ess: Tensor
    acceptance: Tensor


# --- Importance sampling ---


def importance(bench: StageContext, stage: str, x: Tensor, *, vae: VAE, num_particles: int, words: str) -> Importance:
    """L_S with the VAE's guide, (N,) each, on the CPU. x: (N, *E)."""

    def weighed(number: int, images: Tensor) -> Tensors:
        return evaluate_with_progress(
            vae,
            images,
            num_particles=num_particles,
            seed=seed_of(bench.seed, stage, number),
            compile=bench.compile,
            say=bench.say,
            words=words,
        )._asdict()

    found = bench.finished.whole(stage)
    if found is None:
        groups = enumerate(x.split(WEIGHED_A_BLOCK))
        parts = [block(bench, stage, number, partial(weighed, number, images)) for number, images in groups]
        found = bench.finished.join(stage, parts)
    return Importance(**found)


def improved(bench: StageContext, stage: str, x: Tensor, *, num_particles: int, words: str) -> Importance:
    """L_S with a normal of each image's own, (N,) each, on the CPU; a lower bound, as the guide's. x: (N, *E)."""

    size = even_block(len(x), REFINED_A_BLOCK)
    pays = _refining_pays(bench, len(x), size)

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        images = x[items]
        own = proposals.replace_guide(bench.vae, _proposal(bench, images, progress, compiled and pays))
        passes = math.ceil(len(images) * num_particles / pairs_per_pass(own, images))
        return evaluate(
            own,
            images,
            num_particles=num_particles,
            seed=seed_of(bench.seed, f"{stage} particles", items.start),
            compile=compiled and decide_compile(bench.compile, passes, bench.place),
        )._asdict()

    calls = _REFINING_STEPS * size
    found = compute_blocks(bench, stage, len(x), size, compute, calls=calls, words=words)
    return Importance(**found)


def _refining_pays(bench: StageContext, count: int, size: int) -> bool:
    """Whether a graph of a refining step is made: a step is no longer than a training step, and there are few."""
    return decide_compile(bench.compile, _REFINING_STEPS * math.ceil(count / size), bench.place)


def _proposal(bench: StageContext, x: Tensor, progress: Progress, compiled: bool) -> proposals.Proposal:
    """A normal of full covariance for each image, refined from the guide's moments, with a share that is wider."""
    (L,) = bench.vae.prior().event_shape
    q = proposals.refined(
        bench.vae,
        x,
        family=FullNormal(L),
        steps=_REFINING_STEPS,
        num_particles=_REFINING_PARTICLES,
        compile=compiled,
        progress=progress,
    )
    return proposals.defensive(q)


# --- Annealing ---


def annealed(bench: StageContext, stage: str, x: Tensor, chain: Chain, *, words: str) -> AISSummary:
    """log p(x) from below, (N,) each, on the CPU. x: (N, *E)."""

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        annealing = _pilot(bench, x[items], chain, progress, compiled)
        found = ais.lower(bench.vae, x[items], annealing, num_chains=chain.chains, compile=compiled, progress=progress)
        return _summary(found.log_w, found.acceptance, 1)

    size, calls = images_a_block(bench, x, chain), 2 * chain.temperatures
    return AISSummary(**compute_blocks(bench, stage, len(x), size, compute, calls=calls, words=words))


def simulated(
    bench: StageContext, stage: str, num_images: int, chain: Chain, *, words: str
) -> tuple[AISSummary, AISSummary]:
    """log p(x) from below and from above, of images that the model makes together with a z of theirs."""
    with seeded(seed_of(bench.seed, f"{stage} images", 0), bench.place):
        x, z = ais.simulate(bench.vae, num_images)

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        annealing = _pilot(bench, x[items], chain, progress, compiled)
        C = chain.chains
        below = ais.lower(bench.vae, x[items], annealing, num_chains=C, compile=compiled, progress=progress)
        above = ais.upper(bench.vae, x[items], z[items], annealing, num_chains=C, compile=compiled, progress=progress)
        results = {f"lower {name}": value for name, value in _summary(below.log_w, below.acceptance, 1).items()}
        return results | {f"upper {name}": v for name, v in _summary(above.log_w, above.acceptance, -1).items()}

    size, calls = images_a_block(bench, x, chain), 3 * chain.temperatures
    found = compute_blocks(bench, stage, num_images, size, compute, calls=calls, words=words)
    below, above = (
        AISSummary(*(found[f"{side} {name}"] for name in AISSummary._fields)) for side in ("lower", "upper")
    )
    return below, above


def images_a_block(bench: StageContext, x: Tensor, chain: Chain) -> int:
    """Of x (N, *E): blocks of nearly one size, that chains of all images in one fit into a pass of the decoder."""
    return even_block(len(x), min(CHAINED_A_BLOCK, ais.images_a_block(bench.vae, x, chain.chains)))


def _pilot(bench: StageContext, x: Tensor, chain: Chain, progress: Progress, compiled: bool) -> ais.Annealing:
    return ais.pilot(
        bench.vae,
        x,
        # Evenly: from a guide, gaps on simulated images were no larger than with the sigmoidal ones.
        betas=ais.temperatures(chain.temperatures, steepness=0.0),
        num_leapfrogs=chain.leapfrogs,
        num_chains=chain.chains,
        start=chain.start,
        compile=compiled,
        progress=progress,
    )


def _summary(log_w: Tensor, acceptance: Tensor, sign: int) -> Tensors:
    """What is kept of (C, B) log-weights and (T - 1, B) acceptance; the sign is -1 for the bound from above."""
    weights = LogWeightSummary(len(log_w), log_w.shape[1], device=log_w.device)
    weights.update(sign * log_w)
    return {
        "bound": sign * weights.log_mean_exp(),
        "monte_carlo_stderr": weights.monte_carlo_stderr(),
        "bias": weights.bias(),
        "ess": weights.effective_sample_size(),
        "acceptance": acceptance.double().mean(0),
    }


# --- Convergence ---

_SHARES = (8, 4, 2)
_TENS = (1, 2, 5, 10, 20, 50, 100)


def fewer_temperatures(temperatures: int) -> list[int]:
    """T/8, T/4, T/2: those that are different numbers below T."""
    return sorted({max(1, temperatures // share) for share in _SHARES} - {temperatures})


def fewer_particles(num_particles: int) -> list[int]:
    """S/100, S/50, ..., S, different ones."""
    return sorted({max(1, num_particles // share) for share in _TENS})


class Weighed(NamedTuple):
    """What particles with the guide say of each image, all of them at hand.

    Args:
        bounds: (K, N) E[L_s] for each s, by disjoint blocks; the last s is S.
        smoothed: (N,) the Pareto-smoothed estimate of log p(x) of all S. No bound.
    """

    bounds: Tensor
    smoothed: Tensor


def weighed_particles(bench: StageContext, stage: str, x: Tensor, sizes: list[int], *, words: str) -> Weighed:
    """Of the largest of the sizes, the last, as S. x: (N, *E)."""

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        with torch.no_grad():
            log_w = gather_log_weights(bench.vae, x[items], sizes[-1])
        return {"bounds": bound_by_particles(log_w, sizes).T, "smoothed": smoothed_log_mean_exp(log_w.double())}

    size = even_block(len(x), max(1, min(CHAINED_A_BLOCK, _HELD // sizes[-1])))
    found = compute_blocks(bench, stage, len(x), size, compute, calls=1, words=words)
    return Weighed(found["bounds"].T, found["smoothed"])


# --- Gaps, calibration ---


def gaps(bench: StageContext, stage: str, x: Tensor, log_evidence: Tensor, *, words: str) -> gaps_of.Gaps:
    """log p(x) - ELBO in its parts, (N,) each, on the CPU. x: (N, *E), log_evidence: (N,) nats."""
    size = even_block(len(x), REFINED_A_BLOCK)
    pays = _refining_pays(bench, len(x), size)

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        return gaps_of.gaps(
            bench.vae,
            x[items],
            log_evidence[items].to(x.device),
            steps=_REFINING_STEPS,
            num_particles=_REFINING_PARTICLES,
            compile=compiled and pays,
            progress=progress,
        )._asdict()

    calls = _REFINING_STEPS * size
    return gaps_of.Gaps(**compute_blocks(bench, stage, len(x), size, compute, calls=calls, words=words))


def guide_ranks(bench: StageContext, stage: str, num_simulations: int, num_draws: int, *, words: str) -> Ranks:
    """The ranks of simulation-based calibration, on the CPU."""

    def compute(items: slice, progress: Progress, compiled: bool) -> Tensors:
        count = items.stop - items.start
        found = ranks(bench.vae, num_simulations=count, num_draws=num_draws, progress=progress)
        return {"latents": found.latents, "log_joint": found.log_joint}

    size = even_block(num_simulations, SIMULATED_A_BLOCK)
    found = compute_blocks(bench, stage, num_simulations, size, compute, calls=size, words=words)
    return Ranks(found["latents"], found["log_joint"], num_draws)
