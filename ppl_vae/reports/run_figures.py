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
from ppl_vae.commands.options import Figures
from ppl_vae.diagnostics import ACTIVE_VARIANCE, active_units
from ppl_vae.diagnostics.exploration import UNUSED_NATS, decode_plane, decode_traversals, kl_by_latent, latent_quantiles
from ppl_vae.diagnostics.mixture import normal_factors
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import gather_log_weights
from ppl_vae.evidence.moments import PosteriorMoments, compute_moments, encode, mean_or_draw, sample_latents
from ppl_vae.reports import figures as plots
from ppl_vae.reports.display import Display, display_of
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.evaluations import PerImage, read_per_image
from ppl_vae.runs.opening import Run, Say, evaluated_vae, open_run
from ppl_vae.runs.outputs import write_figure
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.numerics import bound_by_particles
from ppl_vae.vae import VAE

# Said of every figure that decodes what the prior says.
OF_AN_AUTOENCODER = "on which an autoencoder was never trained"

_FIGURE_SEED = 0
_NUM_SHOWN = 10  # images in a row, latents in a column
_NUM_PAIRS = 5
_NUM_SAMPLES = 64
_NUM_STEPS = 11  # of a traversal: odd, so that the middle one is the prior's mean
_MANIFOLD = 15
_PRIOR_SHOWN = 2000  # draws of a prior that no circle describes

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
    """Every figure is there and none beside them, and they are newer than what they were drawn from."""
    sources = [run.folder / name for name in (runs.MODEL, runs.METRICS, runs.per_image("test"))]
    newest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    drawn = {path.name: path.stat().st_mtime_ns for path in _drawn(run.folder)}
    return drawn.keys() == set(figure_names(run)) and all(time >= newest for time in drawn.values())


def _drawn(folder: Path) -> list[Path]:
    """The run's figures that are there."""
    return [path for name in _FIGURES if (path := folder / runs.FIGURES / name).exists()]


def figure_names(run: Run) -> list[str]:
    """The figures that this run has: by its data, its latents, and whether its test images were evaluated."""
    return [name for name, drawing in _FIGURES.items() if drawing.applies(run)]


def draw_run(options: Figures, *, say: Say) -> None:
    """Draws a run's figures again, from its files.

    Raises:
        ValueError: no run, a damaged one, or other data than it was trained on.
    """
    write_figures(open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir), say=say)


