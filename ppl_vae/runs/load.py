"""A run's config and weights: read, saved and loaded as a VAE; and the pretrained runs of the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import data, runs
from ppl_vae.runs import hub
from ppl_vae.runs.build import build_meta_vae, build_vae
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.options import MODEL_OPTIONS, Options, check_value, default_objective
from ppl_vae.runs.outputs import record_environment
from ppl_vae.runs.resolve import load_splits, resolve
from ppl_vae.runs.results import to_json
from ppl_vae.vae import VAE

# An export is the model without its training: the "format" of its config.json, and the options in it.
_EXPORT_FORMAT = "ppl_vae model 1"
_EXPORTED = {*MODEL_OPTIONS, "dequantization_draws"} - {"data_dir"}

PRETRAINED = Path(__file__).parents[1] / "pretrained"


# --- config.json ---


def make_config(options: Options, splits: data.Splits, *, exported: bool = False) -> JsonObject:
    """The content of config.json for these (resolved) options and this data.

    An export has the options of the model alone, and its data has a name and no path.
    """
    described = {"kind": splits.kind, "event_shape": list(splits.event_shape), "sha256": splits.sha256}
    if not exported:
        return {"options": to_json(options), "data": described}
    name = options.dataset
    if name not in data.DATASETS:
        name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        # The last folder of a path may be called as a named data set is, such as photos/mnist.
        name = f"own {name}" if name in data.DATASETS else name or "data"
    values = to_json(replace(options, dataset=name))
    model = {key: value for key, value in values.items() if key in _EXPORTED}
    return {"format": _EXPORT_FORMAT, "model": model, "data": described}


def is_export(config: Mapping[str, object]) -> bool:
    """Whether a ``config.json`` belongs to an export."""
    return "format" in config


def read_options(config: Mapping[str, object]) -> Options:
    """The options in the ``config.json`` of a run, or of an export, which has defaults for those of training.

    Raises KeyError where there are none, and ValueError for an option that is unknown or out of its range.
    """
    exported = is_export(config)
    if exported and config["format"] != _EXPORT_FORMAT:
        raise ValueError(f"format: expected {_EXPORT_FORMAT!r}, got {config['format']!r}; another version wrote it")
    values = config["model" if exported else "options"]
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of options, got {type(values).__name__}")
    specs = [spec for spec in fields(Options) if not exported or spec.name in _EXPORTED]
    odd = set(values) - {spec.name for spec in specs}
    if odd:
        raise ValueError(f"expected the options of this version, got unknown ones: {', '.join(sorted(odd))}")
    # A missing option is newer than the run, and its default is what the run did.
    found: JsonObject = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for spec in specs:
        if spec.name in found:
            check_value(spec, found[spec.name])  # a file is held to what this program writes
    options = Options(**found)
    return replace(options, objective=default_objective(options), warmup_epochs=0) if exported else options


def read_config(run_dir: Path) -> tuple[Options, JsonObject]:
    """The options of a run or an export, its data's kind, event_shape (a tuple) and sha256, and whether it can resume.

    Raises ValueError for a damaged config.
    """
    path = run_dir / runs.CONFIG
    config = runs.read_json(path)
    try:
        stored = config["data"]
        shape = stored["event_shape"]
        if not (shape and all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"event_shape: expected whole numbers, got {shape}")
        options = read_options(config)
        for name in ("binarization", "warmup_epochs", "dequantization", "prior", "objective"):
            if getattr(options, name) is None:
                raise ValueError(f"expected {name} as it was resolved, got null")
        found = {"kind": stored.get("kind"), "sha256": stored["sha256"], "event_shape": tuple(shape)}
        # A folder by ``save`` has "trained": "from Python", a pretrained run "shipped". There is no training to resume.
        return options, found | {"can_resume": not is_export(config) and "trained" not in config}
    except KeyError as error:
        raise ValueError(f"{path}: damaged: missing {error}") from None
    except TypeError:
        raise ValueError(f"{path}: damaged: expected the objects options and data") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --- The run's folder ---


def find_run_folder(run_dir: str | Path) -> Path:
    """The run's folder: a path, the name of a pretrained run in the package, or a downloaded ``hf://USER/NAME``.

    Raises ValueError for a single word that is neither, and for an address that the Hub does not answer.
    """
    if hub.is_address(run_dir):
        return hub.download(str(run_dir))
    folder = Path(run_dir)
    names = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{runs.CONFIG}"))
    if folder.exists() or len(folder.parts) > 1 or not names:
        return folder
    if folder.name not in names:
        raise ValueError(f"{folder}: expected a run folder, or a pretrained run ({', '.join(names)}), got neither")
    return PRETRAINED / folder.name


def copy_pretrained(run_dir: str, say: Callable[[str], None]) -> Path:
    """The run's folder. A pretrained run is first copied to runs/NAME, and one of the Hub to runs/USER/NAME.

    Neither the package nor the Hub's cache is written to. Raises ValueError where another run is in that place.
    """
    folder = find_run_folder(run_dir)
    if hub.is_address(run_dir):
        name, place = hub.get_name(run_dir), "Hugging Face Hub"
    elif folder.resolve().parent == PRETRAINED.resolve():
        name, place = folder.name, "package"
    else:
        return folder
    copy = Path("runs") / name
    if not (copy / runs.CONFIG).exists():
        copy.mkdir(parents=True, exist_ok=True)
        for file in (runs.MODEL, runs.EVALUATION, runs.CONFIG):  # the last says that the copy is whole
            if (folder / file).exists():
                runs.write_bytes(copy / file, (folder / file).read_bytes())
        say(f"{run_dir} is a pretrained run of the {place}; its copy {copy} takes what is made of it.")
    elif not (copy / runs.MODEL).exists() or (copy / runs.MODEL).read_bytes() != (folder / runs.MODEL).read_bytes():
        raise ValueError(f"{copy}: expected a copy of the pretrained run {run_dir}, got another run; move it away")
    return copy


# --- Weights ---


def _has_same_shapes(vae: VAE, weights: dict[str, Tensor]) -> bool:
    """Whether weights have the names and shapes of the VAE's own."""
    return {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in vae.state_dict().items()}


