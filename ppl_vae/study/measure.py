"""What is measured of the study's runs: each alone, and all against each other on the same test images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import diagnostics, runs
from ppl_vae.diagnostics.measurement import Measurements, measure, summarize_estimate
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import Estimate, PairedDifference, bound_difference, paired_difference, ratio_of_means
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.runs.load import load
from ppl_vae.runs.results import PerImage, from_json, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study import plan, results
from ppl_vae.study.data import MOST_TRAINING_IMAGES, NUM_SHOWN, PICTURES, StudyData, fit_densities, write_strip
from ppl_vae.study.plan import Planned, Size, name_run, sweep_name
from ppl_vae.study.results import BoundDifferences, DensityQuality, Difference, RunNumbers
from ppl_vae.vae import VAE

MEASUREMENT = "measurement.json"

_VERSION = 4  # to be raised when a diagnostic comes to another number: measurements of other versions are done again
_OPTIONS = (
    *("network", "latent_dim", "beta", "objective", "free_bits", "warmup_epochs", "epochs", "seed", "scale_map"),
    *("posterior", "learning_rate", "likelihood"),
)
_NUM_SAMPLES_SHOWN = 20
_PRIOR_SEED = 20_140_501
_NUM_PAIRS = 4  # between which a picture interpolates
_LEVEL = 0.05  # of all tests of one run's latents together
_NUM_NEIGHBORS = 20
_NUM_NEIGHBORED = 500  # test images whose neighbors are averaged
_NUM_DRAWS = 8  # of q(z | x) per image, for the parts of its squared error


# --- One run ---


def measure_run(planned: Planned, folder: Path, study_data: StudyData) -> RunNumbers:
    """A trained run's numbers: the stored ones if they are of these weights and images, otherwise measured now.

    Args:
        planned: The run.
        folder: The study's folder, which takes its pictures.
        study_data: Its data.
    """
    run_dir = folder / results.RUNS / planned.name
    numbers = RunNumbers(
        name=planned.name,
        dataset=study_data.word,
        options={name: getattr(planned.options, name) for name in _OPTIONS},
        averaged=planned.averaged,
        failed=results.read_failure(run_dir),
    )
    if numbers.failed is not None:
        return numbers
    evaluation = read_evaluation(run_dir)
    assert evaluation is not None  # the run is finished
    key = {"version": _VERSION, "images": study_data.num_images, "codes": planned.num_codes}
    key |= {name: getattr(evaluation, name) for name in ("step", "num_images", "num_particles", "seed")}
    path = run_dir / MEASUREMENT
    stored = runs.read_json(path) if path.exists() else {}
    if stored.get("key") == key:
        return from_json(RunNumbers, stored["run"])
    started = time.monotonic()
    vae, per_image = load(run_dir), read_per_image(run_dir, "test")  # None for an autoencoder
    found = replace(
        numbers,
        parameters=sum(weights.numel() for weights in vae.parameters()),
        seconds=runs.read_metrics(run_dir)[-1].get("seconds"),
        seconds_evaluation=evaluation.seconds,
        tenfold_gain=evaluation.rise,
        **{name: getattr(evaluation, name) for name in ("step", "reconstruction", "kl", "elbo", "log_likelihood")},
    )
    if per_image is not None:
        gap = per_image.result.log_evidence - per_image.result.elbo
        found = replace(found, gap=Estimate.mean_of(gap), reliable=has_settled(per_image))
    if not planned.stressed:
        found = _diagnose(found, planned, vae, per_image, study_data, folder)
    found = replace(found, seconds_measuring=time.monotonic() - started)
    runs.write_json(path, {"key": key, "run": to_json(found)})
    return from_json(RunNumbers, runs.read_json(path)["run"])  # JSON has no NaN


def has_settled(per_image: PerImage) -> bool:
    """Whether L_S of a run can be trusted, as a diagnosis judges it."""
    quality = summarize_estimate(per_image.result, per_image.num_particles)
    return is_reliable(quality.rise, quality.unreliable)


@torch.no_grad()
def _diagnose(
    run: RunNumbers, planned: Planned, vae: VAE, per_image: PerImage | None, study_data: StudyData, folder: Path
) -> RunNumbers:
    """The run with every diagnostic, the quality of its samples, and its pictures."""
    importance = None if per_image is None else summarize_estimate(per_image.result, per_image.num_particles)
    diagnosis = measure(vae, study_data.x, gray=study_data.gray, importance=importance)
    codes = encode(vae, study_data.x).mean[study_data.shown]
    with seeded(_PRIOR_SEED, study_data.x.device):  # the same draws for every run with such a prior
        samples = decode_mean(vae, vae.prior().expand((study_data.num_images,)).sample())
    images = {"reconstructions": vae.likelihood(codes).mean, "samples": samples}
    densities: dict[str, DensityQuality] = {}
    if planned.num_codes:
        generated, densities = _decode_densities(vae, study_data, planned.num_codes)
        images |= generated | {"interpolations": interpolate(vae, codes)}
    pictures = {name: f"{PICTURES}/{run.name}/{name}.png" for name in images}
    for name, path in pictures.items():
        write_strip(folder / path, images[name] if name == "interpolations" else images[name][:_NUM_SAMPLES_SHOWN])
    blur = diagnosis.pictures.blur
    return replace(
        run,
        active=diagnosis.active.count,
        implied_beta=diagnosis.implied_beta,
        variation=diagnosis.pictures.variation,
        blur=None if blur is None else results.BlurNumbers(blur.at_mean, blur.error, blur.posterior_noise, blur.bias),
        prior_match=_match_prior(diagnosis),
        samples=study_data.measure_quality(samples),
        densities=densities,
        pictures=pictures,
    )


def _decode_densities(
    vae: VAE, study_data: StudyData, num_codes: int
) -> tuple[dict[str, Tensor], dict[str, DensityQuality]]:
    """Decoded draws of each fitted density, by "NAME_samples", and their quality, by name."""
    device = study_data.x.device
    with seeded(0, device):
        train = sample_posterior(vae, study_data.load_images("train", num_codes))
        validation = sample_posterior(vae, study_data.load_images("validation"))
    images, found = {}, {}
    for name, fitted in fit_densities(train, validation).items():
        with seeded(0, device):
            z = fitted.distribution.sample((study_data.num_images,))
        decoded = images[f"{name}_samples"] = decode_mean(vae, z)
        quality = study_data.measure_quality(decoded)
        found[name] = DensityQuality(quality, len(train), fitted.log_density, fitted.num_components)
    return images, found


def _match_prior(diagnosis: Measurements) -> results.PriorMatch:
    """The aggregate posterior against the prior."""
    aggregate, split = diagnosis.aggregate, diagnosis.elbo_split
    distance, p_values = aggregate.kolmogorov_smirnov.statistic, aggregate.kolmogorov_smirnov.p_value
    sizes = (float(each.mean.abs().max()) for each in (aggregate.moments.mean, aggregate.moments.log_scale))
    largest_mean, largest_log_scale = (size if math.isfinite(size) else None for size in sizes)
    return results.PriorMatch(
        largest_mean=largest_mean,
        largest_log_scale=largest_log_scale,  # unknown where a latent is constant
        largest_distance=float(distance.max()),
        rejected=int((p_values < _LEVEL / len(p_values)).sum()),
        classifier=aggregate.classifier.effect,
        holes=None if aggregate.holes is None else aggregate.holes.share,
        mutual_information=None if split is None else split.mutual_information,
        marginal_kl=None if split is None else split.marginal_kl,
        saturated=None if split is None else split.saturated,
    )


def interpolate(vae: VAE, codes: Tensor) -> Tensor:
    """E[x | z] at z = (1 - t) a + t b, ten t from 0 to 1, for neighboring codes a, b. codes: (n, L), n at least 8."""
    a, b = codes[: 2 * _NUM_PAIRS : 2], codes[1 : 2 * _NUM_PAIRS : 2]
    t = torch.linspace(0, 1, NUM_SHOWN, dtype=codes.dtype)[:, None]
    return vae.likelihood(((1 - t) * a[:, None] + t * b[:, None]).flatten(0, 1)).mean


# --- Runs against each other ---


def compare_bounds(place: Path, size: Size, words: Sequence[str]) -> dict[str, dict[str, BoundDifferences]]:
    """The differences of each table to its reference, by table."""
    beta: dict[str, BoundDifferences] = {}
    collapse: dict[str, BoundDifferences] = {}
    for word in words:
        betas = [sweep_name(word, each) for each in size.betas_of(word)]
        beta |= compare_with_reference(place, betas, sweep_name(word))
    for network in plan.REMEDIED_NETWORKS:
        remedies = [plan.remedy_name(words[0], network, remedy) for remedy in plan.REMEDIES]
        collapse |= compare_with_reference(place, remedies, plan.remedy_name(words[0], network, "none"))
    networks = compare_with_reference(place, plan.varied_names(size, words[0]), sweep_name(words[0]))
    return {"beta": beta, "collapse": collapse, "networks": networks}


def compare_with_reference(folder: Path, names: Sequence[str], reference: str) -> dict[str, BoundDifferences]:
    """ELBO and L_S of each run minus those of a reference, on the same test images; 95% for all of them together.

    Args:
        folder: The folder of all runs.
        names: The runs of one table.
        reference: One of them. If it was not evaluated, there are no differences.

    Returns:
        By run. The reference and runs without a density are left out.

    Raises:
        ValueError: Evaluations of other images, or with another S or seed, so that not only the weights differ.
    """
    evaluated = {name: each for name in names if (each := _read(folder / name)) is not None}
    if reference not in evaluated:
        return {}
    a, found = evaluated.pop(reference), {}
    for name, b in evaluated.items():
        for what in ("index", "num_particles", "seed"):  # another S is another bound
            if not torch.equal(*(torch.as_tensor(getattr(each, what)) for each in (a, b))):
                raise ValueError(f"{folder / name}: expected an evaluation with the {what} of {reference}, got another")
        bounds = bound_difference(a.result, b.result, comparisons=len(evaluated))
        elbo = paired_difference(a.result.elbo, b.result.elbo, comparisons=len(evaluated))
        log_likelihood = _difference(bounds.bounds, bounds.ranks_log_evidence)
        found[name] = BoundDifferences(reference, _difference(elbo), log_likelihood)
    return found


def _read(folder: Path) -> PerImage | None:
    """The numbers of each test image; None for a run that has none."""
    return read_per_image(folder, "test") if (folder / runs.MODEL).exists() else None


def _difference(found: PairedDifference, ranks: bool | None = None) -> Difference:
    return Difference(found.mean, found.stderr, found.lower, found.upper, ranks)


# --- Why reconstructions blur ---


def split_blur(place: Path, found: Mapping[str, RunNumbers], each: StudyData) -> results.BlurParts | None:
    """E_q|x - y|^2 / D = Var_q y + the autoencoder's error + the rest, y = E[x | z], all on the same test images.

    The autoencoder has as many latents as the VAE and neither noise nor a KL, but it too has binary inputs, a network
    and a training. None if the VAE or the autoencoder did not end.
    """
    names = [sweep_name(each.word), *(name_run(each.word, word) for word in ("autoencoder", "autoencoder-2"))]
    vae, autoencoder, two_latents = (
        load(place / name) if name in found and found[name].failed is None else None for name in names
    )
    if vae is None or autoencoder is None:
        return None
    x, gray, binary = each.x, each.gray, {}
    error, noise = _split_error(vae, x, gray)
    plain = _squared_error(decode_mean(autoencoder, encode(autoencoder, x).mean), gray)
    parts = {"posterior_noise": noise, "autoencoder_error": plain, "lost": error - noise - plain}
    if not torch.equal(x, gray):
        error_of_binary = Estimate.mean_of(_squared_error(x, gray))
        binary = {"sharpness": diagnostics.sharpness(x, gray), "error": error_of_binary}
    return results.BlurParts(
        parts={name: Estimate.mean_of(part) for name, part in parts.items()},
        shares={name: ratio_of_means(part, error) for name, part in parts.items()},
        floor=each.measure_quality(each.load_images("validation", each.num_images, gray=True)),
        binary=binary,
        neighbors={} if two_latents is None else _compare_with_neighbors(two_latents, each),
    )


def _squared_error(images: Tensor, other: Tensor) -> Tensor:
    """(N,) |x - y|^2 / D, float64."""
    return (images.double() - other.double()).square().flatten(1).mean(1)


@torch.no_grad()
def _split_error(vae: VAE, x: Tensor, gray: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) mean_j |x - y_j|^2 / D and (N,) Var_q y = sum_j |y_j - Y|^2 / (J - 1) / D of J draws with mean Y."""
    error = square = torch.zeros(len(x), dtype=torch.double)
    total = torch.zeros_like(gray, dtype=torch.double)
    with seeded(0, x.device):
        for _ in range(_NUM_DRAWS):
            y = decode_mean(vae, sample_posterior(vae, x)).double()
            error = error + _squared_error(y, gray) / _NUM_DRAWS
            square = square + y.square().flatten(1).mean(1)
            total += y
    mean_square = (total / _NUM_DRAWS).square().flatten(1).mean(1)
    return error, (square - _NUM_DRAWS * mean_square) / (_NUM_DRAWS - 1)


@torch.no_grad()
def _compare_with_neighbors(vae: VAE, each: StudyData) -> dict[str, Estimate]:
    """A reconstruction against the mean m of the 20 training images whose codes are nearest.

    If the decoder were exact and codes dense, E[x | z] would be E[x | z(x) = z], which m estimates.
    """
    x, gray = each.x[:_NUM_NEIGHBORED], each.gray[:_NUM_NEIGHBORED]
    train, train_gray = (
        each.load_images("train", MOST_TRAINING_IMAGES),
        each.load_images("train", MOST_TRAINING_IMAGES, gray=True),
    )
    codes = encode(vae, x).mean
    distances = torch.cdist(codes, encode(vae, train).mean)
    nearest = distances.topk(min(_NUM_NEIGHBORS, len(train)), largest=False).indices
    means = torch.stack([train_gray[index].mean(0) for index in nearest])
    error = _squared_error(decode_mean(vae, codes), means)
    return {"sharpness": diagnostics.sharpness(means, gray), "error": Estimate.mean_of(error)}
