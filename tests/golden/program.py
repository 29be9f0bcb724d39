"""The parts of the program that the golden numbers cannot reach through its stable names.

A restructuring of the program edits this file and leaves the rest of the folder as it is. What the functions take and
return must stay: words of the command line, run folders, and a VAE with ``prior``, ``likelihood`` and ``posterior``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from torch import Tensor

from ppl_vae import data, fit, save
from ppl_vae.commands.cli import Command, build_parser, iterate_fields, parse
from ppl_vae.commands.options import COMMANDS
from ppl_vae.evidence import ais
from ppl_vae.objectives import loss_of_batch
from ppl_vae.runs import build
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import (
    choose_evaluated_pixels,
    choose_pixels,
    fit_arguments,
    initialize_output_bias,
    load_splits,
    resolve,
)
from ppl_vae.training import Callbacks

SCRIPTS = Path(__file__).parents[2] / "scripts"

# The command of each script, or the class of options that the script itself declares, and what it requires.
READERS: dict[str, tuple[str, list[str]]] = {
    "benchmark": ("Benchmark", []),
    "benchmark_scale": ("Scale", []),
    "certify_log_likelihood": ("certify", ["RUN"]),
    "compare_likelihoods": ("compare-likelihoods", []),
    "compare_networks": ("compare-networks", []),
    "compare_runs": ("compare", ["RUN"]),
    "diagnose": ("diagnose", ["RUN"]),
    "encode": ("encode", ["RUN", "IMAGES"]),
    "evaluate_log_likelihood": ("evaluate", ["RUN"]),
    "export": ("export", ["RUN"]),
    "impute": ("impute", ["RUN", "IMAGES"]),
    "make_docs": ("Docs", []),
    "make_figures": ("figures", ["RUN"]),
    "report": ("report", ["RUN"]),
    "reproduce": ("reproduce", ["NAME"]),
    "sample": ("sample", ["RUN"]),
    "study": ("study", []),
    "train_svi": ("train", []),
}


def _command(name: str) -> Command:
    word, _ = READERS[name]
    if word in COMMANDS:
        return COMMANDS[word]
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return Command("", runpy.run_path(str(SCRIPTS / f"{name}.py"))[word])


def run_script(name: str, words: str, folder: Path) -> None:
    """Run a script in this process, as ``cd FOLDER; python SCRIPTS/NAME.py WORDS`` would."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "argv", [f"{name}.py", *shlex.split(words)]):
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        os.chdir(before)


def default_values(name: str) -> dict[str, Any]:
    """The value of every option of a script for which its command line has no word."""
    values = {spec.name: spec.default for spec in iterate_fields(_command(name).options)}
    if name == "study":
        values["output"] = "runs/study"  # decided where the command runs
    return values


def argument_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a script's command line."""
    return build_parser(_command(name))


def build_vae(words: str, *, event_shape: tuple[int, ...]) -> Any:
    """The VAE that these words of ``train_svi`` describe, with the weights that it has before its training."""
    asked = _options(words)
    pyro.set_rng_seed(asked.seed)
    return build.build_vae(asked, event_shape)


def save_run(vae: Any, folder: Path, words: str) -> None:
    """Make a run folder of a VAE that ``build_vae`` made of the same words."""
    save(vae, folder, _options(words))


def evaluated_images(words: str) -> Tensor:
    """(N, *E) the test images of the data that these words of ``train_svi`` name, in double precision."""
    asked = _options(words)
    splits = load_splits(asked)
    pixels = choose_evaluated_pixels(resolve(asked, splits), splits)
    return data.evaluation_images(splits, "test", pixels).double()


def fit_marginals(likelihood: Any, x: Tensor) -> Tensor:
    """The features of the pixels' marginal distributions, to which the likelihood's own parameters are set as well."""
    return likelihood.fit_marginals(x)


def train_in_double(words: str) -> dict[str, list[float]]:
    """The losses of every step and the validation of every epoch of ``train_svi WORDS``, in double precision.

    The initial weights are drawn in double precision too: processors differ in the last digit of single ones.
    """
    asked = _options(words)
    splits = load_splits(asked)
    asked = resolve(asked, splits)
    pixels = choose_pixels(asked, splits)
    pyro.set_rng_seed(asked.seed)
    with _double_by_default():
        vae = build.build_vae(asked, splits.event_shape)
    initialize_output_bias(vae, data.initialization_images(splits, pixels).double())
    stored, transform = data.training_images(splits, pixels)
    arguments = fit_arguments(asked, data.evaluation_images(splits, "validation", pixels).double())
    objective = arguments["objective"]
    losses, records = [], []

    def recorded(model: Any, guide: Any, x: Tensor) -> Tensor:
        loss = loss_of_batch(objective, model, guide, x)
        losses.append(loss.item() / len(x))
        return loss

    fit(
        vae,
        stored,
        **arguments | {"objective": recorded},
        transform=lambda values, generator=None: transform(values, generator).double(),
        callbacks=Callbacks(on_epoch=records.append),
    )
    validation = [value for record in records for key, value in record.items() if key.startswith("validation")]
    return {"losses": losses, "validation": validation}


def annealed_bounds(vae: Any, x: Tensor, *, num_temperatures: int, num_chains: int, seed: int) -> dict[str, Tensor]:
    """Annealed importance sampling: the lower bound for images x, and both bounds for images of the model itself."""
    sizes = {"num_chains": num_chains}
    torch.manual_seed(seed)
    own, z = ais.simulate(vae, len(x))
    found = {}
    for name, images in (("given", x), ("simulated", own)):
        annealing = ais.pilot(vae, images, betas=ais.temperatures(num_temperatures), num_leapfrogs=2, **sizes)
        found[f"{name} lower"] = ais.lower_bound(ais.lower(vae, images, annealing, **sizes).log_w)
    found["simulated upper"] = ais.upper_bound(ais.upper(vae, own, z, annealing, **sizes).log_w)
    return found


@contextlib.contextmanager
def _double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _options(words: str) -> Options:
    asked = parse(COMMANDS["train"], shlex.split(words)).options
    assert asked is not None
    return asked
