"""The VAE beside the autoencoder: reconstructions, samples and sharpness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppl_vae.reports.page import Block, Section
from ppl_vae.study.page.pictures import strips
from ppl_vae.study.page.source import Source
from ppl_vae.study.page.tables import known_table, mean_cell
from ppl_vae.study.words import data_name


def blur_section(source: Source) -> Section:
    """Pictures of both, their sharpness, the parts of the error, and the quality of samples."""
    parts = source.parts("autoencoder")
    if not parts:
        return Section("Why it is blurry: VAE and autoencoder", [])
    blocks = source.long("blur")
    for dataset, part in parts.items():
        vae, autoencoder = ((part.get(key) or {}).get("run") for key in ("vae", "autoencoder"))
        blocks += _reconstructions(source, dataset, vae, autoencoder)
        blocks += _samples(source, dataset, vae, autoencoder)
        blocks += _interpolations(source, dataset, vae, autoencoder)
    blocks += source.figure(
        "sharpness",
        "Left: high-frequency power of reconstructions, the test images' being one; fitted pixel noise counts as "
        "power, too. Right: Fréchet distance between decoded draws and test images in their principal components, "
        "less is better; the line is what other real images have.",
        "Bars of sharpness and of samples' distance",
    )
    blocks += source.figure(
        "blur",
        "The squared error of one drawn reconstruction, in parts that add up: an autoencoder's error with as many "
        "latents (of averaging, fitted noise and short training together), the noise of the posterior, and the rest.",
        "Stacked bars of the parts of the error",
    )
    blocks += _quality_table(parts)
    blocks += _latents_table(parts)
    return Section("Why it is blurry: VAE and autoencoder", blocks, anchor="blur")


def _reconstructions(source: Source, dataset: str, vae: str | None, autoencoder: str | None) -> list[Block]:
    named = [
        ("test images", source.originals(dataset)),
        ("the VAE's reconstructions", source.picture_of(vae, "reconstructions")),
        ("the autoencoder's", source.picture_of(autoencoder, "reconstructions")),
    ]
    return strips(named, f"{data_name(dataset)}: look at edges and thin strokes.", "Reconstructions")


def _samples(source: Source, dataset: str, vae: str | None, autoencoder: str | None) -> list[Block]:
    fitted = "at draws of a normal distribution fitted to its codes, two rows"
    named = [
        ("samples of the VAE's prior, two rows", source.picture_of(vae, "samples")),
        ("the autoencoder's decoder at the same draws, two rows", source.picture_of(autoencoder, "samples")),
        (fitted, source.picture_of(autoencoder, "fitted_samples")),
    ]
    return strips(named, f"{data_name(dataset)}: which of them could be data?", "Samples")


def _interpolations(source: Source, dataset: str, vae: str | None, autoencoder: str | None) -> list[Block]:
    named = [
        ("the VAE's, four rows", source.picture_of(vae, "interpolations")),
        ("the autoencoder's, four rows", source.picture_of(autoencoder, "interpolations")),
    ]
    caption = f"{data_name(dataset)}: straight lines between the codes of two test images. Look at the middle."
    return strips(named, caption, "Interpolations")


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
                    mean_cell(of.get("reconstruction")),
                    mean_cell(of.get("sharpness")),
                    mean_cell(of.get("squared_error")),
                    mean_cell(samples.get("frechet")),
                    mean_cell(samples.get("classifier")),
                    mean_cell(fitted.get("frechet")),
                ]
            )
        binarized = part.get("binarized") or {}
        if binarized:
            cells = [mean_cell(binarized.get("sharpness")), mean_cell(binarized.get("error")), None, None, None]
            rows.append([data_name(dataset), "the binary image itself", None, *cells])
        floor = part.get("floor") or {}
        real = [
            mean_cell(floor.get("sharpness")),
            None,
            mean_cell(floor.get("frechet")),
            mean_cell(floor.get("classifier")),
            None,
        ]
        rows.append([data_name(dataset), "other real images", None, *real])
    columns = ["data", "model", "reconstruction, nats", "power", "squared error", "samples: Fréchet"]
    caption = (
        "Reconstructions and samples. Power: of high frequencies, the gray test images' being one; more than one is "
        "noise, not detail. Squared errors are against gray images, of which the networks see binarized ones. The "
        "autoencoder's nats are of its reconstructions, never a log-likelihood. Classifier: none where samples "
        "cannot be told from real images, one where they always can."
    )
    return known_table([*columns, "samples: classifier", "fitted: Fréchet"], rows, caption)


def _latents_table(parts: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            "autoencoder" if row["posterior"] == "delta" else "VAE",
            row["latent_dim"],
            mean_cell(row.get("sharpness")),
            mean_cell(row.get("error")),
            mean_cell(row.get("posterior_noise")),
            mean_cell(row.get("bias")),
        ]
        for part in parts.values()
        for row in part.get("latents") or ()
    ]
    caption = (
        "High-frequency power and squared error a pixel by the number of latents. A short code leaves more open: "
        "look at what the autoencoder, which has no noise, loses with it."
    )
    return known_table(["model", "latents", "power", "error", "posterior noise", "the rest"], rows, caption)
