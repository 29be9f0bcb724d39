"""One run of the study: its training, in a run folder like any other, and its measurement."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.commands.train import evaluate_trained_run, resume_run, train_run
from ppl_vae.diagnostics.measurement import Measurements, measure, summarize_estimate
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.objectives import Loss, loss_of_batch
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import load, save
from ppl_vae.runs.open import Say, open_run
from ppl_vae.runs.resolve import choose_pixels, fit_arguments, initialize_output_bias, load_splits, resolve
from ppl_vae.runs.results import Evaluation, PerImage, from_json, is_evaluated, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study.data import NUM_SHOWN, StudyData, sample_quality, write_strip
from ppl_vae.study.densities import fit_densities
from ppl_vae.study.plan import Planned
from ppl_vae.study.results import BlurNumbers, DensityQuality, PriorMatch, RunNumbers
from ppl_vae.training import Callbacks, TrainingState, fit
from ppl_vae.vae import VAE

# --- Training ---


FAILURE = "failure.json"


class MeanOverPixels(ScaleMessenger):
    """log p(x | z) / D: what a loss that is averaged over pixels does to a model, as an effect handler.

    It scales the observed site by 1 / D, so that the objective is rec / D - KL, which has the optimum of beta = D. The
    library itself never averages.
    """

    def __init__(self, num_pixels: int) -> None:
        super().__init__(1 / num_pixels)

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            super()._process_message(msg)


def average_over_pixels(loss: Loss, num_pixels: int) -> Loss:
    """The loss of a model whose pixels are averaged."""

    def averaged(model: StochasticFunction, guide: StochasticFunction, x: Tensor) -> Tensor:
        return loss_of_batch(loss, MeanOverPixels(num_pixels)(model), guide, x)

    return averaged


def train_planned(planned: Planned, folder: Path, *, say: Say) -> None:
    """Trains a run, or the rest of it, and evaluates it.

    A run that meets a NaN is a result, too: it leaves ``failure.json`` with the message in its folder.
    """
    run_dir = folder / planned.name
    if (run_dir / FAILURE).exists():
        return
    try:
        if planned.averaged:
            _train_averaged(planned, run_dir, say=say)
        elif (run_dir / runs.CONFIG).exists():
            resume_run(str(run_dir), epochs=None, say=say, draw=False)
        else:
            train_run(planned.options, str(run_dir), say=say, draw=False)
    except NotFinite as error:
        runs.write_json(run_dir / FAILURE, {"error": str(error)})
        say(f"{planned.name}: {error}")


def read_failure(run_dir: Path) -> str | None:
    """The message that ended a run; None if none did. That of a training begins with its step."""
    path = run_dir / FAILURE
    return runs.read_json(path)["error"] if path.exists() else None


def is_finished(run_dir: Path) -> bool:
    """Whether a run was trained to the end and evaluated, which comes last, or was ended by a NaN."""
    return (run_dir / FAILURE).exists() or ((run_dir / runs.MODEL).exists() and is_evaluated(run_dir))


def _train_averaged(planned: Planned, run_dir: Path, *, say: Say) -> None:
    """As the command ``train`` does it, but for the objective: no option asks for a mean."""
    if not (run_dir / runs.MODEL).exists():
        _fit_averaged(planned, run_dir, say=say)
    if not is_evaluated(run_dir):
        evaluate_trained_run(open_run(str(run_dir)), say=say)


def _fit_averaged(planned: Planned, run_dir: Path, *, say: Say) -> None:
    seen = load_splits(planned.options)
    options = resolve(planned.options, seen)
    pixels = choose_pixels(options, seen)
    stored, transform = data.training_images(seen, pixels)
    pyro.set_rng_seed(options.seed)
    vae = build_vae(options, seen.event_shape)
    initialize_output_bias(vae, data.initialization_images(seen, pixels))
    metrics: list[dict[str, Any]] = []
    arguments = fit_arguments(options, data.evaluation_images(seen, "validation", pixels))
    arguments["objective"] = average_over_pixels(arguments["objective"], math.prod(seen.event_shape))
    state: TrainingState = fit(
        vae,
        stored,
        **arguments,
        transform=transform,
        callbacks=Callbacks(on_epoch=metrics.append),
        compile=options.compile == "on",
    )
    say(f"Trained {planned.name}, its pixels averaged, in {state.seconds:.0f} s.")
    partial = run_dir.with_name(f".{run_dir.name}.partial")  # renamed when whole: a folder that exists is a whole run
    shutil.rmtree(partial, ignore_errors=True)
    save(vae, partial, options, metrics=metrics)
    partial.replace(run_dir)


# --- Measuring ---


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
    gap = Estimate.mean_of(per_image.result.log_evidence - per_image.result.elbo)
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
