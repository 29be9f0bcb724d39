"""The certificate of a run: log p(x) from both sides, and where log p(x) - ELBO is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands import certificate_stages as stages
from ppl_vae.commands.certificate_stages import StageContext
from ppl_vae.commands.evaluate import choose_images
from ppl_vae.commands.options import Certify
from ppl_vae.evidence.chains import resolve_start
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.guide_calibration import judge
from ppl_vae.evidence.typicality import mix_prior_into_guide, typicality
from ppl_vae.reports.figures.measurements import certificate_figures
from ppl_vae.reports.text.evaluation import certificate_table, describe_certificate
from ppl_vae.runs import certificates
from ppl_vae.runs.certificates import CERTIFICATE, AISSummary, Certificate, CertifiedImages, Convergence
from ppl_vae.runs.checkpoints import BlockStore, StageResults
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.open import Run, Say, check_density, check_images, check_no_labels, load_evaluated_vae, open_run
from ppl_vae.runs.outputs import make_parent, write_figure
from ppl_vae.runs.resolve import data_options, decide_compile, find_device
from ppl_vae.runs.results import to_json
from ppl_vae.runtime.process import stop_on_signals
from ppl_vae.vae import VAE

_CONVERGENCE_IMAGES = 25
# Raise this when a stage gives other numbers for the same options: stored stages are then measured again.
_METHOD = 2


@dataclass(frozen=True)
class Plan:
    """What a certificate measures."""

    run: Run
    options: Certify  # whose start is resolved
    index: Tensor  # the images' places in their split
    x: Tensor  # (N, *E), on the CPU
    gap_splits: tuple[str, ...]  # the splits whose gap is divided into its parts
    other: tuple[Tensor, data.Splits] | None  # images (n, *E) of another data set to score, and that data set


def certify_run(options: Certify, *, say: Say) -> Certificate:
    """Bound log p(x) of a split from both sides, and say how far the bounds can be trusted.

    Writes evaluation.json's "certificate-SPLIT", certificate-SPLIT.safetensors (the numbers of each image) and
    figures/certificate-SPLIT-*.png. An interrupted certificate goes on from its finished blocks, in
    certificate-SPLIT.partial.safetensors, and ends with the same numbers. Stages that an earlier certificate measured
    with the same options are not measured again. What is not asked for this time is not in the entry, but stays in the
    file.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    check_no_labels(run, "certificate")
    with runs.lock_folder(run.folder), stop_on_signals() as should_stop:
        _check_before_work(run, options)
        device = find_device(options.device)
        vae = load_evaluated_vae(run).to(device)
        plan = _plan(run, vae, replace(options, device=str(device)), say)
        options = plan.options
        transitions = options.temperatures * options.leapfrogs * math.ceil(len(plan.x) / stages.CHAIN_BLOCK)
        compiles = decide_compile(options.compile, transitions, device)
        store, results = _open_stores(plan, compiles, say)
        context = StageContext(vae, device, options, store, results, compiles, say, should_stop)
        found, summary = _measure(context, plan)
        seconds = {stage: results.seconds[stage] for stage, _ in _stage_identities(plan)}
        certificate = Certificate(
            **vars(run.provenance),
            split=options.split,
            num_images=len(plan.x),
            **_chain_options(options),
            num_particles=options.num_particles,
            seed=options.seed,
            step=runs.load_step(run.folder / runs.MODEL),
            **summary,
            stage_seconds=seconds,
            seconds=sum(seconds.values()),
        )
        results.save({"index": plan.index})
        _write(run, certificate, found, plan.x, say)
        store.remove()
        if options.output is not None:
            rows = certificates.add_certificate(Path(options.output), run.folder.name, certificate, options.device)
            say(f"{options.output} has its row:")
            say(certificate_table([(row.run, row, row.environment["threads"]) for row in rows]))
        return certificate


def _check_before_work(run: Run, options: Certify) -> None:
    """Find what would fail after the work, such as a damaged file or a read-only folder."""
    check_density(run, "log-likelihood")
    if run.pixels == "dequantized":  # no chain can start from the density of such a guide
        raise ValueError(
            f"{run.folder}: expected a guide that is the same at every call, got one of (level + u) / 256, u drawn "
            "anew each time (dequantized levels), from which no chain can be annealed"
        )
    runs.read_evaluations(run.folder)
    (run.folder / runs.FIGURES).mkdir(exist_ok=True)
    if options.output is not None:
        certificates.read_certificates(Path(options.output))
        make_parent(Path(options.output))
    if options.against_data_dir is not None and options.against is None:
        raise ValueError("--against-data-dir: expected it together with --against, got it alone")


