"""The measurement of one run: its evaluation, its diagnosis, the images that it generates, and its pictures."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.diagnostics.measurement import Measurements, measure, summarize_estimate
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.runs.load import load
from ppl_vae.runs.results import Evaluation, PerImage, from_json, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study.data import NUM_SHOWN, StudyData, write_strip
from ppl_vae.study.densities import fit_densities
from ppl_vae.study.plan import Planned
from ppl_vae.study.quality import sample_quality
from ppl_vae.study.results import BlurNumbers, DensityQuality, PriorMatch, RunNumbers
from ppl_vae.study.training import read_failure
from ppl_vae.vae import VAE

MEASUREMENT = "measurement.json"

_VERSION = 4  # to be raised when a diagnostic comes to another number: measurements of other versions are done again
_OPTIONS = (
    *("network", "latent_dim", "beta", "objective", "free_bits", "warmup_epochs", "epochs", "seed", "scale_map"),
    *("posterior", "learning_rate", "likelihood"),
)
_NUM_SAMPLES_SHOWN = 20
_NUM_PAIRS = 4  # between which a picture interpolates
_LEVEL = 0.05  # of all tests of one run's latents together


def measure_run(planned: Planned, folder: Path, study_data: StudyData, *, pictures: Path) -> RunNumbers:
    """A trained run's numbers: the stored ones if they are of these weights and images, otherwise measured now.

    Args:
        planned: The run.
        folder: Its folder.
        study_data: Its data.
        pictures: The study's folder of pictures.
    """
    numbers = RunNumbers(
        name=planned.name,
        dataset=study_data.word,
        options={name: getattr(planned.options, name) for name in _OPTIONS},
        averaged=planned.averaged,
        failed=read_failure(folder),
    )
    if numbers.failed is not None:
        return numbers
    evaluation = read_evaluation(folder)
    assert evaluation is not None  # the run is finished
    key = {"version": _VERSION, "images": study_data.num_images, "codes": planned.num_codes}
    key |= {name: getattr(evaluation, name) for name in ("step", "num_images", "num_particles", "seed")}
    path = folder / MEASUREMENT
    stored = runs.read_json(path) if path.exists() else {}
    if stored.get("key") == key:
        return from_json(RunNumbers, stored["run"])
    started = time.monotonic()
    vae, per_image = load(folder), read_per_image(folder, "test")  # None for an autoencoder
    found = _add_evaluation(numbers, evaluation, vae, per_image, folder)
    if not planned.stressed:
        found = _diagnose(found, planned, vae, per_image, study_data, pictures)
    found = replace(found, seconds_measuring=time.monotonic() - started)
    runs.write_json(path, {"key": key, "run": to_json(found)})
    return from_json(RunNumbers, runs.read_json(path)["run"])  # JSON has no NaN


def _add_evaluation(
    run: RunNumbers, evaluation: Evaluation, vae: VAE, per_image: PerImage | None, folder: Path
) -> RunNumbers:
    """The run with the numbers of its own files."""
    run = replace(
        run,
        step=evaluation.step,
        parameters=sum(weights.numel() for weights in vae.parameters()),
        seconds=runs.read_metrics(folder)[-1].get("seconds"),
        seconds_evaluation=evaluation.seconds,
        reconstruction=evaluation.reconstruction,
        kl=evaluation.kl,
        elbo=evaluation.elbo,
        log_likelihood=evaluation.log_likelihood,
        tenfold_gain=evaluation.rise,
    )
    if per_image is None:
        return run
    gap = Estimate.from_values(per_image.result.log_evidence - per_image.result.elbo)
    quality = summarize_estimate(per_image.result, per_image.num_particles)
    return replace(run, gap=gap, reliable=is_reliable(quality.rise, quality.unreliable))


# --- The weights ---


@torch.no_grad()
def _diagnose(
    run: RunNumbers, planned: Planned, vae: VAE, per_image: PerImage | None, study_data: StudyData, pictures: Path
) -> RunNumbers:
    """The run with every diagnostic, the quality of its samples, and its pictures."""
    importance = None if per_image is None else summarize_estimate(per_image.result, per_image.num_particles)
    diagnosis = measure(vae, study_data.x, gray=study_data.gray, importance=importance)
    codes = encode(vae, study_data.x).mean
    generated = {"samples": decode_mean(vae, study_data.draw_prior(vae.prior()))}
    densities: dict[str, DensityQuality] = {}
    if planned.num_codes:
        generated_of, densities = _generate_from_densities(vae, study_data, planned.num_codes)
        generated |= generated_of
    blur = diagnosis.pictures.blur
    return replace(
        run,
        active=diagnosis.active.count,
        implied_beta=diagnosis.implied_beta,
        variation=diagnosis.pictures.variation,
        blur=None if blur is None else BlurNumbers(blur.at_mean, blur.error, blur.posterior_noise, blur.bias),
        prior_match=_match_prior(diagnosis),
        samples=sample_quality(generated["samples"], study_data.gray, study_data.components),
        densities=densities,
        pictures=_write_pictures(pictures / run.name, vae, codes[study_data.shown], generated),
    )


def _generate_from_densities(
    vae: VAE, study_data: StudyData, num_codes: int
) -> tuple[dict[str, Tensor], dict[str, DensityQuality]]:
    """Decoded draws of each fitted density, by "NAME_samples", and their quality, by name."""
    device = study_data.x.device
    with seeded(0, device):
        train, validation = (
            sample_posterior(vae, x) for x in (study_data.train_seen(num_codes), study_data.validation_seen())
        )
    images, found = {}, {}
    for name, fitted in fit_densities(train, validation).items():
        with seeded(0, device):
            z = fitted.distribution.sample((study_data.num_images,))
        images[f"{name}_samples"] = decode_mean(vae, z)
        quality = sample_quality(images[f"{name}_samples"], study_data.gray, study_data.components)
        found[name] = DensityQuality(quality, len(train), fitted.log_density, fitted.num_components)
    return images, found


def _match_prior(diagnosis: Measurements) -> PriorMatch:
    """The aggregate posterior against the prior."""
    aggregate, split = diagnosis.aggregate, diagnosis.elbo_split
    distance, holes = aggregate.kolmogorov_smirnov, aggregate.holes
    p_values = distance.p_value.tolist()
    return PriorMatch(
        largest_mean=_largest(aggregate.moments.mean.mean.tolist()),
        largest_log_scale=_largest(aggregate.moments.log_scale.mean.tolist()),
        largest_distance=float(distance.statistic.max()),
        rejected=sum(p < _LEVEL / len(p_values) for p in p_values),
        classifier=aggregate.classifier.effect,
        holes=None if holes is None else holes.share,
        mutual_information=None if split is None else split.mutual_information,
        marginal_kl=None if split is None else split.marginal_kl,
        saturated=None if split is None else split.saturated,
    )


def _largest(values: list[float]) -> float | None:
    """The largest size; None if a latent is constant, so that its log scale is not finite."""
    return max(map(abs, values)) if all(map(math.isfinite, values)) else None


# --- Pictures ---


def _write_pictures(folder: Path, vae: VAE, codes: Tensor, generated: dict[str, Tensor]) -> dict[str, str]:
    """Writes the run's pictures, each of decoded means, and returns the file of each, by name.

    Args:
        folder: The run's folder of pictures.
        vae: Its weights.
        codes: (10, L) codes of the test images that are shown.
        generated: Images (M, C, H, W), by name.
    """
    images = {"reconstructions": vae.likelihood(codes).mean}
    images |= {name: each[:_NUM_SAMPLES_SHOWN] for name, each in generated.items()}
    if len(generated) > 1:
        images["interpolations"] = interpolate(vae, codes)
    for name, each in images.items():
        write_strip(folder / f"{name}.png", each)
    return {name: f"{folder.parent.name}/{folder.name}/{name}.png" for name in images}


def interpolate(vae: VAE, codes: Tensor) -> Tensor:
    """E[x | z] at z = (1 - t) a + t b, ten t from 0 to 1, for neighboring codes a, b. codes: (n, L), n at least 8."""
    a, b = codes[: 2 * _NUM_PAIRS : 2], codes[1 : 2 * _NUM_PAIRS : 2]
    t = torch.linspace(0, 1, NUM_SHOWN, dtype=codes.dtype)[:, None]
    return vae.likelihood(((1 - t) * a[:, None] + t * b[:, None]).flatten(0, 1)).mean
