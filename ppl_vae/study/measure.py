"""The images on which the study's runs are measured, what is measured of each run, and the runs' differences."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    TransformedDistribution,
)

from ppl_vae import data, diagnostics, runs
from ppl_vae.diagnostics.measurement import Measurements, measure, summarize_estimate
from ppl_vae.diagnostics.pictures import PrincipalDirections, find_principal_directions
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import PairedDifference, bound_difference, paired_difference
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.runs.load import load
from ppl_vae.runs.options import Options
from ppl_vae.runs.outputs import write_picture
from ppl_vae.runs.resolve import check_support, choose_evaluated_pixels, load_splits, resolve
from ppl_vae.runs.results import LabelledEvaluation, PerImage, from_json, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study import plan, results
from ppl_vae.study.plan import Planned, Size, dataset_word, sweep_name
from ppl_vae.study.results import BoundDifferences, Difference, LabelledNumbers, Quality, RunNumbers
from ppl_vae.vae import VAE

PICTURES = "pictures"  # a folder in the study's
NUM_SHOWN = 10  # images in a row of a picture
MOST_TRAINING_IMAGES = 20_000  # for principal components and for eigenvalues

_NUM_COMPONENTS = 50
_LEAST_SCALE = 1e-6  # of a component in which no training image varies


@dataclass(frozen=True)
class StudyData:
    """A data set as the study's runs see it.

    Args:
        options: The resolved options of any run on it.
        splits: The data.
        num_images: N, the number of test images that are measured.
    """

    options: Options
    splits: data.Splits
    num_images: int

    @property
    def word(self) -> str:
        """The data set in the names of runs."""
        return dataset_word(self.options.dataset)

    @property
    def num_pixels(self) -> int:
        """D."""
        return math.prod(self.splits.event_shape)

    def load_images(self, split: str, most: int | None = None, *, gray: bool = False) -> Tensor:
        """(n, *E) a fixed subset of at most that many images, as the model sees them, or gray before binarization."""
        if gray:
            images = data.probabilities(self.splits, split)
        else:
            images = data.evaluation_images(self.splits, split, choose_evaluated_pixels(self.options, self.splits))
        return images[data.subset(len(images), most)]

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) test images as the model sees them, those of the runs' evaluation."""
        return self.load_images("test", self.num_images)

    @cached_property
    def gray(self) -> Tensor:
        """(N, *E) the same test images before binarization."""
        return self.load_images("test", self.num_images, gray=True)

    @cached_property
    def components(self) -> PrincipalDirections:
        """The first min(50, D) principal components of the gray training images."""
        images = self.load_images("train", MOST_TRAINING_IMAGES, gray=True)
        return find_principal_directions(images.flatten(1).double(), _NUM_COMPONENTS)

    @cached_property
    def shown(self) -> Tensor:
        """(10,) places among the N test images that are shown, evenly spaced: a file may be sorted by class."""
        return torch.linspace(0, self.num_images - 1, NUM_SHOWN).long()

    @property
    def originals(self) -> str:
        """The picture of the test images that are shown, in the study's folder."""
        return f"{PICTURES}/{self.word}/originals.png"

    def measure_quality(self, images: Tensor) -> Quality:
        """Compare images (M, C, H, W) with the gray test images: the first min(M, N) of both.

        "sharpness" is 1 where they have as much fine detail; "classifier" is 2 accuracy - 1 of a classifier between the
        two in the first principal components of the training images, each divided by its scale: 0 where they are alike,
        1 where they are always told apart. The first says nothing about what is shown, the second nothing beyond those
        components. Network features are usual, but those networks were trained on photos.

        Source: See ``diagnostics.sharpness`` and ``diagnostics.classifier_test``; the choice is ours.
        """
        count = min(len(images), len(self.gray))
        images, real = images[:count], self.gray[:count]
        scale = self.components.scale.clamp(min=_LEAST_SCALE)
        points = (self.components.project(each.flatten(1).double()) / scale for each in (images, real))
        found = diagnostics.classifier_test(*(each.float() for each in points))
        return Quality(diagnostics.sharpness(images, real), found.effect)


def load_study_data(options: Options, num_images: int) -> StudyData:
    """The data set of such options.

    Raises:
        ValueError: The data cannot be read, do not fit the options, or are no images, or too few of them.
    """
    splits = load_splits(options)
    if len(splits.event_shape) != 3:
        raise ValueError(f"expected images, got {splits.name}, whose shape is {splits.event_shape}")
    if min(len(splits.validation), len(splits.test)) < NUM_SHOWN:
        raise ValueError(f"expected at least {NUM_SHOWN} validation and test images in {splits.name}")
    options = resolve(options, splits)
    check_support(options, splits)
    return StudyData(options, splits, min(num_images, len(splits.test)))


