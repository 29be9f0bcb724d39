"""The study's report: what was measured, in pictures and in words, as one HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from ppl_vae import build, report, runs
from ppl_vae.conditional import Conditional
from ppl_vae.experiment.run_report import true_minus
from ppl_vae.report import Block, Explorer, Picture, Section, Slider, SliderStop, Table, Text
from ppl_vae.study.answers import Answer, answers
from ppl_vae.study.figures import Drawn, draw
from ppl_vae.study.words import count, data_name, listed, number, percent_plus_minus, plus_minus, several, signed

STUDY, REPORT, PICTURES = "study.json", "report.html", "pictures"

Study = Mapping[str, Any]
Row = Mapping[str, Any]

_EXTENT, _AUTOENCODER_SHARE = 3.0, 0.99


def write_report(folder: Path) -> Path:
    """Composes FOLDER/report.html of study.json and the pictures beside it, and writes the figures as files too.

    Runs no model; of the runs it reads only the weights of decoders with two latents, which the page draws with.

    Args:
        folder: of the study.

    Returns:
        The page.

    Raises:
        ValueError: no study, or a damaged one.
    """
    study = runs.read_json(folder / STUDY)
    try:
        drawn = draw(study)
        html = compose(study, folder, drawn)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / STUDY}: damaged: {type(error).__name__}, {error}") from error
    figures = folder / runs.FIGURES
    figures.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        runs.write_bytes(figures / f"{name}.png", figure.light)
        runs.write_bytes(figures / f"{name}-dark.png", figure.dark)
    runs.write_bytes(folder / REPORT, html.encode())
    return folder / REPORT


def compose(study: Study, folder: Path, drawn: Mapping[str, Drawn]) -> str:
    """The page as a string.

    Args:
        study: study.json.
        folder: where its pictures and runs are.
        drawn: its figures by name.
    """
    source = _Source(study, folder, drawn, {answer.key: answer for answer in answers(study)})
    made = [
        _short_answers(source),
        _explore(source),
        _mean(source),
        _sweep(source),
        _collapse(source),
        _autoencoder(source),
        _regularization(source),
        _architectures(source),
        _scale_maps(source),
        _method(source),
    ]
    sections = [_typeset(section) for section in made if section.blocks]
    names = listed([data_name(word) for word in study["datasets"]])
    missing = [section.title for section in made if not section.blocks]
    quick = " This is the quick study: fewer and shorter runs, so its numbers are rough." * (study["size"] == "quick")
    left_out = f" Not measured in it: {'; '.join(missing)}." if missing else ""
    return report.page(
        "What a VAE does and why",
        sections,
        subtitle=f"{several(len(study['runs']), 'model')} trained on {names}, to answer what everyone who trains one "
        f"asks. Every number below was measured by one command.{quick}{left_out}",
    )


class _Source(NamedTuple):
    """What the sections are made of."""

    study: Study
    folder: Path
    drawn: Mapping[str, Drawn]
    answers: Mapping[str, Answer]

    def long(self, *keys: str) -> list[Block]:
        """What the answers say at length."""
        found = [self.answers[key] for key in keys if key in self.answers]
        return [Text("\n\n".join([answer.short, *answer.long])) for answer in found]

    def figure(self, name: str, caption: str, alt: str) -> list[Block]:
        """A figure, where there is one."""
        if name not in self.drawn:
            return []
        light, dark = self.drawn[name]
        return [Picture(light, caption, alt, dark_png=dark)]

    def parts(self, section: str) -> dict[str, Any]:
        """A section of study.json by data set."""
        of_section = self.study.get(section) or {}
        return {word: of_section[word] for word in self.study["datasets"] if of_section.get(word)}

    def picture(self, path: str | None) -> bytes | None:
        """The bytes of a picture file of the study."""
        where = None if path is None else self.folder / path
        return where.read_bytes() if where is not None and where.is_file() else None

    def picture_of(self, run: str | None, name: str) -> bytes | None:
        """A run's picture by its name."""
        record = self.study["runs"].get(run) or {}
        return self.picture((record.get("pictures") or {}).get(name))

    def originals(self, dataset: str) -> bytes | None:
        """The test images that are shown of a data set."""
        return self.picture(((self.study.get("data") or {}).get(dataset) or {}).get("originals"))

    def tile(self, dataset: str) -> tuple[int, int]:
        """Height and width of one image."""
        _, height, width = self.study["data"][dataset]["image_shape"]
        return height, width


