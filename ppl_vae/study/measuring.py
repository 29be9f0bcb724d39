"""The measurement of one run: what its evaluation says, every diagnostic, its samples, and its pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.diagnosis_numbers import importance_numbers, measure
from ppl_vae.diagnostics import ACTIVE_VARIANCE, HOLE_QUANTILE
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import UNRELIABLE_BIAS, Importance
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.evaluations import read_per_image
from ppl_vae.runs.load import load
from ppl_vae.study.material import NUM_COMPONENTS, StudyData
from ppl_vae.study.pictures import write_pictures
from ppl_vae.study.plan import Planned
from ppl_vae.study.quality import GROUPS, sample_quality
from ppl_vae.study.training import read_failure
from ppl_vae.vae import VAE

MEASUREMENT = "measurement.json"

_TOLD = (
    *("network", "latent_dim", "beta", "objective", "free_bits", "warmup_epochs", "epochs", "seed", "scale_map"),
    *("posterior", "learning_rate", "likelihood"),
)
_MOST_CODES = 1000
_IN_HOLES_SHOWN = 6
# Of what a measurement holds; another is measured again, and so is one with other constants. To be raised where the
# code of a diagnostic comes to another number.
_VERSION = 2
_CONSTANTS = {
    "active_variance": ACTIVE_VARIANCE,
    "hole_quantile": HOLE_QUANTILE,
    "unreliable_bias": UNRELIABLE_BIAS,
    "num_components": NUM_COMPONENTS,
    "groups": GROUPS,
    "most_codes": _MOST_CODES,
    "in_holes_shown": _IN_HOLES_SHOWN,
}


def measured(planned: Planned, folder: Path, material: StudyData, *, in_full: bool, pictures: Path) -> dict[str, Any]:
    """A trained run's record: the one in its folder where that is of these weights and images, else measured now.

    Args:
        planned: the run.
        folder: its own.
        material: its data.
        in_full: with diagnostics and pictures; else what its own files say.
        pictures: the study's folder of pictures.
    """
    failure = read_failure(folder)
    if failure is not None:
        return _told(planned, material) | dict(zip(("failed", "failed_phase"), failure, strict=True)) | _NOTHING
    record = _stored_or_new(planned, folder, material, in_full=in_full, pictures=pictures)
    record["evaluation"]["reliable"] = _is_reliable(record["evaluation"])  # of today's thresholds
    return record


def _stored_or_new(
    planned: Planned, folder: Path, material: StudyData, *, in_full: bool, pictures: Path
) -> dict[str, Any]:
    entry = runs.read_evaluations(folder)["test"]
    key = {
        "version": _VERSION,
        "constants": _CONSTANTS,
        "images": material.num_images,
        "in_full": in_full,
        **{name: entry[name] for name in ("step", "num_images", "num_particles", "seed")},
    }
    path = folder / MEASUREMENT
    stored = runs.read_json(path) if path.exists() else {}
    if stored.get("key") == key and all((pictures.parent / name).exists() for name in _files(stored["record"])):
        return stored["record"]
    started = time.monotonic()
    record = _told(planned, material) | _from_files(planned, folder)
    record |= _from_weights(planned, folder, material, pictures / planned.name, in_full=in_full)
    record["seconds_measuring"] = time.monotonic() - started
    runs.write_json(path, {"key": key, "record": record}, checksum=True)
    return runs.read_json(path)["record"]  # as it will be read: what is not finite is None


def _files(record: dict[str, Any]) -> list[str]:
    return list(record["pictures"].values())


_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("parameters", "seconds", "step", "evaluation", "active", "implied_beta", "variation")),
    **dict.fromkeys(("diagnosis", "samples", "fitted_samples", "codes", "seconds_evaluation")),
    "pictures": {},
    "seconds_measuring": 0.0,
}


def _told(planned: Planned, material: StudyData) -> dict[str, Any]:
    return {
        "name": planned.name,
        "dataset": material.word,
        "averaged": planned.averaged,
        "autoencoder": is_autoencoder(planned.options),
        "failed": None,
        "failed_phase": None,
        "options": {name: getattr(planned.options, name) for name in _TOLD},
    }


# --- What the run's files say ---


def _from_files(planned: Planned, folder: Path) -> dict[str, Any]:
    entry, metrics = runs.read_evaluations(folder)["test"], runs.read_metrics(folder)
    stored = read_per_image(folder, "test")
    return {
        "seconds": metrics[-1].get("seconds"),
        "seconds_evaluation": entry["seconds"],
        "step": entry["step"],
        "evaluation": _evaluation(entry, None if stored is None else stored.result),
    }


def _evaluation(entry: dict[str, Any], result: Importance | None) -> dict[str, Any]:
    same = ("log_likelihood", "elbo", "reconstruction", "kl", "num_images", "num_particles", "rise", "bias")
    found = {name: entry[name] for name in (*same, "monte_carlo_stderr")}
    if result is None:
        return found | dict.fromkeys(("rise_stderr", "unreliable", "pareto_k"))
    return found | {
        "rise_stderr": Estimate.from_values(result.tenfold_gain).stderr,
        "unreliable": Estimate.from_flags(result.unreliable()).to_json(),
        "pareto_k": entry["pareto_k"]["median"],
    }


def _is_reliable(evaluation: dict[str, Any]) -> bool | None:
    """``is_reliable``; None of an autoencoder, and not of an unknown rise."""
    rise, unreliable = evaluation["rise"], evaluation["unreliable"]
    if unreliable is None:
        return None
    if rise is None:
        return False
    return is_reliable({"mean": rise, "stderr": evaluation["rise_stderr"]}, unreliable)


# --- What its weights do ---


def _from_weights(
    planned: Planned, folder: Path, material: StudyData, pictures: Path, *, in_full: bool
) -> dict[str, Any]:
    vae = load(folder)
    found = {**_NOTHING, "parameters": sum(w.numel() for w in vae.parameters())}
    for name in ("seconds", "seconds_evaluation", "step", "evaluation", "seconds_measuring"):
        del found[name]
    if not in_full:
        return found
    with torch.no_grad():
        diagnosis = _diagnosis(planned, vae, folder, material)
        codes = encode(vae, material.x).mean
        samples = decode_mean(vae, material.prior_draws(vae.prior()))
        fitted = _fitted_draws(vae, material) if _shows_more(planned) else None
        of_fitted = None if fitted is None else decode_mean(vae, fitted)
    found |= {
        "active": diagnosis["active"]["count"],
        "implied_beta": diagnosis["implied_beta"],
        "variation": diagnosis["pictures"]["variation"],
        "diagnosis": diagnosis,
        "samples": sample_quality(samples, material.gray, material.components),
        "fitted_samples": None if of_fitted is None else sample_quality(of_fitted, material.gray, material.components),
        "codes": _codes(codes, material.labels) if codes.shape[1] == 2 else None,
    }
    holes = _holes(diagnosis)
    found["pictures"] = write_pictures(pictures, vae, material, codes, samples=samples, fitted=of_fitted, holes=holes)
    return found


def _diagnosis(planned: Planned, vae: VAE, folder: Path, material: StudyData) -> dict[str, Any]:
    stored = read_per_image(folder, "test")
    importance = None if stored is None else importance_numbers(stored.result, stored.num_particles)
    trained_with = {
        **{name: getattr(planned.options, name) for name in ("beta", "likelihood", "objective")},
        "data": material.splits.kind,
    }
    return measure(vae, material.x, gray=material.gray, trained_with=trained_with, importance=importance)


def _shows_more(planned: Planned) -> bool:
    """Autoencoders, and the beta that they are compared with."""
    return is_autoencoder(planned.options) or planned.options.beta == 1


def _fitted_draws(vae: VAE, material: StudyData) -> Tensor:
    """(N, L) draws of the normal with the mean and covariance of z ~ q(z | x) over as many training images.

    What a prior would have to be, at its simplest, for a guide that was never told of one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = material.train_as_seen(material.num_images)
        z = sample_posterior(vae, x).double()
        values, vectors = torch.linalg.eigh(torch.cov(z.T).reshape(z.shape[1], -1))
        noise = torch.randn(material.num_images, z.shape[1], dtype=z.dtype)
    return (z.mean(0) + noise * values.clamp(min=0).sqrt() @ vectors.T).float()


def _codes(codes: Tensor, labels: Tensor | None) -> list[list[Any]]:
    """[z_1, z_2, class] of the first test images."""
    classes = [None] * len(codes) if labels is None else labels.tolist()
    pairs = zip(codes[:_MOST_CODES].tolist(), classes, strict=False)
    return [[round(a, 4), round(b, 4), label] for (a, b), label in pairs]


def _holes(diagnosis: dict[str, Any]) -> list[list[float]] | None:
    found = diagnosis["aggregate"]["holes"]
    if found is None:
        return None
    count = min(_IN_HOLES_SHOWN, len(found["worst"]), len(found["ordinary"]))
    return found["worst"][:count] + found["ordinary"][:count]
