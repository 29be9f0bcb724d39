"""Results as files: figures, pictures and arrays, each written as a whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ppl_vae import runs

_DOTS_AN_INCH = 130


def make_output_folder(output: str | None, default: Path) -> Path:
    """Makes the folder of a command's results: a new or empty one that was given, or the default one.

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
    """Writes a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_AN_INCH)
    runs.write_bytes(path, png.getvalue())


def write_picture(path: Path, levels: NDArray[np.uint8]) -> None:
    """Writes one image (C, H, W) with 1 or 3 channels of 8 bits as PNG.

    Renamed once it is whole, but not waited for until it is on disk, which took 11 ms each.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(partial, format="png")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str] = ()) -> None:
    """Writes tensors, and the names of images as "names", as compressed .npz without pickle."""
    arrays = {name: values.numpy() for name, values in tensors.items()}
    if names:
        arrays["names"] = np.array(names)
    npz = io.BytesIO()
    np.savez_compressed(npz, **arrays)  # type: ignore[arg-type]
    runs.write_bytes(path, npz.getvalue())
