"""The figures of a run, drawn from its files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae import build, data, plots, runs
from ppl_vae.evidence import seeded
from ppl_vae.experiment.opening import Run, Say, open_run
from ppl_vae.vae import VAE

_FIGURE_SEED = 0
_NUM_SHOWN = 10
_CURVES, _RECONSTRUCTIONS, _SAMPLES, _INTERPOLATIONS = (
    "training_curves.png",
    "reconstructions.png",
    "prior_samples.png",
    "interpolations.png",
)


def is_drawn(run: Run) -> bool:
    """Every figure is there, and is newer than what it was drawn from."""
    sources = [run.folder / runs.MODEL, run.folder / runs.METRICS]
    newest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    drawn = [run.folder / runs.FIGURES / name for name in figure_names(run.splits)]
    return all(path.exists() and path.stat().st_mtime_ns >= newest for path in drawn)


def draw_run(run_dir: str, *, say: Say) -> None:
    """Draws a run's figures again, from its files."""
    write_figures(open_run(run_dir), say=say)


def figure_names(splits: data.Splits) -> list[str]:
    """The figures that a run on this data has: tables are no images."""
    return [_CURVES] if len(splits.event_shape) == 1 else [_CURVES, _RECONSTRUCTIONS, _SAMPLES, _INTERPOLATIONS]


def write_figures(run: Run, *, say: Say) -> None:
    """Training curves, reconstructions, prior samples and interpolations, into the run's figures/."""
    folder, _, splits = run
    vae = build.load(folder)
    metrics = runs.read_metrics(folder)
    if not metrics:
        raise ValueError(f"{folder / runs.METRICS}: expected the record of at least one epoch, got none")
    try:
        figures = {_CURVES: plots.training_curves(metrics, title=f"{splits.name}: training")}
    except KeyError as error:
        raise ValueError(f"{folder / runs.METRICS}: damaged: a record is missing {error}") from None
    if len(splits.event_shape) == 1:
        say("The data is a table, (N, D): figures of images are skipped.")
    else:
        x = data.evaluation_images(splits, "test", run.binarization)
        with seeded(_FIGURE_SEED, x.device), torch.no_grad():
            figures |= _image_figures(vae, x[data.subset(len(x), 2 * _NUM_SHOWN)])
    for name, figure in figures.items():
        path = folder / runs.FIGURES / name
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
        runs.write_bytes(path, png.getvalue())
    say(f"Figures in {folder / runs.FIGURES}: {', '.join(figures)}")


def _image_figures(vae: VAE, x: Tensor) -> dict[str, Any]:
    """x: 2 N test images (2 N, C, H, W), as the model sees them."""
    x = x[torch.randperm(len(x))]
    half = x[: max(1, len(x) // 2)]
    decoded = vae.likelihood(vae.posterior(half).rsample())
    rows = {"test image x": half, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    prior = vae.likelihood(vae.prior().expand((64,)).sample())
    start, end = (vae.posterior(ends).mean for ends in (half[: len(half) // 2 or 1], half[-(len(half) // 2 or 1) :]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1, 1)
    path = vae.likelihood((1 - weight) * start + weight * end).mean
    return {
        _RECONSTRUCTIONS: plots.image_rows(_arrays(rows), title="Reconstructions, z ~ q(z | x)"),
        _SAMPLES: plots.image_grids(
            _arrays({"means E[x | z]": prior.mean, "images x ~ p(x | z)": prior.sample()}),
            columns=8,
            title="Samples from the prior, z ~ p(z)",
        ),
        _INTERPOLATIONS: plots.image_rows(
            _arrays({f"pair {i + 1}": path[:, i] for i in range(path.shape[1])}),
            title="E[x | z] on the line between two posterior means",
        ),
    }


def _arrays(images: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {label: x.float().clamp(0, 1).numpy() for label, x in images.items()}