# --- Words and tables ---


def _typeset(section: Section) -> Section:
    """With a true minus before numbers, in text, captions and tables."""
    return replace(section, blocks=[_with_minus(block) for block in section.blocks])


def _with_minus(block: Any) -> Any:
    if isinstance(block, Table):
        rows = [[true_minus(cell) if isinstance(cell, str) else cell for cell in row] for row in block.rows]
        return replace(block, rows=rows)
    if isinstance(block, Slider):
        return replace(block, positions=[_stop_with_minus(stop) for stop in block.positions])
    fields = {name: getattr(block, name) for name in ("text", "caption") if hasattr(block, name)}
    return replace(block, **{name: true_minus(words) for name, words in fields.items()})


def _stop_with_minus(stop: SliderStop) -> SliderStop:
    return replace(stop, numbers={name: true_minus(words) for name, words in stop.numbers.items()})


def _cell(value: Any) -> str | None:
    """A mean with its error."""
    return None if not value or value.get("mean") is None else plus_minus(value)


def _paired_cell(value: Any) -> str | None:
    return None if not value or value.get("mean") is None else signed(value)


def _share_cell(value: Any) -> str | None:
    return None if not value or value.get("mean") is None else percent_plus_minus(value)


def _number_cell(value: float | None) -> str | None:
    return None if value is None else number(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, highlight: Any = None) -> list[Block]:
    """Without the columns of which nothing is known; no table of nothing."""
    kept = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    if not rows:
        return []
    shown = [[row[k] for k in kept] for row in rows]
    return [Table([columns[k] for k in kept], shown, caption, highlight=highlight)]


def _stacked(strips: Iterable[bytes | None]) -> bytes | None:
    """Strips below each other, with a line of background between them, as wide as the widest."""
    images = [Image.open(io.BytesIO(strip)) for strip in strips if strip is not None]
    if not images:
        return None
    width, gap = max(image.width for image in images), 2
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    mode = "RGB" if any(image.mode == "RGB" for image in images) else "L"
    canvas, top = Image.new(mode, (width, height), 128 if mode == "L" else (128, 128, 128)), 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap
    out = io.BytesIO()
    canvas.save(out, format="png", optimize=True)
    return out.getvalue()


def _strips(named: Sequence[tuple[str, bytes | None]], caption: str, what: str) -> list[Block]:
    """Strips below each other, named in the caption from the top."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    png = _stacked(strip for _, strip in known)
    assert png is not None
    from_the_top = f"From the top: {listed([name for name, _ in known])}. {caption}"
    return [Picture(png, from_the_top, f"{what}: {listed([name for name, _ in known])}", dark_png=png)]


# --- The beginning ---

_PLACES = {
    "regularizer": "beta",
    "check": "prior",
    "blur": "blur",
    "averaging": "mean",
    "peak": "beta",
    "collapse": "collapse",
    "architectures": "architectures",
    "scale_maps": "scales",
}


def _short_answers(source: _Source) -> Section:
    blocks: list[Block] = [
        report.Answer(answer.question, f"{answer.short} [How it was found](#{_PLACES[key]}).")
        for key, answer in source.answers.items()
    ]
    return Section("The answers, in short", blocks, anchor="answers")


def _explore(source: _Source) -> Section:
    blocks: list[Block] = []
    for entry in source.study.get("explorers") or ():
        explorer = _explorer(source, entry)
        if explorer is not None:
            blocks.append(explorer)
    if blocks:
        words = (
            "Two latents are few, but they can be seen whole. Each point below is a test image, where the encoder puts "
            "it; the picture is what the decoder makes of the place under the pointer. The network itself runs in this "
            "page."
        )
        blocks.insert(0, Text(words))
    return Section("Move through a latent space", blocks, anchor="explore")


def _explorer(source: _Source, entry: Row) -> Explorer | None:
    """None where the run's weights are gone, or its decoder is one that a page cannot draw."""
    run_dir = source.folder / entry["folder"]
    if not (run_dir / runs.MODEL).exists():
        return None
    try:
        decoder = report.decoder_weights(cast(Conditional, build.load(run_dir).likelihood))
    except ValueError:
        return None
    codes = entry["codes"]
    points = np.array([[code[0], code[1]] for code in codes], dtype=np.float32).reshape(-1, 2)
    classes = [code[2] for code in codes if len(code) > 2 and code[2] is not None]
    labels = np.array(classes, dtype=np.uint8) if codes and len(classes) == len(codes) else None
    names = source.study["data"][source.study["runs"][entry["run"]]["dataset"]].get("classes") or ()
    return Explorer(
        decoder,
        _of_autoencoder_plane(points) if entry["autoencoder"] else _of_vae_plane(points),
        extent=_extent(points) if entry["autoencoder"] else _EXTENT,
        points=points,
        labels=labels,
        label_names=tuple(map(str, names)),
    )