def load(run_dir: str | Path) -> VAE:
    """The trained VAE of a run, in evaluation mode on the CPU.

    Args:
        run_dir: A run folder or an export, the name of a pretrained run of the package, or ``hf://USER/NAME``, a model
            on the Hugging Face Hub (the extra ``hub``), also at a revision: ``hf://USER/NAME@REVISION``.

    It sees pixels as its training did. Under a density of 8-bit levels it is a density of (level + u) / 256, which also
    accepts levels and gives other numbers: ``dequantized(load(run))`` is the mass of levels that the run reports.

    Raises:
        ValueError: the folder is no run, has no weights yet, or is damaged.
        OSError: the weights cannot be read now.
    """
    folder = find_run_folder(run_dir)
    options, config = read_config(folder)
    try:
        weights, _ = runs.load_tensors(folder / runs.MODEL)
    except ValueError as error:
        cure = f"; --resume {folder} writes it again" if (folder / runs.TRAINING_STATE).exists() else ""
        raise ValueError(f"{error}{cure}") from None
    try:
        # On the meta device first: a damaged config may ask for more weights than the memory holds.
        expected = build_meta_vae(options, config["event_shape"])
    except ValueError as error:
        raise ValueError(f"{folder / runs.CONFIG}: {error}") from None
    if not _has_same_shapes(expected, weights):
        raise ValueError(f"{folder / runs.MODEL}: the weights do not fit the run's config: they differ in shape")
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced
        model = build_vae(options, config["event_shape"])
    model.load_state_dict(weights)
    return model.eval()


def load_starting_weights(vae: VAE, run_dir: str) -> None:
    """Loads a run's evaluated weights into a VAE of the same model. Raises ValueError if they do not fit."""
    weights, _ = runs.load_tensors(find_run_folder(run_dir) / runs.MODEL)
    if not _has_same_shapes(vae, weights):
        raise ValueError(f"--start-from: expected a run of the same model, got {run_dir}, whose weights are of another")
    vae.load_state_dict(weights)


def save(trained: VAE, run_dir: str | Path, options: Options, *, metrics: Sequence[JsonObject] = ()) -> Path:
    """Makes a run folder of a VAE that was trained from Python. It can be loaded and evaluated, but not resumed.

    Args:
        trained: as ``build_vae(options, event_shape)`` makes it, with whatever weights.
        run_dir: a new or empty folder.
        options: what the VAE is made of, and the data that it is evaluated on, as it was trained: a density of 8-bit
            levels is taken for one of (level + u) / 256 unless ``dequantization`` is "none".
        metrics: the records that ``fit`` gave to ``on_epoch``, for the training curves.

    Returns:
        The folder.

    Raises:
        ValueError: before anything is written: options of another VAE, or data off the likelihood's support.
    """
    splits = load_splits(options)
    options = resolve(options, splits)
    if not all(type(record.get("step")) is int for record in metrics):
        raise ValueError("metrics: expected records with a whole number under 'step', as fit gives them to on_epoch")
    weights = trained.state_dict()
    if not _has_same_shapes(build_meta_vae(options, splits.event_shape), weights):
        raise ValueError(
            "options: expected those that the VAE was built with, got others (weights differ in shape); a VAE with "
            "parts of your own has none, and torch.save(vae.state_dict(), file) keeps its weights"
        )
    folder = runs.make_run_dir(str(run_dir), dataset=options.dataset, likelihood=options.likelihood)
    runs.write_json(folder / runs.CONFIG, make_config(options, splits) | {"trained": "from Python"})
    record_environment(folder, options.device)
    for record in metrics:
        runs.append_metrics(folder, record)
    runs.save_tensors(folder / runs.MODEL, weights, {"step": metrics[-1]["step"] if metrics else 0})
    return folder
