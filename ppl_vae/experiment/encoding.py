"""A trained run on images: their latents, and their log p(x)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ppl_vae import build, data, runs
from ppl_vae.evidence import Estimate, Importance, evaluate, seeded
from ppl_vae.experiment.exploration import Codes, encode
from ppl_vae.experiment.figures import latents_figure
from ppl_vae.experiment.opening import Run, Say, open_run
from ppl_vae.experiment.outputs import output_folder, write_arrays, write_figure
from ppl_vae.options import SPLITS

_NUM_LOWEST = 5


class _Images(NamedTuple):
    """x (n, *E) as the model sees them, labels (n,) or None, and a name for each."""

    x: Tensor
    labels: Tensor | None
    names: tuple[str, ...]


def encode_images(
    run_dir: str,
    images_path: str,
    *,
    num_particles: int,
    images: int | None,
    seed: int,
    device: str,
    output: str | None,
    say: Say,
    dataset: str | None = None,
    data_dir: str | None = None,
) -> Path:
    """Latents and log p(x) of images: encoded.npz, encoded.json and latents.png; the lowest log p(x) by name.

    encoded.npz holds, image by image, ``mean`` and ``scale`` of q(z | x) (n, L), ``log_likelihood`` (the bound L_S),
    ``elbo``, ``ess``, ``pareto_k`` (n,), ``names`` and, where they are known, ``labels``.

    Args:
        run_dir: the run's folder.
        images_path: a file or folder of images, or "test", "validation" or "train": that split of the run's data.
        num_particles: S.
        images: a fixed random subset of that many images; None takes all.
        seed: of the importance samples, and of the binarization of images from a file.
        device: where it is computed.
        output: a new or empty folder; by default encodings/NAME in the run's folder, which is written again.
        say: takes each line for the reader.
        dataset, data_dir: where the run's data is now, should it have moved.

    Returns:
        The folder that was written.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, images that do not fit it or have missing
            pixels, or a folder that holds something.
    """
    run = open_run(run_dir, dataset=dataset, data_dir=data_dir)
    place = build.device(device)
    with seeded(seed, place):
        vae = build.load(run.folder).to(place)
    given = _images(run, images_path, images, seed)
    folder = output_folder(output, run.folder / "encodings" / _folder_name(images_path))
    x = given.x.to(place)
    with seeded(seed, place):
        codes = Codes(*(values.cpu() for values in encode(vae, x)))
    with tqdm(total=len(x), unit="image", desc=f"log p(x), {images_path}") as bar:
        result = evaluate(vae, x, num_particles=num_particles, seed=seed, progress=bar.update)
    result = Importance(*(values.cpu() for values in result))
    write_arrays(folder / "encoded.npz", _arrays(given, codes, result))
    summary = _summary(given, result, num_particles) | {
        "images": images_path,
        "binarization": run.binarization,
        "seed": seed,
        "step": runs.load_step(run.folder / runs.MODEL),
    }
    runs.write_json(folder / "encoded.json", summary)
    prior = vae.cpu().prior()
    figure = latents_figure(codes, prior, what="image", classes=given.labels, class_names=run.splits.class_names)
    write_figure(folder / "latents.png", figure)
    for line in _in_words(summary):
        say(line)
    say(f"In {folder}: encoded.npz (latents and log p(x) of each image), encoded.json, latents.png")
    return folder


def _images(run: Run, images_path: str, most: int | None, seed: int) -> _Images:
    if images_path in SPLITS:
        x = data.evaluation_images(run.splits, images_path, run.binarization, seed=seed)
        labels = run.splits.labels.get(images_path)
        names = tuple(str(i) for i in range(len(x)))
    else:
        x, labels, names = data.own_images(images_path, run.splits, run.binarization, seed=seed, fit=run.options.fit)
    index = data.subset(len(x), most)
    x = x[index]
    holes = int(x.flatten(1).isnan().any(1).sum())
    if holes:
        raise ValueError(
            f"{images_path}: expected every pixel, got missing ones (NaN) in {holes:,} of {len(x):,} images"
        )
    return _Images(x, None if labels is None else labels[index], tuple(names[i] for i in index.tolist()))


def _folder_name(images_path: str) -> str:
    return images_path if images_path in SPLITS else Path(images_path).resolve().stem or "images"


def _arrays(given: _Images, codes: Codes, result: Importance) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "mean": codes.mean.numpy(),
        "scale": codes.scale.numpy(),
        "log_likelihood": result.log_evidence.numpy(),
        "elbo": result.elbo.numpy(),
        "ess": result.ess.numpy(),
        "pareto_k": result.pareto_k.numpy(),
        "names": np.array(given.names),
    }
    return arrays if given.labels is None else arrays | {"labels": given.labels.numpy()}


def _summary(given: _Images, result: Importance, num_particles: int) -> dict[str, Any]:
    def mean(values: Tensor) -> dict[str, float]:
        estimate = Estimate.of(values, num_particles)
        return {"mean": estimate.mean, "stderr": estimate.stderr}

    lowest = result.log_evidence.argsort()[:_NUM_LOWEST].tolist()
    return {
        "num_images": len(given.x),
        "num_particles": num_particles,
        "log_likelihood": mean(result.log_evidence),
        "elbo": mean(result.elbo),
        "ess": {"median": float(result.ess.median())},
        "unreliable_images": int(result.unreliable().sum()) if num_particles > 1 else None,
        "lowest": [{"name": given.names[i], "log_likelihood": float(result.log_evidence[i])} for i in lowest],
    }


def _in_words(summary: dict[str, Any]) -> list[str]:
    n, S = summary["num_images"], summary["num_particles"]
    mean, stderr = summary["log_likelihood"].values()
    if n == 1:
        return [f"log-likelihood {mean:.2f} nats of one image: the bound L_{S}, in expectation below log p(x)"]
    lowest = [f"{entry['name']} {entry['log_likelihood']:.2f}" for entry in summary["lowest"]]
    return [
        f"log-likelihood {mean:.2f} ± {stderr:.2f} nats an image: the bound L_{S}, in expectation below log p(x)",
        f"  {n:,} images ({summary['images']}), seed {summary['seed']}; ± is the standard error over images",
        f"  effective particles: median {summary['ess']['median']:.1f} of {S:,}",
        f"  lowest log p(x), perhaps unlike the training images: {', '.join(lowest)}",
        "  That alone does not find outliers: smooth and simple images of another kind can score higher than the "
        "training data's own (Nalisnick et al. 2019, arXiv 1810.09136).",
    ]
