"""The figures of a run, drawn from its files, and those of a table of likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.diagnostics.pictures import decode_plane, decode_traversals, latent_quantiles
from ppl_vae.evidence.importance import gather_log_weights
from ppl_vae.evidence.moments import PosteriorMoments, encode, mean_or_draw
from ppl_vae.reports.display import Display, choose_display
from ppl_vae.reports.figures.charts import bound_by_particles, likelihood_histogram, pixel_calibration, training_curves
from ppl_vae.reports.figures.images import Images, image_grids, image_rows
from ppl_vae.reports.latents_figure import LatentUse, latents_figure, measure_latent_use
from ppl_vae.reports.text.pages import NOT_TRAINED_ON_PRIOR
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.command_results import LikelihoodRow
from ppl_vae.runs.open import Run, Say, load_evaluated_vae
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runs.results import PerImage, read_per_image
from ppl_vae.runtime import numerics
from ppl_vae.runtime.global_state import seeded
from ppl_vae.vae import VAE

_FIGURE_SEED = 0
_NUM_SHOWN = 10  # images in a row, latents in a column
_NUM_PAIRS = 5
_NUM_SAMPLES = 64
_NUM_STEPS = 11  # of a traversal: odd, so that the middle one is the prior's mean
_MANIFOLD = 15

# Images whose latents are drawn: those of a pass over two thousand 28 x 28 images.
_LATENT_PIXELS = 2000 * 784
_MOST_LATENTS = 2000

_PARTICLE_IMAGES = 50
_PARTICLES = [1, 2, 5, 10, 20, 50, 100, 200, 500]


# --- Which figures there are ---


def is_drawn(run: Run) -> bool:
    """Whether exactly the run's figures exist, and are newer than the files they show."""
    sources = [run.folder / name for name in (runs.MODEL, runs.METRICS, runs.per_image_file("test"))]
    newest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    drawn = {path.name: path.stat().st_mtime_ns for path in _drawn(run.folder)}
    return drawn.keys() == set(figure_names(run)) and all(time >= newest for time in drawn.values())


def _drawn(folder: Path) -> list[Path]:
    """The run's figures that exist."""
    return [path for name in _FIGURES if (path := folder / runs.FIGURES / name).exists()]


def figure_names(run: Run) -> list[str]:
    """The names of the figures that this run has, by its data, its latents and its evaluation."""
    return [name for name, (applies, _) in _FIGURES.items() if applies(run)]


def write_figures(run: Run, *, say: Say) -> None:
    """Draws every figure of the run into figures/, and removes figures that it has no longer.

    Weights, evaluation and random state stay as they are.

    Raises:
        ValueError: damaged files, or another process writes to the run.
    """
    with runs.lock_folder(run.folder):
        metrics = runs.read_metrics(run.folder)
        if not metrics and _has_curves(run):
            raise ValueError(f"{run.folder / runs.METRICS}: expected the record of at least one epoch, got none")
        scene = _Scene(run, metrics)
        figures = {}
        for name in figure_names(run):
            with seeded(_FIGURE_SEED, torch.device("cpu")), torch.no_grad():
                figures[name] = _FIGURES[name][1](scene)
        folder = run.folder / runs.FIGURES
        folder.mkdir(exist_ok=True)
        for path in _drawn(run.folder):
            if path.name not in figures:
                path.unlink()
        for name, figure in figures.items():
            write_figure(folder / name, figure)
        say(f"Figures in {folder}: {', '.join(figures)}")


def _has_curves(run: Run) -> bool:
    """Whether there are records of its training."""
    return not run.from_python or bool(runs.read_metrics(run.folder))


def _has_images(run: Run) -> bool:
    return len(run.splits.event_shape) > 1


def _has_a_plane(run: Run) -> bool:
    return _has_images(run) and run.options.latent_dim == 2 and not run.options.upper_latents


def _is_evaluated(run: Run) -> bool:
    return read_per_image(run.folder, "test") is not None


# --- What they are drawn from ---


