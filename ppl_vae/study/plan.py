"""What the study trains: each run's name and options, and the one thing that it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.training.settings import default_warmup


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Args:
        epochs: The epochs of each run.
        betas: The betas of each data set; the last list serves data sets that have none of their own.
        latent_dims: Numbers of latents other than the base's.
        images: Test images that are evaluated and measured.
        num_particles: S of log p(x).
        codes: Training images to whose codes densities are fitted, at most.
        labels: Numbers of known labels of semi-supervised runs, for a first data set with classes.
    """

    epochs: int
    betas: dict[str, tuple[float, ...]]
    latent_dims: tuple[int, ...]
    images: int
    num_particles: int
    codes: int
    labels: tuple[int, ...] = ()

    def betas_of(self, dataset: str) -> tuple[float, ...]:
        """The betas along which a data set is studied."""
        return self.betas.get(dataset, [*self.betas.values()][-1])


DEFAULT = Size(
    epochs=10,
    betas={
        "mnist": (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 20.0, 100.0),
        "fashion-mnist": (0.001, 0.01, 0.1, 0.3, 0.7, 1.0, 2.0, 10.0, 100.0),
    },
    latent_dims=(2, 8, 20, 128),
    images=2000,
    num_particles=500,
    codes=50_000,
    labels=(100, 1000),
)
QUICK = Size(
    epochs=2,
    betas={
        "mnist": (0.001, 0.01, 0.1, 0.3, 1.0, 2.0, 5.0, 20.0, 100.0),
        "fashion-mnist": (0.01, 0.1, 1.0, 10.0, 100.0),
    },
    latent_dims=(2, 10),
    images=500,
    num_particles=200,
    codes=5000,
    labels=(100,),
)

# Remedies against collapse, and the options that they change. The base has the warm-up alone.
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {"warmup_epochs": 0},
    "free-bits": {"warmup_epochs": 0, "objective": "free-bits", "free_bits": 0.25},
    "both": {"objective": "free-bits", "free_bits": 0.25},
}
AUTOENCODER: dict[str, Any] = {"posterior": "delta", "beta": 0.0}


def dataset_word(dataset: str) -> str:
    """A data set in the names of runs: the name of a known one, the file's stem of a path."""
    return Path(dataset).stem


def name_run(dataset: str, what: str) -> str:
    """The run that differs from the base by what the words say, such as "autoencoder" or "latents-8"."""
    return f"{dataset_word(dataset)}-{what}"


def sweep_name(dataset: str, beta: float = 1.0) -> str:
    """The run along beta; at beta = 1 it is the base."""
    return name_run(dataset, f"beta-{beta:g}")


def varied_names(size: Size, dataset: str) -> list[str]:
    """The base, and the runs with other numbers of latents."""
    return [sweep_name(dataset), *(name_run(dataset, f"latents-{L}") for L in size.latent_dims)]


def remedy_names(dataset: str) -> dict[str, str]:
    """The runs with each remedy against collapse, by the remedy; the first has none."""
    runs = {remedy: name_run(dataset, f"remedy-{remedy}") for remedy in REMEDIES}
    return {"none": runs.pop("none"), "warm-up": sweep_name(dataset), **runs}


@dataclass(frozen=True)
class Planned:
    """One run of the study.

    Args:
        name: Its folder.
        options: Its options.
        num_codes: Training images, at most, to whose codes densities are fitted; 0 for no density.
    """

    name: str
    options: Options
    num_codes: int = 0

    @property
    def dataset(self) -> str:
        """The word of its data set."""
        return dataset_word(self.options.dataset)


def base(size: Size, dataset: str, **changed: object) -> Options:
    """The plain VAE from which every run differs in one thing: gated, 40 latents, dynamic binarization."""
    common = PLAIN | {
        "dataset": dataset,
        "epochs": size.epochs,
        "warmup_epochs": default_warmup(size.epochs),
        "images": size.images,
        "evaluation_particles": size.num_particles,
        "keep": "last",  # so that a beta is seen as it ends, and not where the ELBO was best
    }
    return Options(**(common | changed))


def plan_labels(size: Size, dataset: str, num_labels: int) -> list[Planned]:
    """The semi-supervised runs of a data set whose classes have that many labels; none without classes."""
    return [
        Planned(name_run(dataset, f"labels-{number}"), base(size, dataset, labels=number, objective="semi-supervised"))
        for number in size.labels
        if number <= num_labels
    ]


def plan(
    size: Size, datasets: Sequence[str], *, num_pixels: Mapping[str, int] | None = None, num_labels: int = 0
) -> list[Planned]:
    """Every run of the study, in the order of training; the first data set has all parts.

    Args:
        size: How much.
        datasets: The first has every part; others have the betas and the autoencoder.
        num_pixels: D of each, the beta that equals a mean over pixels; by default 784.
        num_labels: The most labels that can be kept of the first, equally many of each class.
    """
    runs = []
    for dataset in datasets:
        for beta in size.betas_of(dataset_word(dataset)):
            num_codes = size.codes if beta == 1 else 0
            runs.append(Planned(sweep_name(dataset, beta), base(size, dataset, beta=beta), num_codes))
        D = float((num_pixels or {}).get(dataset, 784))
        runs.append(Planned(name_run(dataset, "beta-of-mean"), base(size, dataset, beta=D)))
        runs.append(Planned(name_run(dataset, "autoencoder"), base(size, dataset, **AUTOENCODER), size.codes))
    first = datasets[0]
    changed: dict[str, dict[str, Any]] = {f"latents-{L}": {"latent_dim": L} for L in size.latent_dims}
    changed["autoencoder-2"] = AUTOENCODER | {"latent_dim": 2}
    changed |= {f"remedy-{word}": options for word, options in REMEDIES.items()}
    runs += [Planned(name_run(first, what), base(size, first, **options)) for what, options in changed.items()]
    return runs + plan_labels(size, first, num_labels)
