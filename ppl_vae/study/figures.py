"""The study's figures, from study.json alone: each in a light and a dark version, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from ppl_vae.reports.figures import study as plots
from ppl_vae.reports.figures.study import Bar, Curve
from ppl_vae.study._cells import name_data

Study = Mapping[str, Any]
Row = Mapping[str, Any]

_DOTS_AN_INCH = 144
_BACKGROUNDS = {"light": (255, 255, 255), "dark": (20, 22, 26)}  # the page's, into which letters fade
_SWEEP_SEED = 0  # of the curve itself
_COLORS = 128  # of a figure's palette: lines and letters need no more, and the file is a third


class Drawn(NamedTuple):
    """A figure as PNG, for light pages and for dark ones."""

    light: bytes
    dark: bytes


def draw(study: Study) -> dict[str, Drawn]:
    """Every figure that the study has the numbers for, by name."""
    drawn = {name: [_png(figure_of, study, scheme) for scheme in _SCHEMES] for name, figure_of in _FIGURES.items()}
    return {name: Drawn(light, dark) for name, (light, dark) in drawn.items() if light is not None and dark is not None}


_SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def _png(figure_of: Callable[[Study], Figure | None], study: Study, scheme: Literal["light", "dark"]) -> bytes | None:
    with matplotlib.rc_context(plots.page_style(scheme)):
        figure = figure_of(study)
        if figure is None:
            return None
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=_DOTS_AN_INCH)
    return _packed(Image.open(raw).convert("RGBA"), _BACKGROUNDS[scheme])


def _packed(image: Image.Image, background: tuple[int, int, int]) -> bytes:
    """A PNG of few colors, a third in size, of which the page's background is transparent."""
    page = Image.new("RGBA", image.size, (*background, 255))
    few = Image.alpha_composite(page, image).convert("RGB").quantize(_COLORS, kmeans=1, dither=Image.Dither.NONE)
    out = io.BytesIO()
    few.save(out, format="png", transparency=few.getpixel((0, 0)))  # no figure draws in its corner
    return out.getvalue()


# --- What they are drawn from ---


