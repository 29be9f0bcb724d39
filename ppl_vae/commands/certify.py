"""log p(x) of a run from both sides: measured block by block, written under its own key, drawn, and said in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands import certificate_numbers as numbers
from ppl_vae.commands import certificate_stages as stages
from ppl_vae.commands.certificate_stages import AISSummary, Chain
from ppl_vae.commands.evaluate import describe_provenance
from ppl_vae.commands.options import Certify
from ppl_vae.evidence.ais import start_of
from ppl_vae.evidence.gaps import Gaps
from ppl_vae.evidence.typicality import guarded
from ppl_vae.reports.certificate_figures import certificate_figures
from ppl_vae.reports.certificate_table import certificate_table, check_output, read_certificates, write_certificate
from ppl_vae.reports.certificate_words import describe_certificate
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.certificate_blocks import BlockStore, StageContext
from ppl_vae.runs.fit_arguments import decide_compile, find_device
from ppl_vae.runs.opening import Run, Say, check_density, evaluated_vae, open_run
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runs.resolve import data_options
from ppl_vae.runtime.process import stop_on_signals

_CONVERGING = 25  # images
_METHOD = (
    2  # to be raised when a stage comes to other numbers by the same options: what is stored is then measured anew
)


def key_of(split: str) -> str:
    """Of evaluation.json."""
    return f"certificate-{split}"


def per_image(split: str) -> str:
    """The file that has a number for each image, by stage."""
    return f"{key_of(split)}.safetensors"


def partial_file(split: str) -> str:
    """The finished blocks of a certificate that is not finished."""
    return f"{key_of(split)}.partial.safetensors"


def certify_run(options: Certify, *, say: Say) -> dict[str, Any]:
    """Bounds log p(x) of a split, says how far they can be trusted, and where log p(x) - ELBO is lost.

    Writes evaluation.json's "certificate-SPLIT", certificate-SPLIT.safetensors (the numbers of each image) and
    figures/certificate-SPLIT-*.png. What is interrupted goes on where it was, and ends with the same numbers: its
    finished blocks are in certificate-SPLIT.partial.safetensors, until the end. Stages that were measured with the same
    options before are not measured again, so that another one can be added to them; another seed measures anew. What is
    not asked for this time is not in the entry, but stays in the file.

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        The entry, as evaluation.json holds it.

    Raises:
        Interrupted: SIGINT or SIGTERM, after the block that it came in; finished blocks are kept.
        ValueError: no run, a damaged or a read-only one, one that another process writes to, an autoencoder,
            dequantized levels, other data than it was trained on, or another data set that does not fit; before the
            work.
    """
    gap_images = options.gap_images
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    with runs.locked(run.folder), stop_on_signals() as should_stop:
        check_density(run, "log-likelihood")
        _check_exact(run)
        place = find_device(options.device)
        runs.read_evaluations(run.folder)  # a damaged file is found before the work, not after it
        runs.check_writable(run.folder)
        if options.output is not None:
            check_output(options.output)
        _check_places(run.folder, options.split)
        if options.against_data_dir is not None and options.against is None:
            raise ValueError("--against-data-dir: expected --against beside it, which it is of, got none")
        other = (
            None
            if options.against is None
            else _other_images(run, options.against, options.against_data_dir, options.images, options.seed)
        )
        index, x = _images_of(run, options.split, options.images, options.seed, say)
        vae = evaluated_vae(run).to(place)
        chain = Chain(options.temperatures, options.leapfrogs, options.chains, start_of(vae, options.start))
        if chain.start != options.start:
            say(
                f"--start {options.start}: the guide's density is slow to compute except at its own samples. The "
                "chains start from a normal with its moments instead."
            )
        asked = {
            "split": options.split,
            "num_images": len(x),
            **chain._asdict(),
            "num_particles": options.num_particles,
            "seed": options.seed,
        }
        asked["step"] = runs.load_step(run.folder / runs.MODEL)
        compiles = decide_compile(
            options.compile,
            options.temperatures * options.leapfrogs * math.ceil(len(x) / stages.CHAINED_A_BLOCK),
            place,
        )
        if gap_images and run.options.upper_latents:
            say("A guide of several layers has no features of an image's own to refine: the gap is not split in two.")
            gap_images = 0
        parts = Parts(options.simulated, gap_images, options.simulations, options.draws)
        of_all = {
            "weights": data.compute_sha256(run.folder / runs.MODEL),
            "data": run.splits.sha256,
            "seed": options.seed,
            "device": options.device,
            "compile": [options.compile, compiles],
            "blocks": stages.BLOCKS,
            "method": _METHOD,
        }
        decided_by = {
            stage: of_all | own
            for stage, own in _stages(run, options.split, len(x), chain, options.num_particles, parts, other)
        }
        finished = BlockStore(
            run.folder / partial_file(options.split), run.folder / per_image(options.split), decided_by, of_all, say
        )
        bench = StageContext(vae, place, options.seed, finished, options.compile, compiles, say, should_stop)
        found = _measure(bench, run, index, x.to(place), chain, options.num_particles, parts, other)
        entry = {
            **describe_provenance(run),
            **asked,
            **numbers.numbers_of(found, options.num_particles),
            "stage_seconds": finished.seconds,
            "seconds": sum(finished.seconds.values()),
        }
        if other is not None:
            entry["against"] |= {"dataset": other.name}
        finished.save({"index": index})
        _write(run, entry, found, x, say)
        finished.remove_blocks()
        if options.output is not None:
            write_certificate(options.output, run.folder.name, entry, options.device)
            say(f"{options.output} has its row:")
            say(certificate_table(read_certificates(options.output)))
        return entry


class Parts(NamedTuple):
    """How much of what may be left out, by a 0.

    Args:
        simulated: images of the model's own.
        gap_images: of train and of validation.
        simulations, draws: of the guide's calibration.
    """

    simulated: int
    gap_images: int
    simulations: int
    draws: int


class Other(NamedTuple):
    """Images of another data set, as the run sees them.

    Args:
        name: of the data set.
        x: (n, *E).
        sha256: of its bytes.
    """

    name: str
    x: Tensor
    sha256: str


# --- Before the work ---


def _check_places(folder: Path, split: str) -> None:
    """Refuses a file where a folder will be, and a folder where a file will be."""
    if (folder / runs.FIGURES).is_file():
        raise ValueError(f"{folder / runs.FIGURES}: expected a folder, got a file")
    for name in (partial_file(split), per_image(split)):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name}: expected a file, got a folder")


def _check_exact(run: Run) -> None:
    """Refuses a guide that sees its images with new noise at every call: no chain can start from its density."""
    if run.pixels == "dequantized":
        raise ValueError(
            f"{run.folder}: expected a guide that is the same at every call, got one of (level + u) / 256, u drawn "
            "anew each time (dequantized levels), from which no chain can be annealed"
        )


def _images_of(run: Run, split: str, images: int, seed: int, say: Say) -> tuple[Tensor, Tensor]:
    x = data.evaluation_images(run.splits, split, run.evaluated_pixels, seed=seed)
    if images > len(x):
        say(f"--images {images:,}: the {split} split has {len(x):,}, and all are taken.")
    index = data.subset(len(x), images)
    return index, x[index]


def _other_images(run: Run, dataset: str, data_dir: str | None, images: int, seed: int) -> Other:
    """As many test images of another data set, binarized as the run's own.

    Raises:
        ValueError: it cannot be read, has images of another shape, or pixels that the run's likelihood is not of.
    """
    named = dataset in data.DATASETS
    of_images = {} if named or data.is_array_file(Path(dataset)) else data_options(run.options)
    of_images = {name: of_images[name] for name in ("image_size", "fit", "color") if name in of_images}
    try:
        download = data_dir is not None or run.options.data_dir is None  # never into a folder that a config names
        splits = data.load(dataset, data_dir=data_dir or run.options.data_dir, download=download, **of_images)
    except ValueError as error:
        raise ValueError(f"--against {dataset}: {error}") from None
    if splits.event_shape != run.splits.event_shape:
        own, theirs = ("x".join(map(str, each.event_shape)) for each in (run.splits, splits))
        raise ValueError(f"--against {dataset}: expected images of shape {own}, as the run's, got {theirs}")
    try:
        x = data.evaluation_images(splits, "test", run.evaluated_pixels, seed=seed)
    except ValueError as error:
        raise ValueError(f"--against {dataset}: {error}") from None
    family = build_likelihood(run.options, run.splits.event_shape)
    if not family.support.check(x).all():
        raise ValueError(
            f"--against {dataset}: expected pixels that are {family.support_words}, got {splits.kind} from "
            f"{float(x.min()):.4g} to {float(x.max()):.4g}"
        )
    return Other(splits.name, x[data.subset(len(x), images)], splits.sha256)


# --- The work ---


def _stages(
    run: Run, split: str, num_images: int, chain: Chain, S: int, parts: Parts, other: Other | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage by its name, with what it alone depends on."""
    images = {"split": split, "images": num_images}
    yield "importance", images | {"num_particles": S}
    yield "improved", images | {"num_particles": S}
    yield "particles", images | {"num_particles": S}
    yield "ais", images | chain._asdict()
    for T in stages.fewer_temperatures(chain.temperatures):
        yield f"temperatures {T}", images | chain._replace(temperatures=T)._asdict()
    if parts.simulated:
        yield "simulated", chain._asdict() | {"simulated": parts.simulated}
    for of_gap in _splits_of_gaps(run) if parts.gap_images else ():
        for stage in ("ais", "gaps"):
            yield f"{stage} {of_gap}", chain._asdict() | {"gap_images": parts.gap_images}
    if parts.simulations:
        yield "calibration", {"simulations": parts.simulations, "draws": parts.draws}
    if other is not None:
        yield "against own", images | {"num_particles": S}
        yield "against", {"against": [other.name, other.sha256, len(other.x)], "num_particles": S}