def _plan(run: Run, vae: VAE, options: Certify, say: Say) -> Plan:
    index, x = choose_images(run, run.evaluated_pixels, options, say)
    start = resolve_start(vae, options.start)
    if start != options.start:
        say(
            f"--start {options.start}: the guide's density is slow to compute except at its own samples. The "
            "chains start from a normal with its moments instead."
        )
    gap_splits = tuple(split for split in ("train", "validation") if len(getattr(run.splits, split)))
    if options.gap_images and run.options.upper_latents:
        say("The gap is not split in two: a guide of several layers has no features of a single image to refine.")
    if not options.gap_images or run.options.upper_latents:
        gap_splits = ()
    other = None if options.against is None else _load_other_images(run, options, options.against)
    return Plan(run, replace(options, start=start), index, x, gap_splits, other)


def _load_other_images(run: Run, options: Certify, dataset: str) -> tuple[Tensor, data.Splits]:
    """As many test images of another data set, binarized as the run's own."""
    own, data_dir = data_options(run.options), options.against_data_dir or run.options.data_dir
    is_folder = dataset not in data.DATASETS and not data.is_array_file(Path(dataset))
    reading = {name: own[name] for name in ("image_size", "fit", "color")} if is_folder else {}
    try:
        # Nothing is downloaded into a folder that a config names.
        download = options.against_data_dir is not None or run.options.data_dir is None
        splits = data.load(dataset, data_dir=data_dir, download=download, **reading)
        if splits.event_shape != run.splits.event_shape:
            raise ValueError(f"expected images of shape {run.splits.event_shape}, got {splits.event_shape}")
        x = data.evaluation_images(splits, "test", run.evaluated_pixels, seed=options.seed)
        check_images(run, "test", x)
    except ValueError as error:
        raise ValueError(f"--against {dataset}: {error}") from None
    return x[data.subset(len(x), options.images)], splits


def _open_stores(plan: Plan, compiles: bool, say: Say) -> tuple[BlockStore, StageResults]:
    """Finished blocks and finished stages, each with everything that decides its numbers."""
    folder, options = plan.run.folder, plan.options
    common = {
        "weights": data.compute_sha256(folder / runs.MODEL),
        "data": plan.run.splits.sha256,
        "seed": options.seed,
        "device": options.device,
        "compile": [options.compile, compiles],
        "blocks": stages.BLOCKS,
        "method": _METHOD,
    }
    identities = {stage: common | identity for stage, identity in _stage_identities(plan)}
    path = folder / f"{CERTIFICATE}{options.split}"
    return (
        BlockStore(path.with_suffix(".partial.safetensors"), identities, say),
        StageResults(path.with_suffix(".safetensors"), identities, common, say),
    )


def _stage_identities(plan: Plan) -> Iterator[tuple[str, dict[str, object]]]:
    """Each stage's name, and what decides its numbers in addition to what decides those of every stage."""
    options, chain = plan.options, _chain_options(plan.options)
    images = {"split": options.split, "images": len(plan.x)}
    particles = {"num_particles": options.num_particles}
    for stage in ("importance", "improved", "particles"):
        yield stage, images | particles
    yield "ais", images | chain
    for T in stages.list_fewer_temperatures(options.temperatures):
        yield f"temperatures {T}", images | chain | {"temperatures": T}
    if options.simulated:
        yield "simulated", chain | {"simulated": options.simulated}
    for split in plan.gap_splits:
        for stage in ("ais", "gaps"):
            yield f"{stage} {split}", chain | {"gap_images": options.gap_images}
    if options.simulations:
        yield "calibration", {"simulations": options.simulations, "draws": options.draws}
    if plan.other is not None:
        x, splits = plan.other
        yield "against own", images | particles
        yield "against", particles | {"against": [splits.name, splits.sha256, len(x)]}


def _chain_options(options: Certify) -> JsonObject:
    """The options that say how chains are annealed."""
    return {name: getattr(options, name) for name in ("temperatures", "leapfrogs", "chains", "start")}


