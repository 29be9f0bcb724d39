"""Training over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, float]]


def training_curves(metrics: Records, *, title: str, autoencoder: bool = False) -> Figure:
    """Over epochs: the training objective beside the validation ELBO, and the ELBO's two terms.

    The objective is minus the training loss, at the beta of the step: an ELBO only once beta is 1, and labelled so.
    Without validation images the objective stands alone. An autoencoder has one panel, of reconstructions.

    Args:
        metrics: the records of metrics.jsonl, at least one.
        title: over the figure.
        autoencoder: whether they are an autoencoder's.
    """
    if autoencoder:
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        panels = [figure.subplots()]
        _reconstructions(panels[0], metrics, marker="." if len(metrics) < 5 else "")
        return _finished(figure, panels, metrics, title)
    validated = any("validation_elbo_nats_per_image" in record for record in metrics)
    figure = Figure(figsize=(9 if validated else 5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    marker = "." if len(metrics) < 5 else ""
    _bounds(panels[0], metrics, validated=validated, marker=marker)
    if validated:
        _terms(panels[1], metrics, marker=marker)
    return _finished(figure, panels, metrics, title)


def _finished(figure: Figure, panels: Sequence[Axes], metrics: Records, title: str) -> Figure:
    """Adds axes of whole epochs, legends and the title."""
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(metrics) == 1:  # else the axis is a twentieth of an epoch wide
            axes.set_xlim(metrics[0]["epoch"] - 0.5, metrics[0]["epoch"] + 0.5)
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _bounds(axes: Axes, metrics: Records, *, validated: bool, marker: str) -> None:
    epochs = [record["epoch"] for record in metrics]
    annealed = any(record["beta"] != 1 for record in metrics)
    several = {record.get("validation_particles", 1) for record in metrics} - {1}
    bound = f"L_{max(several)}" if several else "the ELBO"
    label = "training objective" + (f" (beta = 1 is {bound})" if annealed else f" ({bound})")
    curves = [[-record["train_loss_nats_per_image"] for record in metrics]]
    axes.plot(epochs, curves[0], label=label, color="tab:gray", marker=marker)
    if validated:
        key = "bound" if several else "elbo"
        curves.append([record[f"validation_{key}_nats_per_image"] for record in metrics])
        label = f"validation {bound}" if several else "validation ELBO"
        _validation(axes, epochs, curves[1], label=label, marker=marker)
    _limited(axes, metrics, curves)


def _reconstructions(axes: Axes, metrics: Records, *, marker: str) -> None:
    """Draws log p(x | z(x)) of the training images, and of the validation images if there are any."""
    epochs, key = [record["epoch"] for record in metrics], "validation_reconstruction_nats_per_image"
    curves = [[-record["train_loss_nats_per_image"] for record in metrics]]
    axes.plot(epochs, curves[0], label="training: log p(x | z(x))", color="tab:gray", marker=marker)
    if any(key in record for record in metrics):
        curves.append([record[key] for record in metrics])
        _validation(axes, epochs, curves[1], label="validation: log p(x | z(x))", marker=marker)
    _limited(axes, metrics, curves)


def _validation(axes: Axes, epochs: list[float], curve: list[float], *, label: str, marker: str) -> None:
    """Draws the curve, and its highest point."""
    axes.plot(epochs, curve, label=label, color="tab:blue", marker=marker)
    best, epoch = max(zip(curve, epochs, strict=True), key=lambda pair: pair[0])
    axes.plot(epoch, best, "o", color="tab:blue", label="best, kept")


def _limited(axes: Axes, metrics: Records, curves: list[list[float]]) -> None:
    if len(metrics) > 5:  # the first epochs would squeeze everything that matters into a line
        shown = [value for curve in curves for value in curve[len(metrics) // 5 :]]
        axes.set_ylim(bottom=min(shown) - 0.3 * (max(shown) - min(shown)))
    axes.set_ylabel("nats an image")


def _terms(axes: Axes, metrics: Records, *, marker: str) -> None:
    epochs = [record["epoch"] for record in metrics]
    reconstruction = [-record["validation_reconstruction_nats_per_image"] for record in metrics]
    axes.plot(epochs, reconstruction, label="-E_q[log p(x | z)]", marker=marker)
    kl = [record["validation_kl_nats_per_image"] for record in metrics]
    axes.plot(epochs, kl, label="KL(q(z | x) || p(z))", marker=marker)
    axes.set_ylabel("nats an image (validation)")
    if min(reconstruction) >= 0:  # a density can be above 1
        axes.set_ylim(bottom=0)