def _splits_of_gaps(run: Run) -> list[str]:
    return [split for split in ("train", "validation") if len(getattr(run.splits, split))]


def _measure(
    bench: StageContext, run: Run, index: Tensor, x: Tensor, chain: Chain, S: int, parts: Parts, other: Other | None
) -> numbers.Measured:
    """Every stage, the quickest first, so that what is wrong is found soon."""
    plain = stages.importance(bench, "importance", x, vae=bench.vae, num_particles=S, words="importance sampling")
    scored = None if other is None else _scored(bench, x, other, S)
    found = None
    if parts.simulations:
        words = "calibration of the guide"
        found = stages.guide_ranks(bench, "calibration", parts.simulations, parts.draws, words=words)
    improved = stages.improved(bench, "improved", x, num_particles=S, words="refined importance sampling")
    chains = stages.annealed(bench, "ais", x, chain, words="annealed importance sampling")
    simulated = None
    if parts.simulated:
        words = "simulated images, from both sides"
        simulated = stages.simulated(bench, "simulated", parts.simulated, chain, words=words)
    sizes = stages.fewer_particles(S)
    weighed = stages.weighed_particles(bench, "particles", x, sizes, words="fewer importance samples")
    converging = _converging(bench, x, chain, sizes, weighed, chains)
    gaps = _gaps(bench, run, chain, parts.gap_images) if parts.gap_images else {}
    return numbers.Measured(
        index, chains, plain, weighed.smoothed, improved, converging, simulated, gaps, found, scored
    )


