"""The figures of a run, of its diagnosis and of a table of likelihoods, for which trained weights are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.diagnostics.measurement import Measurements
from ppl_vae.diagnostics.pictures import find_principal_directions, latent_quantiles
from ppl_vae.evidence.importance import gather_log_weights
from ppl_vae.evidence.moments import PosteriorMoments, encode, mean_or_draw
from ppl_vae.labels import ConditionalVAE
from ppl_vae.reports.figures.charts import (
    bound_by_particles,
    confusion_table,
    latents_figure,
    likelihood_histogram,
    pixel_calibration,
    training_curves,
)
from ppl_vae.reports.figures.images import (
    MOST_CLASSES,
    Display,
    Images,
    choose_display,
    name_classes,
    samples_by_class,
    samples_figure,
    show_rows,
)
from ppl_vae.reports.figures.measurements import draw_aggregate, draw_latents, draw_noise
from ppl_vae.reports.text.pages import TITLES
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.command_results import LikelihoodRow
from ppl_vae.runs.load import load
from ppl_vae.runs.open import Run, Say, load_evaluated_vae
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runs.results import LabelledEvaluation, PerImage, read_evaluation, read_per_image
from ppl_vae.runtime import numerics
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.records import Records
from ppl_vae.vae import VAE

_FIGURE_SEED = 0
_NUM_SHOWN = 10  # images in a row, directions in a column
_NUM_PAIRS = 5
_NUM_SAMPLES = 64
_NUM_STEPS = 11  # of a traversal: odd, so that the middle one is the reconstruction
_REACH = 2.5  # standard deviations of the codes, to either side
_LEAST_SHARE = 0.01  # of the codes' variance that a direction has, to be shown
_MANIFOLD = 15
_MOST_DRAWS = 12  # in or out of holes

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
    drawn = {name: path.stat().st_mtime_ns for name in _FIGURES if (path := run.folder / runs.FIGURES / name).exists()}
    return drawn.keys() == set(figure_names(run)) and all(time >= newest for time in drawn.values())


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
        for name in _FIGURES.keys() - figures.keys():
            (folder / name).unlink(missing_ok=True)
        _write(folder, figures, say)


def _write(folder: Path, figures: Mapping[str, Figure], say: Say) -> None:
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        write_figure(folder / name, figure)
    say(f"Figures in {folder}: {', '.join(figures)}")


def _has_curves(run: Run) -> bool:
    """Whether there are records of its training."""
    return run.can_resume or bool(runs.read_metrics(run.folder))


def _has_images(run: Run) -> bool:
    return len(run.splits.event_shape) > 1


def _takes_labels(run: Run) -> bool:
    return run.options.condition != "none"


def _has_codes(run: Run) -> bool:
    """Whether an image has a code by itself, without a label."""
    return _has_images(run) and not _takes_labels(run)


def _has_plane(run: Run) -> bool:
    return _has_codes(run) and run.options.latent_dim == 2 and not run.options.upper_latents


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

    @property
    def labelled(self) -> Any:
        """The VAE, whose parts also take ``labels``."""
        return self.vae

    @cached_property
    def labels(self) -> tuple[Tensor, ...]:
        """The labels of the shown images, (n,), if the model takes them."""
        return (self.run.splits.labels["test"][self.shown],) if _takes_labels(self.run) else ()

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


# --- The figures ---


def _training_curves(scene: _Scene) -> Figure:
    title = TITLES["training-dequantized" if scene.run.pixels == "dequantized" else "training"]
    title = title.format(name=scene.run.splits.name)
    try:
        return training_curves(scene.metrics, title=title, autoencoder=is_autoencoder(scene.run.options))
    except KeyError as error:
        raise ValueError(f"{scene.run.folder / runs.METRICS}: damaged: a record is missing {error}") from None


def _reconstructions(scene: _Scene) -> Figure:
    x = scene.x[scene.shown]
    decoded = scene.labelled.likelihood(scene.labelled.posterior(x, *scene.labels).sample(), *scene.labels)
    rows = {"test image x": x, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    return show_rows(scene.display, rows, "reconstructions")


def _prior_samples(scene: _Scene) -> Figure:
    if isinstance(scene.vae, ConditionalVAE):
        means = {name: sample_means(scene.vae.fix_label(k)) for k, name in enumerate(name_classes(scene.run))}
        return samples_by_class(scene.display, means)
    decoded = scene.vae.likelihood(scene.vae.prior().expand((_NUM_SAMPLES,)).sample())
    autoencoder = is_autoencoder(scene.run.options)
    return samples_figure(scene.display, decoded.mean, decoded.sample(), autoencoder=autoencoder)


def sample_means(vae: VAE, num_samples: int = _NUM_SHOWN) -> Tensor:
    """(n, *E) E[x | z] for z ~ p(z)."""
    return vae.likelihood(vae.prior().expand((num_samples,)).sample()).mean


def _classes(scene: _Scene) -> Figure:
    """The code of each shown image, given its label, decoded with every label."""
    vae, x = scene.labelled, scene.x[scene.shown]
    z, names = vae.posterior(x, *scene.labels).sample(), name_classes(scene.run)[:MOST_CLASSES]
    rows = {"test image x": x}
    rows |= {f"as {name}": vae.likelihood(z, torch.full((len(x),), k)).mean for k, name in enumerate(names)}
    return show_rows(scene.display, rows, "classes")


def _confusion(scene: _Scene) -> Figure:
    found = read_evaluation(scene.run.folder)
    assert isinstance(found, LabelledEvaluation)
    title = TITLES["confusion"].format(found=found, percent=100 * found.accuracy.mean)
    return confusion_table(found.confusion, name_classes(scene.run), title=title)


def _interpolations(scene: _Scene) -> Figure:
    pairs = min(_NUM_PAIRS, len(scene.shown) // 2)
    ends = mean_or_draw(scene.vae.posterior(scene.x[scene.shown[: 2 * pairs]]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1)
    lines = [(1 - weight) * ends[i] + weight * ends[pairs + i] for i in range(pairs)]
    rows = {f"pair {i + 1}": scene.vae.likelihood(z).mean for i, z in enumerate(lines)}
    return show_rows(scene.display, rows, "interpolations")


def _traversals(scene: _Scene) -> Figure:
    """Moves the bottom layer alone, in a hierarchy: the decoder may see no other."""
    index, codes = scene.encoded
    found = find_principal_directions(codes.mean, _NUM_SHOWN, num_moved=scene.run.options.latent_dim)
    kept = max(1, int((found.share >= _LEAST_SHARE).sum()))
    start = found.find_central(codes.mean)
    middle = _NUM_STEPS // 2
    steps = _REACH * torch.arange(-middle, middle + 1) / middle
    moves = found.scale[:kept, None] * found.directions[:kept]
    images = scene.vae.likelihood(codes.mean[start] + steps[:, None] * moves[:, None]).mean  # (R, K, *E)
    original = torch.full_like(images[0], torch.nan)  # nothing, but for the middle
    original[middle] = scene.x[index[start]]
    rows = {"the image": original}
    rows |= {f"direction {k + 1}, {found.share[k]:.0%}": row for k, row in enumerate(images)}
    words = {"place": int(index[start]), "num_images": len(index)}
    return show_rows(scene.display, rows, "traversals", columns=[f"{t:.1f}" for t in steps], **words)


def _manifold(scene: _Scene) -> Figure:
    x, y = latent_quantiles(scene.vae.prior(), _MANIFOLD).T
    planes = scene.vae.likelihood(torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)).mean
    rows = {f"z1 = {value:.2g}": plane for value, plane in zip(y.flip(0).tolist(), planes.flip(0), strict=True)}
    return show_rows(scene.display, rows, "manifold", columns=[f"{value:.2g}" for value in x.tolist()])


def _latents(scene: _Scene) -> Figure:
    (index, codes), splits = scene.encoded, scene.run.splits
    classes, names = splits.labels["test"][index] if "test" in splits.labels else None, splits.class_names
    prior = scene.vae.prior()
    return latents_figure(codes, prior, kind="test image", classes=classes, class_names=names)


def _log_likelihoods(scene: _Scene) -> Figure:
    stored = read_per_image(scene.run.folder, "test")
    assert stored is not None
    values = stored.result.log_evidence
    return likelihood_histogram(
        values,
        name=f"log p(x), the bound L_{stored.num_particles:,}",
        title=TITLES["log-likelihoods"].format(name=scene.run.splits.name, num_images=len(values)),
        examples=_extremes(scene, stored) if _has_images(scene.run) else {},
    )


def _extremes(scene: _Scene, stored: PerImage) -> dict[str, tuple[Images, list[str]]]:
    """The images with the highest and the lowest bound, with their nats and index in the split."""
    x = data.evaluation_images(scene.run.splits, "test", scene.run.evaluated_pixels, seed=stored.seed)
    values = stored.result.log_evidence
    ascending = values.argsort()
    rows = {}
    for label, order in (("highest", ascending.flip(0)), ("lowest", ascending)):
        places = stored.index[order[:_NUM_SHOWN]]
        captions = [f"{values[i]:.1f}\nno. {int(stored.index[i])}" for i in order[:_NUM_SHOWN].tolist()]
        rows[label] = (scene.display(x[places]), captions)
    return rows


def _particles(scene: _Scene) -> Figure:
    index = data.subset(len(scene.x), _PARTICLE_IMAGES)
    x = scene.x[index]
    given = Records(x, scene.run.splits.labels["test"][index]) if _takes_labels(scene.run) else x
    log_weights = gather_log_weights(scene.vae, given, _PARTICLES[-1])
    bounds = numerics.bound_by_particles(log_weights, _PARTICLES)
    what = "log p(x | y)" if _takes_labels(scene.run) else "log p(x)"
    return bound_by_particles(_PARTICLES, bounds, title=TITLES["particles"].format(what=what, num_images=len(x)))


# By the name of its file: which runs have a figure, and how it is drawn.
_FIGURES: dict[str, tuple[Callable[[Run], bool], Callable[[_Scene], Figure]]] = {
    "training_curves.png": (_has_curves, _training_curves),
    "reconstructions.png": (_has_images, _reconstructions),
    "prior_samples.png": (_has_images, _prior_samples),
    "classes.png": (lambda run: _has_images(run) and _takes_labels(run), _classes),
    "confusion.png": (lambda run: isinstance(read_evaluation(run.folder), LabelledEvaluation), _confusion),
    "interpolations.png": (lambda run: _has_codes(run) and len(run.splits.test) > 1, _interpolations),
    "traversals.png": (_has_codes, _traversals),
    "manifold.png": (_has_plane, _manifold),
    "latents.png": (lambda run: not _takes_labels(run), _latents),
    "log_likelihoods.png": (lambda run: read_per_image(run.folder, "test") is not None, _log_likelihoods),
    "particles.png": (lambda run: not is_autoencoder(run.options), _particles),
}


# --- A diagnosis ---


def diagnosis_figures(run: Run, numbers: Measurements) -> dict[str, Callable[[Tensor], Figure]]:
    """How each figure that these measurements have is drawn, by the name of its file, given the images (N, *E)."""
    found = numbers.calibration
    draw: dict[str, Callable[[Tensor], Figure]] = {
        "diagnosis-latents.png": lambda x: draw_latents(numbers),
        "diagnosis-aggregate.png": lambda x: draw_aggregate(numbers),
    }
    if numbers.noise is not None and not numbers.autoencoder:
        draw["diagnosis-noise.png"] = lambda x: draw_noise(numbers)
    if _has_images(run) and numbers.aggregate.holes is not None:
        draw["diagnosis-holes.png"] = lambda x: _draw_holes(run, numbers, x)
    if found is not None:
        title = TITLES["diagnosis-pixels"].format(num_images=found.num_images)
        draw["diagnosis-pixels.png"] = lambda x: pixel_calibration({run.options.likelihood: found}, title=title)
    return draw


def _draw_holes(run: Run, numbers: Measurements, x: Tensor) -> Figure:
    vae, display, found = load(run.folder), choose_display(run), numbers.aggregate.holes
    assert found is not None
    dtype = next(vae.parameters()).dtype
    some = x[torch.linspace(0, len(x) - 1, min(_MOST_DRAWS, len(x))).long()].cpu()
    rows = {
        "prior draws\nthat posteriors\ncover least": vae.likelihood(torch.tensor(found.worst, dtype=dtype)).mean,
        "ordinary\nprior draws": vae.likelihood(torch.tensor(found.ordinary, dtype=dtype)).mean,
        "reconstructions": vae.likelihood(mean_or_draw(vae.posterior(some))).mean,
        "their images": some,
    }
    if run.pixels == "dequantized":  # drawn as levels, which is what the display expects
        rows = {name: 256 * images - 0.5 for name, images in rows.items()}
    shown = min(map(len, rows.values()))
    effect = numbers.aggregate.classifier.effect.mean
    return show_rows(
        display, {name: images[:shown] for name, images in rows.items()}, "diagnosis-holes", holes=found, effect=effect
    )


# --- A table of likelihoods ---


def write_likelihood_figure(folder: Path, name: str, rows: Sequence[LikelihoodRow], say: Say) -> None:
    """Writes calibration.png, the best likelihood first. ``name``: of the data set."""
    title = TITLES["calibration"].format(name=name, num_images=rows[0].calibration.num_images)
    figure = pixel_calibration({row.likelihood: row.calibration for row in rows}, title=title)
    _write(folder, {"calibration.png": figure}, say)
