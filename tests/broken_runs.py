"""Small runs, some healthy and some broken on purpose, each trained in seconds the first time it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from fitting import fit
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger

from ppl_vae import data, objectives
from ppl_vae.commands.train import train_run
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.load import load, save
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import initialize_output_bias, load_splits

DIGITS = Options(
    **PLAIN,
    network="mlp",
    hidden=(128,),
    latent_dim=8,
    epochs=6,
    images=100,
    evaluation_particles=20,
    compile="off",
    checkpoint_seconds=1e6,
)
FACTORS = replace(DIGITS, likelihood="normal", hidden=(64,), latent_dim=4, epochs=15)


def save_digits(path: Path) -> Path:
    """4,000 / 1,000 / 500 MNIST images as 8-bit levels."""
    whole = data.load("mnist")
    arrays = {
        "train": whole.train[:4000, 0].numpy(),
        "valid": whole.validation[:1000, 0].numpy(),
        "test": whole.test[:500, 0].numpy(),
    }
    np.savez(path, **arrays)
    return path


def save_factors(path: Path) -> Path:
    """x = W z + 0.5 e, four factors in 8 x 8 real pixels: 4,000 / 1,000 / 500."""
    generator = np.random.default_rng(0)
    W = generator.normal(size=(4, 64)).astype(np.float32) / 2
    arrays = {}
    for split, count in (("train", 4000), ("valid", 1000), ("test", 500)):
        z, e = generator.normal(size=(count, 4)), generator.normal(size=(count, 64))
        arrays[split] = (z @ W + 0.5 * e).astype(np.float32).reshape(count, 8, 8)
    np.savez(path, **arrays)
    return path


def _trained(options: Options) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        train_run(options, str(folder), say=lambda line: None, draw=False)

    return make


class MeanOverPixels(ScaleMessenger):
    """log p(x | z) / D: what a loss that is averaged over pixels does to a model."""

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            super()._process_message(msg)


def average_over_pixels(model: Any, guide: Any, x: torch.Tensor) -> torch.Tensor:
    """The loss with the mean over the pixels in the place of their sum."""
    averaged = MeanOverPixels(1 / math.prod(x.shape[1:]))(model)
    return objectives.loss_of_batch(objectives.elbo(), averaged, guide, x)


def _mean_over_pixels(options: Options) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        splits = load_splits(options)
        stored, transform = data.training_images(splits, "dynamic")
        pyro.set_rng_seed(0)
        vae = build_vae(options, splits.event_shape)
        initialize_output_bias(vae, data.expected_images(splits, "dynamic"))
        fit(vae, stored, epochs=options.epochs, objective=average_over_pixels, transform=transform, learning_rate=3e-3)
        save(vae, folder, options)

    return make


def _beside(healthy: Path, options: Options, shift: float) -> Callable[[Path], None]:
    """A trained run whose guide puts every latent off by so many of the prior's scales."""

    def make(folder: Path) -> None:
        vae: Any = load(healthy)
        with torch.no_grad():
            vae.posterior.net.output.bias[: options.latent_dim] += shift
        save(vae, folder, options)

    return make


class Runs:
    """Run folders by name."""

    def __init__(self, place: Path) -> None:
        self.place = place
        digits = replace(DIGITS, dataset=str(save_digits(place / "digits.npz")))
        factors = replace(FACTORS, dataset=str(save_factors(place / "factors.npz")))
        self.options = {
            "digits": digits,
            "factors": factors,
            "beta 10": replace(digits, beta=10.0),
            "beta 0.1": replace(digits, beta=0.1),
            "beta 0.001": replace(digits, beta=0.001),
            "beta 1000 at once": replace(digits, beta=1000.0, warmup_epochs=0, epochs=2),
            "mean over pixels": digits,
            "far too many latents": replace(factors, latent_dim=32, epochs=25),
            "scale fixed too small": replace(factors, likelihood="normal-fixed", likelihood_scale=0.2),
            "scale fixed too large": replace(factors, likelihood="normal-fixed", likelihood_scale=1.5),
            "guide beside the posterior": digits,
            "autoencoder": replace(digits, posterior="delta", beta=0.0),
        }

    def folder(self, name: str) -> Path:
        """The run's folder, trained when it is first asked for."""
        path, options = self.place / name.replace(" ", "-"), self.options[name]
        if not path.exists():
            special = {"mean over pixels": _mean_over_pixels(options)}
            if name == "guide beside the posterior":
                special[name] = _beside(self.folder("digits"), options, 1.0)
            special.get(name, _trained(options))(path)
        return path