def _scored(bench: StageContext, x: Tensor, other: Other, S: int) -> numbers.Scored:
    """Both sets by the same bound, with a guide that serves images for which the run's was not made."""
    vae = guarded(bench.vae)
    both = {"against own": (x, "the run's own"), "against": (other.x.to(bench.place), other.name)}
    bounds = [
        stages.importance(bench, stage, images, vae=vae, num_particles=S, words=f"guarded importance sampling, {name}")
        for stage, (images, name) in both.items()
    ]
    return numbers.Scored(*(bound.log_evidence for bound in bounds))


def _converging(
    bench: StageContext, x: Tensor, chain: Chain, sizes: list[int], weighed: stages.Weighed, full: AISSummary
) -> numbers.Converging:
    """With fewer temperatures and fewer particles, on images spread over all of them: files may be sorted by class."""
    count = min(_CONVERGING, len(x))
    places = torch.arange(count) * len(x) // count
    some, temperatures = x[places.to(x.device)], stages.fewer_temperatures(chain.temperatures)
    bounds = [
        stages.annealed(bench, f"temperatures {T}", some, chain._replace(temperatures=T), words=f"{T:,} temperatures")
        for T in temperatures
    ]
    in_full = [*(each.bound for each in bounds), full.bound[places]]
    return numbers.Converging(
        places, [*temperatures, chain.temperatures], torch.stack(in_full), sizes, weighed.bounds[:, places]
    )


def _gaps(bench: StageContext, run: Run, chain: Chain, images: int) -> dict[str, Gaps]:
    """Of train and of validation, as far as the data has them."""
    found = {}
    for split in _splits_of_gaps(run):
        x = data.evaluation_images(run.splits, split, run.evaluated_pixels)
        x = x[data.subset(len(x), images)].to(bench.place)
        log_p_x = stages.annealed(bench, f"ais {split}", x, chain, words=f"annealed importance sampling, {split}").bound
        found[split] = stages.gaps(bench, f"gaps {split}", x, log_p_x, words=f"refined guide, {split}")
    return found


# --- After the work ---


def _write(run: Run, entry: dict[str, Any], found: numbers.Measured, x: Tensor, say: Say) -> None:
    """The figures and then the entry, in files and in words."""
    key = key_of(entry["split"])
    folder = run.folder / runs.FIGURES
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{key}-*.png"):
        old.unlink()
    figures = certificate_figures(run, entry, found, x)
    for name, figure in figures.items():
        write_figure(folder / f"{key}-{name}.png", figure)
    others = runs.read_evaluations(run.folder)
    kept = {other: old for other, old in others.items() if old.get("step") == entry["step"]}  # of these weights
    runs.write_json(run.folder / runs.EVALUATION, kept | {key: entry})
    if key in kept:
        say(f"Replaces the certificate of {kept[key].get('num_images', 0):,} images of the {entry['split']} split.")
    for line in describe_certificate(entry):
        say(line)
    drawn = ", ".join(f"{key}-{name}.png" for name in figures)
    say(f"In {run.folder}: {runs.EVALUATION} ({key}), {per_image(entry['split'])}; {runs.FIGURES}/{drawn}")
