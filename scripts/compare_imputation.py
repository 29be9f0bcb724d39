"""Compare imputation by a VAE that trains on missing values with scikit-learn's, and training on half of the pixels.

tables: columns are standardized, half of the entries are hidden at random, and every method sees the rest of the same
rows, as in Mattei and Frellsen (2019, arXiv 1812.02633). The error is the mean square over hidden entries, in
units of a column's variance: the column's mean has 1. mnist: a VAE of binarized digits trains on all pixels, and one on
half of them; both are scored on the same complete test images, and on the same images with half of the pixels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_vae.commands.cli import Command, parse
from ppl_vae.runs.files import check_output
from ppl_vae.runs.options import NOT_EMPTY, POSITIVE_INTEGER, CheckedOptions, option
from ppl_vae.runtime.process import run_script

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ppl_vae import VAE

TABLES, MNIST = ("breast_cancer", "iris"), "mnist"


@dataclass(frozen=True)
class CompareImputation(CheckedOptions):
    """Compare imputation of missing values with scikit-learn's imputers, and training on half of MNIST's pixels."""

    parts: tuple[str, ...] = option((*TABLES, MNIST), "what is compared", (*TABLES, MNIST))
    seeds: int = option(5, "draws of the hidden entries, each with weights of its own", POSITIVE_INTEGER)
    steps: int = option(1500, "training steps on a table", POSITIVE_INTEGER)
    images: int = option(10_000, "training images of MNIST", POSITIVE_INTEGER)
    epochs: int = option(15, "passes through them", POSITIVE_INTEGER)
    output: str | None = option(None, "JSON file of the results (default: printed only)", NOT_EMPTY)


def build(
    event_shape: tuple[int, ...], latent_dim: int, hidden: tuple[int, ...], *, binary: bool, with_mask: bool
) -> VAE:
    """An ``IncompleteVAE`` of dense layers: Student's t for real values, as MIWAE has it, or Bernoulli."""
    from ppl_vae import Conditional
    from ppl_vae.parts import likelihoods, networks, posteriors, priors
    from ppl_vae.parts.incomplete import IncompleteVAE, ZeroFilled

    family = (likelihoods.Bernoulli if binary else likelihoods.StudentT)(event_shape)
    first, *others = event_shape
    encoder: nn.Module = networks.MLP(((1 + with_mask) * first, *others), 2 * latent_dim, hidden=hidden)
    encoder = ZeroFilled(encoder, with_mask=with_mask, event_dims=len(event_shape))
    return IncompleteVAE(
        priors.StandardNormal(latent_dim),
        Conditional(networks.MLP(latent_dim, family.num_features, hidden=hidden), family),
        Conditional(encoder, posteriors.DiagonalNormal(latent_dim)),
    )


def hide(x: np.ndarray, seed: int) -> np.ndarray:
    """x with half of its entries NaN, chosen at random."""
    import numpy as np

    return np.where(np.random.default_rng(seed).random(x.shape) < 0.5, np.nan, x)


# --- Tables ---