@dataclass(frozen=True)
class _Scene:
    """A run, and what several of its figures share, computed once."""

    run: Run
    metrics: list[dict[str, float]]

    @cached_property
    def vae(self) -> VAE:
        return load_evaluated_vae(self.run)

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) the test images, as the model sees them."""
        return data.evaluation_images(self.run.splits, "test", self.run.evaluated_pixels)

    @cached_property
    def shown(self) -> Tensor:
        """Indices of some test images in random order, since the file may be sorted by class."""
        index = data.subset(len(self.x), _NUM_SHOWN)
        return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(_FIGURE_SEED))]

    @cached_property
    def display(self) -> Display:
        return choose_display(self.run)

    @cached_property
    def encoded(self) -> tuple[Tensor, PosteriorMoments]:
        """Indices of a subset of the test images, and their latents."""
        pixels = math.prod(self.run.splits.event_shape)
        index = data.subset(len(self.x), min(_MOST_LATENTS, max(_NUM_SHOWN, _LATENT_PIXELS // pixels)))
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            return index, encode(self.vae, self.x[index])

    @cached_property
    def use(self) -> LatentUse:
        index, codes = self.encoded
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            return measure_latent_use(self.vae, self.x[index], codes)


# --- The figures ---


def _training_curves(scene: _Scene) -> Figure:
    title = f"{scene.run.splits.name}: training"
    if scene.run.pixels == "dequantized":
        title += " of the density of (level + u) / 256"
    try:
        return training_curves(scene.metrics, title=title, autoencoder=is_autoencoder(scene.run.options))
    except KeyError as error:
        raise ValueError(f"{scene.run.folder / runs.METRICS}: damaged: a record is missing {error}") from None


def _reconstructions(scene: _Scene) -> Figure:
    x = scene.x[scene.shown]
    decoded = scene.vae.likelihood(scene.vae.posterior(x).sample())
    rows = {"test image x": x, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    title = "Reconstructions, z ~ q(z | x)" + scene.display.words
    return image_rows({label: scene.display(images) for label, images in rows.items()}, title=title)


def _prior_samples(scene: _Scene) -> Figure:
    decoded = scene.vae.likelihood(scene.vae.prior().expand((_NUM_SAMPLES,)).sample())
    autoencoder = is_autoencoder(scene.run.options)
    return samples_figure(scene.display, decoded.mean, decoded.sample(), autoencoder=autoencoder)


def samples_figure(display: Display, means: Tensor, images: Tensor, *, autoencoder: bool = False) -> Figure:
    """Means E[x | z] beside draws x ~ p(x | z), for z ~ p(z). means, images: (N, *E)."""
    title = "Samples from the prior, z ~ p(z)"
    if autoencoder:
        title = f"No samples of a model: decoded draws of the prior, z ~ N(0, I),\n{NOT_TRAINED_ON_PRIOR}"
    return image_grids(
        {"means E[x | z]": display(means), "images x ~ p(x | z)": display(images)},
        columns=math.ceil(math.sqrt(len(means))),
        title=title + display.words,
    )


def _interpolations(scene: _Scene) -> Figure:
    pairs = min(_NUM_PAIRS, len(scene.shown) // 2)
    ends = mean_or_draw(scene.vae.posterior(scene.x[scene.shown[: 2 * pairs]]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1)
    rows = {
        f"pair {i + 1}": scene.display(scene.vae.likelihood((1 - weight) * ends[i] + weight * ends[pairs + i]).mean)
        for i in range(pairs)
    }
    return image_rows(rows, title="E[x | z] on the line between the codes of two test images" + scene.display.words)


def _traversals(scene: _Scene) -> Figure:
    """Draws the bottom layer's latents, each moved alone. The decoder may see no others."""
    use, L = scene.use, scene.run.options.latent_dim
    values = use.values[:L]
    num_unused = int((values < use.least).sum())  # an unused latent moves nothing
    most_used = values.argsort(descending=True)[: max(1, min(_NUM_SHOWN, L - num_unused))].tolist()
    middle = _NUM_STEPS // 2
    steps = 3 * torch.arange(-middle, middle + 1) / middle
    place = int(scene.shown[0])
    z = mean_or_draw(scene.vae.posterior(scene.x[place : place + 1]))[0]
    images = decode_traversals(scene.vae, z, most_used, steps)
    labels = [f"z{latent}, {values[latent]:.2f}{use.unit}" for latent in most_used]
    rows = {label: scene.display(row) for label, row in zip(labels, images, strict=True)}
    title = (
        "E[x | z] as one latent moves, in scales of the prior; the others stay at the code of test image no. "
        f"{place}\nrows: the most used latents, by {use.meaning} over {len(scene.encoded[0]):,} test images\n"
        f"unused latents, with a {use.name} below {use.least}{use.unit}: {num_unused} of {L}{scene.display.words}"
    )
    return image_rows(rows, columns=[f"{t:.1f}" for t in steps], title=title)


def _manifold(scene: _Scene) -> Figure:
    grid = latent_quantiles(scene.vae.prior(), _MANIFOLD)
    x, y = grid.T.tolist()
    planes = scene.display(decode_plane(scene.vae, grid))
    rows = {f"z1 = {value:.2g}": row for value, row in zip(reversed(y), planes[::-1], strict=True)}
    title = "E[x | z] over the plane of two latents, at equal steps of each latent's prior probability; across: z0"
    return image_rows(rows, columns=[f"{value:.2g}" for value in x], title=title + scene.display.words)


