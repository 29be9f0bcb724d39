"""Figures of results, as matplotlib's Figures. They save nothing."""

from __future__ import annotations

from matplotlib.figure import Figure


def make_figure(title: str, *, width: float = 9.0, height: float = 3.4) -> Figure:
    """An empty figure of that size in inches, and more for the lines of its title."""
    figure = Figure(figsize=(width, height + 0.25 * (1 + title.count("\n"))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure
