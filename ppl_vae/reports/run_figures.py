"""The figures of a run, drawn from its files: config, weights, metrics, evaluation, data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ppl_vae import data, runs
from ppl_vae.diagnostics.exploration import decode_plane, decode_traversals, latent_quantiles
from ppl_vae.diagnostics.mixture import normal_factors
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import gather_log_weights
from ppl_vae.evidence.moments import PosteriorMoments, encode, mean_or_draw
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import Display, choose_display
from ppl_vae.reports.latents_figure import LatentUse, latents_figure, measure_latent_use
from ppl_vae.reports.text.captions import (
    count_images,
    format_use,
    interpolations_title,
    particles_title,
    plane_title,
    reconstructions_title,
    samples_title,
    training_title,
    traversals_title,
)
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.evaluations import PerImage, read_per_image
from ppl_vae.runs.open import Run, Say, load_evaluated_vae
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.numerics import bound_by_particles
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

# The particles figure: its images, its most particles, and how much the decoder may compute for it. On one core a
# default run takes all 1,000 in 1.5 s, a convolutional decoder of 2.2 MFLOP an image in 7 s; one of 8.9 MFLOP gets 200.
_PARTICLE_IMAGES = 100
_MOST_PARTICLES = 1000
_DECODER_FLOP = 3e11
_FLOP_A_PIXEL = 200  # the log-probability's, which the counter does not see


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
    return [name for name, drawing in _FIGURES.items() if drawing.applies(run)]


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
        for line in _left_out(run):
            say(line)
        figures = {}
        for name in figure_names(run):
            with seeded(_FIGURE_SEED, torch.device("cpu")), torch.no_grad():
                figures[name] = _FIGURES[name].draw(scene)
        folder = run.folder / runs.FIGURES
        folder.mkdir(exist_ok=True)
        for path in _drawn(run.folder):
            if path.name not in figures:
                path.unlink()
        for name, figure in figures.items():
            write_figure(folder / name, figure)
        say(f"Figures in {folder}: {', '.join(figures)}")


def _left_out(run: Run) -> list[str]:
    """Which figures are missing, and why."""
    lines = []
    if not _has_images(run):
        lines.append("The data is a table, (N, D): figures of images are skipped.")
    elif not _has_pairs(run):
        lines.append("There is one test image: interpolations between two are skipped.")
    if not _has_a_density(run):
        lines.append("An autoencoder has no log p(x): log_likelihoods.png and particles.png are skipped.")
    elif not _is_evaluated(run):
        lines.append("There is no evaluation of single test images: log_likelihoods.png is skipped.")
    return lines


def _has_curves(run: Run) -> bool:
    """Whether there are records of its training."""
    return not run.from_python or bool(runs.read_metrics(run.folder))


def _always(run: Run) -> bool:
    return True


def _has_images(run: Run) -> bool:
    return len(run.splits.event_shape) > 1


def _has_pairs(run: Run) -> bool:
    return _has_images(run) and len(run.splits.test) > 1


def _has_a_plane(run: Run) -> bool:
    return _has_images(run) and run.options.latent_dim == 2 and not run.options.upper_latents


def _has_a_density(run: Run) -> bool:
    return not is_autoencoder(run.options)


def _is_evaluated(run: Run) -> bool:
    return read_per_image(run.folder, "test") is not None


# --- What they are drawn from ---


@dataclass(frozen=True)
class _Scene:
    """A run, and what several of its figures share, computed once."""

    run: Run
    metrics: list[dict[str, Any]]

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

    @property
    def is_autoencoder(self) -> bool:
        return is_autoencoder(self.run.options)

    @property
    def has_dependent_prior(self) -> bool:
        """Whether the prior is not a product of normals."""
        return normal_factors(self.vae.prior()) is None


# --- The figures ---


def _training_curves(scene: _Scene) -> Figure:
    title = training_title(scene.run.splits.name, is_dequantized=scene.run.pixels == "dequantized")
    try:
        return plots.training_curves(scene.metrics, title=title, autoencoder=scene.is_autoencoder)
    except KeyError as error:
        raise ValueError(f"{scene.run.folder / runs.METRICS}: damaged: a record is missing {error}") from None


def _reconstructions(scene: _Scene) -> Figure:
    x = scene.x[scene.shown]
    decoded = scene.vae.likelihood(scene.vae.posterior(x).sample())
    rows = {"test image x": x, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    return plots.image_rows(
        {label: scene.display(images) for label, images in rows.items()},
        title=reconstructions_title(is_autoencoder=scene.is_autoencoder) + scene.display.words,
    )


def _prior_samples(scene: _Scene) -> Figure:
    decoded = scene.vae.likelihood(scene.vae.prior().expand((_NUM_SAMPLES,)).sample())
    return samples_figure(scene.display, decoded.mean, decoded.sample(), autoencoder=scene.is_autoencoder)


def samples_figure(display: Display, means: Tensor, images: Tensor, *, autoencoder: bool = False) -> Figure:
    """Means E[x | z] beside draws x ~ p(x | z), for z ~ p(z). means, images: (N, *E)."""
    return plots.image_grids(
        {"means E[x | z]": display(means), "images x ~ p(x | z)": display(images)},
        columns=math.ceil(math.sqrt(len(means))),
        title=samples_title(is_autoencoder=autoencoder) + display.words,
    )


def _interpolations(scene: _Scene) -> Figure:
    pairs = min(_NUM_PAIRS, len(scene.shown) // 2)
    ends = mean_or_draw(scene.vae.posterior(scene.x[scene.shown[: 2 * pairs]]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1)
    rows = {
        f"pair {i + 1}": scene.display(scene.vae.likelihood((1 - weight) * ends[i] + weight * ends[pairs + i]).mean)
        for i in range(pairs)
    }
    title = interpolations_title(is_autoencoder=scene.is_autoencoder) + scene.display.words
    return plots.image_rows(rows, title=title)


def _traversals(scene: _Scene) -> Figure:
    """Draws the bottom layer's latents, each moved alone. The decoder may see no others."""
    use, L = scene.use, scene.run.options.latent_dim
    values = use.values[:L]
    num_rows = max(1, min(_NUM_SHOWN, int((values >= use.least).sum())))  # an unused latent moves nothing
    most_used = values.argsort(descending=True)[:num_rows].tolist()
    middle = _NUM_STEPS // 2
    steps = 3 * torch.arange(-middle, middle + 1) / middle
    place = int(scene.shown[0])
    z = mean_or_draw(scene.vae.posterior(scene.x[place : place + 1]))[0]
    images = decode_traversals(scene.vae, z, most_used, steps)
    labels = [f"z{latent}, {format_use(float(values[latent]))}{use.unit}" for latent in most_used]
    title = traversals_title(
        place=place,
        num_images=len(scene.encoded[0]),
        num_rows=num_rows,
        num_latents=L,
        num_unused=int((values < use.least).sum()),
        meaning=use.meaning,
        threshold=f"{use.name} below {use.least}{use.unit}",
        is_autoencoder=scene.is_autoencoder,
        has_upper_layers=len(use.values) > L,
        has_dependent_prior=scene.has_dependent_prior,
    )
    rows = {label: scene.display(row) for label, row in zip(labels, images, strict=True)}
    return plots.image_rows(rows, columns=[f"{t:.1f}" for t in steps], title=title + scene.display.words)