def impute_by_vae(holes: np.ndarray, seed: int, steps: int, *, with_mask: bool) -> np.ndarray:
    """E[x_missing | x_observed] of an importance-weighted VAE (10 particles) that was trained on the same rows."""
    import pyro
    import torch

    from ppl_vae import fit, objectives
    from ppl_vae.evidence.missing import Observed, impute
    from ppl_vae.training import Optimizer, Schedule

    x = torch.from_numpy(holes).float()
    pyro.set_rng_seed(seed)
    vae = build((x.shape[1],), 10, (128, 128), binary=False, with_mask=with_mask)
    fit(
        vae,
        x,
        epochs=max(1, steps // -(-len(x) // 128)),
        objective=objectives.IWAE(10),
        optimizer=Optimizer(learning_rate=3e-3),
        schedule=Schedule(batch_size=128, seed=seed),
    )
    return impute(Observed(vae), x, num_particles=1000, num_draws=1).mean.double().numpy()


def compare_table(name: str, asked: CompareImputation, say: Callable[[str], None]) -> dict[str, Any]:
    """The mean squared error of each method over hidden entries, with its standard error over the seeds."""
    import numpy as np
    from sklearn import datasets
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401, without which the next import fails
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    x = getattr(datasets, f"load_{name}")().data
    x = (x - x.mean(0)) / x.std(0)
    methods: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
        "VAE": lambda holes, seed: impute_by_vae(holes, seed, asked.steps, with_mask=False),
        "VAE, encoder sees the mask": lambda holes, seed: impute_by_vae(holes, seed, asked.steps, with_mask=True),
        "mean": lambda holes, seed: SimpleImputer().fit_transform(holes),
        "IterativeImputer": lambda holes, seed: IterativeImputer(max_iter=50, random_state=seed).fit_transform(holes),
        "KNNImputer, 5 neighbors": lambda holes, seed: KNNImputer(n_neighbors=5).fit_transform(holes),
        "KNNImputer, 10 neighbors": lambda holes, seed: KNNImputer(n_neighbors=10).fit_transform(holes),
    }
    rows = []
    for method, impute in methods.items():
        errors, started = [], time.monotonic()
        for seed in range(asked.seeds):
            holes = hide(x, seed)
            missing = np.isnan(holes)
            errors.append(float(np.square(impute(holes, seed) - x)[missing].mean()))
        stderr = float(np.std(errors, ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else None
        seconds = (time.monotonic() - started) / asked.seeds
        mean = float(np.mean(errors))
        rows.append({"method": method, "mean": mean, "stderr": stderr, "errors": errors, "seconds": seconds})
        say(f"{name}, {method}: {mean:.3f} ± {stderr or 0:.3f}, {seconds:.1f} s per seed")
    return {"rows": rows, "num_rows": len(x), "num_columns": x.shape[1]}


# --- MNIST ---


def compare_mnist(asked: CompareImputation, say: Callable[[str], None]) -> dict[str, Any]:
    """L_100 of 1,000 test images under a VAE of all pixels and one of half of them, and their paired difference."""
    import pyro
    import torch

    from ppl_vae import data, fit
    from ppl_vae.evidence.estimate import Estimate
    from ppl_vae.evidence.evaluation import evaluate
    from ppl_vae.training import Schedule

    splits = data.load("mnist")
    train = data.evaluation_images(splits, "train", "fixed")[: asked.images]
    test = data.evaluation_images(splits, "test", "fixed")[:1000]
    half = torch.from_numpy(hide(train.numpy(), 0)).float()
    half_test = torch.from_numpy(hide(test.numpy(), 1)).float()
    found: dict[str, dict[str, Tensor]] = {}
    rows = []
    for name, images in (("all pixels", train), ("half of the pixels", half)):
        pyro.set_rng_seed(0)
        vae = build((1, 28, 28), 40, (300,), binary=True, with_mask=False)
        started = time.monotonic()
        fit(vae, images, epochs=asked.epochs, schedule=Schedule(warmup_epochs=2))
        seconds = time.monotonic() - started
        found[name] = {
            kind: evaluate(vae, x, num_particles=100, seed=0).log_evidence
            for kind, x in (("complete", test), ("half", half_test))
        }
        row = {kind: vars(Estimate.mean_of(log_p, 100)) for kind, log_p in found[name].items()}
        rows.append({"trained_on": name, "seconds": seconds, **row})
        say(f"mnist, {name}: {row['complete']['mean']:.2f} nats, of half the pixels {row['half']['mean']:.2f}")
    first, second = found.values()
    difference = {kind: vars(Estimate.mean_of(second[kind] - first[kind], 100)) for kind in first}
    return {"rows": rows, "difference": difference, "images": asked.images, "epochs": asked.epochs}


def main() -> None:
    asked = parse(Command("", CompareImputation))
    if asked.output is not None:
        check_output(Path(asked.output))
    from ppl_vae import runs

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    made_with = {key: value for key, value in runs.describe_environment("cpu").items() if key != "argv"}
    result: dict[str, Any] = {"seeds": asked.seeds, "steps": asked.steps, "environment": made_with, "tables": {}}
    for part in asked.parts:
        if part == MNIST:
            result[MNIST] = compare_mnist(asked, say)
        else:
            result["tables"][part] = compare_table(part, asked, say)
        if asked.output is not None:
            runs.write_json(Path(asked.output), result)


if __name__ == "__main__":
    run_script(main)