def _of_vae_plane(points: Any) -> str:
    spread = ""
    if len(points) > 1:
        scales = [number(float(scale), 2) for scale in points.std(axis=0)]
        spread = f" Their spread is {listed(scales)}; the prior's is 1 in both."
    return (
        f"A VAE with two latents: the prior asks the codes to lie around the origin.{spread} Neighbors are alike; "
        "between classes the decoder draws what is neither."
    )


def _of_autoencoder_plane(points: Any) -> str:
    reach = np.abs(points).max() if len(points) else 0.0
    return (
        "The plain autoencoder with two latents, on its own scale: its codes reach as far as "
        f"{number(float(reach))}; draws of a standard normal distribution hardly pass {number(_EXTENT)}. Nothing asked "
        "the codes to lie together, and where there are none the decoder was never trained: those are the holes."
    )


def _extent(points: Any) -> float:
    """What holds nearly all of the codes, in both directions."""
    if not len(points):
        return _EXTENT
    return max(_EXTENT, float(np.ceil(np.quantile(np.abs(points), _AUTOENCODER_SHARE))))


# --- (a) ---


def _mean(source: _Source) -> Section:
    parts = source.parts("mean")
    if not parts:
        return Section("Sum or mean over pixels", [])
    blocks = source.long("averaging")
    blocks += source.figure(
        "spectrum",
        "Eigenvalues of the training images' covariance, each in units of the likelihood's noise. A direction is worth "
        "its price where it is above the dashed line: count those above that of a sum, and above that of a mean.",
        "Eigenvalues by rank on logarithmic axes, with the thresholds of sum and mean",
    )
    blocks += source.figure(
        "active",
        "Active latents along beta, beside what the eigenvalues predict. Look at where both reach zero, and at the "
        "cross: the mean over pixels, at the beta that it amounts to.",
        "Active latents against beta, measured and predicted",
    )
    for dataset, part in parts.items():
        by_word = {row["condition"]: row for row in part["conditions"]}
        named = [("test images", source.originals(dataset))]
        named += [
            (words, source.picture_of((by_word.get(word) or {}).get("run"), "reconstructions"))
            for word, words in _REDUCTIONS.items()
        ]
        blocks += _strips(named, f"{data_name(dataset)}: same network, same training.", "Reconstructions")
        sweep = [row for row in part["conditions"] if row["condition"] == "beta"]
        named_runs = {row["run"] for row in part["conditions"] if row["condition"] != "beta"}
        shown = [by_word[word] for word in ("sum", "mean", "beta-of-mean") if word in by_word]
        shown += [row for row in sweep if row["run"] not in named_runs]
        rows = [
            [
                "mean over pixels" if row["condition"] == "mean" else "sum",
                f"{row['beta']:g}",
                _number_cell(row["threshold"]),
                row["predicted_live"],
                row["active"],
                _share_cell(row["variation"]),
                _cell(row["kl"]),
                _cell(row["reconstruction"]),
                None if row["as_predicted"] is None else "yes" if row["as_predicted"] else "no",
            ]
            for row in shown
        ]
        columns = ["loss", "beta", "threshold", "directions above", "active", "variation", "KL", "reconstruction"]
        caption = (
            f"{data_name(dataset)}. Variation: how much reconstructions differ between images, as a share of what the "
            "images do; at zero they are all one picture. As predicted: whether all latents died exactly where no "
            "eigenvalue is above the threshold."
        )
        places = [k for k, row in enumerate(shown) if row["condition"] == "mean"]
        blocks += _table([*columns, "as predicted"], rows, caption, places)
    return Section("Sum or mean over pixels", blocks, anchor="mean")