def _manifold(scene: _Scene) -> Figure:
    grid = latent_quantiles(scene.vae.prior(), _MANIFOLD)
    x, y = grid.T.tolist()
    title = plane_title(is_autoencoder=scene.is_autoencoder, has_dependent_prior=scene.has_dependent_prior)
    images = scene.display(decode_plane(scene.vae, grid))
    return plots.image_plane(images, x=x, y=y, names=("z0", "z1"), title=title + scene.display.words)


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
    estimate = Estimate.from_values(values, stored.num_particles)
    name = "ELBO" if stored.num_particles == 1 else f"log p(x), the bound L_{stored.num_particles:,}"
    return plots.likelihood_histogram(
        values.numpy(),
        mean=estimate.mean,
        stderr=estimate.stderr,
        name=name,
        title=f"{scene.run.splits.name}: log p(x) of {count_images(len(values), 'test image')}",
        examples=_extremes(scene, stored) if _has_images(scene.run) else None,
    )


def _extremes(scene: _Scene, stored: PerImage) -> dict[str, tuple[Any, list[str]]]:
    """The images with the highest and the lowest bound, with their nats and index in the split."""
    x = data.evaluation_images(scene.run.splits, "test", scene.run.evaluated_pixels, seed=stored.seed)
    values = stored.result.log_evidence
    ascending = values.argsort()
    count = min(_NUM_SHOWN, len(values) // 2)
    chosen = {"highest": ascending.flip(0)[:count], "lowest": ascending[:count]} if count else {"the image": ascending}
    rows = {}
    for label, places in chosen.items():
        captions = [f"{values[i]:.1f}\nno. {int(stored.index[i])}" for i in places.tolist()]
        rows[label] = (scene.display(x[stored.index[places]]), captions)
    return rows


def _particles(scene: _Scene) -> Figure:
    x = scene.x[data.subset(len(scene.x), _PARTICLE_IMAGES)]
    num_particles = _affordable_particles(scene.vae, len(x))
    sizes = [s for s in _round_numbers() if s <= num_particles]
    bounds = bound_by_particles(gather_log_weights(scene.vae, x, num_particles), sizes)
    return plots.bound_by_particles(
        sizes,
        bound=_mean_and_stderr(bounds),
        gain=_mean_and_stderr(bounds - bounds[0]),
        title=particles_title(len(x), num_particles),
    )


def _mean_and_stderr(values: Tensor) -> tuple[Any, Any]:
    """(K, N) -> the mean over N and its standard error, each (K,); no error of one image."""
    estimates = [Estimate.from_values(row, 1) for row in values]
    stderr = [0.0 if math.isnan(e.stderr) else e.stderr for e in estimates]
    return [e.mean for e in estimates], stderr


def _round_numbers() -> list[int]:
    """The numbers 1, 2, 5, 10, ... up to the largest number of particles."""
    numbers = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    return [number for number in numbers if number <= _MOST_PARTICLES]


def _affordable_particles(vae: VAE, num_images: int) -> int:
    """The largest round number of particles, at least 10, within the decoder's limit of operations.

    By counted operations, never by a clock: the same run is drawn the same on every machine.
    """
    z = vae.prior().sample((1,))
    with FlopCounterMode(display=False) as counter:
        decoded = vae.likelihood(z)
    cost = counter.get_total_flops() + _FLOP_A_PIXEL * math.prod(decoded.event_shape)
    most = _DECODER_FLOP / (cost * num_images)
    return max(number for number in _round_numbers() if number <= max(10, most))


class _Drawing(NamedTuple):
    """Which runs have a figure, and how it is drawn."""

    applies: Callable[[Run], bool]
    draw: Callable[[_Scene], Figure]


_FIGURES = {
    "training_curves.png": _Drawing(_has_curves, _training_curves),
    "reconstructions.png": _Drawing(_has_images, _reconstructions),
    "prior_samples.png": _Drawing(_has_images, _prior_samples),
    "interpolations.png": _Drawing(_has_pairs, _interpolations),
    "traversals.png": _Drawing(_has_images, _traversals),
    "manifold.png": _Drawing(_has_a_plane, _manifold),
    "latents.png": _Drawing(_always, _latents),
    "log_likelihoods.png": _Drawing(_is_evaluated, _log_likelihoods),
    "particles.png": _Drawing(_has_a_density, _particles),
}
