"""A run's figures: which there are, that they hold the run's numbers, and that drawing changes nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_run import SMALL, contents, save_bars, train_small

from ppl_vae import data, load, log_weights, runs
from ppl_vae.commands.options import Figures
from ppl_vae.commands.report import draw_run
from ppl_vae.evidence.moments import PosteriorMoments
from ppl_vae.reports import run_figures as figures
from ppl_vae.reports.figures.charts import latents_figure
from ppl_vae.reports.run_figures import figure_names, is_drawn
from ppl_vae.runs.open import Run, open_run
from ppl_vae.runs.options import Options

pytestmark = pytest.mark.thorough

ALL = {
    "training_curves.png",
    "reconstructions.png",
    "prior_samples.png",
    "interpolations.png",
    "traversals.png",
    "manifold.png",
    "latents.png",
    "log_likelihoods.png",
    "particles.png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run on labelled images, with two latents."""
    place = tmp_path_factory.mktemp("figures")
    return train_small(place / "run", replace(SMALL, dataset=str(save_bars(place / "bars.npz"))), draw=True)


@pytest.fixture
def run(folder):
    return open_run(str(folder))


@pytest.fixture
def draw(run) -> Figure:
    """Draws one figure of a run, which may be changed first."""

    def figure(name, **splits):
        changed = run._replace(splits=replace(run.splits, **splits))
        scene = figures._Scene(changed, runs.read_metrics(run.folder))
        with torch.no_grad():
            return figures._FIGURES[name][1](scene)

    return figure


def splits_of(shape, *, num_test=5, kind=data.BINARY):
    x = torch.zeros(5, *shape)
    return data.Splits(name="x", kind=kind, train=x, validation=x, test=x[:num_test], sha256="", split="")


def unsaved(tmp_path, shape, *, num_test=5, **options):
    return Run(tmp_path, Options(binarization="none", **options), splits_of(shape, num_test=num_test))


# --- Which figures there are ---