_REDUCTIONS = {"sum": "the sum", "mean": "the mean over pixels", "beta-of-mean": "the sum, beta = the number of pixels"}


# --- (b) ---


def _sweep(source: _Source) -> Section:
    parts = source.parts("sweep")
    if not parts:
        return Section("Along beta", [])
    blocks: list[Block] = []
    for dataset, part in parts.items():
        blocks += _slider(source, dataset, part["rows"])
    blocks += source.long("regularizer")
    blocks += source.figure(
        "rate-distortion",
        "Each point is a model, with its beta. Going left, codes tell less and reconstructions cost more. "
        "The sum of both axes is minus the ELBO: all points of the dotted line have the best one.",
        "Distortion against rate along beta",
    )
    blocks += source.long("peak")
    blocks += source.figure(
        "bounds",
        "What each beta gains or loses on beta = 1, on the same test images; bars are standard errors of the paired "
        "difference, small dots are further seeds, hollow marks are estimates that have not settled. Look at where "
        "each "
        "curve peaks.",
        "Differences of log p(x) and ELBO to beta = 1, along beta",
    )
    for dataset, part in parts.items():
        blocks += _sweep_table(dataset, part)
    return Section("Along beta", blocks, anchor="beta")


def _slider(source: _Source, dataset: str, rows: Sequence[Row]) -> list[Block]:
    stops = []
    for row in rows:
        pictures = [(name, source.picture_of(row["run"], name)) for name in ("reconstructions", "samples")]
        known = [(name, png) for name, png in pictures if png is not None]
        if len(known) == len(pictures):
            stops.append(SliderStop(f"{row['beta']:g}", known, _numbers(row)))
    originals = source.originals(dataset)
    if not stops or originals is None:
        return []
    labels = [stop.label for stop in stops]
    caption = (
        f"{data_name(dataset)}. Move beta and compare both rows with the test images: where are reconstructions exact, "
        "where are samples of the prior like the data, and from where on are all pictures the same?"
    )
    start = labels.index("1") if "1" in labels else len(labels) // 2
    return [Slider("beta", stops, caption, fixed=("test images", originals), start=start)]


def _numbers(row: Row) -> dict[str, str]:
    values = {
        "log p(x), nats": _cell(row["log_likelihood"]),
        "ELBO, nats": _cell(row["elbo"]),
        "rate, nats": _cell(row["rate"]),
        "distortion, nats": _cell(row["distortion"]),
        "active latents": None if row["active"] is None else count(row["active"]),
    }
    return {name: value or "–" for name, value in values.items()}


def _sweep_table(dataset: str, part: Row) -> list[Block]:
    columns = ["beta", "rate", "distortion", "ELBO", "log p(x)", "log p(x) - that of beta = 1", "gap", "active"]
    rows = [
        [
            f"{row['beta']:g}" + ("" if row["reliable"] is not False else " *"),
            _cell(row["rate"]),
            _cell(row["distortion"]),
            _cell(row["elbo"]),
            _cell(row["log_likelihood"]),
            _paired_cell(row["difference_log_likelihood"]),
            _cell(row["gap"]),
            row["active"],
            _cell(row.get("implied_beta")),
        ]
        for row in part["rows"]
    ]
    peak = ((part.get("peaks") or {}).get("log_likelihood") or {}).get("beta")
    places = [k for k, row in enumerate(part["rows"]) if row["beta"] == peak]
    caption = (
        f"{data_name(dataset)}, nats an image ± standard error over images; differences are paired. The row of the "
        "highest log p(x) is marked. Gap: log p(x) - ELBO, at least. Implied beta: read off the finished weights."
    )
    if any(row["reliable"] is False for row in part["rows"]):
        caption += " *: the importance estimate has not settled."
    return _table([*columns, "implied beta"], rows, caption, places)


# --- (c) ---


def _collapse(source: _Source) -> Section:
    part = source.study.get("collapse") or {}
    blocks = source.long("collapse")
    blocks += source.figure(
        "remedies",
        "Active latents after the same training, by what was done against collapse.",
        "Bars of active latents by network and remedy",
    )
    rows = [
        [
            network,
            row["remedy"],
            row["active"],
            _cell(row["kl"]),
            _cell(row["elbo"]),
            _cell(row["log_likelihood"]),
            _paired_cell(row["difference_log_likelihood"]),
        ]
        for network, of_network in (part.get("networks") or {}).items()
        for row in of_network["rows"]
    ]
    columns = ["network", "remedy", "active", "KL", "ELBO", "log p(x)", "log p(x) - that of none"]
    caption = f"{data_name(part['dataset'])}, nats an image; differences are paired." if rows else ""
    blocks += _table(columns, rows, caption)
    return Section("Against collapse: warm-up and free bits", blocks if rows else [], anchor="collapse")


