"""Training over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppl_vae.reports.figures import make_figure

Records = Sequence[Mapping[str, float]]


def training_curves(metrics: Records, *, title: str, autoencoder: bool = False) -> Figure:
    """Over epochs: the training objective with the validation bound, and the ELBO's two terms.

    The objective is minus the training loss, at the beta of the step. Without validation images it stands alone. An
    autoencoder has one panel, of reconstructions.

    Args:
        metrics: The records of metrics.jsonl, at least one.
        title: Over the figure.
        autoencoder: Whether they are an autoencoder's.
    """
    several = {record.get("validation_particles", 1) for record in metrics} - {1}
    key, bound = ("bound", f"L_{max(several)}") if several else ("elbo", "ELBO")
    if autoencoder:
        key, bound = "reconstruction", "log p(x | z(x))"
    validated = any(f"validation_{key}_nats_per_image" in record for record in metrics)
    has_terms = validated and not autoencoder
    curves = {"training objective": [-record["train_loss_nats_per_image"] for record in metrics]}
    if validated:
        curves[f"validation {bound}"] = _read(metrics, key)
    figure = make_figure(title, width=9.0 if has_terms else 5.0)
    panels = figure.subplots(1, 1 + has_terms, squeeze=False)[0]
    epochs, marker = [record["epoch"] for record in metrics], "." if len(metrics) < 5 else ""
    for (label, curve), color in zip(curves.items(), ("tab:gray", "tab:blue"), strict=False):
        panels[0].plot(epochs, curve, label=label, color=color, marker=marker)
    if validated:
        best, epoch = max(zip(_read(metrics, key), epochs, strict=True), key=lambda pair: pair[0])
        panels[0].plot(epoch, best, "o", color="tab:blue", label="best")
    if len(metrics) > 5:  # the first epochs would squeeze everything that matters into a line
        shown = [value for curve in curves.values() for value in curve[len(metrics) // 5 :]]
        panels[0].set_ylim(bottom=min(shown) - 0.3 * (max(shown) - min(shown)))
    panels[0].set_ylabel("nats an image")
    if has_terms:
        distortion = [-value for value in _read(metrics, "reconstruction")]
        panels[1].plot(epochs, distortion, label="-E_q[log p(x | z)]", marker=marker)
        panels[1].plot(epochs, _read(metrics, "kl"), label="KL(q(z | x) || p(z))", marker=marker)
        panels[1].set_ylabel("nats an image (validation)")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    return figure


def _read(metrics: Records, name: str) -> list[float]:
    return [record[f"validation_{name}_nats_per_image"] for record in metrics]
