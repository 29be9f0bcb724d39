"""Latents and log p(x) of images under a trained run, or an autoencoder's reconstructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.evaluate import evaluate_with_progress
from ppl_vae.commands.options import Encode
from ppl_vae.data import dequantize_uniformly
from ppl_vae.data.registry import SPLITS
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.evaluation import reconstruction
from ppl_vae.evidence.importance import Importance
from ppl_vae.evidence.moments import PosteriorMoments, encode
from ppl_vae.reports.latents_figure import latents_figure, measure_latent_use
from ppl_vae.reports.text.images import describe_encoding
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.image_results import Encoding, ImageScore
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Images, Run, Say, load_evaluated_vae, load_given_images, open_run, open_run_or_export
from ppl_vae.runs.outputs import make_output_folder, remove_if_empty, remove_record, write_arrays, write_figure
from ppl_vae.runs.results import Quantiles, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar
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

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        The folder that was written.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, images that do not fit it or have missing
            pixels, or a folder that holds something.
    """
    opened = open_run if options.images_path in SPLITS else open_run_or_export
    run = opened(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    place = find_device(options.device)
    vae = load_evaluated_vae(run)
    given = load_given_images(run, options.images_path, most=options.images, seed=options.seed)
    _check_complete(given)
    folder = make_output_folder(options.output, run.folder / "encodings" / _name_folder(options.images_path))
    result: Importance | Tensor
    with remove_if_empty(folder):
        if is_autoencoder(run.options):
            codes, result = _reconstruct_images(run, given, options.seed, place)
        else:
            codes, result = _evaluate_images(vae.to(place), given, options.num_particles, options.seed, place, say)
    summary = _summarize(run, given, result, options)
    with seeded(options.seed, torch.device("cpu")), torch.no_grad():
        use = measure_latent_use(vae.cpu(), given.x, codes)
        figure = latents_figure(
            codes, use, vae.prior(), kind="image", classes=given.labels, class_names=run.splits.class_names
        )
    if replaced := remove_record(folder / "encoded.json"):
        say(replaced)
    write_arrays(folder / "encoded.npz", _make_arrays(given, codes, result))
    write_figure(folder / "latents.png", figure)
    runs.write_json(folder / "encoded.json", to_json(summary))
    for line in (*given.notes, *describe_encoding(summary)):
        say(line)
    numbers = "log p(x)" if isinstance(result, Importance) else "reconstruction"
    say(f"In {folder}: encoded.npz (latents and {numbers} of each image), encoded.json, latents.png")
    return folder


def _check_complete(given: Images) -> None:
    holes = int(given.x.flatten(1).isnan().any(1).sum())
    if holes:
        raise ValueError(
            f"{given.source}: expected every pixel, got missing ones (NaN) in {holes:,} of {len(given.x):,} images"
        )


def _evaluate_images(
    vae: VAE, given: Images, num_particles: int, seed: int, place: torch.device, say: Say
) -> tuple[PosteriorMoments, Importance]:
    """The latents and the numbers of each image, on the CPU."""
    x = given.x.to(place)
    with seeded(seed, place):
        codes = encode(vae, x)
    words = f"log p(x), {Path(given.source).name}"
    result = evaluate_with_progress(
        vae, x, num_particles=num_particles, seed=seed, compile="auto", say=say, words=words
    )
    return _move_to_cpu(codes), result.cpu()


def _reconstruct_images(run: Run, given: Images, seed: int, place: torch.device) -> tuple[PosteriorMoments, Tensor]:
    """An autoencoder's codes, and log p(x | z(x)) of each image, (n,) nats, on the CPU."""
    vae, x = load(run.folder).to(place), given.x.to(place)
    with seeded(seed, place):
        x = dequantize_uniformly(x) if run.pixels == "dequantized" else x
    codes = encode(vae, x)
    with progress_bar(total=len(x), unit="image", desc=f"log p(x | z), {Path(given.source).name}") as bar:
        log_p_x_given_z = reconstruction(vae, x, seed=seed, progress=bar.update)
    return _move_to_cpu(codes), log_p_x_given_z.cpu()


def _move_to_cpu(codes: PosteriorMoments) -> PosteriorMoments:
    return codes._replace(mean=codes.mean.cpu(), scale=codes.scale.cpu())


def _name_folder(images_path: str) -> str:
    return images_path if images_path in SPLITS else Path(images_path).resolve().stem or "images"


def _make_arrays(given: Images, codes: PosteriorMoments, result: Importance | Tensor) -> dict[str, Any]:
    arrays: dict[str, Any] = {"mean": codes.mean.numpy()}
    if isinstance(result, Importance):
        arrays |= {
            "scale": codes.scale.numpy(),
            "log_likelihood": result.log_evidence.numpy(),
            "elbo": result.elbo.numpy(),
            "ess": result.ess.numpy(),
            "pareto_k": result.pareto_k.numpy(),
        }
    else:
        arrays |= {"reconstruction": result.numpy()}
    arrays |= {"names": np.array(given.names)}
    return arrays if given.labels is None else arrays | {"labels": given.labels.numpy()}


def _summarize(run: Run, given: Images, result: Importance | Tensor, options: Encode) -> Encoding:
    shared: dict[str, Any] = {
        "images": given.source,
        "num_images": len(given.x),
        "seed": options.seed,
        "step": runs.load_step(run.folder / runs.MODEL),
        "notes": given.notes,
    }
    if not isinstance(result, Importance):
        lowest = result.argsort()[:_NUM_LOWEST].tolist()
        return Encoding(
            **vars(replace(run.provenance, scale=run.trained_scale)),
            **shared,
            num_particles=None,
            reconstruction=Estimate.from_values(result, 1),
            lowest=tuple(ImageScore(given.names[i], reconstruction=float(result[i])) for i in lowest),
        )
    S = options.num_particles
    lowest = result.log_evidence.argsort()[:_NUM_LOWEST].tolist()
    return Encoding(
        **vars(run.provenance),
        **shared,
        num_particles=S,
        log_likelihood=Estimate.from_values(result.log_evidence, S),
        elbo=Estimate.from_values(result.elbo, S),
        ess=Quantiles.from_values(result.ess),
        unreliable_images=int(result.unreliable().sum()) if S > 1 else None,
        lowest=tuple(ImageScore(given.names[i], log_likelihood=float(result.log_evidence[i])) for i in lowest),
    )
