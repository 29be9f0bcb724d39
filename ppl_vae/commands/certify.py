"""The certificate of a run: log p(x) from both sides, and where log p(x) - ELBO is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands import certificate_stages as stages
from ppl_vae.commands.certificate_stages import ChainOptions, StageContext
from ppl_vae.commands.options import Certify
from ppl_vae.evidence.chains import resolve_start
from ppl_vae.evidence.gaps import Gaps
from ppl_vae.evidence.typicality import mix_prior_into_guide
from ppl_vae.reports.certificate_figures import certificate_figures
from ppl_vae.reports.text.certificate import certificate_table, describe_certificate
from ppl_vae.runs.block_store import BlockStore, StageResults
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.certificate_results import CERTIFICATE, Certificate, add_certificate, read_certificates
from ppl_vae.runs.certified_images import AISSummary, CertifiedImages, ConvergenceBounds, ScoredImages, summarize_images
from ppl_vae.runs.fit_arguments import decide_compile, find_device
from ppl_vae.runs.open import Run, Say, check_density, load_evaluated_vae, open_run
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runs.resolve import data_options
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.process import stop_on_signals
from ppl_vae.vae import VAE

_CONVERGENCE_IMAGES = 25
# Raise this when a stage gives other numbers for the same options: stored stages are then measured again.
_METHOD = 2


def evaluation_key(split: str) -> str:
    """The certificate's key in evaluation.json."""
    return f"{CERTIFICATE}{split}"


def images_file(split: str) -> str:
    """The file with the numbers of each image, by stage."""
    return f"{evaluation_key(split)}.safetensors"


def partial_file(split: str) -> str:
    """The file of the finished blocks of a certificate that is not complete."""
    return f"{evaluation_key(split)}.partial.safetensors"


class OtherImages(NamedTuple):
    """Images (n, *E) of another data set, as the run sees them, with its name and the SHA-256 of its bytes."""

    name: str
    x: Tensor
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What a certificate measures.

    Args:
        run, options: the run, and the command's options.
        place: the device.
        index, x: the images' places in their split, and the images (N, *E), on the CPU.
        chain: how chains are annealed.
        gap_splits: the splits whose gap is divided into its parts; empty if none.
        other: another data set to score, if asked for.
    """

    run: Run
    options: Certify
    place: torch.device
    index: Tensor
    x: Tensor
    chain: ChainOptions
    gap_splits: tuple[str, ...]
    other: OtherImages | None


def certify_run(options: Certify, *, say: Say) -> Certificate:
    """Bound log p(x) of a split from both sides, and say how far the bounds can be trusted.

    Writes evaluation.json's "certificate-SPLIT", certificate-SPLIT.safetensors (the numbers of each image) and
    figures/certificate-SPLIT-*.png. An interrupted certificate goes on from its finished blocks, in
    certificate-SPLIT.partial.safetensors, and ends with the same numbers. Stages that an earlier certificate measured
    with the same options are not measured again. What is not asked for this time is not in the entry, but stays in the
    file.

    Args:
        options: The command's options.
        say: Receives each line for the reader.

    Raises:
        Interrupted: SIGINT or SIGTERM, after the current block; finished blocks are kept.
        ValueError: before the work: no run, a damaged or a read-only one, one that another process writes to, an
            autoencoder, dequantized levels, other data than the run was trained on, or another data set that does not
            fit.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    with runs.lock_folder(run.folder), stop_on_signals() as should_stop:
        _check_before_work(run, options)
        vae = load_evaluated_vae(run).to(find_device(options.device))
        plan = _plan(run, vae, options, say)
        context = _stage_context(plan, vae, say, should_stop)
        found = _measure(context, plan)
        certificate = Certificate(
            **vars(run.provenance),
            split=options.split,
            num_images=len(plan.x),
            **plan.chain._asdict(),
            num_particles=options.num_particles,
            seed=options.seed,
            step=runs.load_step(run.folder / runs.MODEL),
            **summarize_images(found, options.num_particles),
            stage_seconds=context.results.asked_seconds,
            seconds=sum(context.results.asked_seconds.values()),
        )
        context.results.save({"index": plan.index})
        _write(run, certificate, found, plan.x, say)
        context.store.remove()
        if options.output is not None:
            rows = add_certificate(Path(options.output), run.folder.name, certificate, options.device)
            say(f"{options.output} has its row:")
            say(certificate_table([(row.run, row, row.environment["threads"]) for row in rows]))
        return certificate


# --- Before the work ---