# --- (d) ---


def _autoencoder(source: _Source) -> Section:
    parts = source.parts("autoencoder")
    if not parts:
        return Section("Why it is blurry: VAE and autoencoder", [])
    blocks = source.long("blur")
    for dataset, part in parts.items():
        names = {key: (part.get(key) or {}).get("run") for key in ("vae", "autoencoder")}
        blocks += _strips(
            [
                ("test images", source.originals(dataset)),
                ("the VAE's reconstructions", source.picture_of(names["vae"], "reconstructions")),
                ("the autoencoder's", source.picture_of(names["autoencoder"], "reconstructions")),
            ],
            f"{data_name(dataset)}: look at edges and thin strokes.",
            "Reconstructions",
        )
        blocks += _strips(
            [
                ("samples of the VAE's prior, two rows", source.picture_of(names["vae"], "samples")),
                (
                    "the autoencoder's decoder at the same draws, two rows",
                    source.picture_of(names["autoencoder"], "samples"),
                ),
                (
                    "at draws of a normal distribution fitted to its codes, two rows",
                    source.picture_of(names["autoencoder"], "fitted_samples"),
                ),
            ],
            f"{data_name(dataset)}: which of them could be data?",
            "Samples",
        )
        blocks += _strips(
            [
                ("the VAE's, four rows", source.picture_of(names["vae"], "interpolations")),
                ("the autoencoder's, four rows", source.picture_of(names["autoencoder"], "interpolations")),
            ],
            f"{data_name(dataset)}: straight lines between the codes of two test images. Look at the middle.",
            "Interpolations",
        )
    blocks += source.figure(
        "sharpness",
        "Left: high-frequency power of reconstructions, the test images' being one. Right: Fréchet distance between "
        "decoded draws and test images in their principal components, less is better; the line is what other real "
        "images "
        "have.",
        "Bars of sharpness and of samples' distance",
    )
    blocks += source.figure(
        "blur",
        "The squared error of one drawn reconstruction, in parts that add up: what an autoencoder of as many latents "
        "has "
        "already, the noise of the posterior, and the rest.",
        "Stacked bars of the parts of the error",
    )
    blocks += _quality_table(parts)
    blocks += _latents_table(parts)
    return Section("Why it is blurry: VAE and autoencoder", blocks, anchor="blur")


def _quality_table(parts: Mapping[str, Any]) -> list[Block]:
    rows: list[list[Any]] = []
    for dataset, part in parts.items():
        for key, name in (("vae", "VAE"), ("autoencoder", "autoencoder")):
            of = part.get(key) or {}
            samples, fitted = of.get("samples") or {}, of.get("fitted_samples") or {}
            rows.append(
                [
                    data_name(dataset),
                    name,
                    _cell(of.get("reconstruction")),
                    _cell(of.get("sharpness")),
                    _cell(of.get("squared_error")),
                    _cell(samples.get("frechet")),
                    _cell(samples.get("classifier")),
                    _cell(fitted.get("frechet")),
                ]
            )
        floor = part.get("floor") or {}
        real = [_cell(floor.get("sharpness")), None, _cell(floor.get("frechet")), _cell(floor.get("classifier")), None]
        rows.append([data_name(dataset), "other real images", None, *real])
    columns = ["data", "model", "reconstruction, nats", "sharpness", "squared error", "samples: Fréchet"]
    caption = (
        "Reconstructions and samples. The autoencoder's nats are of its reconstructions, never a log-likelihood. "
        "Classifier: none where samples cannot be told from real images, one where they always can."
    )
    return _table([*columns, "samples: classifier", "fitted: Fréchet"], rows, caption)


