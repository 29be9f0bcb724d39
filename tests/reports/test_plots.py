"""Figures hold the data they were given, in its place: read back from matplotlib's axes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from ppl_vae.diagnostics.likelihood import NoiseSpectrum
from ppl_vae.evidence.moments import PosteriorMoments
from ppl_vae.reports.figures import charts, images
from ppl_vae.reports.figures.measurements import draw_noise


def gray(*levels, shape=(1, 4, 4)):
    """Images of one gray level each."""
    return np.stack([np.full(shape, level) for level in levels])


def tile(axes, row, column):
    """The pixel in the middle of a tile."""
    picture = axes.get_images()[0]
    left, right, bottom, top = picture.get_extent()
    values = picture.get_array()
    height, width = values.shape[:2]
    return values[int((row + 0.5) / (bottom - top) * height), int((column + 0.5) / (right - left) * width)]


def words(labels):
    return [label.get_text() for label in labels]


# --- Rows and grids ---


def test_a_row_shows_its_images_from_left_to_right():
    axes = images.image_rows({"a": gray(0.1, 0.2, 0.3), "b": gray(0.4, 0.5, 0.6)}, title="t").axes[0]
    shown = [[tile(axes, row, column) for column in range(3)] for row in range(2)]
    np.testing.assert_allclose(shown, [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])


def test_an_image_is_not_turned_or_mirrored():
    image = np.arange(12.0).reshape(1, 1, 3, 4) / 12
    picture = images.image_rows({"a": image}, title="t").axes[0].get_images()[0].get_array()
    places = [
        [int((i + 0.5) / count * (length - 4)) + 2 for i in range(count)]  # a line and a margin of 1 pixel on each side
        for count, length in zip((3, 4), picture.shape, strict=True)
    ]
    np.testing.assert_allclose(picture[np.ix_(*places)], image[0, 0])


def test_a_grid_is_read_by_rows_and_white_where_images_end():
    axes = images.image_grids({"a": gray(0.1, 0.2, 0.3, 0.4, 0.5)}, columns=3, title="t").axes[0]
    shown = [[tile(axes, row, column) for column in range(3)] for row in range(2)]
    np.testing.assert_allclose(shown, [[0.1, 0.2, 0.3], [0.4, 0.5, 1.0]])


# --- Latents ---


def normal(num_latents):
    zeros = torch.zeros(num_latents)
    return torch.distributions.Independent(torch.distributions.Normal(zeros, zeros + 1), 1)


def test_one_latent_has_a_histogram_that_counts_every_image():
    codes = PosteriorMoments(torch.linspace(-5, 2, 50)[:, None], torch.ones(50, 1))
    figure = charts.latents_figure(codes, normal(1), kind="x", classes=torch.arange(50) % 2)
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_height() for bar in bars) == 50


# --- Likelihoods ---


def test_a_histogram_counts_every_image_and_marks_the_mean():
    values = torch.tensor([-90.0, -80.0, -100.0, -70.0])
    axes = charts.likelihood_histogram(values, name="L_10", title="t", examples={}).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert list(axes.lines[0].get_xdata()) == [-85.0, -85.0]
    assert words(axes.get_legend().get_texts()) == ["mean -85.00 ± 6.45"]


def test_a_bound_is_drawn_over_its_particles_with_its_errors():
    bounds = torch.tensor([[-90.0, -80.0], [-88.0, -79.0], [-87.0, -78.0]])
    left, right = charts.bound_by_particles([1, 10, 100], bounds, title="t").axes
    for axes, mean, stderr in ((left, [-85, -83.5, -82.5], [5, 4.5, 4.5]), (right, [0, 1.5, 2.5], [0, 0.5, 0.5])):
        curve, _, (bars,) = axes.containers[0]
        np.testing.assert_allclose(curve.get_xydata(), np.stack([[1, 10, 100], mean], axis=1))
        lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(lengths, 2 * np.array(stderr), atol=1e-12)
        assert axes.get_xscale() == "log"
    assert list(left.lines[-1].get_ydata()) == [-85.0, -85.0]


# --- Training ---


def record(epoch, loss, elbo=None):
    base = {"epoch": epoch, "beta": 1.0, "train_loss_nats_per_image": loss}
    if elbo is None:
        return base
    terms = {"validation_reconstruction_nats_per_image": elbo + 20, "validation_kl_nats_per_image": 20.0}
    return base | {"validation_elbo_nats_per_image": elbo} | terms


def curves(axes):
    return {line.get_label(): line.get_ydata().tolist() for line in axes.lines}


def test_training_curves_are_the_records():
    left, right = charts.training_curves([record(1, 130.0, -120.0), record(2, 110.0, -105.0)], title="t").axes
    shown = {label: values for label, values in curves(left).items() if label != "best"}
    assert shown == {"training objective": [-130.0, -110.0], "validation ELBO": [-120.0, -105.0]}
    assert curves(right) == {"-E_q[log p(x | z)]": [100.0, 85.0], "KL(q(z | x) || p(z))": [20.0, 20.0]}


# --- The noise of a diagnosis ---


@pytest.mark.parametrize(("beta", "num_lines"), [(1.0, 2), (64.0, 1)])
def test_thresholds_that_coincide_are_one_line_with_both_names(beta, num_lines):
    noise = NoiseSpectrum(torch.linspace(70, 0.1, 64).double(), 1.2, 60, 3)
    numbers = SimpleNamespace(
        noise=noise, trained_with=SimpleNamespace(beta=beta), num_pixels=64, active=SimpleNamespace(count=0)
    )
    labels = [text.get_text() for text in draw_noise(numbers).axes[0].get_legend().get_texts()]
    assert len(labels) == num_lines
    assert "a mean over pixels" in labels[-1]
    assert f"beta = {beta:g}" in labels[0]