def _check_before_work(run: Run, options: Certify) -> None:
    """Find what would fail after the work: a damaged file, a read-only folder, a file in the place of a folder."""
    check_density(run, "log-likelihood")
    if run.pixels == "dequantized":  # no chain can start from the density of such a guide
        raise ValueError(
            f"{run.folder}: expected a guide that is the same at every call, got one of (level + u) / 256, u drawn "
            "anew each time (dequantized levels), from which no chain can be annealed"
        )
    runs.read_evaluations(run.folder)
    runs.check_writable(run.folder)
    if options.output is not None:
        read_certificates(Path(options.output))
        if not Path(options.output).parent.is_dir():
            raise ValueError(f"--output: expected a file in a folder that is there, got {options.output}")
        runs.check_writable(Path(options.output).parent)
    if (run.folder / runs.FIGURES).is_file():
        raise ValueError(f"{run.folder / runs.FIGURES}: expected a folder, got a file")
    for name in (partial_file(options.split), images_file(options.split)):
        if (run.folder / name).is_dir():
            raise ValueError(f"{run.folder / name}: expected a file, got a folder")
    if options.against_data_dir is not None and options.against is None:
        raise ValueError("--against-data-dir: expected it together with --against, got it alone")


def _plan(run: Run, vae: VAE, options: Certify, say: Say) -> Plan:
    other = None if options.against is None else _load_other_images(run, options, options.against)
    x = data.evaluation_images(run.splits, options.split, run.evaluated_pixels, seed=options.seed)
    if options.images > len(x):
        say(f"--images {options.images:,}: the {options.split} split has {len(x):,}, and all are taken.")
    index = data.subset(len(x), options.images)
    chain = ChainOptions(options.temperatures, options.leapfrogs, options.chains, resolve_start(vae, options.start))
    if chain.start != options.start:
        say(
            f"--start {options.start}: the guide's density is slow to compute except at its own samples. The "
            "chains start from a normal with its moments instead."
        )
    gap_splits = tuple(split for split in ("train", "validation") if len(getattr(run.splits, split)))
    if options.gap_images and run.options.upper_latents:
        say("The gap is not split in two: a guide of several layers has no features of a single image to refine.")
    if not options.gap_images or run.options.upper_latents:
        gap_splits = ()
    return Plan(run, options, find_device(options.device), index, x[index], chain, gap_splits, other)


def _load_other_images(run: Run, options: Certify, dataset: str) -> OtherImages:
    """As many test images of another data set, binarized as the run's own.

    Raises:
        ValueError: the data set cannot be read, has images of another shape, or pixels outside the likelihood's
            support.
    """
    is_folder = dataset not in data.DATASETS and not data.is_array_file(Path(dataset))
    own = data_options(run.options)
    reading = {name: own[name] for name in ("image_size", "fit", "color") if is_folder and name in own}
    data_dir, stored_dir = options.against_data_dir, run.options.data_dir
    try:
        download = data_dir is not None or stored_dir is None  # never into a folder that a config names
        splits = data.load(dataset, data_dir=data_dir or stored_dir, download=download, **reading)
        if splits.event_shape != run.splits.event_shape:
            expected, got = ("x".join(map(str, each.event_shape)) for each in (run.splits, splits))
            raise ValueError(f"expected images of shape {expected}, as the run's, got {got}")
        x = data.evaluation_images(splits, "test", run.evaluated_pixels, seed=options.seed)
        family = build_likelihood(run.options, run.splits.event_shape)
        if not family.support.check(x).all():
            raise ValueError(
                f"expected pixels that are {family.support_words}, got {splits.kind} from {float(x.min()):.4g} to "
                f"{float(x.max()):.4g}"
            )
    except ValueError as error:
        raise ValueError(f"--against {dataset}: {error}") from None
    return OtherImages(splits.name, x[data.subset(len(x), options.images)], splits.sha256)


# --- The work ---


def _stage_context(plan: Plan, vae: VAE, say: Say, should_stop: Callable[[], bool]) -> StageContext:
    run, options = plan.run, plan.options
    num_transitions = options.temperatures * options.leapfrogs * math.ceil(len(plan.x) / stages.CHAIN_BLOCK)
    compiles = decide_compile(options.compile, num_transitions, plan.place)
    common = {
        "weights": data.compute_sha256(run.folder / runs.MODEL),
        "data": run.splits.sha256,
        "seed": options.seed,
        "device": options.device,
        "compile": [options.compile, compiles],
        "blocks": stages.BLOCKS,
        "method": _METHOD,
    }
    identities = {stage: common | identity for stage, identity in _stage_identities(plan)}
    store = BlockStore(run.folder / partial_file(options.split), identities, say)
    results = StageResults(run.folder / images_file(options.split), identities, common, say)
    return StageContext(vae, plan.place, options.seed, store, results, options.compile, compiles, say, should_stop)


def _stage_identities(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage's name, and what decides its numbers in addition to what decides those of every stage."""
    options, chain = plan.options, plan.chain
    images = {"split": options.split, "images": len(plan.x)}
    particles = {"num_particles": options.num_particles}
    for stage in ("importance", "improved", "particles"):
        yield stage, images | particles
    yield "ais", images | chain._asdict()
    for T in stages.list_fewer_temperatures(chain.temperatures):
        yield f"temperatures {T}", images | chain._replace(temperatures=T)._asdict()
    if options.simulated:
        yield "simulated", chain._asdict() | {"simulated": options.simulated}
    for split in plan.gap_splits:
        for stage in ("ais", "gaps"):
            yield f"{stage} {split}", chain._asdict() | {"gap_images": options.gap_images}
    if options.simulations:
        yield "calibration", {"simulations": options.simulations, "draws": options.draws}
    if plan.other is not None:
        yield "against own", images | particles
        yield "against", particles | {"against": [plan.other.name, plan.other.sha256, len(plan.other.x)]}


def _measure(context: StageContext, plan: Plan) -> CertifiedImages:
    """Run every stage, the quickest first, so that errors show early."""
    options, chain, S = plan.options, plan.chain, plan.options.num_particles
    x = plan.x.to(plan.place)
    plain = stages.weigh_images(context, "importance", x, vae=context.vae, num_particles=S, words="importance sampling")
    scored = None if plan.other is None else _score_other(context, x, plan.other, S)
    ranks = simulated = None
    if options.simulations:
        words = "calibration of the guide"
        ranks = stages.rank_simulations(context, "calibration", options.simulations, options.draws, words=words)
    improved = stages.weigh_images_refined(context, "improved", x, num_particles=S, words="refined importance sampling")
    chains = stages.anneal_images(context, "ais", x, chain, words="annealed importance sampling")
    if options.simulated:
        words = "simulated images, from both sides"
        simulated = stages.anneal_simulated_images(context, "simulated", options.simulated, chain, words=words)
    sizes = stages.list_fewer_particles(S)
    weighed = stages.weigh_fewer_particles(context, "particles", x, sizes, words="fewer importance samples")
    converging = _measure_convergence(context, x, chain, sizes, weighed, chains)
    gaps = {split: _split_gap(context, plan, split) for split in plan.gap_splits}
    return CertifiedImages(
        plan.index, chains, plain, weighed.smoothed, improved, converging, simulated, gaps, ranks, scored
    )


def _score_other(context: StageContext, x: Tensor, other: OtherImages, S: int) -> ScoredImages:
    """The bound L_S of both data sets, with a guide that also covers images unlike the training data."""
    vae = mix_prior_into_guide(context.vae)
    both = {"against own": (x, "the run's own"), "against": (other.x.to(context.place), other.name)}
    bounds = [
        stages.weigh_images(
            context, stage, images, vae=vae, num_particles=S, words=f"guarded importance sampling, {name}"
        )
        for stage, (images, name) in both.items()
    ]
    return ScoredImages(bounds[0].log_evidence, bounds[1].log_evidence, other.name)


def _measure_convergence(
    context: StageContext,
    x: Tensor,
    chain: ChainOptions,
    sizes: list[int],
    weighed: stages.WeighedParticles,
    full: AISSummary,
) -> ConvergenceBounds:
    """Bounds with fewer temperatures and fewer particles, on images spread evenly: files may be sorted by class."""
    count = min(_CONVERGENCE_IMAGES, len(x))
    places = torch.arange(count) * len(x) // count
    some, temperatures = x[places.to(x.device)], stages.list_fewer_temperatures(chain.temperatures)
    bounds = [
        stages.anneal_images(
            context, f"temperatures {T}", some, chain._replace(temperatures=T), words=f"{T:,} temperatures"
        ).bound
        for T in temperatures
    ]
    annealed = torch.stack([*bounds, full.bound[places]])
    return ConvergenceBounds(places, [*temperatures, chain.temperatures], annealed, sizes, weighed.bounds[:, places])


def _split_gap(context: StageContext, plan: Plan, split: str) -> Gaps:
    x = data.evaluation_images(plan.run.splits, split, plan.run.evaluated_pixels)
    x = x[data.subset(len(x), plan.options.gap_images)].to(plan.place)
    words = f"annealed importance sampling, {split}"
    log_p_x = stages.anneal_images(context, f"ais {split}", x, plan.chain, words=words).bound
    return stages.split_gaps(context, f"gaps {split}", x, log_p_x, words=f"refined guide, {split}")


# --- After the work ---


def _write(run: Run, certificate: Certificate, found: CertifiedImages, x: Tensor, say: Say) -> None:
    """Write the figures and then the entry of evaluation.json, and say what they show."""
    key, folder = evaluation_key(certificate.split), run.folder / runs.FIGURES
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{key}-*.png"):
        old.unlink()
    figures = certificate_figures(run, certificate, found, x)
    for name, figure in figures.items():
        write_figure(folder / f"{key}-{name}.png", figure)
    kept = runs.read_evaluations(run.folder, step=certificate.step)
    runs.write_json(run.folder / runs.EVALUATION, kept | {key: to_json(certificate)})
    if key in kept:
        replaced = kept[key].get("num_images", 0)
        say(f"Replaces the certificate of {replaced:,} images of the {certificate.split} split.")
    for line in describe_certificate(certificate):
        say(line)
    names = ", ".join(f"{key}-{name}.png" for name in figures)
    say(f"In {run.folder}: {runs.EVALUATION} ({key}), {images_file(certificate.split)}; {runs.FIGURES}/{names}")