def _known(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("mean") is not None


def _mean(value: Any) -> float | None:
    return value["mean"] if _known(value) else None


def _stderr(value: Any) -> float | None:
    return value.get("stderr") if _known(value) else None


def _parts(study: Study, section: str) -> dict[str, Any]:
    """A section by data set, as far as it is there."""
    of_section = study.get(section) or {}
    return {word: of_section[word] for word in study["datasets"] if of_section.get(word)}


def _curve(rows: Sequence[Row], pick: Callable[[Row], Any]) -> Curve:
    """Values with errors along beta."""
    values = [pick(row) for row in rows]
    return Curve([row["beta"] for row in rows], [_mean(v) for v in values], [_stderr(v) for v in values])


def _plain_curve(rows: Sequence[Row], pick: Callable[[Row], float | None]) -> Curve:
    return Curve([row["beta"] for row in rows], [pick(row) for row in rows])


def _has_any(curve: Curve) -> bool:
    return any(value is not None for value in curve.mean)


# --- Along beta ---


def _rate_distortion(study: Study) -> Figure | None:
    shown = {}
    for dataset, part in _parts(study, "sweep").items():
        rows = [row for row in part["rows"] if _known(row["rate"]) and _known(row["distortion"])]
        if not rows:
            continue
        mean = _condition(study, dataset, "mean")
        others: dict[str, tuple[float, float]] = {}
        if mean and _known(mean["kl"]) and _known(mean["reconstruction"]):
            others["a mean over pixels"] = (mean["kl"]["mean"], -mean["reconstruction"]["mean"])
        shown[name_data(dataset)] = plots.Tradeoff(
            [row["beta"] for row in rows],
            [row["rate"]["mean"] for row in rows],
            [row["distortion"]["mean"] for row in rows],
            others,
        )
    return plots.rate_distortion(shown) if shown else None


def _bounds(study: Study) -> Figure | None:
    shown = {}
    for dataset, part in _parts(study, "sweep").items():
        curves = {bound: _differences(part["rows"], bound) for bound in ("log_likelihood", "elbo")}
        if any(any(_known(row.get(f"difference_{bound}")) for row in part["rows"]) for bound in curves):
            seeds = {bound: _seed_gains(part, bound) for bound in curves}
            shown[name_data(dataset)] = plots.Bounds(curves["log_likelihood"], curves["elbo"], seeds)
    return plots.bounds_along_beta(shown) if shown else None


def _differences(rows: Sequence[Row], bound: str) -> Curve:
    """To beta = 1, which has 0 by definition."""
    paired = [{"mean": 0.0, "stderr": 0.0} if row["beta"] == 1 else row.get(f"difference_{bound}") for row in rows]
    reliable = [row.get("reliable") is not False or bound == "elbo" for row in rows]
    return Curve([row["beta"] for row in rows], [_mean(v) for v in paired], [_stderr(v) for v in paired], reliable)


def _seed_gains(part: Mapping[str, Any], bound: str) -> list[tuple[float, float]]:
    """Of each further seed than the sweep's: its value minus that of the same seed at beta = 1."""
    by_beta = {
        row["beta"]: dict(zip(row["seeds"], row[bound]["values"], strict=True))
        for row in part.get("seeds") or ()
        if row.get(bound)
    }
    at_one = by_beta.get(1.0, {})
    return [
        (value, theirs - at_one[seed])
        for value, by_seed in by_beta.items()
        for seed, theirs in by_seed.items()
        if seed != _SWEEP_SEED and theirs is not None and at_one.get(seed) is not None
    ]


def _condition(study: Study, dataset: str, word: str) -> Row | None:
    part = (study.get("mean") or {}).get(dataset) or {}
    return next((row for row in part.get("conditions", ()) if row["condition"] == word), None)


def _active(study: Study) -> Figure | None:
    shown = {}
    for dataset, part in _parts(study, "mean").items():
        # the sum is the sweep's beta = 1; whichever of them is there
        by_beta = {
            row["beta"]: row for row in part["conditions"] if row["condition"] in ("sum", "beta", "beta-of-mean")
        }
        rows = [by_beta[value] for value in sorted(by_beta)]
        mean = _condition(study, dataset, "mean")
        if not rows:
            continue
        shown[name_data(dataset)] = plots.Activity(
            [row["beta"] for row in rows],
            [row["active"] for row in rows],
            [row["predicted"] for row in rows],
            rows[0]["latent_dim"],
            None if not mean or mean["active"] is None else (mean["threshold"], mean["active"], mean["predicted"]),
        )
    return plots.active_along_beta(shown) if shown else None


def _spectrum(study: Study) -> Figure | None:
    parts = {word: part for word, part in _parts(study, "mean").items() if part["eigenvalues"]}
    if not parts:
        return None
    thresholds: dict[str, float] = {}
    for part in parts.values():
        thresholds |= {"sum over pixels": 1.0, f"mean over {part['num_pixels']:,} pixels": float(part["num_pixels"])}
    return plots.eigenvalue_spectrum({name_data(word): part["eigenvalues"] for word, part in parts.items()}, thresholds)


def _maximum(name: str) -> Callable[[Row], float | None]:
    return lambda row: (row.get(name) or {}).get("max")


_MEASURES: dict[str, Callable[[Sequence[Row]], Curve]] = {
    "classifier's effect: 0 alike, 1 apart": lambda rows: _curve(
        rows, lambda r: (r.get("classifier") or {}).get("effect")
    ),
    "largest Kolmogorov-Smirnov distance": lambda rows: _plain_curve(rows, _maximum("kolmogorov_smirnov")),
    "share of prior draws in holes": lambda rows: _curve(rows, lambda r: r.get("holes")),
    "mutual information, nats": lambda rows: _curve(rows, lambda r: r.get("mutual_information")),
}
_SHARES = (
    "classifier's effect: 0 alike, 1 apart",
    "largest Kolmogorov-Smirnov distance",
    "share of prior draws in holes",
)


def _aggregate(study: Study) -> Figure | None:
    panels: dict[str, dict[str, Curve]] = {}
    autoencoders: dict[str, dict[str, float]] = {}
    for measure, curve_of in _MEASURES.items():
        for dataset, part in _parts(study, "regularization").items():
            curve = curve_of([row for row in part["rows"] if not row["autoencoder"]])
            if _has_any(curve):
                panels.setdefault(measure, {})[name_data(dataset)] = curve
            plain = [value for value in curve_of([row for row in part["rows"] if row["autoencoder"]]).mean if value]
            if plain:
                autoencoders.setdefault(measure, {})[name_data(dataset)] = plain[0]
    if not panels:
        return None
    return plots.aggregate_along_beta(panels, autoencoders=autoencoders, shares=_SHARES)


# --- Pictures' quality ---


def _bar(name: str, value: Any) -> list[Bar]:
    return [Bar(name, value["mean"], value.get("stderr"))] if _known(value) else []


_POWER = "high-frequency power of reconstructions"


def _sharpness(study: Study) -> Figure | None:
    """Sharpness of reconstructions and distances of samples, of the first data set that has both."""
    for part in _parts(study, "autoencoder").values():
        both = [("VAE", part.get("vae") or {}), ("autoencoder", part.get("autoencoder") or {})]
        sharp = [bar for name, of in both for bar in _bar(name, of.get("sharpness"))]
        distance = [bar for name, of in both for bar in _bar(name, (of.get("samples") or {}).get("frechet"))]
        distance += [
            bar
            for name, of in both
            for bar in _bar(f"{name}, fitted normal", (of.get("fitted_samples") or {}).get("frechet"))
        ]
        panels = {_POWER: sharp, "Fréchet distance of samples": distance}
        panels = {quantity: bars for quantity, bars in panels.items() if bars}
        if panels:
            marks = {_POWER: ("the test images", 1.0)}
            floor = _mean((part.get("floor") or {}).get("frechet"))
            if floor is not None:
                marks["Fréchet distance of samples"] = ("other real images", floor)
            return plots.bar_panels(panels, marks=marks)
    return None


_BLUR_PARTS = {
    "autoencoder_error": "the autoencoder's error",
    "posterior_noise": "posterior noise",
    "lost": "the rest",
}


def _blur(study: Study) -> Figure | None:
    shown = {}
    for dataset, part in _parts(study, "autoencoder").items():
        parts = part.get("decomposition") or {}
        if all(_known(parts.get(name)) for name in _BLUR_PARTS):
            shown[name_data(dataset)] = {words: parts[name]["mean"] for name, words in _BLUR_PARTS.items()}
    return plots.blur_parts(shown) if shown else None


# --- Remedies, architectures, scale maps ---


def _remedies(study: Study) -> Figure | None:
    networks = (study.get("collapse") or {}).get("networks") or {}
    panels = {}
    for network, part in networks.items():
        bars = [Bar(row["remedy"], row["active"]) for row in part["rows"] if row["active"] is not None]
        if bars:
            panels[f"{network} network: active latents"] = bars
    return plots.bar_panels(panels, height=3.2) if panels else None


def _architectures(study: Study) -> Figure | None:
    rows = [row for row in (study.get("architectures") or {}).get("rows", ()) if _known(row["log_likelihood"])]
    models = [
        plots.Model(
            f"{row['latent_dim']}" if row["varied"] == "latents" else row["network"],
            "gated, by latents" if row["varied"] == "latents" else "by network",
            row.get("seconds"),
            row["parameters"],
            row["log_likelihood"]["mean"],
            row["log_likelihood"].get("stderr"),
            row["latent_dim"],
        )
        for row in rows
        if row.get("parameters")
    ]
    return plots.nats_of_models(models, bound="L_S") if len(models) > 1 else None


def _norm(row: Row) -> float | None:
    norm = row["gradient_norm"]
    return _mean(norm) if isinstance(norm, Mapping) else norm


def _scale_maps(study: Study) -> Figure | None:
    rows = (study.get("scale_maps") or {}).get("gradients") or ()
    maps = {}
    for word in dict.fromkeys(row["scale_map"] for row in rows):
        own = sorted((row for row in rows if row["scale_map"] == word), key=lambda row: row["largest_feature"])
        sampled = [row["sampled"] for row in own if row.get("sampled")]
        maps[word] = plots.ScaleMap(
            [row["largest_feature"] for row in own],
            [_norm(row) for row in own],
            [row["not_finite"] for row in own],
            [_norm(row) for row in sampled] if len(sampled) == len(own) else None,
            [row["not_finite"] for row in sampled] if len(sampled) == len(own) else None,
        )
    finite = [n for of_map in maps.values() for n in of_map.gradient_norm if n is not None and math.isfinite(n)]
    return plots.scale_map_gradients(maps) if finite else None


_FIGURES: dict[str, Callable[[Study], Figure | None]] = {
    "spectrum": _spectrum,
    "active": _active,
    "rate-distortion": _rate_distortion,
    "bounds": _bounds,
    "remedies": _remedies,
    "sharpness": _sharpness,
    "blur": _blur,
    "aggregate": _aggregate,
    "architectures": _architectures,
    "scale-maps": _scale_maps,
}
