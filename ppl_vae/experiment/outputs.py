"""Results as files: figures, pictures and arrays, each written as a whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ppl_vae import runs

_DOTS_AN_INCH = 130


def output_folder(output: str | None, default: Path) -> Path:
    """The folder of a command's results: a new or empty one that was asked for, or its own, where it writes again.

    Raises:
        ValueError: what was asked for holds something, or cannot be made.
    """
    folder = Path(output) if output is not None else default
    try:
        if output is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output: expected a new or empty folder, but {folder} exists")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made: {error.strerror}") from None
    return folder


def write_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_AN_INCH)
    runs.write_bytes(path, png.getvalue())


def write_picture(path: Path, levels: NDArray[np.uint8]) -> None:
    """One image (C, H, W), 1 or 3 channels of 8 bits, as PNG, a pixel a pixel.

    Renamed once it is whole, but not waited for until it is on disk, which took 11 ms each.
    """
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(partial, format="png")
    partial.replace(path)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Named arrays as compressed .npz; nothing in it is pickled."""
    npz = io.BytesIO()
    np.savez_compressed(npz, **arrays)
    runs.write_bytes(path, npz.getvalue())
