"""The numbers of a study as frozen records, and ``study.json``, which holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ppl_vae import diagnostics, runs
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.results import from_json
from ppl_vae.study.plan import Size, sweep_name

STUDY, RUNS, FAILURE = "study.json", "runs", "failure.json"


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
    frechet: Estimate
    classifier: Estimate


@dataclass(frozen=True)
class DensityQuality:
    """Decoded draws of a density that was fitted to the codes of training images.

    Args:
        quality: The decoded draws against test images.
        num_codes: The number of training codes.
        log_density: Mean log-density of the validation codes, nats.
        num_components: K of a mixture, chosen by ``log_density``.
    """

    quality: Quality
    num_codes: int
    log_density: Estimate | None = None
    num_components: int | None = None


@dataclass(frozen=True)
class BlurNumbers:
    """Reconstructions: high-frequency power, and E_q|x - y|^2 = Var_q y + |x - E_q y|^2, per pixel."""

    sharpness: Estimate
    error: Estimate
    posterior_noise: Estimate
    bias: Estimate


@dataclass(frozen=True)
class PriorMatch:
    """Codes of test images, one sample each, against the prior.

    Args:
        largest_mean, largest_log_scale: Largest |mean| and |log scale| over latents, in scales of the prior.
        largest_distance: Largest Kolmogorov-Smirnov distance over latents.
        rejected: Latents that the test rejects at 5%, corrected for their number (Dunn 1961).
        classifier: 0 where codes and prior samples are alike, 1 where they are always told apart.
        holes: Share of prior samples that the codes cover less than 99% of other codes.
        mutual_information, marginal_kl: The two parts of the mean KL, nats.
        saturated: Whether the mutual information is at its cap, the logarithm of the number of images.
    """

    largest_mean: float | None
    largest_log_scale: float | None
    largest_distance: float
    rejected: int
    classifier: Estimate
    holes: Estimate | None = None
    mutual_information: Estimate | None = None
    marginal_kl: Estimate | None = None
    saturated: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RunNumbers:
    """One run: its options, its evaluation and its diagnosis. What was not measured is None.

    Args:
        options: The options that the study varies.
        averaged: Whether the log-likelihood was averaged over pixels in training.
        failed: The message that ended the run, where a number was not finite.
        elbo, log_likelihood, gap: The ELBO, L_S, and L_S minus the ELBO, nats per image.
        tenfold_gain: What ten times the samples gained, from S / 10 to S, nats per image.
        reliable: Whether L_S has settled (``diagnostics.verdicts.is_reliable``).
        variation: How much reconstructions differ between images, relative to the images; 0 where they are alike.
        samples: Decoded prior draws.
        densities: Decoded draws of densities that were fitted to the codes: "normal", "mixture", "flow".
        pictures: Files in the study's folder, by what they show.
    """

    name: str
    dataset: str
    options: dict[str, Any]
    averaged: bool = False
    failed: str | None = None
    step: int | None = None
    parameters: int | None = None
    seconds: float | None = None
    seconds_evaluation: float | None = None
    seconds_measuring: float | None = None
    reconstruction: Estimate | None = None
    kl: Estimate | None = None
    elbo: Estimate | None = None
    log_likelihood: Estimate | None = None
    gap: Estimate | None = None
    tenfold_gain: float | None = None
    reliable: bool | None = None
    active: int | None = None
    implied_beta: Estimate | None = None
    variation: Estimate | None = None
    blur: BlurNumbers | None = None
    prior_match: PriorMatch | None = None
    samples: Quality | None = None
    densities: dict[str, DensityQuality] = field(default_factory=dict)
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
        originals: The picture of test images, a file in the study's folder.
    """

    description: str
    num_pixels: int
    train: int
    validation: int
    test: int
    eigenvalues: tuple[float, ...]
    edge: float
    floor: Estimate | None = None
    originals: str | None = None


@dataclass(frozen=True)
class BlurParts:
    """Why reconstructions of one data set blur, all on the same test images.

    Args:
        parts: Squared error per pixel of a sampled reconstruction of the VAE, as a sum: "posterior_noise",
            "autoencoder_error" and "lost", the rest.
        shares: The same parts, divided by their sum.
        floor: Validation images in the place of generated ones.
        binary: "sharpness" and "error" of the binary images that the networks see, against the gray ones.
        neighbors: "sharpness" of the mean of the 20 training images with the nearest codes, of an autoencoder with two
            latents, and "error" of its reconstruction against that mean.
    """

    parts: dict[str, Estimate]
    shares: dict[str, Estimate]
    floor: Quality
    binary: dict[str, Estimate] = field(default_factory=dict)
    neighbors: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyNumbers:
    """All numbers of a study, as ``study.json`` holds them.

    Args:
        size: "default" or "quick".
        settings: The size itself.
        datasets: Words of the data sets; the first has all parts.
        seconds: The seconds of training, of evaluation and of measuring, summed over the runs.
        runs: By name, in the order of training.
        differences: By table ("beta", "collapse" or "networks"), then by run.
        blur: By data set.
    """

    size: str
    settings: Size
    datasets: tuple[str, ...]
    data: dict[str, DataNumbers]
    runs: dict[str, RunNumbers]
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    differences: dict[str, dict[str, BoundDifferences]] = field(default_factory=dict)
    blur: dict[str, BlurParts] = field(default_factory=dict)

    def find_runs(self, names: Iterable[str]) -> list[RunNumbers]:
        """The runs that ended with finite numbers."""
        return [run for name in names if (run := self.runs.get(name)) is not None and run.failed is None]

    def find_sweep(self, dataset: str) -> list[RunNumbers]:
        """The runs along beta, ascending."""
        return self.find_runs(sweep_name(dataset, beta) for beta in sorted(self.settings.betas_of(dataset)))

    def threshold(self, run: RunNumbers) -> float:
        """The eigenvalue above which a direction is kept: beta for a sum over pixels, beta D for a mean."""
        return run.beta * (self.data[run.dataset].num_pixels if run.averaged else 1)

    def count_directions(self, run: RunNumbers) -> int:
        """Directions of the data that a linear decoder near collapse keeps: the prediction of collapse."""
        data = self.data[run.dataset]
        eigenvalues = torch.tensor(data.eigenvalues, dtype=torch.double)
        return diagnostics.live_directions(eigenvalues, beta=self.threshold(run), edge=data.edge)

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


def read_failure(run_dir: Path) -> str | None:
    """The message that ended a run; None if none did. That of a training begins with its step."""
    path = run_dir / FAILURE
    return runs.read_json(path)["error"] if path.exists() else None