def write_strip(path: Path, images: Tensor) -> None:
    """Writes images (N, C, H, W) in [0, 1] as one PNG, ten in a row. Those that fill no row are left out."""
    rows, (C, H, W) = len(images) // NUM_SHOWN, images.shape[1:]
    table = images[: rows * NUM_SHOWN].float().reshape(rows, NUM_SHOWN, C, H, W).permute(2, 0, 3, 1, 4)
    levels = (255 * table.reshape(C, rows * H, NUM_SHOWN * W)).round().clamp(0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, levels.numpy().astype(np.uint8))


MEASUREMENT = "measurement.json"

_VERSION = 5  # to be raised when a diagnostic comes to another number: measurements of other versions are done again
_OPTIONS = "network latent_dim beta objective free_bits warmup_epochs epochs seed posterior learning_rate likelihood"
_NUM_SAMPLES_SHOWN = 20
_PRIOR_SEED = 20_140_501


# --- One run ---


@torch.no_grad()
def measure_run(planned: Planned, folder: Path, study_data: StudyData) -> RunNumbers:
    """A trained run's numbers: the stored ones if they are of these weights and images, otherwise measured now.

    Args:
        planned: The run.
        folder: The study's folder, which takes its pictures.
        study_data: Its data.
    """
    run_dir = folder / results.RUNS / planned.name
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
    quality = None if per_image is None else summarize_estimate(per_image.result, per_image.num_particles)
    diagnosis = measure(vae, study_data.x, gray=study_data.gray, importance=quality)
    images, samples, densities = _decode(vae, study_data, planned.num_codes)
    pictures = {name: f"{PICTURES}/{planned.name}/{name}.png" for name in images}
    for name, picture in pictures.items():
        write_strip(folder / picture, images[name][:_NUM_SAMPLES_SHOWN])
    found = RunNumbers(
        name=planned.name,
        dataset=study_data.word,
        options={name: getattr(planned.options, name) for name in _OPTIONS.split()},
        seconds=runs.read_metrics(run_dir)[-1].get("seconds"),
        seconds_evaluation=evaluation.seconds,
        seconds_measuring=time.monotonic() - started,
        **{name: getattr(evaluation, name) for name in ("reconstruction", "kl", "elbo", "log_likelihood")},
        reliable=None if quality is None else is_reliable(quality.rise, quality.unreliable),
        active=diagnosis.active.count,
        implied_beta=diagnosis.implied_beta,
        variation=diagnosis.pictures.variation,
        blur=diagnosis.pictures.blur,
        prior_match=_match_prior(diagnosis),
        samples=samples,
        densities=densities,
        pictures=pictures,
    )
    runs.write_json(path, {"key": key, "run": to_json(found)})
    return from_json(RunNumbers, runs.read_json(path)["run"])  # JSON has no NaN


def _decode(vae: VAE, study_data: StudyData, num_codes: int) -> tuple[dict[str, Tensor], Quality, dict[str, Quality]]:
    """Images to show by name, the quality of decoded prior draws, and that of each density of codes by its name."""
    device, count = study_data.x.device, study_data.num_images
    codes = encode(vae, study_data.x).mean[study_data.shown]
    with seeded(_PRIOR_SEED, device):  # the same draws for every run with such a prior
        samples = decode_mean(vae, vae.prior().expand((count,)).sample())
    images = {"reconstructions": vae.likelihood(codes).mean, "samples": samples}
    found = {}
    if num_codes:
        with seeded(0, device):
            train = sample_posterior(vae, study_data.load_images("train", num_codes))
            validation = sample_posterior(vae, study_data.load_images("validation"))
        for name, density in fit_densities(train, validation).items():
            with seeded(0, device):
                decoded = images[f"{name}_samples"] = decode_mean(vae, density.sample((count,)))
            found[name] = study_data.measure_quality(decoded)
    return images, study_data.measure_quality(samples), found


def _match_prior(diagnosis: Measurements) -> results.PriorMatch:
    """The aggregate posterior against the prior."""
    aggregate, split = diagnosis.aggregate, diagnosis.elbo_split
    return results.PriorMatch(
        largest_distance=float(aggregate.kolmogorov_smirnov.statistic.max()),
        classifier=aggregate.classifier.effect,
        holes=None if aggregate.holes is None else aggregate.holes.share,
        mutual_information=None if split is None else split.mutual_information,
        marginal_kl=None if split is None else split.marginal_kl,
        saturated=None if split is None else split.saturated,
    )


