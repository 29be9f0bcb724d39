"""Figures: arrays in, a matplotlib Figure out. Runs no model, saves nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Images = NDArray[Any]


def _tiles(images: Images, columns: int) -> Images:
    """(N, C, H, W) in [0, 1] -> one picture (rows (H + 1), columns (W + 1), C), with thin gray lines between images."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 0.5)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return sheet


def image_rows(rows: Mapping[str, Images], *, title: str) -> Figure:
    """One labelled row of images for each entry, aligned by column.

    Args:
        rows: a label and images (N, C, H, W) with 1 or 3 channels, values in [0, 1]; the same N in each row.
    """
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(max(4.0, 0.7 * count + 1.2), 0.75 * len(rows) + 0.6), layout="constrained")
    for i, (label, images) in enumerate(rows.items()):
        axes = figure.add_subplot(len(rows), 1, i + 1)
        _show(axes, _tiles(images, count))
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def image_grids(grids: Mapping[str, Images], *, columns: int, title: str) -> Figure:
    """Square-ish grids of images side by side, a heading over each. Values and shapes as ``image_rows``."""
    figure = Figure(figsize=(4.2 * len(grids), 4.8), layout="constrained")
    for i, (label, images) in enumerate(grids.items()):
        axes = figure.add_subplot(1, len(grids), i + 1)
        _show(axes, _tiles(images, columns))
        axes.set_title(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _show(axes: Any, picture: Images) -> None:
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def training_curves(metrics: Sequence[Mapping[str, float]], *, title: str) -> Figure:
    """Over epochs: the training objective beside the validation ELBO, and the ELBO's two terms.

    The objective is minus the training loss, at the beta of the step: an ELBO only once beta is 1, and labelled so.

    Args:
        metrics: the records of metrics.jsonl.
    """
    epochs = [record["epoch"] for record in metrics]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "." if len(metrics) < 5 else ""
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    annealed = any(record["beta"] != 1 for record in metrics)
    label = "training objective" + (" (beta = 1 is the ELBO)" if annealed else " (the ELBO)")
    left.plot(
        epochs,
        [-record["train_loss_nats_per_image"] for record in metrics],
        label=label,
        color="tab:gray",
        marker=marker,
    )
    left.plot(
        epochs,
        [r["validation_elbo_nats_per_image"] for r in metrics],
        label="validation ELBO",
        color="tab:blue",
        marker=marker,
    )
    best = max(metrics, key=lambda record: record["validation_elbo_nats_per_image"])
    left.plot(best["epoch"], best["validation_elbo_nats_per_image"], "o", color="tab:blue", label="best, kept")
    if len(metrics) > 5:  # the first epochs would squeeze everything that matters into a line
        shown = metrics[len(metrics) // 5 :]
        floor = min(min(r["validation_elbo_nats_per_image"], -r["train_loss_nats_per_image"]) for r in shown)
        left.set_ylim(bottom=floor - 5)
    left.set(xlabel="epoch", ylabel="nats an image")
    left.legend(fontsize=8)
    right.plot(
        epochs,
        [-r["validation_reconstruction_nats_per_image"] for r in metrics],
        label="-E_q[log p(x | z)]",
        marker=marker,
    )
    right.plot(
        epochs, [r["validation_kl_nats_per_image"] for r in metrics], label="KL(q(z | x) || p(z))", marker=marker
    )
    right.set(xlabel="epoch", ylabel="nats an image (validation)", ylim=(0, None))
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
