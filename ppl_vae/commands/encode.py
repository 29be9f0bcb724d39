"""A trained run on images: their latents, and their log p(x), or an autoencoder's reconstructions."""

from __future__ import annotations

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
from ppl_vae.evidence.importance import Importance, reconstruction
from ppl_vae.evidence.moments import PosteriorMoments, encode
from ppl_vae.reports.run_figures import latents_figure, use_of_latents
from ppl_vae.reports.text.evaluation import NOT_A_LOG_LIKELIHOOD, describe_images_scale, plus_minus
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.exported import open_with_or_without
from ppl_vae.runs.fit_arguments import find_device
from ppl_vae.runs.images import Images, images_of
from ppl_vae.runs.load import load
from ppl_vae.runs.opening import Run, Say, evaluated_vae, open_run
from ppl_vae.runs.outputs import drop_record, output_folder, removed_if_empty, write_arrays, write_figure
from ppl_vae.runs.results import Provenance, from_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.vae import VAE

_NUM_LOWEST = 5


def encode_images(options: Encode, *, say: Say) -> Path:
    """Latents and log p(x) of images: encoded.npz, encoded.json and latents.png; the lowest log p(x) by name.

    encoded.npz holds, image by image, ``mean`` and ``scale`` of q(z | x) (n, L), ``log_likelihood`` (the bound L_S),
    ``elbo``, ``ess``, ``pareto_k`` (n,), ``names`` and, where they are known, ``labels``. Of dequantized levels the
    first two are of q(z | (x + u) / 256), with one draw of u.

    Images of one's own need no data beside an export.

    An autoencoder has no density: there ``mean`` is z(x), and ``reconstruction``, log p(x | z(x)), is the only other
    number of an image. Of dequantized levels both are of the same (x + u) / 256.

    Args:
        options: The command's options.
        say: Takes each line for the reader.

    Returns:
        The folder that was written.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, images that do not fit it or have missing
            pixels, or a folder that holds something.
    """
    opened = open_run if options.images_path in SPLITS else open_with_or_without
    run = opened(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    place = find_device(options.device)
    vae = evaluated_vae(run)
    given = images_of(run, options.images_path, most=options.images, seed=options.seed)
    _check_whole(given)
    folder = output_folder(options.output, run.folder / "encodings" / _folder_name(options.images_path))
    result: Importance | Tensor
    with removed_if_empty(folder):
        if is_autoencoder(run.options):
            codes, result = _reconstructed(run, given, options.seed, place)
        else:
            codes, result = _measured(vae.to(place), given, options.num_particles, options.seed, place, say)
    summary = _summary(run, given, result, options.num_particles) | {
        "binarization": run.binarization,
        "seed": options.seed,
        "step": runs.load_step(run.folder / runs.MODEL),
        "notes": list(given.notes),
    }
    with seeded(options.seed, torch.device("cpu")), torch.no_grad():
        use = use_of_latents(vae.cpu(), given.x, codes)
        figure = latents_figure(
            codes, use, vae.prior(), what="image", classes=given.labels, class_names=run.splits.class_names
        )
    if replaced := drop_record(folder / "encoded.json"):
        say(replaced)
    write_arrays(folder / "encoded.npz", _arrays(given, codes, result))
    write_figure(folder / "latents.png", figure)
    runs.write_json(folder / "encoded.json", summary)
    for line in (*given.notes, *_in_words(summary)):
        say(line)
    numbers = "log p(x)" if isinstance(result, Importance) else "reconstruction"
    say(f"In {folder}: encoded.npz (latents and {numbers} of each image), encoded.json, latents.png")
    return folder


def _check_whole(given: Images) -> None:
    holes = int(given.x.flatten(1).isnan().any(1).sum())
    if holes:
        raise ValueError(
            f"{given.source}: expected every pixel, got missing ones (NaN) in {holes:,} of {len(given.x):,} images"
        )


def _measured(
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
    return _on_cpu(codes), result.cpu()


def _reconstructed(run: Run, given: Images, seed: int, place: torch.device) -> tuple[PosteriorMoments, Tensor]:
    """An autoencoder's codes, and log p(x | z(x)) of each image (n,) nats, on the CPU; x as its training saw images."""
    vae, x = load(run.folder).to(place), given.x.to(place)
    with seeded(seed, place):
        x = dequantize_uniformly(x) if run.pixels == "dequantized" else x
    codes = encode(vae, x)
    with progress_bar(total=len(x), unit="image", desc=f"log p(x | z), {Path(given.source).name}") as bar:
        log_p_x_given_z = reconstruction(vae, x, seed=seed, progress=bar.update)
    return _on_cpu(codes), log_p_x_given_z.cpu()


def _on_cpu(codes: PosteriorMoments) -> PosteriorMoments:
    return codes._replace(mean=codes.mean.cpu(), scale=codes.scale.cpu())


def _folder_name(images_path: str) -> str:
    return images_path if images_path in SPLITS else Path(images_path).resolve().stem or "images"


def _arrays(given: Images, codes: PosteriorMoments, result: Importance | Tensor) -> dict[str, Any]:
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


def _summary(run: Run, given: Images, result: Importance | Tensor, num_particles: int) -> dict[str, Any]:
    of_images = {"images": given.source, **vars(run.provenance), "num_images": len(given.x)}
    if not isinstance(result, Importance):
        lowest = result.argsort()[:_NUM_LOWEST].tolist()
        return of_images | {
            "scale": run.trained_scale,
            "num_particles": None,
            "log_likelihood": None,
            "reconstruction": Estimate.from_values(result, 1).to_json(),
            "lowest": [{"name": given.names[i], "reconstruction": float(result[i])} for i in lowest],
        }
    lowest = result.log_evidence.argsort()[:_NUM_LOWEST].tolist()
    return of_images | {
        "num_particles": num_particles,
        "log_likelihood": Estimate.from_values(result.log_evidence, num_particles).to_json(),
        "elbo": Estimate.from_values(result.elbo, num_particles).to_json(),
        "ess": {"median": float(result.ess.median())},
        "unreliable_images": int(result.unreliable().sum()) if num_particles > 1 else None,
        "lowest": [{"name": given.names[i], "log_likelihood": float(result.log_evidence[i])} for i in lowest],
    }


def _scale(summary: dict[str, Any]) -> str:
    return describe_images_scale(from_json(Provenance, summary), summary["seed"])


def _in_words(summary: dict[str, Any]) -> list[str]:
    if summary["log_likelihood"] is None:
        return _reconstructions_in_words(summary)
    n, S = summary["num_images"], summary["num_particles"]
    if n == 1:
        mean = summary["log_likelihood"]["mean"]
        return [f"log-likelihood {mean:.2f} nats of one image: the bound L_{S}, in expectation below log p(x)"]
    lowest = [f"{entry['name']} {entry['log_likelihood']:.2f}" for entry in summary["lowest"]]
    return [
        f"log-likelihood {plus_minus(summary['log_likelihood'])} nats an image: the bound L_{S}, in expectation below "
        "log p(x)",
        f"  {n:,} images ({summary['images']}), seed {summary['seed']}, {_scale(summary)}; "
        "± is the standard error over images",
        f"  effective particles: median {summary['ess']['median']:.1f} of {S:,}",
        f"  lowest log p(x), perhaps unlike the training images: {', '.join(lowest)}",
        "  That alone does not find outliers: smooth and simple images of another kind can score higher than the "
        "training data's own (Nalisnick et al. 2019, arXiv 1810.09136).",
    ]


def _reconstructions_in_words(summary: dict[str, Any]) -> list[str]:
    found = summary["reconstruction"]
    if summary["num_images"] == 1:
        return [f"reconstruction log p(x | z(x)) {found['mean']:.2f} nats of one image: {NOT_A_LOG_LIKELIHOOD}"]
    lowest = [f"{entry['name']} {entry['reconstruction']:.2f}" for entry in summary["lowest"]]
    return [
        f"reconstruction log p(x | z(x)) {plus_minus(found)} nats an image: {NOT_A_LOG_LIKELIHOOD}",
        f"  {summary['num_images']:,} images ({summary['images']}), seed {summary['seed']}, {_scale(summary)}; "
        "± is the standard error over images",
        f"  lowest log p(x | z(x)), the worst reconstructed: {', '.join(lowest)}",
    ]