def measure_labelled(planned: Planned, folder: Path) -> LabelledNumbers:
    """A trained semi-supervised run's numbers, and a picture of its samples in the study's folder."""
    place, name = folder / results.RUNS, planned.name
    vae, evaluation = load(place / name), read_evaluation(place / name)
    assert isinstance(vae, SemiSupervisedVAE)
    assert isinstance(evaluation, LabelledEvaluation)
    assert evaluation.classifier_accuracy is not None
    assert evaluation.log_likelihood is not None
    with seeded(_PRIOR_SEED, torch.device("cpu")), torch.no_grad():
        z = vae.fix_label(0).prior().expand((NUM_SHOWN,)).sample()  # the same codes for each class
        samples = torch.cat([decode_mean(vae.fix_label(y), z) for y in range(vae.num_classes)])
    picture = f"{PICTURES}/{name}/samples.png"
    write_strip(folder / picture, samples)
    return LabelledNumbers(
        labels=planned.options.labels or 0,
        log_likelihood=evaluation.log_likelihood,
        classifier=evaluation.classifier_accuracy,
        density=evaluation.accuracy,
        seconds=runs.read_metrics(place / name)[-1]["seconds"],
        seconds_evaluation=evaluation.seconds,
        picture=picture,
    )


# --- Runs against each other ---


def compare_bounds(
    place: Path, size: Size, words: Sequence[str], labelled: Sequence[str]
) -> dict[str, dict[str, BoundDifferences]]:
    """The differences of each table to its reference, by table. ``labelled``: the names of semi-supervised runs."""
    beta: dict[str, BoundDifferences] = {}
    for word in words:
        betas = [sweep_name(word, each) for each in size.betas_of(word)]
        beta |= compare_with_reference(place, betas, sweep_name(word))
    remedies = list(plan.remedy_names(words[0]).values())
    latents = compare_with_reference(place, plan.varied_names(size, words[0]), sweep_name(words[0]))
    classes = compare_with_reference(place, [sweep_name(words[0]), *labelled], sweep_name(words[0]))
    collapse = compare_with_reference(place, remedies, remedies[0])
    return {"beta": beta, "collapse": collapse, "latents": latents, "labels": classes}


def compare_with_reference(folder: Path, names: Sequence[str], reference: str) -> dict[str, BoundDifferences]:
    """ELBO and L_S of each run minus those of a reference, on the same test images; 95% for all of them together.

    Args:
        folder: The folder of all runs.
        names: The runs of one table.
        reference: One of them.

    Returns:
        By run, without the reference.

    Raises:
        ValueError: Evaluations of other images, or with another S or seed, so that not only the weights differ.
    """
    evaluated = {name: _read(folder / name) for name in names}
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


def _read(folder: Path) -> PerImage:
    """The numbers of each test image."""
    found = read_per_image(folder, "test")
    assert found is not None  # the run is finished, and has a density
    return found


def _difference(found: PairedDifference, ranks: bool | None = None) -> Difference:
    return Difference(found.mean, found.stderr, found.lower, found.upper, ranks)


# --- Densities of codes ---

COMPONENTS = (10, 30, 100)  # candidates for a mixture
_CODES_PER_COMPONENT = 20  # at least
_RIDGE = 1e-6  # added to variances of standardized codes: a latent may be constant
_SEED = 0  # of the mixture's start


def fit_densities(train: Tensor, validation: Tensor) -> dict[str, Distribution]:
    """A "normal" and a "mixture" of normals with full covariances, each fitted to codes by maximum likelihood.

    A plain autoencoder is not trained with a prior, so its decoder can be judged fairly only with codes that are drawn
    from such a density. Codes are standardized first. The mixture is fitted by expectation-maximization, with as many
    components as give validation codes the highest density; there is none without scikit-learn or with fewer than 200
    codes.

    Args:
        train: (N, L) codes of training images, which are fitted to.
        validation: (M, L) codes that choose the mixture's number of components.

    Returns:
        Distributions of event (L,), by name.

    Reference: Dempster, Laird and Rubin 1977; Ghosh et al. 2020, arXiv 1903.12436 (a mixture fitted to an autoencoder's
    codes); Dai and Wipf 2019, arXiv 1903.05789 (a second model of a VAE's codes).
    """
    L, loc, scale = train.shape[1], train.mean(0), train.std(0).clamp(min=_RIDGE)
    u, u_validation = (train - loc) / scale, (validation - loc) / scale
    covariance = torch.cov(u.T).reshape(L, L) + _RIDGE * torch.eye(L)
    found: dict[str, Distribution] = {"normal": MultivariateNormal(u.mean(0), covariance)}
    with suppress(ImportError), warnings.catch_warnings():  # without the extra "sklearn" there is no mixture
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        warnings.simplefilter("ignore", ConvergenceWarning)  # validation codes judge a candidate, converged or not
        candidates = [
            GaussianMixture(K, reg_covar=_RIDGE, tol=1e-2, max_iter=50, random_state=_SEED).fit(u.numpy())
            for K in COMPONENTS
            if len(u) >= K * _CODES_PER_COMPONENT
        ]
        if candidates:
            best = max(candidates, key=lambda candidate: candidate.score(u_validation.numpy()))
            parameters = (best.weights_, best.means_, best.covariances_)
            weights, means, covariances = (torch.as_tensor(each).to(u) for each in parameters)
            found["mixture"] = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    to_codes = AffineTransform(loc, scale, event_dim=1)
    return {name: TransformedDistribution(density, [to_codes]) for name, density in found.items()}
