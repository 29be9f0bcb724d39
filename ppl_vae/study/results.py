"""The numbers of a study as frozen records, and ``study.json``, which holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ppl_vae import diagnostics, runs
from ppl_vae.diagnostics.pictures import Blur
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.results import from_json
from ppl_vae.study.plan import Size, sweep_name

STUDY, RUNS = "study.json", "runs"


@dataclass(frozen=True)
class Difference:
    """The mean of b - a over the same images, with the corrected 95% interval [lower, upper], nats per image.

    ``ranks_log_likelihood``: of L_S, whether log p(x) ranks as the bounds do (``evidence.estimate.BoundDifference``).
    """

    mean: float
    stderr: float
    lower: float
    upper: float
    ranks_log_likelihood: bool | None = None


@dataclass(frozen=True)
class BoundDifferences:
    """A run minus the reference of its table, on the same test images."""

    reference: str
    elbo: Difference
    log_likelihood: Difference


@dataclass(frozen=True)
class Quality:
    """Generated images against real ones; see ``StudyData.measure_quality``."""

    sharpness: Estimate
    classifier: Estimate


@dataclass(frozen=True)
class PriorMatch:
    """Codes of test images, one sample each, against the prior.

    Args:
        largest_distance: Largest Kolmogorov-Smirnov distance over latents.
        classifier: 0 where codes and prior samples are alike, 1 where they are always told apart.
        holes: Share of prior samples that the codes cover less than 99% of other codes.
        mutual_information, marginal_kl: The two parts of the mean KL, nats.
        saturated: Whether the mutual information is at its cap, the logarithm of the number of images.
    """

    largest_distance: float
    classifier: Estimate
    holes: Estimate | None = None
    mutual_information: Estimate | None = None
    marginal_kl: Estimate | None = None
    saturated: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RunNumbers:
    """One run: its options, its evaluation and its diagnosis. An autoencoder has None for what needs a density.

    Args:
        options: Those that the study varies, and the network, likelihood, learning rate and seed of all runs.
        seconds, seconds_evaluation, seconds_measuring: The time of its training, evaluation and diagnosis.
        elbo, log_likelihood: The ELBO and L_S, nats per image.
        reliable: Whether L_S has settled (``diagnostics.verdicts.is_reliable``).
        variation: How much reconstructions differ between images, relative to the images; 0 where they are alike.
        samples: Decoded prior draws.
        densities: Decoded draws of densities that were fitted to the codes: "normal", "mixture".
        pictures: Files in the study's folder, by what they show.
    """

    name: str
    dataset: str
    options: dict[str, Any]
    seconds: float | None
    seconds_evaluation: float
    seconds_measuring: float
    reconstruction: Estimate
    kl: Estimate | None
    elbo: Estimate | None
    log_likelihood: Estimate | None
    reliable: bool | None
    active: int
    implied_beta: Estimate | None
    variation: Estimate | None
    blur: Blur | None
    prior_match: PriorMatch | None
    samples: Quality
    densities: dict[str, Quality] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def is_autoencoder(self) -> bool:
        """Whether the guide is deterministic."""
        return self.options["posterior"] == "delta"

    @property
    def model(self) -> str:
        """Its kind in words."""
        return "autoencoder" if self.is_autoencoder else "VAE"

    @property
    def beta(self) -> float:
        """The weight of the KL in training."""
        return self.options["beta"]


@dataclass(frozen=True)
class DataNumbers:
    """One data set.

    Args:
        eigenvalues: The largest eigenvalues of the training images' covariance, in units of the likelihood's noise.
        edge: What eigenvalues of as many images of independent pixels reach by chance.
        floor: log p of the test images under independent pixels, nats per image.
        real: Validation images in the place of generated ones.
        originals: The picture of test images, a file in the study's folder.
    """

    description: str
    num_pixels: int
    train: int
    validation: int
    test: int
    eigenvalues: tuple[float, ...]
    edge: float
    floor: Estimate | None
    real: Quality
    originals: str


@dataclass(frozen=True, kw_only=True)
class LabelledNumbers:
    """A semi-supervised run.

    Args:
        labels: How many labels of training images it knows.
        log_likelihood: L_S, nats per image.
        classifier, density: The accuracy of q(y | x), and of p(y | x) = p(y) p(x | y) / p(x).
        seconds, seconds_evaluation: The time of its training and evaluation.
        picture: Samples, a row for each class: a file in the study's folder.
    """

    labels: int
    log_likelihood: Estimate
    classifier: Estimate
    density: Estimate
    seconds: float
    seconds_evaluation: float
    picture: str


@dataclass(frozen=True, kw_only=True)
class StudyNumbers:
    """All numbers of a study, as ``study.json`` holds them.

    Args:
        size: "default" or "quick".
        settings: The size itself.
        datasets: Words of the data sets; the first has all parts.
        seconds: The seconds of training, of evaluation and of measuring, summed over the runs.
        runs: By name, in the order of training.
        differences: By table ("beta", "collapse", "latents" or "labels"), then by run.
        labelled: The semi-supervised runs of the first data set, by name.
    """

    size: str
    settings: Size
    datasets: tuple[str, ...]
    data: dict[str, DataNumbers]
    runs: dict[str, RunNumbers]
    environment: dict[str, Any]
    seconds: dict[str, float]
    differences: dict[str, dict[str, BoundDifferences]]
    labelled: dict[str, LabelledNumbers] = field(default_factory=dict)

    def find_runs(self, names: Iterable[str]) -> list[RunNumbers]:
        """The runs of those names that the study has."""
        return [self.runs[name] for name in names if name in self.runs]

    def find_sweep(self, dataset: str) -> list[RunNumbers]:
        """The runs along beta, ascending."""
        return self.find_runs(sweep_name(dataset, beta) for beta in sorted(self.settings.betas_of(dataset)))

    def count_directions(self, run: RunNumbers) -> int:
        """Directions of the data that a linear decoder near collapse keeps at this beta: the prediction of collapse."""
        data = self.data[run.dataset]
        eigenvalues = torch.tensor(data.eigenvalues, dtype=torch.double)
        return diagnostics.live_directions(eigenvalues, beta=run.beta, edge=data.edge)

    def find_differences(self, table: str, run: str) -> tuple[Difference | None, Difference | None]:
        """ELBO and L_S minus those of the reference of that table; (None, None) for the reference itself."""
        found = self.differences.get(table, {}).get(run)
        return (None, None) if found is None else (found.elbo, found.log_likelihood)


def read_study(folder: Path) -> StudyNumbers:
    """Reads FOLDER/study.json.

    Raises:
        ValueError: No such file, or a damaged one.
    """
    stored = runs.read_json(folder / STUDY)
    try:
        return from_json(StudyNumbers, stored)
    except ValueError as error:
        raise ValueError(f"{folder / STUDY}: damaged: {error}") from None
