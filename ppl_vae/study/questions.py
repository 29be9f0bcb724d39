"""The study's questions: for each its figures, its tables, and the fixed paragraph that says how to read them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppl_vae import runs
from ppl_vae.evidence.estimate import INDISTINCT, Estimate
from ppl_vae.reports.page.blocks import Section, picture, table, text, true_minus
from ppl_vae.reports.text.pages import CAPTIONS, COMPARED_PICTURES, NOT_RANKED, QUESTIONS
from ppl_vae.study.plan import name_run, remedy_names, sweep_name, varied_names
from ppl_vae.study.results import Difference, StudyNumbers

Cell = Estimate | Difference | str | float | int | None
Row = list[Cell]

_TWO_DIGITS = 3.55  # an error whose digits are below it has two of them. Source: the Particle Data Group's rule


def format_mean(value: Estimate | Difference | None, *, scale: float = 1.0, signed: bool = False) -> str | None:
    """mean ± stderr, with one or two digits of the error; None where nothing is known.

    >>> format_mean(Estimate(-85.118, 0.217))
    '-85.12 ± 0.22'
    """
    if value is None:
        return None
    mean, stderr = scale * value.mean, abs(scale) * value.stderr
    sign = "+" if signed and mean > 0 else ""
    if not stderr or not math.isfinite(stderr):
        return f"{sign}{mean:.4g}"
    power = math.floor(math.log10(stderr))
    decimals = (1 if stderr / 10**power < _TWO_DIGITS else 0) - power
    if decimals > 6:
        return f"{sign}{mean:.3g} ± {stderr:.1g}"
    decimals = max(0, decimals)
    return f"{sign}{round(mean, decimals) + 0.0:,.{decimals}f} ± {stderr:,.{decimals}f}"


def _format_share(value: Estimate | None) -> str | None:
    """A share with its error, as a percentage."""
    return None if value is None else f"{format_mean(value, scale=100.0)}%"


def _format_cell(value: Cell) -> str | float | int | None:
    """A cell of a table: estimates with their errors, and differences with their signs and what they say."""
    if isinstance(value, Difference):
        remark = NOT_RANKED if value.ranks_log_likelihood is False else ""
        remark = INDISTINCT if value.lower <= 0 <= value.upper else remark
        value = f"{format_mean(value, signed=True)}" + (f" ({remark})" if remark else "")
    value = format_mean(value) if isinstance(value, Estimate) else value
    return true_minus(value) if isinstance(value, str) else value


def _make_table(name: str, columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """A table without columns that are empty in every row; nothing if there is no row. ``name``: of its caption."""
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    cells = [[_format_cell(row[k]) for k in kept] for row in rows]
    return [table([columns[k] for k in kept], cells, CAPTIONS[name])] if rows else []


def _make_section(anchor: str, *parts: Sequence[str], **numbers: float) -> Section:
    title, paragraphs = QUESTIONS[anchor]
    words = text(paragraphs.format(**numbers) if numbers else paragraphs)
    return Section(title, [words, *(block for part in parts for block in part)], anchor=anchor)


@dataclass(frozen=True)
class PageSource:
    """What the page is made of: the numbers, and the study's folder with its pictures and figures."""

    study: StudyNumbers
    folder: Path

    def show_figure(self, name: str) -> list[str]:
        """The figure with its caption, if it was drawn."""
        png = self.read(f"{runs.FIGURES}/{name}.png")
        return [] if png is None else [picture(png, CAPTIONS[name], CAPTIONS[name])]

    def read_picture(self, run: str, name: str) -> bytes | None:
        """A run's picture by its name, if it exists."""
        found = self.study.runs.get(run)
        return None if found is None else self.read(found.pictures.get(name))

    def read_originals(self, dataset: str) -> tuple[str, bytes | None]:
        """The test images of a data set that are shown, with their name."""
        return "test images", self.read(self.study.data[dataset].originals)

    def read(self, path: str | None) -> bytes | None:
        """The bytes of a file in the study's folder, if it exists."""
        place = None if path is None else self.folder / path
        return place.read_bytes() if place is not None and place.is_file() else None