def _latents_table(parts: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            "autoencoder" if row["posterior"] == "delta" else "VAE",
            row["latent_dim"],
            _cell(row.get("sharpness")),
            _cell(row.get("error")),
            _cell(row.get("posterior_noise")),
            _cell(row.get("bias")),
        ]
        for part in parts.values()
        for row in part.get("latents") or ()
    ]
    caption = (
        "Sharpness and squared error a pixel by the number of latents. A short code leaves more open: look at what the "
        "autoencoder, which has no noise, loses with it."
    )
    return _table(["model", "latents", "sharpness", "error", "posterior noise", "the rest"], rows, caption)


# --- (e) ---


def _regularization(source: _Source) -> Section:
    parts = source.parts("regularization")
    if not parts:
        return Section("Was the regularization successful?", [])
    blocks = source.long("check")
    blocks += source.figure(
        "aggregate",
        "How far all codes together are from the prior, along beta; dashed: the autoencoder. The first three should be "
        "low and the last, what codes tell about images, should not be zero. It cannot exceed the logarithm of the "
        "number "
        "of images.",
        "Four measures of codes against prior, along beta",
    )
    for dataset in parts:
        run = (((source.study.get("sweep") or {}).get(dataset) or {}).get("reference")) or None
        holes = source.picture_of(run, "holes")
        if holes is not None:
            caption = (
                f"{data_name(dataset)}, beta = 1: above, the prior draws furthest from any code, decoded; below, "
                "ordinary "
                "ones."
            )
            blocks.append(Picture(holes, caption, "Decoded prior draws: worst holes and ordinary ones", dark_png=holes))
    for dataset, part in parts.items():
        rows = [
            [
                "autoencoder" if row["autoencoder"] else f"{row['beta']:g}",
                row["active"],
                _number_cell(((row.get("moments") or {}).get("mean") or {}).get("max")),
                _number_cell(((row.get("moments") or {}).get("log_scale") or {}).get("max")),
                _number_cell((row.get("kolmogorov_smirnov") or {}).get("max")),
                (row.get("kolmogorov_smirnov") or {}).get("rejected"),
                _cell((row.get("classifier") or {}).get("effect")),
                _share_cell(row.get("holes")),
                _cell(row.get("mutual_information")),
                _cell(row.get("marginal_kl")),
                _cell(row.get("total_correlation")),
            ]
            for row in part["rows"]
        ]
        columns = ["beta", "active", "largest |mean|", "largest |log scale|", "largest KS", "rejected", "classifier"]
        caption = (
            f"{data_name(dataset)}: codes of test images, one draw each, against the prior. Means and scales are in "
            "scales of the prior. Rejected: latents whose Kolmogorov-Smirnov test has p below five percent. KL to "
            "prior: "
            "of all codes together; it and the mutual information add up to the mean KL."
        )
        blocks += _table([*columns, "holes", "mutual information", "KL to prior", "total correlation"], rows, caption)
    return Section("Was the regularization successful?", blocks, anchor="prior")


# --- (f), (g) ---


def _architectures(source: _Source) -> Section:
    part = source.study.get("architectures") or {}
    rows = [
        [
            row["network"],
            row["latent_dim"],
            row["active"],
            row["parameters"],
            _number_cell(row["seconds"]),
            _cell(row["elbo"]),
            _cell(row["log_likelihood"]),
            _paired_cell(row["difference_log_likelihood"]),
        ]
        for row in part.get("rows", ())
    ]
    if not rows:
        return Section("Networks and numbers of latents", [])
    blocks = source.long("architectures")
    blocks += source.figure(
        "architectures",
        "log p(x) by the number of latents, the time that training took, and the number of weights. Numbers beside "
        "points "
        "are latents of the gated network.",
        "log p(x) against latents, seconds and weights",
    )
    columns = ["network", "latents", "active", "weights", "seconds", "ELBO", "log p(x)", "log p(x) - that of the base"]
    caption = f"{data_name(part['dataset'])}, the same epochs each; nats an image, differences are paired."
    places = [k for k, row in enumerate(part["rows"]) if row["varied"] == "base"]
    blocks += _table(columns, rows, caption, places)
    return Section("Networks and numbers of latents", blocks, anchor="architectures")


