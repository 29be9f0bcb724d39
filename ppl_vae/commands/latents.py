"""From images to latents, and from latents to new images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.evaluate import evaluate_with_progress
from ppl_vae.commands.options import Encode, Sample
from ppl_vae.data import dequantize_uniformly
from ppl_vae.data.registry import SPLITS
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import reconstruction
from ppl_vae.evidence.moments import PosteriorMoments, encode, sample_latents
from ppl_vae.reports.display import choose_display
from ppl_vae.reports.latents_figure import latents_figure, measure_latent_use
from ppl_vae.reports.run_figures import samples_figure
from ppl_vae.reports.text.evaluation import describe_encoding
from ppl_vae.reports.text.pages import NOT_TRAINED_ON_PRIOR
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.command_results import Encoding, ImageScore
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Images, Run, Say, load_evaluated_vae, load_given_images, open_run, open_run_or_export
from ppl_vae.runs.outputs import make_output_folder, write_arrays, write_figure, write_picture
from ppl_vae.runs.resolve import find_device
from ppl_vae.runs.results import Quantiles, to_json
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.process import progress_bar
from ppl_vae.vae import VAE

_NUM_LOWEST = 5


def encode_images(options: Encode, *, say: Say) -> Path:
    """Computes latents and log p(x) of images; writes encoded.npz, encoded.json and latents.png.

    encoded.npz holds for each image ``mean`` and ``scale`` of q(z | x) (n, L), ``log_likelihood`` (the bound L_S),
    ``elbo``, ``ess``, ``pareto_k`` (n,), ``names`` and, if they are known, ``labels``. For dequantized levels, mean and
    scale are those of q(z | (x + u) / 256) with one draw of u.

    An autoencoder has no density: ``mean`` is z(x), and ``reconstruction``, log p(x | z(x)), is the only other number.
    For dequantized levels both use the same (x + u) / 256.

    An export of a run needs no data for a person's own images.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, images that do not fit it or have missing
            pixels, or a folder that holds something.
    """
    is_split = options.images_path in SPLITS
    opened = open_run if is_split else open_run_or_export
    run = opened(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    find_device(options.device)
    given = load_given_images(run, options.images_path, most=options.images, seed=options.seed)
    holes = int(given.x.flatten(1).isnan().any(1).sum())
    if holes:
        raise ValueError(
            f"{given.source}: expected every pixel, got missing ones (NaN) in {holes:,} of {len(given.x):,} images"
        )
    name = options.images_path if is_split else Path(options.images_path).resolve().stem or "images"
    folder = make_output_folder(options.output, run.folder / "encodings" / name)
    measure = _reconstruct_images if is_autoencoder(run.options) else _evaluate_images
    codes, numbers, summary = measure(run, given, options, say)
    arrays = {"mean": codes.mean} | numbers
    if given.labels is not None:
        arrays |= {"labels": given.labels}
    vae = load_evaluated_vae(run)
    with seeded(options.seed, torch.device("cpu")), torch.no_grad():
        use = measure_latent_use(vae, given.x, codes)
        figure = latents_figure(
            codes, use, vae.prior(), kind="image", classes=given.labels, class_names=run.splits.class_names
        )
    (folder / "encoded.json").unlink(missing_ok=True)  # the last that is written: it never describes other arrays
    write_arrays(folder / "encoded.npz", arrays, given.names)
    write_figure(folder / "latents.png", figure)
    runs.write_json(folder / "encoded.json", to_json(summary))
    for line in (*given.notes, *describe_encoding(summary)):
        say(line)
    say(f"In {folder}: encoded.npz (latents and numbers of each image), encoded.json, latents.png")
    return folder


Encoded = tuple[PosteriorMoments, dict[str, Tensor], Encoding]  # latents, numbers of each image, and their summary


def _summarize(run: Run, given: Images, options: Encode) -> Encoding:
    """The fields that both kinds of runs have."""
    return Encoding(
        **vars(run.provenance),
        images=given.source,
        num_images=len(given.x),
        num_particles=None,
        lowest=(),
        seed=options.seed,
        step=runs.load_step(run.folder / runs.MODEL),
        notes=given.notes,
    )


def _evaluate_images(run: Run, given: Images, options: Encode, say: Say) -> Encoded:
    place, S = find_device(options.device), options.num_particles
    vae, x = load_evaluated_vae(run).to(place), given.x.to(place)
    with seeded(options.seed, place):
        codes = encode(vae, x)
    words = f"log p(x), {Path(given.source).name}"
    result = evaluate_with_progress(
        vae, x, num_particles=S, seed=options.seed, compile="auto", say=say, words=words
    ).cpu()
    lowest = result.log_evidence.argsort()[:_NUM_LOWEST].tolist()
    summary = replace(
        _summarize(run, given, options),
        num_particles=S,
        log_likelihood=Estimate.mean_of(result.log_evidence, S),
        elbo=Estimate.mean_of(result.elbo, S),
        ess=Quantiles.compute(result.ess),
        unreliable_images=int(result.unreliable().sum()) if S > 1 else None,
        lowest=tuple(ImageScore(given.names[i], log_likelihood=float(result.log_evidence[i])) for i in lowest),
    )
    codes = _move_to_cpu(codes)
    numbers = {"scale": codes.scale, "log_likelihood": result.log_evidence}
    return codes, numbers | {"elbo": result.elbo, "ess": result.ess, "pareto_k": result.pareto_k}, summary


def _reconstruct_images(run: Run, given: Images, options: Encode, say: Say) -> Encoded:
    place = find_device(options.device)
    vae, x = load(run.folder).to(place), given.x.to(place)
    with seeded(options.seed, place):
        x = dequantize_uniformly(x) if run.pixels == "dequantized" else x
    with progress_bar(total=len(x), unit="image", desc=f"log p(x | z), {Path(given.source).name}") as bar:
        found = reconstruction(vae, x, seed=options.seed, progress=bar.update).cpu()
    summary = replace(
        _summarize(run, given, options),
        scale=run.trained_scale,
        reconstruction=Estimate.mean_of(found, 1),
        lowest=tuple(
            ImageScore(given.names[i], reconstruction=float(found[i])) for i in found.argsort()[:_NUM_LOWEST].tolist()
        ),
    )
    return _move_to_cpu(encode(vae, x)), {"reconstruction": found}, summary


def _move_to_cpu(codes: PosteriorMoments) -> PosteriorMoments:
    return codes._replace(mean=codes.mean.cpu(), scale=codes.scale.cpu())


_MOST_DRAWN = 256  # in samples.png


class Samples(NamedTuple):
    """Draws z ~ p(z), and for each the mean and a draw of p(x | z).

    Args:
        z: (N, L).
        mean: (N, *E) E[x | z].
        images: (N, *E) x ~ p(x | z).
    """

    z: Tensor
    mean: Tensor
    images: Tensor


@serialize_threads()
@torch.no_grad()
def sample(vae: VAE, num_samples: int) -> Samples:
    """Draws z ~ p(z), x ~ p(x | z) by torch's global generator, in passes that fit into memory."""
    z = sample_latents(vae.prior(), num_samples)
    one = vae.likelihood(z[:1]).mean
    samples = Samples(z, *(one.new_empty((num_samples, *one.shape[1:])) for _ in range(2)))
    chunk = images_per_pass(one, vae.likelihood)
    for part, mean, images in zip(*(values.split(chunk) for values in samples), strict=True):
        decoded = vae.likelihood(part)
        mean.copy_(decoded.mean)
        images.copy_(decoded.sample())
    return samples