def _stack_strips(named: Sequence[tuple[str, bytes | None]], caption: str) -> list[str]:
    """Strips of one width below each other, named from the top in the caption; nothing for fewer than two."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    images = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB")) for _, strip in known]
    gap = np.full((2, *images[0].shape[1:]), 128, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.concatenate([part for image in images for part in (image, gap)][:-1])).save(out, format="png")
    words = CAPTIONS["strips"].format(names="; ".join(name for name, _ in known), caption=caption)
    return [picture(out.getvalue(), words, words)]


# --- The questions ---


def explain_beta(source: PageSource) -> Section:
    """Why is the regularizer troublesome, and where does the likelihood peak along beta?"""
    study = source.study
    rows: list[Row] = []
    for run in (run for dataset in study.datasets for run in study.find_sweep(dataset)):
        beta = f"{run.beta:g}" + (" *" if run.reliable is False else "")
        bounds = [run.kl, format_mean(run.reconstruction, scale=-1), run.elbo, run.log_likelihood]
        rows.append(
            [run.dataset, beta, *bounds, *study.find_differences("beta", run.name), run.active, run.implied_beta]
        )
    columns = ["data", "beta", "rate", "distortion", "ELBO", "L_S", "ELBO - that of beta = 1", "L_S - that of beta = 1"]
    return _make_section(
        "beta",
        *(_show_sweep(source, dataset, name) for dataset in study.datasets for name in ("reconstructions", "samples")),
        source.show_figure("rate-distortion"),
        source.show_figure("bounds"),
        _make_table("beta", [*columns, "active", "implied beta"], rows),
    )


def _show_sweep(source: PageSource, dataset: str, name: str) -> list[str]:
    """The pictures of that name along beta, below the test images."""
    sweep = source.study.find_sweep(dataset)
    named = [(f"beta = {run.beta:g}", source.read_picture(run.name, name)) for run in sweep]
    return _stack_strips([source.read_originals(dataset), *named], CAPTIONS["sweep"].format(dataset=dataset, name=name))


def explain_check(source: PageSource) -> Section:
    """How do I check that the regularization worked?"""
    study = source.study
    rows: list[Row] = []
    for dataset in study.datasets:
        for run in study.find_sweep(dataset) + study.find_runs([name_run(dataset, "autoencoder")]):
            match, model = run.prior_match, run.model if run.is_autoencoder else run.beta
            assert match is not None
            information = format_mean(match.mutual_information)
            if match.saturated:
                information = f"{information} (cap)"
            distances: Row = [match.largest_distance, match.classifier, _format_share(match.holes)]
            rows.append([dataset, model, run.active, *distances, information, match.marginal_kl])
    columns = ["data", "beta", "active", "largest KS", "classifier", "holes", "mutual information", "KL to prior"]
    return _make_section("check", _make_table("check", columns, rows))


def explain_blur(source: PageSource) -> Section:
    """Why do VAEs blur, and autoencoders too?"""
    pictures: list[str] = []
    for dataset in source.study.datasets:
        models = {"the VAE": sweep_name(dataset), "the autoencoder": name_run(dataset, "autoencoder")}
        for name, words in COMPARED_PICTURES.items():
            named = [source.read_originals(dataset)] if name == "reconstructions" else []
            named += [(model, source.read_picture(run, name)) for model, run in models.items()]
            pictures += _stack_strips(named, f"{dataset}. {words}")
    return _make_section("blur", pictures, _tabulate_error(source.study), _tabulate_samples(source.study))


def _tabulate_error(study: StudyNumbers) -> list[str]:
    """Reconstructions of the VAE and the autoencoder, by the number of latents."""
    rows: list[Row] = []
    for dataset in study.datasets:
        names = [
            *varied_names(study.settings, dataset),
            *(name_run(dataset, f"autoencoder{end}") for end in ("-2", "")),
        ]
        for run in sorted(study.find_runs(names), key=lambda run: (run.is_autoencoder, run.options["latent_dim"])):
            parts = run.blur
            if parts is not None:
                noise = [None, None] if run.is_autoencoder else [parts.posterior_noise, parts.bias]
                cells = [run.options["latent_dim"], run.reconstruction, parts.at_mean, parts.error, *noise]
                rows.append([dataset, run.model, *cells])
    columns = ["data", "model", "latents", "reconstruction, nats", "power", "squared error"]
    return _make_table("errors", [*columns, "posterior noise", "the rest"], rows)


def _tabulate_samples(study: StudyNumbers) -> list[str]:
    """Samples of the prior and of densities that were fitted to codes."""
    rows: list[Row] = []
    for dataset in study.datasets:
        for run in study.find_runs([sweep_name(dataset), name_run(dataset, "autoencoder")]):
            sources = {"prior": run.samples} | {f"fitted {word}": each for word, each in run.densities.items()}
            for name, each in sources.items():
                rows.append([dataset, run.model, name, each.sharpness, each.classifier])
        real = study.data[dataset].real
        rows.append([dataset, "other real images", None, real.sharpness, real.classifier])
    return _make_table("samples", ["data", "model", "codes from", "power", "classifier"], rows)


def explain_averaging(source: PageSource) -> Section:
    """What does averaging over pixels do?"""
    study = source.study
    pictures: list[str] = []
    rows: list[Row] = []
    for dataset in study.datasets:
        compared = {"beta = 1": sweep_name(dataset), "beta = D": name_run(dataset, "beta-of-mean")}
        named = [(words, source.read_picture(name, "reconstructions")) for words, name in compared.items()]
        caption = CAPTIONS["averaged-pictures"].format(dataset=dataset)
        pictures += _stack_strips([source.read_originals(dataset), *named], caption)
        for run in [*study.find_sweep(dataset), *study.find_runs([compared["beta = D"]])]:
            directions = study.count_directions(run)
            agrees = "yes" if (directions == 0) == (run.active == 0) else "no"
            cells: Row = [run.active, _format_share(run.variation), run.kl, run.reconstruction, agrees]
            rows.append([dataset, run.beta, directions, *cells])
    columns = ["data", "beta", "directions above", "active", "variation", "KL", "reconstruction", "as predicted"]
    return _make_section("averaging", source.show_figure("active"), pictures, _make_table("averaging", columns, rows))


def explain_collapse(source: PageSource) -> Section:
    """What helps against posterior collapse?"""
    study = source.study
    rows: list[Row] = []
    for remedy, name in remedy_names(study.datasets[0]).items():
        run, (_, gain) = study.runs[name], study.find_differences("collapse", name)
        rows.append([remedy, run.active, run.kl, run.elbo, run.log_likelihood, gain])
    columns = ["remedy", "active", "KL", "ELBO", "L_S", "L_S - that of none"]
    return _make_section("collapse", _make_table("collapse", columns, rows))


def explain_latents(source: PageSource) -> Section:
    """How many latents?"""
    study = source.study
    rows: list[Row] = []
    for run in study.find_runs(varied_names(study.settings, study.datasets[0])):
        _, gain = study.find_differences("latents", run.name)
        rows.append([run.options["latent_dim"], run.active, run.elbo, run.log_likelihood, gain])
    columns = ["latents", "active", "ELBO", "L_S", "L_S - that of the base"]
    return _make_section("latents", _make_table("latents", columns, rows))


def explain_labels(source: PageSource) -> Section | None:
    """What is a label worth? None without semi-supervised runs."""
    study = source.study
    rows: list[Row] = []
    for name, run in study.labelled.items():
        _, gain = study.find_differences("labels", name)
        rows.append([run.labels, _format_share(run.classifier), _format_share(run.density), run.log_likelihood, gain])
    columns = ["labels", "q(y | x) is right", "p(y | x) is right", "L_S", "L_S - that of the base"]
    pictures = [(f"{run.labels:,} labels", source.read(run.picture)) for run in study.labelled.values()]
    strips = [picture(png, words, words) for words, png in pictures if png is not None]
    return _make_section("labels", _make_table("labels", columns, rows), strips) if rows else None


def explain_method(source: PageSource) -> Section:
    """How was it measured?"""
    study, settings = source.study, source.study.settings
    rows: list[Row] = [
        [word, each.description, each.train, each.validation, each.test, each.floor]
        for word, each in study.data.items()
    ]
    described = _make_table("data", ["data", "what it is", "train", "validation", "test", "floor"], rows)
    numbers = {name: seconds / 60 for name, seconds in study.seconds.items()}
    numbers |= {name: getattr(settings, name) for name in ("epochs", "num_particles", "images")}
    return _make_section("method", described, **numbers)


EXPLANATIONS: tuple[Callable[[PageSource], Section | None], ...] = (
    explain_beta,
    explain_check,
    explain_blur,
    explain_averaging,
    explain_collapse,
    explain_latents,
    explain_labels,
    explain_method,
)
