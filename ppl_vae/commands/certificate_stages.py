"""The stages of a certificate: images in, numbers of each image out, in blocks that are kept when they are finished."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.commands.evaluate import evaluate_with_progress
from ppl_vae.evidence import ais, gaps
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.guide_calibration import compute_ranks
from ppl_vae.evidence.importance import IMPORTANCE_NAMES, Importance, gather_log_weights
from ppl_vae.evidence.proposals import defend_proposal, replace_guide
from ppl_vae.evidence.rank_statistics import Ranks
from ppl_vae.evidence.refinement import refine_proposal
from ppl_vae.parts.posteriors import FullNormal
from ppl_vae.runs.block_store import BlockStore, StageResults
from ppl_vae.runs.certified_images import AISSummary
from ppl_vae.runs.fit_arguments import decide_compile, matmul_precision
from ppl_vae.runs.open import Say
from ppl_vae.runtime.batching import pairs_per_pass
from ppl_vae.runtime.blocks import Stopped, block_seed, compute_blocks, even_block_size
from ppl_vae.runtime.errors import CannotCapture, Interrupted
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.numerics import LogWeightSummary, bound_by_particles, smoothed_log_mean_exp
from ppl_vae.runtime.progress import Progress
from ppl_vae.vae import VAE

# Images and simulations per block: an interruption loses at most one block. Each block of refinement compiles a graph.
CHAIN_BLOCK, REFINEMENT_BLOCK, IMPORTANCE_BLOCK, SIMULATION_BLOCK = 25, 100, 1000, 250
BLOCKS = [CHAIN_BLOCK, REFINEMENT_BLOCK, IMPORTANCE_BLOCK, SIMULATION_BLOCK]

_REFINEMENT_STEPS, _REFINEMENT_PARTICLES = 300, 8
_MOST_LOG_WEIGHTS = 5_000_000  # held at once for bounds with fewer particles
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # without counts: blocks advance by fractions

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # of one item's numbers, by name
Count = Callable[[int], None]
Compute = Callable[[slice, Count, bool], Tensors]
_IMPORTANCE: Shapes = dict.fromkeys(IMPORTANCE_NAMES, ())


class ChainOptions(NamedTuple):
    """How chains are annealed: T temperatures, leapfrog steps per transition, C chains per image, and their start."""

    temperatures: int
    leapfrogs: int
    chains: int
    start: str


@dataclass
class StageContext:
    """What every stage works with.

    Args:
        vae: on its device, in evaluation mode.
        place: the device.
        seed: the certificate's.
        store: finished blocks of unfinished stages.
        results: complete stages.
        compile: the word of --compile.
        compiles: whether computations that repeat often are compiled.
        say: receives each line for the reader.
        should_stop: asked after each block.
    """

    vae: VAE
    place: torch.device
    seed: int
    store: BlockStore
    results: StageResults
    compile: str
    compiles: bool
    say: Say
    should_stop: Callable[[], bool] = lambda: False
    _obstacles: dict[str, str] = field(default_factory=dict)  # why a stage is not compiled

    def block_seed(self, stage: str, number: int) -> int:
        """The seed of one block of one stage, from 0 to 2^63 - 1."""
        return block_seed(self.seed, stage, number) >> 1

    def run_stage(
        self,
        stage: str,
        num_items: int,
        block_size: int,
        shapes: Shapes,
        compute: Compute,
        *,
        calls: int,
        words: str,
        has_bar: bool = True,
        is_compiled: bool = False,
    ) -> Tensors:
        """The results of all items, computed block by block where they are not stored, on the CPU.

        Args:
            stage: its name.
            num_items, block_size: in all, and per block.
            shapes: of one item's results, by name.
            compute: takes the block's slice, a progress function and whether to compile, and returns tensors (n,
                *shape). The global generators are seeded for each block.
            calls: about how far ``compute`` advances the progress function in all.
            words: what the progress bar says.
            has_bar: whether there is one.
            is_compiled: whether ``compute`` compiles where it may; a clock runs until its first progress then.

        Raises:
            Interrupted: SIGINT or SIGTERM; the finished blocks are kept.
            ValueError: --compile on, and the stage cannot be compiled.
        """
        stored = self.results.get(stage)
        if stored is not None:
            return stored
        widths = {name: math.prod(shape) for name, shape in shapes.items()}
        num_columns = sum(widths.values())
        done = self.store.open_stage(stage, num_items=num_items, block_size=block_size, num_columns=num_columns)
        is_before_graph, has_clock = is_compiled, False
        bar = Progress(
            total=num_items,
            initial=sum(map(len, done.values())),
            unit="item",
            desc=words,
            bar_format=_BAR,
            disable=not has_bar,
        )

        def compute_rows(items: slice) -> Tensor:
            size = items.stop - items.start
            end = bar.count + size

            def advance(count: int) -> None:
                bar.update(max(0.0, min(count * size / max(1, calls), end - bar.count)))

            def run(compiled: bool) -> Tensors:
                nonlocal is_before_graph, has_clock
                if compiled and is_before_graph:
                    bar.show_clock(f"Compiling: {words}", self.say)
                    has_clock = True
                elif has_clock and not compiled:
                    bar.close()
                    has_clock = False
                is_before_graph = False
                with seeded(self.block_seed(stage, items.start // block_size), self.place):
                    return compute(items, advance, compiled)

            results = self._run_compiled_or_not(stage, run)
            bar.update(end - bar.count)
            return torch.cat([results[name].detach().cpu().double().reshape(size, -1) for name in shapes], dim=1)

        with bar, matmul_precision("float32"):
            rows = self._keep_blocks(
                lambda: compute_blocks(
                    compute_rows,
                    num_items,
                    block_size,
                    num_columns=num_columns,
                    device=torch.device("cpu"),
                    done=done,
                    on_block=self.store.add,
                    should_stop=self.should_stop,
                )
            )
        columns = zip(shapes.items(), rows.split(list(widths.values()), dim=1), strict=True)
        found = {name: values.reshape(num_items, *shape).contiguous() for (name, shape), values in columns}
        self.results.add(stage, found, self.store.seconds(stage))
        return found

    def _keep_blocks(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute, and write the finished blocks to disk if that ends early."""
        try:
            if self.should_stop():
                raise Stopped
            return compute()
        except BaseException as error:
            self.store.write()
            if isinstance(error, Stopped):
                raise Interrupted("the finished blocks are kept, and the same command goes on from there") from None
            raise

    def _run_compiled_or_not(self, stage: str, run: Callable[[bool], Tensors]) -> Tensors:
        if not self.compiles or stage in self._obstacles:
            return run(False)
        try:
            with warnings.catch_warnings():  # from torch's compiler, about its own code
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
                return run(True)
        except CannotCapture as error:
            if self.compile == "on":
                raise ValueError(f"--compile on: {error}") from None
            if str(error) not in self._obstacles.values():
                self.say(f"Not compiled: {error}.")
            self._obstacles[stage] = str(error)
            return run(False)