def _measure(context: StageContext, plan: Plan) -> tuple[CertifiedImages, JsonObject]:
    """Run every stage, the quickest first, so that errors show early; the fields of a ``Certificate`` come second."""
    options, x, S = plan.options, plan.x.to(context.device), plan.options.num_particles
    plain = stages.weigh_images(context, "importance", x, context.vae)
    ranks = simulated = scored = against = None
    if plan.other is not None:
        other, splits = plan.other
        vae = mix_prior_into_guide(context.vae)  # a guide that also covers images unlike the training data
        scored = (
            stages.weigh_images(context, "against own", x, vae).log_evidence,
            stages.weigh_images(context, "against", other.to(context.device), vae).log_evidence,
        )
        against = typicality(*scored, dataset=splits.name, num_particles=S)
    if options.simulations:
        ranks = stages.rank_simulations(context, "calibration", options.simulations, options.draws)
    improved = stages.weigh_images_refined(context, "improved", x)
    chains = stages.anneal_images(context, "ais", x)
    if options.simulated:
        below, above = stages.anneal_simulated_images(context, "simulated", options.simulated)
        simulated = certificates.summarize_simulated(below, above)
    convergence = _measure_convergence(context, x, chains)
    gaps = {}
    for split in plan.gap_splits:
        images = data.evaluation_images(plan.run.splits, split, plan.run.evaluated_pixels)
        images = images[data.subset(len(images), options.gap_images)].to(context.device)
        log_p_x = stages.anneal_images(context, f"ais {split}", images).bound
        gaps[split] = certificates.summarize_gaps(stages.split_gaps(context, f"gaps {split}", images, log_p_x))
    found = CertifiedImages(plan.index, chains, plain, improved, ranks, scored)
    return found, {
        "ais": certificates.summarize_chains(chains),
        "importance": certificates.summarize_bound(plain, S),
        "improved": certificates.summarize_bound(improved, S),
        "ais_minus_importance": certificates.subtract_importance(chains, plain),
        "ais_minus_improved": certificates.subtract_importance(chains, improved),
        "total_gap": Estimate.mean_of(chains.bound - plain.elbo),
        "unreliable": tuple(plan.index[found.unreliable].tolist()),
        "simulated": simulated,
        "convergence": convergence,
        "gaps": gaps or None,
        "calibration": None if ranks is None else judge(ranks),
        "against": against,
    }


def _measure_convergence(context: StageContext, x: Tensor, full: AISSummary) -> Convergence:
    """Bounds with less effort, on images spread evenly: files may be sorted by class."""
    count, T = min(_CONVERGENCE_IMAGES, len(x)), context.options.temperatures
    sizes, fewer = stages.list_fewer_particles(context.options.num_particles), stages.list_fewer_temperatures(T)
    weighed = stages.weigh_fewer_particles(context, "particles", x, sizes)
    places = torch.arange(count) * len(x) // count
    some, ais = x[places.to(x.device)], full.bound[places]
    bounds = [stages.anneal_images(context, f"temperatures {t}", some, temperatures=t).bound for t in fewer]
    temperatures = certificates.summarize_curve([*fewer, T], torch.stack([*bounds, ais]), ais)
    particles = certificates.summarize_curve(sizes, weighed[:, places], ais)
    return Convergence(count, temperatures, particles)


def _write(run: Run, certificate: Certificate, found: CertifiedImages, x: Tensor, say: Say) -> None:
    """Write the figures and then the entry of evaluation.json, and say what they show."""
    key, folder = f"{CERTIFICATE}{certificate.split}", run.folder / runs.FIGURES
    for old in folder.glob(f"{key}-*.png"):
        old.unlink()
    figures = certificate_figures(run, certificate, found, x)
    for name, figure in figures.items():
        write_figure(folder / f"{key}-{name}.png", figure)
    kept = runs.read_evaluations(run.folder, step=certificate.step)
    runs.write_json(run.folder / runs.EVALUATION, kept | {key: to_json(certificate)})
    for line in describe_certificate(certificate):
        say(line)
    names = ", ".join(f"{key}-{name}.png" for name in figures)
    say(f"In {run.folder}: {runs.EVALUATION} ({key}), {key}.safetensors; {runs.FIGURES}/{names}")
