"""The results of training a published model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.results import read_rows


@dataclass(frozen=True)
class Published:
    """A number that is in print.

    Args:
        log_likelihood: Nats per image.
        stderr: The error that is printed with it, or None.
        source: The model in a few words, and where it is published.
    """

    log_likelihood: float
    stderr: float | None
    source: str


@dataclass(frozen=True)
class Budget:
    """The epochs of a reproduction: the share of the recipe's, and the epochs of each stage, there and here."""

    share: float
    epochs: tuple[int, ...]
    recipe_epochs: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationProtocol:
    """The images and particles of a reproduction's log p(x)."""

    dataset: str
    protocol: str
    binarization: str
    split: str
    num_images: int
    num_particles: int


@dataclass(frozen=True)
class ValidationCurve:
    """How the validation curve of each training stage ended. Nats per image.

    Args:
        elbo: The validation ELBO of the kept weights. None where the last stage's initial weights are kept.
        epoch: Their epoch in the last stage, 0 for the initial weights.
        last_tenth_gains: What the last tenth of each stage's epochs gained over the best epoch before, by the
            validation ELBO, or by the bound L_S where that chooses the weights. None for a stage of one epoch.
    """

    elbo: float | None
    epoch: int
    last_tenth_gains: tuple[float | None, ...]


@dataclass(frozen=True)
class StageSeconds:
    """The time of each training stage, and of the evaluation."""

    training: tuple[float, ...]
    evaluation: float


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A published model that was trained again: a row of the file of reproductions. Nats per image.

    Args:
        published: The numbers in print that it is compared with.
        differs: How the training differs from the source's.
        options: The options of each stage, without places on a machine.
        ours: log p(x), the importance-weighted bound L_S.
        active_units: How many latents vary over images (``diagnostics.active_units``). None with several layers.
        command: The command line that makes the row again.
        commits: The commits of the code that took part.
        environment: Of the last stage.
    """

    recipe: str
    model: str
    published: tuple[Published, ...]
    differs: str
    seed: int
    budget: Budget
    precision: str
    options: tuple[JsonObject, ...]
    ours: Estimate
    elbo: Estimate
    kl: Estimate
    rise: float
    protocol: EvaluationProtocol
    weights: int
    active_units: int | None
    validation: ValidationCurve | None
    seconds: StageSeconds
    command: str
    commits: tuple[str, ...]
    environment: JsonObject


def read_reproductions(path: Path) -> list[Reproduction]:
    """The rows of a file of reproductions; none if there is no file. Raises ValueError for a damaged one."""
    return read_rows(path, "rows", Reproduction)