def _latents(scene: _Scene) -> Figure:
    index, codes = scene.encoded
    labels = scene.run.splits.labels.get("test")
    return latents_figure(
        codes,
        scene.use,
        scene.vae.prior(),
        classes=None if labels is None else labels[index],
        class_names=scene.run.splits.class_names,
        kind="test image",
    )


def _log_likelihoods(scene: _Scene) -> Figure:
    stored = read_per_image(scene.run.folder, "test")
    assert stored is not None
    values = stored.result.log_evidence
    return likelihood_histogram(
        values,
        name=f"log p(x), the bound L_{stored.num_particles:,}",
        title=f"{scene.run.splits.name}: log p(x) of {len(values):,} test images",
        examples=_extremes(scene, stored) if _has_images(scene.run) else {},
    )


def _extremes(scene: _Scene, stored: PerImage) -> dict[str, tuple[Images, list[str]]]:
    """The images with the highest and the lowest bound, with their nats and index in the split."""
    x = data.evaluation_images(scene.run.splits, "test", scene.run.evaluated_pixels, seed=stored.seed)
    values = stored.result.log_evidence
    ascending = values.argsort()
    rows = {}
    for label, order in (("highest", ascending.flip(0)), ("lowest", ascending)):
        places = order[:_NUM_SHOWN]
        captions = [f"{values[i]:.1f}\nno. {int(stored.index[i])}" for i in places.tolist()]
        rows[label] = (scene.display(x[stored.index[places]]), captions)
    return rows


def _particles(scene: _Scene) -> Figure:
    x = scene.x[data.subset(len(scene.x), _PARTICLE_IMAGES)]
    log_weights = gather_log_weights(scene.vae, x, _PARTICLES[-1])
    title = (
        "The bound L_s on log p(x) by its number of importance samples s\n"
        f"{len(x):,} test images; bars are standard errors over images"
    )
    return bound_by_particles(_PARTICLES, numerics.bound_by_particles(log_weights, _PARTICLES), title=title)


# By the name of its file: which runs have a figure, and how it is drawn.
_FIGURES: dict[str, tuple[Callable[[Run], bool], Callable[[_Scene], Figure]]] = {
    "training_curves.png": (_has_curves, _training_curves),
    "reconstructions.png": (_has_images, _reconstructions),
    "prior_samples.png": (_has_images, _prior_samples),
    "interpolations.png": (lambda run: _has_images(run) and len(run.splits.test) > 1, _interpolations),
    "traversals.png": (_has_images, _traversals),
    "manifold.png": (_has_a_plane, _manifold),
    "latents.png": (lambda run: True, _latents),
    "log_likelihoods.png": (_is_evaluated, _log_likelihoods),
    "particles.png": (lambda run: not is_autoencoder(run.options), _particles),
}


# --- A table of likelihoods ---


def write_likelihood_figures(folder: Path, opened: Sequence[Run], rows: Sequence[LikelihoodRow], say: Say) -> None:
    """Writes calibration.png, and for images reconstructions.png and samples.png, the best likelihood first."""
    folder.mkdir(exist_ok=True)
    by_word = {run.options.likelihood: run for run in opened}
    title = (
        f"{opened[0].splits.name}: where pixels of {rows[0].calibration.num_images:,} test images lie in p(x | z), "
        "z ~ q(z | x)\n(probability integral transform; uniform if the model were right; bars are standard errors)"
    )
    figures = {"calibration.png": pixel_calibration({row.likelihood: row.calibration for row in rows}, title=title)}
    if len(opened[0].splits.event_shape) > 1:
        figures |= _picture_figures([by_word[row.likelihood] for row in rows])
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    say(f"Figures in {folder}: {', '.join(figures)}")


@torch.no_grad()
def _picture_figures(opened: Sequence[Run]) -> dict[str, Figure]:
    first = opened[0]
    display, x = choose_display(first), data.evaluation_images(first.splits, "test", first.evaluated_pixels)
    x = x[data.subset(len(x), _NUM_SHOWN)]
    reconstructions, samples = {"test image x": display(x)}, dict[str, NDArray[np.float32]]()
    for run in opened:
        word, vae = run.options.likelihood, load_evaluated_vae(run)
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            reconstructions[word] = display(vae.likelihood(vae.posterior(x).sample()).mean)
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            decoded = vae.likelihood(vae.prior().expand((_NUM_SHOWN,)).sample())
            samples[f"{word}\nE[x | z]"] = display(decoded.mean)
            samples[f"{word}\nx ~ p(x | z)"] = display(decoded.sample())
    name = first.splits.name
    return {
        "reconstructions.png": image_rows(
            reconstructions, title=f"{name}: reconstructions E[x | z], z ~ q(z | x)" + display.words
        ),
        "samples.png": image_rows(
            samples,
            title=f"{name}: samples, z ~ p(z) by one seed, in the latents of each model" + display.words,
        ),
    }
