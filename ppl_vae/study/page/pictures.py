"""Pictures below each other, to be compared."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from PIL import Image

from ppl_vae.reports.page import Block, Picture
from ppl_vae.study.words import listed


def strips(named: Sequence[tuple[str, bytes | None]], caption: str, what: str) -> list[Block]:
    """Strips below each other, named in the caption from the top."""
    known = [(name, strip) for name, strip in named if strip is not None]
    if len(known) < 2:
        return []
    png = _below_each_other(strip for _, strip in known)
    from_the_top = f"From the top: {listed([name for name, _ in known])}. {caption}"
    return [Picture(png, from_the_top, f"{what}: {listed([name for name, _ in known])}", dark_png=png)]


def _below_each_other(pictures: Iterable[bytes]) -> bytes:
    """One picture of several, with a line of background between them, as wide as the widest."""
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
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
