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
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from torch import Tensor

from ppl_vae import data, fit, save
from ppl_vae.commands.cli import (
    parse_benchmark,
    parse_certify,
    parse_compare,
    parse_diagnose,
    parse_docs,
    parse_encode,
    parse_evaluate,
    parse_export,
    parse_figures,
    parse_impute,
    parse_kills,
    parse_likelihoods,
    parse_networks,
    parse_report,
    parse_reproduce,
    parse_sample,
    parse_scale,
    parse_study,
    parse_train,
)
from ppl_vae.evidence import ais
from ppl_vae.runs import build
from ppl_vae.runs.options import Options

SCRIPTS = Path(__file__).parents[2] / "scripts"

# The function that reads each script's command line, and a command line with nothing but what the script requires.
READERS = {
    "benchmark": (parse_benchmark, []),
    "benchmark_scale": (parse_scale, []),
    "certify_log_likelihood": (parse_certify, ["RUN"]),
    "compare_likelihoods": (parse_likelihoods, []),
    "compare_networks": (parse_networks, []),
    "compare_runs": (parse_compare, ["RUN"]),
    "diagnose": (parse_diagnose, ["RUN"]),
    "encode": (parse_encode, ["RUN", "IMAGES"]),
    "evaluate_log_likelihood": (parse_evaluate, ["RUN"]),
    "export": (parse_export, ["RUN"]),
    "impute": (parse_impute, ["RUN", "IMAGES"]),
    "kill_runs": (parse_kills, []),
    "make_docs": (parse_docs, []),
    "make_figures": (parse_figures, ["RUN"]),
    "report": (parse_report, ["RUN"]),
    "reproduce": (parse_reproduce, ["NAME"]),
    "sample": (parse_sample, ["RUN"]),
    "study": (parse_study, []),
    "train_svi": (parse_train, []),
}


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
    read, required = READERS[name]
    values = vars(read(required)) if name not in ("train_svi", "compare_likelihoods") else read(required)._asdict()
    for value in list(values.values()):
        if is_dataclass(value):
            values = asdict(value) | {key: own for key, own in values.items() if own is not value}
    if name == "compare_likelihoods":
        values["num_particles"] = values["evaluation_particles"]
    return values


def argument_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a script's command line, caught at the moment when it would read one."""
    read, required = READERS[name]
    with mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=InterruptedError) as parse:
        with contextlib.suppress(InterruptedError):
            read(required)
        return parse.call_args.args[0]


def build_vae(words: str, *, event_shape: tuple[int, ...]) -> Any:
    """The VAE that these words of ``train_svi`` describe, with the weights that it has before its training."""
    asked = _options(words)
    pyro.set_rng_seed(asked.seed)
    return build.vae(asked, event_shape)


def save_run(vae: Any, folder: Path, words: str) -> None:
    """Make a run folder of a VAE that ``build_vae`` made of the same words."""
    save(vae, folder, _options(words))


def evaluated_images(words: str) -> Tensor:
    """(N, *E) the test images of the data that these words of ``train_svi`` name, in double precision."""
    asked = _options(words)
    splits = build.splits(asked)
    pixels = build.evaluated_pixels(build.resolve(asked, splits), splits)
    return data.evaluation_images(splits, "test", pixels).double()


def fit_marginals(likelihood: Any, x: Tensor) -> Tensor:
    """The features of the pixels' marginal distributions, to which the likelihood's own parameters are set as well."""
    return likelihood.fit_marginals(x)


def train_in_double(words: str) -> dict[str, list[float]]:
    """The losses of every step and the validation of every epoch of ``train_svi WORDS``, in double precision.

    The initial weights are drawn in double precision too: processors differ in the last digit of single ones.
    """
    asked = _options(words)
    splits = build.splits(asked)
    asked = build.resolve(asked, splits)
    pixels = build.pixels(asked, splits)
    pyro.set_rng_seed(asked.seed)
    with _double_by_default():
        vae = build.vae(asked, splits.event_shape)
    build.start_from_marginals(vae, data.images_to_start_from(splits, pixels).double())
    stored, observe = data.training_images(splits, pixels)
    objective = build.objective(asked)
    losses, records = [], []

    def recorded(*arguments: Any, **named: Any) -> Tensor:
        loss = objective(*arguments, **named)
        losses.append(loss.item())
        return loss

    fit(
        vae,
        stored,
        data.evaluation_images(splits, "validation", pixels).double(),
        **build.schedule(asked),
        objective=recorded,
        observe=lambda values, generator=None: observe(values, generator).double(),
        on_epoch=records.append,
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
    asked = parse_train(shlex.split(words)).options
    assert asked is not None
    return asked