def _scale_maps(source: _Source) -> Section:
    part = source.study.get("scale_maps") or {}
    gradients = [
        [
            row["scale_map"],
            _number_cell(row["largest_feature"]),
            _cell(row["gradient_norm"])
            if isinstance(row["gradient_norm"], Mapping)
            else _number_cell(row["gradient_norm"]),
            _share(row["not_finite"]),
            _share(row.get("kl_overflow")),
            _number_cell(row.get("largest_scale")),
            _share(row.get("vanished")),
        ]
        for row in part.get("gradients") or ()
    ]
    stressed = [
        [
            row["scale_map"],
            "yes" if row["finished"] else "no",
            None if row.get("step") is None else f"{count(row['step'])} of {count(row['num_steps'])}",
            _cell(row.get("elbo")),
            row.get("failure"),
        ]
        for row in part.get("stressed") or ()
    ]
    if not gradients and not stressed:
        return Section("How the guide's scales are kept positive", [])
    blocks = source.long("scale_maps")
    blocks += source.figure(
        "scale-maps",
        "The gradient that reaches the features of the guide's scales at initialization, as these features are made "
        "larger. A good map keeps it neither huge nor broken.",
        "Gradient norm and share of broken gradients against the largest feature",
    )
    columns = [
        "map",
        "largest feature",
        "gradient norm",
        "NaN or infinite",
        "KL infinite",
        "largest scale",
        "zero entries",
    ]
    blocks += _table(columns, gradients, "At initialization, features scaled up by hand.")
    names = ["map", "finished", "step of the failure", "ELBO", "what was said"]
    blocks += _table(names, stressed, "Training under stress: a high learning rate, no warm-up, no clipping.")
    return Section("How the guide's scales are kept positive", blocks, anchor="scales")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.3g}%"


# --- The end ---


def _method(source: _Source) -> Section:
    study, settings = source.study, source.study["settings"]
    seconds, environment = study.get("seconds") or {}, study.get("environment") or {}
    S, n = count(settings["num_particles"]), count(settings["images"])
    base = _base_words(study)
    paragraphs = [
        f"Every run is {base} unless its name says otherwise, trained for {several(settings['epochs'], 'epoch')} "
        f"(residual networks of the collapse section {settings['collapse_epochs']}, stressed runs "
        f"{settings['stress_epochs']}), and its last weights are kept. beta is a matter of training alone: every "
        "reported "
        "number is at beta = 1.",
        f"log p(x) is the importance-weighted bound L_{S}, with {S} samples an image, on {n} test images drawn at "
        "random once; errors are standard errors over images, and say nothing of what another training would give. "
        "Differences are between the same images, with 95% intervals that are corrected for the number of comparisons "
        "of their table; what such an interval does not part is called not distinguishable.",
        _seed_words(settings),
        "What is not shown: other data, other priors and guides, longer training. A bound that has not settled is "
        "marked, and no peak is claimed there.",
    ]
    if seconds:
        parts = [f"{number(value / 60, 2)} minutes of {name}" for name, value in seconds.items() if value]
        where = environment.get("device") or "one computer"
        threads = environment.get("threads")
        paragraphs.append(
            f"It took {listed(parts)} on {where}" + (f" with {several(threads, 'thread')}." if threads else ".")
            if parts
            else ""
        )
    blocks: list[Block] = [Text("\n\n".join(p for p in paragraphs if p))]
    rows = [
        [
            data_name(word),
            entry.get("description"),
            entry.get("train"),
            entry.get("validation"),
            entry.get("test"),
            _cell(entry.get("floor")),
        ]
        for word, entry in (study.get("data") or {}).items()
    ]
    caption = "The data. Floor: the log-likelihood of each pixel on its own, without latents, on the same test images."
    blocks += _table(["data", "what it is", "train", "validation", "test", "floor, nats"], rows, caption)
    return Section("How it was measured", blocks, anchor="method")


def _base_words(study: Study) -> str:
    """The run at beta = 1 of the first data set, in words."""
    part = (study.get("sweep") or {}).get(study["datasets"][0]) or {}
    options = (study["runs"].get(part.get("reference")) or {}).get("options")
    if not options:
        return "the same network"
    return (
        f"a {options['network']} network with {count(options['latent_dim'])} latents, a {options['likelihood']} "
        f"likelihood, {several(options['warmup_epochs'], 'epoch')} of warm-up"
    )


def _seed_words(settings: Mapping[str, Any]) -> str:
    seeds = settings.get("seeds") or ()
    if not seeds:
        return "Each run was trained once, with one seed."
    return (
        f"Each run was trained with one seed, those at beta = {listed(list(settings['close_betas']))} of the first "
        "data "
        f"set with {several(len(seeds) + 1, 'seed')}."
    )
