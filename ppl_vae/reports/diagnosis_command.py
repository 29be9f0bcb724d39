"""The command line that would change what a verdict found: a run's own options, and the one that is changed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ppl_vae.diagnostics.verdicts import EVALUATE, Verdict
from ppl_vae.runs.fields import format_flag
from ppl_vae.runs.opening import Run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import resolve

# What another word leaves without meaning: its own options go back to their defaults.
_OF_A_WORD = {
    "likelihood": ("likelihood_scale", "likelihood_components", "transform", "dequantization"),
    "objective": ("kl", "free_bits", "num_particles"),
    "posterior": (
        "scale_map",
        "objective",
        "free_bits",
        "kl",
        "num_particles",
        "posterior_flow",
        "posterior_layers",
        "posterior_hidden",
    ),
    "prior": ("kl", "prior_components", "prior_flow", "prior_layers", "prior_hidden"),
}
_DECIDED_BY_OTHERS = ("binarization", "dequantization", "warmup_epochs", "hidden", "keep")


def command_line(run: Run, verdict: Verdict, split: str) -> str | None:
    """A whole command that can be pasted; None where the verdict changes nothing."""
    if verdict.change is None:
        return None
    if verdict.script == EVALUATE:
        words = [str(run.folder), *_words("split", split), *_flags(verdict.change)]
    else:
        words = _training(run, dict(verdict.change))
    return shlex.join(["python", f"scripts/{verdict.script}", *words])


def _training(run: Run, change: dict[str, Any]) -> list[str]:
    default = Options()
    freed = {name: getattr(default, name) for word in change for name in _OF_A_WORD.get(word, ())}
    asked = _shortened(
        run, replace(run.options, **(freed | change)), [n for n in _DECIDED_BY_OTHERS if n not in change]
    )
    told = {spec.name: getattr(asked, spec.name) for spec in fields(Options)}
    others = {name: value for name, value in told.items() if name in change or value != getattr(default, name)}
    return [*_flags(others), *_words("run_dir", str(_new_folder(run.folder, change)))]


def _shortened(run: Run, asked: Options, names: Sequence[str]) -> Options:
    """Without those of the names that were left to the program: it decides them again, for the changed options."""
    for name in names:
        left_out: dict[str, Any] = {name: None}
        try:
            resolved = resolve(replace(run.options, compile="off", **left_out), run.splits)
        except ValueError:  # without it, these options are none
            continue
        if getattr(resolved, name) == getattr(run.options, name):
            asked = replace(asked, **left_out)
    return replace(asked, compile=Options().compile)


def _new_folder(folder: Path, change: dict[str, Any]) -> Path:
    """Beside the run, named by what is changed; a name that is free."""
    words = "-".join(f"{name.replace('_', '-')}-{_value(value)}" for name, value in change.items())
    names = [f"{folder.name}-{words}", *(f"{folder.name}-{words}-{i}" for i in range(2, 1000))]
    return next((path for name in names if not (path := folder.parent / name).exists()), folder.parent / names[0])


def _flags(options: Any) -> list[str]:
    return [word for name, value in options.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple | list) else (value,)
    return [format_flag(name), *(_value(one) for one in values)]


def _value(value: Any) -> str:
    """As short as it reads back the same."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
