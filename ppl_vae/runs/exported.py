"""An export, opened without the data that its model was trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from ppl_vae import data, runs
from ppl_vae.runs.load import find_run_folder, is_from_python, read_config
from ppl_vae.runs.opening import Run, Say, open_run
from ppl_vae.runs.options import is_export


def open_with_or_without(run_dir: str, *, dataset: str | None, data_dir: str | None, say: Say) -> Run:
    """A run as ``open_run``; an export without its data, unless it is said where that is.

    Raises:
        ValueError: as ``open_run``.
    """
    folder = find_run_folder(run_dir)
    told = dataset is not None or data_dir is not None
    if told or not (folder / runs.CONFIG).is_file() or not is_export(runs.read_json(folder / runs.CONFIG)):
        return open_run(run_dir, dataset=dataset, data_dir=data_dir, say=say)
    return without_data(folder)


def without_data(folder: Path) -> Run:
    """A run or an export whose splits have their kind and their shape, and no images.

    Raises:
        ValueError: it is damaged, or says nothing of the kind of its data.
    """
    options, seen = read_config(folder)
    kind = runs.read_json(folder / runs.CONFIG)["data"].get("kind")
    if kind not in data.KINDS:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: expected a kind of data ({', '.join(data.KINDS)}), got {kind!r}"
        )
    dtype = torch.uint8 if kind in (data.BINARY, data.LEVELS) else torch.float32
    none = torch.empty((0, *seen["event_shape"]), dtype=dtype)
    splits = data.Splits(
        name=Path(options.dataset).name,
        kind=kind,
        train=none,
        validation=none,
        test=none,
        sha256=seen["sha256"],
        split="none is here",
        protocol=options.protocol,
    )
    return Run(folder, options, splits, from_python=is_from_python(folder))