# --- Importance sampling ---


def weigh_images(
    context: StageContext, stage: str, x: Tensor, *, vae: VAE, num_particles: int, words: str
) -> Importance:
    """L_S with the VAE's guide, (N,) each. x: (N, *E)."""

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        return evaluate_with_progress(
            vae,
            x[items],
            num_particles=num_particles,
            seed=context.block_seed(stage, items.start // IMPORTANCE_BLOCK),
            compile=context.compile,
            say=context.say,
            words=words,
        ).to_tensors()

    sizes = (len(x), IMPORTANCE_BLOCK)
    found = context.run_stage(stage, *sizes, _IMPORTANCE, compute, calls=1, words=words, has_bar=False)
    return Importance.from_tensors(found)


def weigh_images_refined(context: StageContext, stage: str, x: Tensor, *, num_particles: int, words: str) -> Importance:
    """L_S with a normal of full covariance refined for each image, (N,) each; a lower bound. x: (N, *E).

    The proposal starts from the guide's moments, and is mixed with a wider one.
    """
    size = even_block_size(len(x), REFINEMENT_BLOCK)
    pays = _is_refinement_compiled(context, len(x), size)

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        images = x[items]
        q = refine_proposal(
            context.vae,
            images,
            family=FullNormal(context.vae.prior().event_shape[0]),
            steps=_REFINEMENT_STEPS,
            num_particles=_REFINEMENT_PARTICLES,
            compile=compiled and pays,
            progress=advance,
        )
        refined = replace_guide(context.vae, defend_proposal(q))
        passes = math.ceil(len(images) * num_particles / pairs_per_pass(refined, images))
        return evaluate(
            refined,
            images,
            num_particles=num_particles,
            seed=context.block_seed(f"{stage} particles", items.start),
            compile=compiled and decide_compile(context.compile, passes, context.place),
        ).to_tensors()

    calls = _REFINEMENT_STEPS * size
    found = context.run_stage(stage, len(x), size, _IMPORTANCE, compute, calls=calls, words=words, is_compiled=pays)
    return Importance.from_tensors(found)


def _is_refinement_compiled(context: StageContext, num_images: int, block_size: int) -> bool:
    """Refinement steps are as short as training steps, and there are few of them: compile only if there are enough."""
    return decide_compile(context.compile, _REFINEMENT_STEPS * math.ceil(num_images / block_size), context.place)


class WeighedParticles(NamedTuple):
    """What S particles with the guide say of each image.

    Args:
        bounds: (K, N) E[L_s] for each s, from disjoint blocks of particles; the last s is S.
        smoothed: (N,) the Pareto-smoothed estimate of log p(x) from all S. It is not a bound.
    """

    bounds: Tensor
    smoothed: Tensor


def weigh_fewer_particles(
    context: StageContext, stage: str, x: Tensor, numbers: list[int], *, words: str
) -> WeighedParticles:
    """E[L_s] for each s of ``numbers``, the last of which is the largest. x: (N, *E)."""

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        with torch.no_grad():
            log_w = gather_log_weights(context.vae, x[items], numbers[-1])
        return {"bounds": bound_by_particles(log_w, numbers).T, "smoothed": smoothed_log_mean_exp(log_w.double())}

    size = even_block_size(len(x), max(1, min(CHAIN_BLOCK, _MOST_LOG_WEIGHTS // numbers[-1])))
    shapes: Shapes = {"bounds": (len(numbers),), "smoothed": ()}
    found = context.run_stage(stage, len(x), size, shapes, compute, calls=1, words=words)
    return WeighedParticles(found["bounds"].T, found["smoothed"])


def list_fewer_particles(num_particles: int) -> list[int]:
    """S/100, S/50, S/20, S/10, S/5, S/2 and S, ascending and without repeats."""
    return sorted({max(1, num_particles // divisor) for divisor in (1, 2, 5, 10, 20, 50, 100)})


# --- Annealing ---


def anneal_images(context: StageContext, stage: str, x: Tensor, chain: ChainOptions, *, words: str) -> AISSummary:
    """Bounds on log p(x) from below, (N,) each. x: (N, *E)."""

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        annealing = _adapt_annealing(context, x[items], chain, advance, compiled)
        found = ais.lower(context.vae, x[items], annealing, num_chains=chain.chains, compile=compiled, progress=advance)
        return _summarize_chains(found.log_w, found.acceptance, 1)

    size, calls = images_per_block(context, x, chain), 2 * chain.temperatures
    shapes: Shapes = dict.fromkeys(AISSummary._fields, ())
    found = context.run_stage(stage, len(x), size, shapes, compute, calls=calls, words=words, is_compiled=True)
    return AISSummary(**found)


def anneal_simulated_images(
    context: StageContext, stage: str, num_images: int, chain: ChainOptions, *, words: str
) -> tuple[AISSummary, AISSummary]:
    """Bounds on log p(x) from below and from above, of images that the model makes together with their z."""
    with seeded(context.block_seed(f"{stage} images", 0), context.place):
        x, z = ais.simulate(context.vae, num_images)

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        annealing = _adapt_annealing(context, x[items], chain, advance, compiled)
        own, C = x[items], chain.chains
        below = ais.lower(context.vae, own, annealing, num_chains=C, compile=compiled, progress=advance)
        above = ais.upper(context.vae, own, z[items], annealing, num_chains=C, compile=compiled, progress=advance)
        results = {f"lower {name}": v for name, v in _summarize_chains(below.log_w, below.acceptance, 1).items()}
        return results | {f"upper {n}": v for n, v in _summarize_chains(above.log_w, above.acceptance, -1).items()}

    size, calls = images_per_block(context, x, chain), 3 * chain.temperatures
    shapes: Shapes = {f"{side} {name}": () for side in ("lower", "upper") for name in AISSummary._fields}
    found = context.run_stage(stage, num_images, size, shapes, compute, calls=calls, words=words, is_compiled=True)
    below, above = (AISSummary(*(found[f"{side} {n}"] for n in AISSummary._fields)) for side in ("lower", "upper"))
    return below, above


def images_per_block(context: StageContext, x: Tensor, chain: ChainOptions) -> int:
    """Blocks of nearly equal size of x, (N, *E), so small that all chains of a block fit into one decoder pass."""
    return even_block_size(len(x), min(CHAIN_BLOCK, ais.images_per_block(context.vae, x, chain.chains)))


def _adapt_annealing(
    context: StageContext, x: Tensor, chain: ChainOptions, advance: Count, compiled: bool
) -> ais.Annealing:
    return ais.pilot(
        context.vae,
        x,
        # Evenly spaced: from a guide, gaps on simulated images were no larger than with sigmoidal temperatures.
        betas=ais.temperatures(chain.temperatures, steepness=0.0),
        num_leapfrogs=chain.leapfrogs,
        num_chains=chain.chains,
        start=chain.start,
        compile=compiled,
        progress=advance,
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


# --- Gaps, calibration ---


def split_gaps(context: StageContext, stage: str, x: Tensor, log_evidence: Tensor, *, words: str) -> gaps.Gaps:
    """log p(x) - ELBO in its two parts, (N,) each. x: (N, *E), log_evidence: (N,) nats."""
    size = even_block_size(len(x), REFINEMENT_BLOCK)
    pays = _is_refinement_compiled(context, len(x), size)

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        found = gaps.gaps(
            context.vae,
            x[items],
            log_evidence[items].to(x.device),
            steps=_REFINEMENT_STEPS,
            num_particles=_REFINEMENT_PARTICLES,
            compile=compiled and pays,
            progress=advance,
        )
        return vars(found)

    shapes: Shapes = dict.fromkeys(("log_evidence", "elbo", "refined_elbo"), ())
    calls = _REFINEMENT_STEPS * size
    found = context.run_stage(stage, len(x), size, shapes, compute, calls=calls, words=words, is_compiled=pays)
    return gaps.Gaps(**found)


def rank_simulations(context: StageContext, stage: str, num_simulations: int, num_draws: int, *, words: str) -> Ranks:
    """The ranks of simulation-based calibration."""
    shapes: Shapes = {"latents": tuple(context.vae.prior().event_shape), "log_joint": ()}

    def compute(items: slice, advance: Count, compiled: bool) -> Tensors:
        count = items.stop - items.start
        found = compute_ranks(context.vae, num_simulations=count, num_draws=num_draws, progress=advance)
        return {name: getattr(found, name) for name in shapes}

    size = even_block_size(num_simulations, SIMULATION_BLOCK)
    found = context.run_stage(stage, num_simulations, size, shapes, compute, calls=size, words=words)
    return Ranks(found["latents"].long(), found["log_joint"].long(), num_draws)
