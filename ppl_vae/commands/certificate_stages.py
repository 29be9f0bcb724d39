"""The stages of a certificate: images in, numbers of each image out, in blocks that are kept when they are finished."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_vae.commands.options import Certify
from ppl_vae.evidence import ais
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.guide_calibration import Ranks, compute_ranks
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance, gather_log_weights
from ppl_vae.evidence.proposals import defend_proposal, replace_guide
from ppl_vae.evidence.refinement import Gaps, measure_gaps, refine_proposal
from ppl_vae.parts.posteriors import FullNormal
from ppl_vae.runs.certificates import AISSummary
from ppl_vae.runs.checkpoints import BlockStore, StageResults
from ppl_vae.runs.open import Say
from ppl_vae.runs.resolve import decide_compile, matmul_precision
from ppl_vae.runtime.batching import Stopped, block_seed, compute_blocks, even_block_size, pairs_per_pass
from ppl_vae.runtime.errors import CannotCapture, Interrupted
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.numerics import LogWeightSummary, bound_by_particles
from ppl_vae.runtime.process import progress_bar
from ppl_vae.vae import VAE

# Images and simulations per block: an interruption loses at most one block. Each block of refinement compiles a graph.
CHAIN_BLOCK, REFINEMENT_BLOCK, IMPORTANCE_BLOCK, SIMULATION_BLOCK = 25, 100, 1000, 250
BLOCKS = [CHAIN_BLOCK, REFINEMENT_BLOCK, IMPORTANCE_BLOCK, SIMULATION_BLOCK]

_REFINEMENT_STEPS, _REFINEMENT_PARTICLES = 300, 8
_MOST_LOG_WEIGHTS = 5_000_000  # held at once for bounds with fewer particles

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # of one item's numbers, by name
Compute = Callable[[slice, bool], Tensors]
_IMPORTANCE: Shapes = dict.fromkeys(IMPORTANCE_NAMES, ())


@dataclass
class StageContext:
    """What every stage works with."""

    vae: VAE  # on its device, in evaluation mode
    device: torch.device
    options: Certify
    store: BlockStore  # finished blocks of unfinished stages
    results: StageResults  # complete stages
    compiles: bool  # whether chains are compiled
    say: Say
    should_stop: Callable[[], bool]  # asked after each block
    _eager: set[str] = field(default_factory=set)  # stages that cannot be compiled

    def block_seed(self, stage: str, number: int) -> int:
        """The seed of one block of one stage, from 0 to 2^63 - 1."""
        return block_seed(self.options.seed, stage, number) >> 1

    def run_stage(self, stage: str, num_items: int, block_size: int, shapes: Shapes, compute: Compute) -> Tensors:
        """The results of all items, computed block by block where they are not stored, on the CPU.

        Args:
            stage: its name.
            num_items, block_size: in all, and per block.
            shapes: of one item's results, by name.
            compute: takes the block's slice and whether it may compile, and returns tensors (n, *shape). The global
                generators are seeded for each block.

        Raises Interrupted on SIGINT or SIGTERM; the finished blocks are kept.
        """
        if stage in self.results.stages:
            return self.results.stages[stage]
        widths = [math.prod(shape) for shape in shapes.values()]
        done = self.store.open_stage(stage, num_items=num_items, block_size=block_size, num_columns=sum(widths))

        def compute_rows(items: slice) -> Tensor:
            results = self._compute(stage, compute, items, block_size)
            columns = [results[name].detach().cpu().double() for name in shapes]
            return torch.cat([column.reshape(len(column), -1) for column in columns], dim=1)

        before = sum(map(len, done.values()))
        try:
            if self.should_stop():
                raise Stopped
            with (
                progress_bar(total=num_items, initial=before, unit="item", desc=stage) as bar,
                matmul_precision("float32"),
            ):
                rows = compute_blocks(
                    compute_rows,
                    num_items,
                    block_size,
                    num_columns=sum(widths),
                    device=torch.device("cpu"),
                    progress=bar.update,
                    done=done,
                    on_block=self.store.add,
                    should_stop=self.should_stop,
                )
        except BaseException as error:
            self.store.write()
            if isinstance(error, Stopped):
                raise Interrupted("the finished blocks are kept, and the same command goes on from there") from None
            raise
        columns = zip(shapes.items(), rows.split(widths, dim=1), strict=True)
        found = {name: values.reshape(num_items, *shape).contiguous() for (name, shape), values in columns}
        self.results.add(stage, found, self.store.seconds(stage))
        return found

    def _compute(self, stage: str, compute: Compute, items: slice, block_size: int) -> Tensors:
        """One block, compiled unless that is not asked for or has failed."""

        def run(compiled: bool) -> Tensors:
            with seeded(self.block_seed(stage, items.start // block_size), self.device):
                return compute(items, compiled)

        if stage in self._eager:
            return run(False)
        try:
            with warnings.catch_warnings():  # from torch's compiler, about its own code
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
                return run(True)
        except CannotCapture as error:
            if self.options.compile == "on":
                raise ValueError(f"--compile on: {error}") from None
            self.say(f"Stage {stage} is not compiled: {error}.")
            self._eager.add(stage)
            return run(False)


def weigh_images(context: StageContext, stage: str, x: Tensor, vae: VAE) -> Importance:
    """L_S with the VAE's guide, (N,) each. x: (N, *E)."""

    def compute(items: slice, compiled: bool) -> Tensors:
        return _weigh(context, stage, vae, x[items], items.start // IMPORTANCE_BLOCK, compiled)

    return Importance.from_tensors(context.run_stage(stage, len(x), IMPORTANCE_BLOCK, _IMPORTANCE, compute))


def _weigh(context: StageContext, stage: str, vae: VAE, x: Tensor, number: int, compiled: bool) -> Tensors:
    S = context.options.num_particles
    passes = math.ceil(len(x) * S / pairs_per_pass(vae, x))
    compile = compiled and decide_compile(context.options.compile, passes, context.device)
    seed = context.block_seed(stage, number)
    return evaluate(vae, x, num_particles=S, seed=seed, compile=compile, say=context.say).to_tensors()


def weigh_images_refined(context: StageContext, stage: str, x: Tensor) -> Importance:
    """L_S with a normal of full covariance refined for each image, (N,) each; a lower bound. x: (N, *E).

    The proposal starts from the guide's moments, and is mixed with a wider one.
    """
    size = even_block_size(len(x), REFINEMENT_BLOCK)
    family = FullNormal(context.vae.prior().event_shape[0])

    def compute(items: slice, compiled: bool) -> Tensors:
        q = refine_proposal(
            context.vae,
            x[items],
            family=family,
            steps=_REFINEMENT_STEPS,
            num_particles=_REFINEMENT_PARTICLES,
            compile=compiled and _is_refinement_compiled(context, len(x), size),
        )
        refined = replace_guide(context.vae, defend_proposal(q))
        return _weigh(context, f"{stage} particles", refined, x[items], items.start, compiled and context.compiles)

    return Importance.from_tensors(context.run_stage(stage, len(x), size, _IMPORTANCE, compute))


def _is_refinement_compiled(context: StageContext, num_images: int, block_size: int) -> bool:
    """Refinement steps are as short as training steps, and there are few of them: compile only if there are enough."""
    steps = _REFINEMENT_STEPS * math.ceil(num_images / block_size)
    return context.compiles and decide_compile(context.options.compile, steps, context.device)


def weigh_fewer_particles(context: StageContext, stage: str, x: Tensor, numbers: list[int]) -> Tensor:
    """Bounds with s particles of the guide.

    Args:
        x: (N, *E).
        numbers: s, ascending; the last is S.

    Returns:
        (K, N) E[L_s] for each s, from disjoint blocks of particles.
    """

    def compute(items: slice, compiled: bool) -> Tensors:
        with torch.no_grad():
            log_w = gather_log_weights(context.vae, x[items], numbers[-1])
        return {"bounds": bound_by_particles(log_w, numbers).T}

    size = even_block_size(len(x), max(1, min(CHAIN_BLOCK, _MOST_LOG_WEIGHTS // numbers[-1])))
    shapes: Shapes = {"bounds": (len(numbers),)}
    return context.run_stage(stage, len(x), size, shapes, compute)["bounds"].T


def list_fewer_particles(num_particles: int) -> list[int]:
    """S/100, S/50, S/20, S/10, S/5, S/2 and S, ascending and without repeats."""
    return sorted({max(1, num_particles // divisor) for divisor in (1, 2, 5, 10, 20, 50, 100)})


def anneal_images(context: StageContext, stage: str, x: Tensor, *, temperatures: int | None = None) -> AISSummary:
    """Bounds on log p(x) from below, (N,) each. x: (N, *E)."""
    T, C = temperatures or context.options.temperatures, context.options.chains

    def compute(items: slice, compiled: bool) -> Tensors:
        compile = compiled and context.compiles
        annealing = _adapt_annealing(context, x[items], T, compile)
        found = ais.lower(context.vae, x[items], annealing, num_chains=C, compile=compile)
        return _summarize_chains(found.log_w, found.acceptance, 1)

    shapes: Shapes = dict.fromkeys(AISSummary._fields, ())
    return AISSummary(**context.run_stage(stage, len(x), _images_per_block(context, x), shapes, compute))


def anneal_simulated_images(context: StageContext, stage: str, num_images: int) -> tuple[AISSummary, AISSummary]:
    """Bounds on log p(x) from below and from above, of images that the model makes together with their z."""
    with seeded(context.block_seed(f"{stage} images", 0), context.device):
        x, z = ais.simulate(context.vae, num_images)

    def compute(items: slice, compiled: bool) -> Tensors:
        own, C, compile = x[items], context.options.chains, compiled and context.compiles
        annealing = _adapt_annealing(context, own, context.options.temperatures, compile)
        below = ais.lower(context.vae, own, annealing, num_chains=C, compile=compile)
        above = ais.upper(context.vae, own, z[items], annealing, num_chains=C, compile=compile)
        results = {f"lower {name}": v for name, v in _summarize_chains(below.log_w, below.acceptance, 1).items()}
        return results | {f"upper {n}": v for n, v in _summarize_chains(above.log_w, above.acceptance, -1).items()}

    shapes: Shapes = {f"{side} {name}": () for side in ("lower", "upper") for name in AISSummary._fields}
    found = context.run_stage(stage, num_images, _images_per_block(context, x), shapes, compute)
    below, above = (AISSummary(*(found[f"{side} {n}"] for n in AISSummary._fields)) for side in ("lower", "upper"))
    return below, above


def _images_per_block(context: StageContext, x: Tensor) -> int:
    """Blocks of nearly equal size of x, (N, *E), so small that all chains of a block fit into one decoder pass."""
    return even_block_size(len(x), min(CHAIN_BLOCK, ais.images_per_block(context.vae, x, context.options.chains)))


def _adapt_annealing(context: StageContext, x: Tensor, temperatures: int, compile: bool) -> ais.Annealing:
    return ais.pilot(
        context.vae,
        x,
        # Evenly spaced: from a guide, gaps on simulated images were no larger than with sigmoidal temperatures.
        betas=ais.temperatures(temperatures, steepness=0.0),
        num_leapfrogs=context.options.leapfrogs,
        num_chains=context.options.chains,
        start=context.options.start,
        compile=compile,
    )


def _summarize_chains(log_w: Tensor, acceptance: Tensor, sign: int) -> Tensors:
    """``AISSummary`` of log-weights (C, B) and acceptance (T - 1, B); sign -1 for the bound from above."""
    weights = LogWeightSummary(len(log_w), log_w.shape[1], device=log_w.device)
    weights.update(sign * log_w)
    return {
        "bound": sign * weights.log_mean_exp(),
        "monte_carlo_stderr": weights.monte_carlo_stderr(),
        "bias": weights.bias(),
        "ess": weights.effective_sample_size(),
        "acceptance": acceptance.double().mean(0),
    }


def list_fewer_temperatures(temperatures: int) -> list[int]:
    """T/8, T/4 and T/2, ascending, without repeats and without T itself."""
    return sorted({max(1, temperatures // divisor) for divisor in (8, 4, 2)} - {temperatures})


def split_gaps(context: StageContext, stage: str, x: Tensor, log_evidence: Tensor) -> Gaps:
    """log p(x) - ELBO in its two parts, (N,) each. x: (N, *E), log_evidence: (N,) nats."""
    size = even_block_size(len(x), REFINEMENT_BLOCK)

    def compute(items: slice, compiled: bool) -> Tensors:
        found = measure_gaps(
            context.vae,
            x[items],
            log_evidence[items].to(x.device),
            steps=_REFINEMENT_STEPS,
            num_particles=_REFINEMENT_PARTICLES,
            compile=compiled and _is_refinement_compiled(context, len(x), size),
        )
        return vars(found)

    shapes: Shapes = dict.fromkeys(("log_evidence", "elbo", "refined_elbo"), ())
    return Gaps(**context.run_stage(stage, len(x), size, shapes, compute))


def rank_simulations(context: StageContext, stage: str, num_simulations: int, num_draws: int) -> Ranks:
    """The ranks of simulation-based calibration."""
    shapes: Shapes = {"latents": tuple(context.vae.prior().event_shape), "log_joint": ()}

    def compute(items: slice, compiled: bool) -> Tensors:
        found = compute_ranks(context.vae, num_simulations=items.stop - items.start, num_draws=num_draws)
        return {name: getattr(found, name) for name in shapes}

    size = even_block_size(num_simulations, SIMULATION_BLOCK)
    found = context.run_stage(stage, num_simulations, size, shapes, compute)
    return Ranks(found["latents"].long(), found["log_joint"].long(), num_draws)
