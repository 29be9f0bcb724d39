"""Latents and log p(x) of images under a trained run, or an autoencoder's reconstructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.evaluate import evaluate_with_progress
from ppl_vae.commands.options import Encode
from ppl_vae.data import dequantize_uniformly
from ppl_vae.data.registry import SPLITS
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import reconstruction
from ppl_vae.evidence.moments import PosteriorMoments, encode
from ppl_vae.reports.latents_figure import latents_figure, measure_latent_use
from ppl_vae.reports.text.evaluation import describe_encoding
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.image_results import Encoding, ImageScore
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Images, Run, Say, load_evaluated_vae, load_given_images, open_run, open_run_or_export
from ppl_vae.runs.outputs import make_output_folder, write_arrays, write_figure
from ppl_vae.runs.results import Quantiles, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar

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
        log_likelihood=Estimate.from_values(result.log_evidence, S),
        elbo=Estimate.from_values(result.elbo, S),
        ess=Quantiles.from_values(result.ess),
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
        reconstruction=Estimate.from_values(found, 1),
        lowest=tuple(
            ImageScore(given.names[i], reconstruction=float(found[i])) for i in found.argsort()[:_NUM_LOWEST].tolist()
        ),
    )
    return _move_to_cpu(encode(vae, x)), {"reconstruction": found}, summary


def _move_to_cpu(codes: PosteriorMoments) -> PosteriorMoments:
    return codes._replace(mean=codes.mean.cpu(), scale=codes.scale.cpu())