@pytest.mark.parametrize(
    ("shape", "num_test", "latent_dim", "missing"),
    [
        ((1, 8, 8), 5, 2, set()),
        ((3, 8, 9), 5, 3, {"manifold.png"}),
        ((1, 8, 8), 1, 2, {"interpolations.png"}),
        (
            (8,),
            5,
            2,
            {"reconstructions.png", "prior_samples.png", "interpolations.png", "traversals.png", "manifold.png"},
        ),
    ],
)
def test_the_data_and_the_latents_decide_which_figures_there_are(tmp_path, shape, num_test, latent_dim, missing):
    names = figure_names(unsaved(tmp_path, shape, num_test=num_test, latent_dim=latent_dim))
    assert set(names) == ALL - missing - {"log_likelihoods.png"}


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "evaluation-test.safetensors"])
def test_figures_older_than_what_they_show_are_not_drawn(run, name):
    assert is_drawn(run)
    stamp = (run.folder / name).stat()
    try:
        os.utime(run.folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**12))
        assert not is_drawn(run)
    finally:
        os.utime(run.folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.fixture
def trained_further(folder, tmp_path):
    """A copy of the run whose weights are of a later step than its evaluation and its figures."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights, scalars = runs.load_tensors(copy / runs.MODEL)
    runs.save_tensors(copy / runs.MODEL, weights, scalars | {"step": scalars["step"] + 1})
    return copy


def test_a_figure_of_former_weights_does_not_stay_beside_those_of_the_present_ones(trained_further):
    (trained_further / "figures" / "mine.png").write_bytes(b"")
    draw_run(Figures(str(trained_further)), say=lambda line: None)
    left = {path.name for path in (trained_further / "figures").iterdir()}
    assert left == ALL - {"log_likelihoods.png"} | {"mine.png"}


# --- Drawing changes nothing ---


def test_drawing_again_gives_the_same_files_and_touches_no_other(folder):
    before = contents(folder)
    draw_run(Figures(str(folder)), say=lambda line: None)
    assert contents(folder) == before


# --- What they show ---


def test_latents_are_the_posterior_means_by_class(draw, folder, run):
    axes = draw("latents.png").axes[0]
    with torch.no_grad():
        mean = load(folder).posterior(run.splits.test.float()).mean.numpy()
    labels = run.splits.labels["test"].numpy()
    shown = {part.get_label(): np.asarray(part.get_offsets()) for part in axes.collections}
    assert shown.pop("prior: 2,000 draws").shape == (2000, 2)
    assert shown.keys() == {"0", "1"}
    for word, points in shown.items():
        np.testing.assert_allclose(points, mean[labels == int(word)], rtol=1e-5, atol=1e-6)


def test_the_latents_of_the_largest_variance_are_shown_and_named():
    torch.manual_seed(0)
    mean = torch.randn(500, 4) * torch.tensor([0.1, 3.0, 0.0, 2.0])
    codes = PosteriorMoments(mean, torch.ones(500, 4))
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4), torch.ones(4)), 1)
    axes = latents_figure(codes, prior, kind="image").axes[0]
    variance = mean.var(0)
    assert axes.get_xlabel() == f"z1, variance {variance[1]:.2f}"
    assert axes.get_ylabel() == f"z3, variance {variance[3]:.2f}"
    np.testing.assert_array_equal(axes.collections[1].get_offsets(), mean[:, [1, 3]])


def test_the_histograms_mean_is_the_stored_evaluation(draw, folder):
    stored = json.loads((folder / "evaluation.json").read_text())["test"]["log_likelihood"]
    axes = draw("log_likelihoods.png").axes[0]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(stored["mean"])
    assert sum(bar.get_height() for bar in axes.patches) == 25


def test_the_extremes_are_the_images_of_their_places_in_the_split(draw, folder, run):
    """Captions against the stored numbers, and the pixels in the middle of each tile against the data."""
    tensors, _ = runs.load_tensors(folder / runs.per_image_file("test"))
    by_place = dict(zip(tensors["index"].tolist(), tensors["log_evidence"].tolist(), strict=True))
    order = sorted(by_place, key=by_place.get)
    for axes, places in zip(draw("log_likelihoods.png").axes[1:], (order[::-1][:10], order[:10]), strict=True):
        captions = [label.get_text() for label in axes.get_xticklabels()]
        assert captions == [f"{by_place[i]:.1f}\nno. {i}" for i in places]
        picture = axes.get_images()[0].get_array()
        width = picture.shape[1] // 10
        for column, i in enumerate(places):
            tile = picture[2:-2, column * width + 2 : (column + 1) * width - 2]
            step = len(tile) // 8
            np.testing.assert_array_equal(tile[step // 2 :: step, step // 2 :: step], run.splits.test[i, 0])


def test_the_bound_starts_at_the_elbo_and_ends_at_the_evaluations_bound(draw, folder, run):
    """s = 1 and s = 500 against ELBO and L_S of the same images, drawn anew: both within 5 Monte Carlo errors."""
    axes = draw("particles.png").axes[0]
    curve = axes.containers[0][0]
    assert curve.get_xdata().tolist() == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    vae = load(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, run.splits.test.float(), 500).double()  # (S, N) nats
    relative = (log_w - log_w.logsumexp(0)).exp() * 500
    expected = log_w.mean(0), log_w.logsumexp(0) - math.log(500)
    first, last = curve.get_ydata()[[0, -1]]
    for shown, bound, each in zip((first, last), expected, (log_w, relative), strict=True):
        stderr = (2 * (each.var(0) / 500).sum()).sqrt() / len(bound)  # 2: the figure's own particles err as much
        assert abs(shown - bound.mean()) < 5 * stderr
    assert last > first


def test_traversals_start_at_the_most_central_image_and_follow_the_spread_of_codes(draw, folder, run):
    """The numbers of its titles, and the pixels in the middle of tiles, against NumPy's covariance."""
    figure = draw("traversals.png")
    x = run.splits.test.float()
    vae = load(folder)
    with torch.no_grad():
        codes = vae.posterior(x).mean
    values, vectors = np.linalg.eigh(np.cov(codes.numpy(), rowvar=False, bias=True))
    values, vectors = values[::-1], vectors.T[::-1]
    place = int((((codes - codes.mean(0)).numpy() @ vectors.T) ** 2 / values).sum(1).argmin())
    assert f"test image no. {place}," in figure._suptitle.get_text()
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["the image", *(f"direction {k + 1}, {v / sum(values):.0%}" for k, v in enumerate(values))]
    picture = axes.get_images()[0].get_array()
    height, width = picture.shape[0] // 3, picture.shape[1] // 11

    def tile(row, column):
        shown = picture[row * height + 2 : (row + 1) * height - 2, column * width + 2 : (column + 1) * width - 2]
        step = len(shown) // 8
        return shown[step // 2 :: step, step // 2 :: step]

    np.testing.assert_array_equal(tile(0, 5), x[place, 0])
    for row, (value, vector) in enumerate(zip(values, vectors, strict=True), 1):
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        for column, t in ((0, -2.5), (5, 0.0), (10, 2.5)):
            z = codes[place] + torch.tensor(t * math.sqrt(value) * vector, dtype=torch.float)
            with torch.no_grad():
                np.testing.assert_allclose(tile(row, column), vae.likelihood(z).mean[0], atol=1e-4)


@pytest.mark.parametrize("num_shown", [1, 2])
def test_traversals_leave_out_directions_along_which_codes_hardly_vary(draw, num_shown, monkeypatch):
    monkeypatch.setattr(figures, "_LEAST_SHARE", {1: 1.1, 2: 0.0}[num_shown])
    assert len(draw("traversals.png").axes[0].get_yticklabels()) == 1 + num_shown
