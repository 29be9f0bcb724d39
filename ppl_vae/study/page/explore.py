"""Latent spaces of two dimensions, which the page draws itself."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from ppl_vae import runs
from ppl_vae.conditional import Conditional
from ppl_vae.reports import page as report
from ppl_vae.reports.page import Block, Explorer, Section, Text
from ppl_vae.runs.load import load
from ppl_vae.study.page.source import Row, Source
from ppl_vae.study.words import listed, number

_EXTENT = 3.0  # of a standard normal prior
_AUTOENCODER_SHARE = 0.99  # of an autoencoder's codes, which have no scale of their own


def explore_section(source: Source) -> Section:
    """A plane for each run of two latents, to move through."""
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


def _explorer(source: Source, entry: Row) -> Explorer | None:
    """None where the run's weights are gone, or its decoder is one that a page cannot draw."""
    run_dir = source.folder / entry["folder"]
    if not (run_dir / runs.MODEL).exists():
        return None
    try:
        decoder = report.decoder_weights(cast(Conditional, load(run_dir).likelihood))
    except ValueError:
        return None
    codes = entry["codes"]
    points = np.array([[code[0], code[1]] for code in codes], dtype=np.float32).reshape(-1, 2)
    classes = [code[2] for code in codes if len(code) > 2 and code[2] is not None]
    labels = np.array(classes, dtype=np.uint8) if codes and len(classes) == len(codes) else None
    names = source.study["data"][source.study["runs"][entry["run"]]["dataset"]].get("classes") or ()
    return Explorer(
        decoder,
        _of_autoencoder_plane(points) if entry["autoencoder"] else _of_vae_plane(points, labeled=labels is not None),
        extent=_extent(points) if entry["autoencoder"] else _EXTENT,
        points=points,
        labels=labels,
        label_names=tuple(map(str, names)),
    )


def _of_vae_plane(points: Any, *, labeled: bool) -> str:
    spread = ""
    if len(points) > 1:
        scales = [number(float(scale), 2) for scale in points.std(axis=0)]
        spread = f" Their spread is {listed(scales)}; the prior's is 1 in both."
    between = "; between classes the decoder may draw what is neither" if labeled else ""
    return (
        f"A VAE with two latents: the prior asks the codes to lie around the origin.{spread} Neighbors are "
        f"alike{between}."
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