def sample_run(options: Sample, *, say: Say) -> Path:
    """Draws images from a run: samples.npz (``Samples``), samples.png, and images/0000.png and so on.

    The single pictures are of the means, in 8 bits: what the decoder is sure of, without the noise of single pixels
    that p(x | z) draws independently. The draws themselves are in samples.npz. Tables have no pictures. An export needs
    no data for it.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, or a folder that holds something.
    """
    run = open_run_or_export(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    place = find_device(options.device)
    vae = load_evaluated_vae(run).to(place)
    if is_autoencoder(run.options):
        say(f"No samples of a model: these are decoded draws of N(0, I), {NOT_TRAINED_ON_PRIOR}.")
    folder = make_output_folder(options.output, run.folder / "samples")
    with seeded(options.seed, place):
        samples = Samples(*(values.cpu() for values in sample(vae, options.num_samples)))
    write_arrays(folder / "samples.npz", samples._asdict())
    say(f"{options.num_samples:,} samples, z ~ p(z), x ~ p(x | z), seed {options.seed}, in {folder}:")
    say("  samples.npz: z, mean E[x | z], and images x ~ p(x | z)")
    if len(run.splits.event_shape) == 1:
        say("The data is a table, (N, D): there are no pictures.")
        return folder
    display = choose_display(run, None if len(run.splits.train) else samples.images)
    shown = Samples(*(values[:_MOST_DRAWN] for values in samples))
    figure = samples_figure(display, shown.mean, shown.images, autoencoder=is_autoencoder(run.options))
    write_figure(folder / "samples.png", figure)
    _write_pictures(folder / "images", display.levels(samples.mean))
    first = f" of the first {_MOST_DRAWN}" if options.num_samples > _MOST_DRAWN else ""
    say(f"  samples.png: means and images{first}; images/: a picture of each mean")
    return folder


def _write_pictures(folder: Path, levels: NDArray[np.uint8]) -> None:
    """Writes 0000.png and so on in place of the pictures of an earlier call."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    for i, image in enumerate(levels):
        write_picture(folder / f"{i:04d}.png", image)