def write_figures(run: Run, *, say: Say) -> None:
    """Every figure that this run has, into its figures/, and those that it has no longer out of there.

    Weights, evaluation and random state stay as they are.

    Raises:
        ValueError: damaged files, or another process writes to the run.
    """
    with runs.locked(run.folder):
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
    """What a reader might look for in vain, and why."""
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
    """It was trained by a script, or its records came with it from Python."""
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
    """A run, and what several of its figures need of it, found once."""

    run: Run
    metrics: list[dict[str, Any]]

    @cached_property
    def vae(self) -> VAE:
        return evaluated_vae(self.run)

    @cached_property
    def x(self) -> Tensor:
        """(N, *E) the test images, as the model sees them."""
        return data.evaluation_images(self.run.splits, "test", self.run.evaluated_pixels)

    @cached_property
    def shown(self) -> Tensor:
        """Places of some test images, not sorted: the file may be, by class."""
        index = data.subset(len(self.x), _NUM_SHOWN)
        return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(_FIGURE_SEED))]

    @cached_property
    def display(self) -> Display:
        return display_of(self.run)

    @cached_property
    def encoded(self) -> tuple[Tensor, PosteriorMoments]:
        """Places of a subset of the test images, and their latents."""
        pixels = math.prod(self.run.splits.event_shape)
        index = data.subset(len(self.x), min(_MOST_LATENTS, max(_NUM_SHOWN, _LATENT_PIXELS // pixels)))
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            return index, encode(self.vae, self.x[index])

    @cached_property
    def use(self) -> Use:
        index, codes = self.encoded
        with seeded(_FIGURE_SEED, torch.device("cpu")):
            return use_of_latents(self.vae, self.x[index], codes)

    @cached_property
    def traversed(self) -> Use:
        """The same of the latents next to the image: the decoder may see no others."""
        return self.use._replace(values=self.use.values[: self.run.options.latent_dim])

    @cached_property
    def untrained_words(self) -> str:
        """What is to be said over a figure that decodes what the prior says."""
        return "" if _has_a_density(self.run) else f",\n{OF_AN_AUTOENCODER}"


class Use(NamedTuple):
    """How much each latent says of an image.

    Args:
        values: (L,).
        what: they are, in words.
        word: the same, short.
        unit: after a number.
        least: below it, a latent is called unused.
    """

    values: Tensor
    what: str
    word: str
    unit: str
    least: float


@torch.no_grad()
def use_of_latents(vae: VAE, x: Tensor, codes: PosteriorMoments) -> Use:
    """The mean KL of each latent where guide and prior are products of normals, else the variance of E[z_l | x].

    A latent of another guide or prior has no KL of its own in closed form, and of a deterministic guide it is infinite.

    Args:
        vae: the VAE.
        x: images (N, *E).
        codes: theirs.
    """
    prior = vae.prior()
    if bool((codes.scale == 0).any()):
        return Use(codes.mean.var(0, correction=0), "the variance of z_l", "variance", "", ACTIVE_VARIANCE)
    if normal_factors(prior) is not None and normal_factors(vae.posterior(x[:1])) is not None:
        kl = kl_by_latent(codes, prior)
        return Use(kl, "KL(q(z_l | x) || p(z_l)), the mean", "mean KL", " nats", UNUSED_NATS)
    variance = active_units(codes, compute_moments(prior).scale).mean
    what = "the variance of E[z_l | x] in variances of the prior, taken"
    return Use(variance, what, "variance", "", ACTIVE_VARIANCE)


# --- The figures ---


def _training_curves(scene: _Scene) -> Figure:
    try:
        of = " of the density of (level + u) / 256" if scene.run.pixels == "dequantized" else ""
        return plots.training_curves(
            scene.metrics,
            title=f"{scene.run.splits.name}: training{of}",
            autoencoder=not _has_a_density(scene.run),
        )
    except KeyError as error:
        raise ValueError(f"{scene.run.folder / runs.METRICS}: damaged: a record is missing {error}") from None


def _reconstructions(scene: _Scene) -> Figure:
    x = scene.x[scene.shown]
    decoded = scene.vae.likelihood(scene.vae.posterior(x).sample())
    rows = {"test image x": x, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    return plots.image_rows(
        {label: scene.display(images) for label, images in rows.items()},
        title=("Reconstructions, z ~ q(z | x)" if _has_a_density(scene.run) else "Reconstructions, z = z(x)")
        + scene.display.words,
    )


def _prior_samples(scene: _Scene) -> Figure:
    decoded = scene.vae.likelihood(scene.vae.prior().expand((_NUM_SAMPLES,)).sample())
    return samples_figure(scene.display, decoded.mean, decoded.sample(), autoencoder=not _has_a_density(scene.run))


def samples_figure(display: Display, means: Tensor, images: Tensor, *, autoencoder: bool = False) -> Figure:
    """Means E[x | z] beside draws x ~ p(x | z), for z ~ p(z). means, images: (N, *E).

    Of an autoencoder p(z) has no part in training, and no sample of it is the model's: the title says so.
    """
    of_model = "Samples from the prior, z ~ p(z)"
    of_decoder = f"No samples of a model: decoded draws of the prior, z ~ N(0, I),\n{OF_AN_AUTOENCODER}"
    return plots.image_grids(
        {"means E[x | z]": display(means), "images x ~ p(x | z)": display(images)},
        columns=math.ceil(math.sqrt(len(means))),
        title=(of_decoder if autoencoder else of_model) + display.words,
    )


def _interpolations(scene: _Scene) -> Figure:
    pairs = min(_NUM_PAIRS, len(scene.shown) // 2)
    ends = mean_or_draw(scene.vae.posterior(scene.x[scene.shown[: 2 * pairs]]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1)
    rows = {
        f"pair {i + 1}": scene.display(scene.vae.likelihood((1 - weight) * ends[i] + weight * ends[pairs + i]).mean)
        for i in range(pairs)
    }
    ends_in_words = "posterior means" if _has_a_density(scene.run) else "codes z(x)"
    title = f"E[x | z] on the line between the {ends_in_words} of two test images" + scene.display.words
    return plots.image_rows(rows, title=title)


def _traversals(scene: _Scene) -> Figure:
    use = scene.traversed
    most_used = use.values.argsort(descending=True)[: _num_traversed(use)].tolist()
    middle = _NUM_STEPS // 2
    steps = 3 * torch.arange(-middle, middle + 1) / middle
    place = int(scene.shown[0])
    z = mean_or_draw(scene.vae.posterior(scene.x[place : place + 1]))[0]
    images = decode_traversals(scene.vae, z, most_used, steps)
    labels = [f"z{latent}, {_few_digits(use.values[latent])}{use.unit}" for latent in most_used]
    rows = {label: scene.display(row) for label, row in zip(labels, images, strict=True)}
    where = "posterior mean" if _has_a_density(scene.run) else "code z(x)"
    dependent = "" if normal_factors(scene.vae.prior()) is not None else ", which may itself put nothing there"
    title = (
        f"E[x | z] as one latent moves, in scales of the prior{dependent};{_break(dependent)}"
        f"the others stay at the {where} of test image no. {place}\n"
        f"{_most_used_in_words(scene)}\n{_unused_in_words(scene)}"
    )
    return plots.image_rows(rows, columns=[f"{t:.1f}" for t in steps], title=title + scene.display.words)


def _most_used_in_words(scene: _Scene) -> str:
    use = scene.traversed
    count, all_of_them = _num_traversed(use), len(use.values)
    few = "most used" if count == 1 else f"{count} most used"
    which = "the latents" if count == all_of_them else f"the {few} of {all_of_them} latents"
    which += " next to the image" * (all_of_them < len(scene.use.values))
    return f"rows: {which}, by {use.what} over {_several(len(scene.encoded[0]), 'test image')}"


def _break(words: str) -> str:
    """Before what would make a line with these words too long."""
    return "\n" if words else " "


def _num_traversed(use: Use) -> int:
    """Rows: a latent that is not used moves nothing, but there is at least one."""
    return max(1, min(_NUM_SHOWN, int((use.values >= use.least).sum())))


def _unused_in_words(scene: _Scene) -> str:
    use = scene.traversed
    unused = int((use.values < use.least).sum())
    return f"unused latents, with a {use.word} below {use.least}{use.unit}: {unused} of {len(use.values)}"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _few_digits(nats: Tensor) -> str:
    return f"{nats:.2f}" if nats >= 0.1 else f"{nats:.3f}"


def _manifold(scene: _Scene) -> Figure:
    prior = scene.vae.prior()
    grid = latent_quantiles(prior, _MANIFOLD)
    x, y = grid.T.tolist()
    whose = "the prior's probability" if normal_factors(prior) is not None else "each latent's own prior probability"
    return plots.image_plane(
        scene.display(decode_plane(scene.vae, grid)),
        x=x,
        y=y,
        names=("z0", "z1"),
        title="E[x | z] over the plane of the two latents,\n"
        f"on a grid at equal steps of {whose}" + scene.untrained_words + scene.display.words,
    )


def _latents(scene: _Scene) -> Figure:
    index, codes = scene.encoded
    labels = scene.run.splits.labels.get("test")
    return latents_figure(
        codes,
        scene.use,
        scene.vae.prior(),
        classes=None if labels is None else labels[index],
        class_names=scene.run.splits.class_names,
        what="test image",
    )


def latents_figure(
    codes: PosteriorMoments,
    use: Use,
    prior: Any,
    *,
    what: str,
    classes: Tensor | None = None,
    class_names: tuple[str, ...] = (),
) -> Figure:
    """Posterior means in the two latents that are used most, of two in their own order, or in the only one.

    A normal prior is drawn by its circles, any other by draws, from torch's global generator.

    Args:
        codes: of N images.
        use: how much each latent is used.
        prior: p(z), event (L,).
        what: one of the images, in words.
        classes: (N,) int64, where they are known.
        class_names: the word for each class.
    """
    L = codes.mean.shape[1]
    order = list(range(L)) if L <= 2 else use.values.argsort(descending=True)[:2].tolist()
    means = "Codes z(x)" if bool((codes.scale == 0).any()) else "Posterior means"
    word = use.word.removeprefix("mean ")
    names = [f"z{latent}, {word} {_few_digits(use.values[latent])}{use.unit}" for latent in order]
    points = codes.mean[:, order].numpy()
    title = f"{means} of {_several(len(points), what)}"
    colored: dict[str, Any] = {
        "classes": None if classes is None else classes.numpy(),
        "class_names": class_names,
        "prior": _prior_beside(prior, order),
    }
    if L == 1:
        return plots.latent_line(points[:, 0], name=names[0], title=title, **colored)
    if L > 2:
        title += f",\nin the two of {L} latents with the highest {use.word}"
    return plots.latent_plane(points, names=(names[0], names[1]), title=title, **colored)


def _prior_beside(prior: Any, order: list[int]) -> plots.Scales | Any:
    """Mean and scale of these latents where the prior is a product of normals, else draws of them (n, R)."""
    if normal_factors(prior) is None:
        return sample_latents(prior, _PRIOR_SHOWN)[:, order].cpu().numpy()
    p = compute_moments(prior)
    return plots.Scales(p.mean[order].tolist(), p.scale[order].tolist())


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
        title=f"{scene.run.splits.name}: log p(x) of {_several(len(values), 'test image')}",
        examples=_extremes(scene, stored) if _has_images(scene.run) else None,
    )


def _extremes(scene: _Scene, stored: PerImage) -> dict[str, tuple[Any, list[str]]]:
    """The images of the highest and of the lowest bound, and below each its nats and its place in the split."""
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
        title=f"The bound L_s on log p(x) by its number of importance samples s\n"
        f"{_several(len(x), 'test image')}, means over {num_particles:,} samples an image; "
        "bars are standard errors over images",
    )


def _mean_and_stderr(values: Tensor) -> tuple[Any, Any]:
    """(K, N) -> the mean over N and its standard error, each (K,); no error of one image."""
    estimates = [Estimate.from_values(row, 1) for row in values]
    stderr = [0.0 if math.isnan(e.stderr) else e.stderr for e in estimates]
    return [e.mean for e in estimates], stderr


def _round_numbers() -> list[int]:
    """1, 2, 5, 10, ... up to the most particles."""
    numbers = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    return [number for number in numbers if number <= _MOST_PARTICLES]


def _affordable_particles(vae: VAE, num_images: int) -> int:
    """The largest round number of particles, from 10 on, for which the decoder computes no more than it may.

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
