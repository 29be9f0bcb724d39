"""What the study trains: each run's name and options, and the one thing that it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppl_vae.parts.registry import SCALE_MAPS
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.training.settings import default_warmup


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Args:
        epochs: The epochs of most runs.
        collapse_epochs: The epochs of residual networks, which collapse without a warm-up.
        stress_epochs: The epochs of runs with another scale map at ten times the learning rate.
        betas: The betas of each data set; the last list serves data sets that have none of their own.
        seeds: Further seeds, at the betas between which the likelihood peaks.
        close_betas: Those betas.
        latent_dims: Numbers of latents other than the base's.
        networks: Networks other than the base's.
        images: Test images that are evaluated and measured.
        num_particles: S of log p(x).
        codes: Training images to whose codes densities are fitted, at most.
    """

    epochs: int
    collapse_epochs: int
    stress_epochs: int
    betas: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    close_betas: tuple[float, ...]
    latent_dims: tuple[int, ...]
    networks: tuple[str, ...]
    images: int
    num_particles: int
    codes: int

    def betas_of(self, dataset: str) -> tuple[float, ...]:
        """The betas along which a data set is studied."""
        return self.betas.get(dataset, [*self.betas.values()][-1])


DEFAULT = Size(
    epochs=10,
    collapse_epochs=4,
    stress_epochs=2,
    betas={
        "mnist": (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 20.0, 100.0),
        "fashion-mnist": (0.001, 0.01, 0.1, 0.3, 0.7, 1.0, 2.0, 10.0, 100.0),
    },
    seeds=(1, 2),
    close_betas=(0.5, 0.7, 1.0),
    latent_dims=(2, 8, 20, 128),
    networks=("mlp", "conv", "residual"),
    images=2000,
    num_particles=500,
    codes=50_000,
)
QUICK = Size(
    epochs=2,
    collapse_epochs=2,  # one epoch has no warm-up
    stress_epochs=1,
    betas={
        "mnist": (0.001, 0.01, 0.1, 0.3, 1.0, 2.0, 5.0, 20.0, 100.0),
        "fashion-mnist": (0.01, 0.1, 1.0, 10.0, 100.0),
    },
    seeds=(),
    close_betas=(),
    latent_dims=(2, 10),
    networks=("mlp", "conv"),
    images=500,
    num_particles=200,
    codes=5000,
)


def dataset_word(dataset: str) -> str:
    """A data set in the names of runs: the name of a known one, the file's stem of a path."""
    return Path(dataset).stem


def name_run(dataset: str, what: str) -> str:
    """The run that differs from the base by what the words say, such as "autoencoder" or "latents-8"."""
    return f"{dataset_word(dataset)}-{what}"


def sweep_name(dataset: str, beta: float = 1.0, seed: int = 0) -> str:
    """The run along beta; at beta = 1 it is the base."""
    return name_run(dataset, f"beta-{beta:g}" + (f"-seed-{seed}" if seed else ""))


def varied_names(size: Size, dataset: str) -> list[str]:
    """The base, and the runs with other numbers of latents or another network."""
    varied = [f"latents-{L}" for L in size.latent_dims] + [f"network-{word}" for word in size.networks]
    return [sweep_name(dataset), *(name_run(dataset, each) for each in varied)]


# Remedies against collapse, and the options that they change. The residual network collapses without one; the gated
# network loses some latents.
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {"warmup_epochs": 0},
    "warm-up": {},
    "free-bits": {"warmup_epochs": 0, "objective": "free-bits", "free_bits": 0.25},
    "both": {"objective": "free-bits", "free_bits": 0.25},
}
REMEDIED_NETWORKS = ("gated", "residual")


def remedy_name(dataset: str, network: str, remedy: str) -> str:
    """The network, trained with that remedy. The gated network with a warm-up is the base itself."""
    is_base = (network, remedy) == ("gated", "warm-up")
    return sweep_name(dataset) if is_base else name_run(dataset, f"{network}-remedy-{remedy}")


@dataclass(frozen=True)
class Planned:
    """One run of the study.

    Args:
        name: Its folder.
        options: Its options.
        averaged: Whether its log-likelihood is averaged over pixels in training.
        stressed: Whether it is trained only to see if it ends with finite numbers.
        num_codes: Training images, at most, to whose codes densities are fitted; 0 for no density.
    """

    name: str
    options: Options
    averaged: bool = False
    stressed: bool = False
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


def plan(size: Size, datasets: Sequence[str], *, num_pixels: Mapping[str, int] | None = None) -> list[Planned]:
    """Every run of the study, in the order of training; the first data set has all parts.

    Args:
        size: How much.
        datasets: The first has every part; others have the betas, the mean over pixels and the autoencoder.
        num_pixels: D of each, the beta that equals a mean over pixels; by default 784.
    """
    runs = []
    for dataset in datasets:
        for beta in size.betas_of(dataset_word(dataset)):
            num_codes = size.codes if beta == 1 else 0
            runs.append(Planned(sweep_name(dataset, beta), base(size, dataset, beta=beta), num_codes=num_codes))
        D, autoencoder = float((num_pixels or {}).get(dataset, 784)), base(size, dataset, posterior="delta", beta=0.0)
        runs += [
            Planned(name_run(dataset, "mean-over-pixels"), base(size, dataset), averaged=True),
            Planned(name_run(dataset, "beta-of-mean"), base(size, dataset, beta=D)),
            Planned(name_run(dataset, "autoencoder"), autoencoder, num_codes=size.codes),
        ]
    return runs + _plan_first(size, datasets[0])


def _plan_first(size: Size, dataset: str) -> list[Planned]:
    """The parts for which one data set suffices."""
    planned = {
        sweep_name(dataset, beta, seed): base(size, dataset, beta=beta, seed=seed)
        for seed in size.seeds
        for beta in size.close_betas
    }
    planned |= {name_run(dataset, f"latents-{L}"): base(size, dataset, latent_dim=L) for L in size.latent_dims}
    planned[name_run(dataset, "autoencoder-2")] = base(size, dataset, latent_dim=2, posterior="delta", beta=0.0)
    planned |= {name_run(dataset, f"network-{word}"): base(size, dataset, network=word) for word in size.networks}
    for network in REMEDIED_NETWORKS:
        epochs = size.collapse_epochs if network == "residual" else size.epochs
        options = replace(base(size, dataset, network=network), epochs=epochs, warmup_epochs=default_warmup(epochs))
        planned |= {remedy_name(dataset, network, word): replace(options, **REMEDIES[word]) for word in REMEDIES}
    del planned[sweep_name(dataset)]  # the gated network with a warm-up, which is the base itself
    stress = {"epochs": size.stress_epochs, "warmup_epochs": 0, "learning_rate": 0.03, "clip_norm": 1e9}
    return [Planned(name, options) for name, options in planned.items()] + [
        Planned(name_run(dataset, f"stress-{word}"), base(size, dataset, scale_map=word, **stress), stressed=True)
        for word in SCALE_MAPS
    ]
