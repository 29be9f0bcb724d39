"""Pretrained runs: weights, options and evaluation that come with the package, and the folder that scripts write to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ppl_vae import data, runs
from ppl_vae.runs import load as stored
from ppl_vae.runs.load import SHIPPED, find_run_folder, read_config
from ppl_vae.runs.options import to_json

_PLACES = ("data_dir", "start_from")  # of the machine that trained it


def ship(run_dir: str, name: str) -> Path:
    """Puts a finished run's weights, options and evaluation into the package, as the pretrained run of that name.

    Returns:
        Its folder, which ``load(name)`` and every script then take; an older one of the same name is replaced.

    Raises:
        ValueError: no run, one without an evaluation of its weights, one of a data file of one's own, or a bad name.
    """
    folder = Path(run_dir)
    options, _ = read_config(folder)
    if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"name: expected small letters and digits with dashes between them, got {name!r}")
    if options.dataset not in data.DATASETS:
        raise ValueError(f"{folder}: expected a run on one of {', '.join(data.DATASETS)}, got {options.dataset}")
    step = runs.load_step(folder / runs.MODEL)
    entries = {key: entry for key, entry in runs.read_evaluations(folder).items() if entry.get("step") == step}
    if "test" not in entries:
        raise ValueError(f"{folder}: expected an evaluation of its weights on the test split, got none")
    config = runs.read_json(folder / runs.CONFIG)
    config |= {"options": to_json(options) | dict.fromkeys(_PLACES), "trained": SHIPPED}
    shipped = stored.PRETRAINED / name
    shipped.mkdir(parents=True, exist_ok=True)
    runs.write_bytes(shipped / runs.MODEL, (folder / runs.MODEL).read_bytes())
    runs.write_json(shipped / runs.EVALUATION, entries)
    runs.write_json(shipped / runs.CONFIG, config)
    return shipped


def copy_pretrained(run_dir: str, say: Callable[[str], None]) -> Path:
    """The run's folder; of a pretrained run its copy runs/NAME, which is made once, since nobody writes to a package.

    Raises:
        ValueError: a word that is neither a folder nor a pretrained run, or runs/NAME is another run.
    """
    folder = find_run_folder(run_dir)
    if folder.resolve().parent != stored.PRETRAINED.resolve():
        return folder
    copy = Path("runs") / folder.name
    if not (copy / runs.CONFIG).exists():
        copy.mkdir(parents=True, exist_ok=True)
        for name in (runs.MODEL, runs.EVALUATION, runs.CONFIG):  # the last says that the copy is whole
            runs.write_bytes(copy / name, (folder / name).read_bytes())
        say(f"{folder.name} is a pretrained run of the package; its copy {copy} takes what is made of it.")
    elif not (copy / runs.MODEL).exists() or (copy / runs.MODEL).read_bytes() != (folder / runs.MODEL).read_bytes():
        raise ValueError(f"{copy}: expected a copy of the pretrained run {folder.name}, got another run; move it away")
    return copy
