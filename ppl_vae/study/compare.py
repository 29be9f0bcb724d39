"""What compares the runs of a study: paired differences, the parts of the squared error, and the data's eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import diagnostics, runs
from ppl_vae.diagnostics.likelihood import NoiseSpectrum, measure_noise
from ppl_vae.evidence.estimate import Estimate, PairedDifference, bound_difference, paired_difference, ratio_of_means
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.load import load
from ppl_vae.runs.results import PerImage, read_evaluation, read_per_image
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study.data import MOST_TRAINING_IMAGES, StudyData, originals_path, sample_quality
from ppl_vae.study.plan import REMEDIED_NETWORKS, REMEDIES, Size, name_run, remedy_name, sweep_name
from ppl_vae.study.results import (
    RUNS,
    BlurParts,
    BoundDifferences,
    DataNumbers,
    Difference,
    RunNumbers,
    StudyNumbers,
)
from ppl_vae.vae import VAE

_NUM_NEIGHBORS = 20
_NUM_NEIGHBORED = 500  # test images whose neighbors are averaged
_NUM_DRAWS = 8  # of q(z | x) per image, for the parts of its squared error


# --- All numbers ---


def assemble_numbers(
    folder: Path, size: Size, name: str, loaded: Mapping[str, StudyData], found: dict[str, RunNumbers]
) -> StudyNumbers:
    """All numbers of the study.

    Args:
        folder: The study's folder.
        size: How much was trained.
        name: Of the size.
        loaded: The data sets, by word; the first has all parts.
        found: The numbers of each run.
    """
    place = folder / RUNS
    seconds = {
        "training": sum(run.seconds or 0.0 for run in found.values()),
        "evaluation": sum(run.seconds_evaluation or 0.0 for run in found.values()),
        "measuring": sum(run.seconds_measuring or 0.0 for run in found.values()),
    }
    return StudyNumbers(
        size=name,
        settings=size,
        datasets=tuple(loaded),
        data={word: _describe_data(place, each) for word, each in loaded.items()},
        runs=found,
        environment=runs.describe_environment("cpu"),
        seconds=seconds,
        differences=_compare_bounds(place, size, loaded),
        blur={word: blur for word in loaded if (blur := _split_blur(place, found, loaded[word])) is not None},
    )


def _describe_data(place: Path, each: StudyData) -> DataNumbers:
    splits, noise = each.splits, measure_training_noise(each)
    evaluation = read_evaluation(place / sweep_name(each.word, 1.0))
    return DataNumbers(
        description=splits.describe(),
        num_pixels=each.num_pixels,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        eigenvalues=tuple(noise.eigenvalues.tolist()),
        edge=noise.edge,
        floor=None if evaluation is None else evaluation.floor,
        originals=originals_path(each.word),
    )


def measure_training_noise(study_data: StudyData) -> NoiseSpectrum:
    """The training images' eigenvalues in units of the likelihood's noise."""
    family = build_likelihood(study_data.options, study_data.splits.event_shape)
    found = measure_noise(family, study_data.train_seen(MOST_TRAINING_IMAGES))
    assert found is not None  # the study's likelihood is a Bernoulli
    return found


def _compare_bounds(place: Path, size: Size, loaded: Mapping[str, StudyData]) -> dict[str, dict[str, BoundDifferences]]:
    """The differences of each table to its reference, by table."""
    tables: dict[str, dict[str, BoundDifferences]] = {"beta": {}, "collapse": {}, "networks": {}}
    for word in loaded:
        betas = [sweep_name(word, beta) for beta in size.betas_of(word)]
        tables["beta"] |= compare_with_reference(place, betas, sweep_name(word, 1.0))
    first = next(iter(loaded))
    for network in REMEDIED_NETWORKS:
        remedies = [remedy_name(first, network, remedy) for remedy in REMEDIES]
        tables["collapse"] |= compare_with_reference(place, remedies, remedy_name(first, network, "none"))
    varied = [f"latents-{L}" for L in size.latent_dims] + [f"network-{network}" for network in size.networks]
    base_name = sweep_name(first, 1.0)
    names = [base_name, *(name_run(first, each) for each in varied)]
    tables["networks"] = compare_with_reference(place, names, base_name)
    return tables


# --- Paired differences ---


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


def _split_blur(place: Path, found: dict[str, RunNumbers], each: StudyData) -> BlurParts | None:
    """The parts of the error of one data set; None if the VAE or the autoencoder did not end."""
    names = [sweep_name(each.word, 1.0), *(name_run(each.word, word) for word in ("autoencoder", "autoencoder-2"))]
    vae, autoencoder, two = (
        load(place / name) if name in found and found[name].failed is None else None for name in names
    )
    return None if vae is None or autoencoder is None else split_blur(vae, autoencoder, two, each)


def split_blur(vae: VAE, autoencoder: VAE, two_latents: VAE | None, study_data: StudyData) -> BlurParts:
    """E_q|x - y|^2 / D = Var_q y + the autoencoder's error + the rest, y = E[x | z], all on the same test images.

    The autoencoder has as many latents as the VAE and neither noise nor a KL, but it too has binary inputs, a network
    and a training. The variance is sum_j |y_j - Y|^2 / (J - 1) of J draws with mean Y. ``two_latents`` is the
    autoencoder with two latents, if it was trained.
    """
    x, gray = study_data.x, study_data.gray
    error, noise = _split_error(vae, x, gray)
    plain = _squared_error(decode_mean(autoencoder, encode(autoencoder, x).mean), gray)
    parts = {"posterior_noise": noise, "autoencoder_error": plain, "lost": error - noise - plain}
    binary = {}
    if not torch.equal(x, gray):
        error_of_binary = Estimate.mean_of(_squared_error(x, gray))
        binary = {"sharpness": diagnostics.sharpness(x, gray), "error": error_of_binary}
    return BlurParts(
        {name: Estimate.mean_of(part) for name, part in parts.items()},
        {name: ratio_of_means(part, error) for name, part in parts.items()},
        sample_quality(study_data.other_gray, gray, study_data.components),
        binary,
        {} if two_latents is None else _compare_with_neighbors(two_latents, study_data),
    )


def _squared_error(images: Tensor, other: Tensor) -> Tensor:
    """(N,) |x - y|^2 / D, float64."""
    return (images.double() - other.double()).square().flatten(1).mean(1)


@torch.no_grad()
def _split_error(vae: VAE, x: Tensor, gray: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) mean_j |x - y_j|^2 / D and (N,) Var_q y / D, float64."""
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
def _compare_with_neighbors(vae: VAE, study_data: StudyData) -> dict[str, Estimate]:
    """A reconstruction against the mean m of the 20 training images whose codes are nearest.

    If the decoder were exact and codes dense, E[x | z] would be E[x | z(x) = z], which m estimates.
    """
    x, gray = study_data.x[:_NUM_NEIGHBORED], study_data.gray[:_NUM_NEIGHBORED]
    train, train_gray = study_data.train_seen(MOST_TRAINING_IMAGES), study_data.train_gray(MOST_TRAINING_IMAGES)
    codes = encode(vae, x).mean
    distances = torch.cdist(codes, encode(vae, train).mean)
    nearest = distances.topk(min(_NUM_NEIGHBORS, len(train)), largest=False).indices
    means = torch.stack([train_gray[index].mean(0) for index in nearest])
    error = _squared_error(decode_mean(vae, codes), means)
    return {"sharpness": diagnostics.sharpness(means, gray), "error": Estimate.mean_of(error)}
