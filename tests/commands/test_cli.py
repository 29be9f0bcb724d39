"""The command line of every command: help, errors, config files, and the round trip of every option."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from ppl_vae import data
from ppl_vae.commands.cli import iterate_fields, parse
from ppl_vae.commands.options import CHANGES, COMMANDS, QUICK, Evaluate
from ppl_vae.parts.registry import PRIORS
from ppl_vae.runs.options import Options, format_flag
from ppl_vae.runs.resolve import resolve
from ppl_vae.runs.results import to_json

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
TRAIN = COMMANDS["train"]


def refuse(capsys: pytest.CaptureFixture[str], command: str, words: Sequence[str]) -> str:
    """The one line on stderr of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(COMMANDS[command], list(words))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert (len(lines), captured.out) == (1, "")
    assert lines[0].startswith("error: ")
    return lines[0]


def read_help(capsys: pytest.CaptureFixture[str], command: str, flag: str) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        parse(COMMANDS[command], [flag])
    return capsys.readouterr().out


# --- Help ---

# Runs a script as python would, then prints which of the slow packages it imported.
IMPORTED = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as done:
    code = done.code
slow = sorted({"torch", "pyro", "numpy", "matplotlib", "safetensors", "tqdm", "torchvision"} & set(sys.modules))
print("IMPORTED", code, slow)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_answers_without_torch(script):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(script), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED 0 []"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_names_every_option(capsys, command):
    specs = [spec for spec in iterate_fields(COMMANDS[command].options) if not spec.metadata["positional"]]
    flag = "--help-all" if any(spec.metadata["rare"] for spec in specs) else "--help"
    shown = read_help(capsys, command, flag)
    assert all(f"{format_flag(spec.name)} " in shown or f"{format_flag(spec.name)}\n" in shown for spec in specs)


def test_the_help_of_train_fits_on_two_screens_and_shows_the_choices(capsys):
    shown = read_help(capsys, "train", "--help")
    assert len(shown.splitlines()) <= 100
    assert "{" + ",".join(PRIORS) + "}" in shown
    for group in ("data:", "model:", "objective:", "optimization:", "evaluation:", "run:"):
        assert f"\n{group}\n" in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_unknown_option_ends_a_script_with_code_2_and_one_line(script):
    done = subprocess.run([sys.executable, str(script), "run", "--sparkle"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["--likelihood", "bernouli"], "bernoulli"),
        (["--network", "gated_conv"], "gated-conv"),
        (["--batchsize", "3"], "--batch-size"),
        (["--learning_rate=0.1"], "--learning-rate"),
    ],
    ids=str,
)
def test_a_mistyped_word_gets_a_suggestion(capsys, words, suggestion):
    assert f"did you mean {suggestion}?" in refuse(capsys, "train", words)


# --- From words to options ---


def test_every_option_of_train_survives_the_command_line():
    changed = Options(dataset="own.npz", image_size=(28, 20), hidden=(7, 5, 3), beta=0.1, seed=2**31 - 1, color="rgb")
    words: list[str] = []
    for name, value in to_json(changed).items():
        if value is not None:
            words += [format_flag(name), *map(str, value if isinstance(value, list) else [value])]
    assert parse(TRAIN, words).options == changed


# --- Config files ---


def test_a_config_file_gives_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\n[model]\nhidden = [7, 5]\nlatent-dim = 2\n[objective]\nbeta = 4\n")
    asked = parse(TRAIN, ["--config", str(file), "--epochs", "9"]).options
    assert (asked.epochs, asked.hidden, asked.latent_dim, asked.beta) == (9, (7, 5), 2, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch = 3", "unknown option 'epoch'; did you mean epochs?"),
        ("epochs = 0", "--epochs: expected a whole number, at least 1, got 0"),
        ("epochs = '3'", "--epochs: expected a whole number, at least 1, got '3'"),
        ("epochs = ", "cannot be read"),
    ],
)
def test_a_wrong_config_file_is_refused_in_one_line(capsys, tmp_path, text, expected):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert expected in refuse(capsys, "train", ["--config", str(file)])


# --- Refusals ---

_INTEGER_WORDS = ("1.5", "1e3", "nan", "inf", "many", "", "99999999999999999999")
_FLOAT_WORDS = ("-0.5", "nan", "inf", "1e400", "much", "", "0x10")
AT_LEAST_1 = ("0", "-1", "2147483649", *_INTEGER_WORDS)
AT_LEAST_0 = ("-1", "2147483648", *_INTEGER_WORDS)
ABOVE_0 = ("0", "-0.0", "1e-400", *_FLOAT_WORDS)
NOT_BELOW_0 = ("-1", *_FLOAT_WORDS)
A_WORD = ("sparkle", "", "BERNOULLI", "None")

REFUSED_WORDS = {
    """
    hidden channels image_size dequantization_draws likelihood_components latent_dim epochs batch_size
    num_particles images evaluation_particles prior_components prior_layers prior_hidden
    posterior_layers posterior_hidden upper_latents upper_hidden classes labels
    """: AT_LEAST_1,
    """
    protocol compile stream tensorboard precision dequantization transform fit color binarization
    likelihood network prior posterior prior_flow posterior_flow inference decoder_input initialization
    schedule scale_map objective keep kl missing missing_mask condition
    """: A_WORD,
    "likelihood_scale learning_rate clip_norm skip_norm": ABOVE_0,
    "average_decay decay_start dropout": ("1", "-0.1", *_FLOAT_WORDS),
    "data_dir start_from dataset device": ("",),
    "warmup_epochs seed": AT_LEAST_0,
    "beta checkpoint_seconds free_bits label_weight label_consistency": NOT_BELOW_0,
}
BAD_WORDS = {name: words for names, words in REFUSED_WORDS.items() for name in names.split()}


def test_every_option_is_refused_something():
    assert set(BAD_WORDS) == {spec.name for spec in fields(Options)}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_a_value_out_of_range_is_refused_in_one_line(capsys, name):
    for word in BAD_WORDS[name]:
        line = refuse(capsys, "train", [f"{format_flag(name)}={word}"])
        assert line.startswith(f"error: {format_flag(name)}: expected ")
        assert f"got {word!r}" in line


@pytest.mark.parametrize("command", [name for name, found in COMMANDS.items() if name != "train"])
def test_every_option_of_every_command_is_checked(capsys, command):
    arguments = ["run", "other"]
    positional = [spec for spec in iterate_fields(COMMANDS[command].options) if spec.metadata["positional"]]
    for spec in iterate_fields(COMMANDS[command].options):
        if spec.metadata["positional"] or str(spec.type) == "bool":
            continue
        line = refuse(capsys, command, [*arguments[: len(positional)], f"{format_flag(spec.name)}="])
        assert line.startswith(f"error: {format_flag(spec.name)}: expected ")


@pytest.mark.parametrize(
    "words",
    ["--latent 3", "--sparkle", "stray", "--epochs", "--hidden", "--hidden 3 x", "--hidden 300,300", "--resume"],
)
def test_a_wrong_command_line_is_refused_in_one_line(capsys, words):
    refuse(capsys, "train", words.split())


RUN_COMMANDS = [
    name
    for name, found in COMMANDS.items()
    if any(
        spec.name in ("run_dir", "run_dirs") and spec.metadata["positional"] for spec in iterate_fields(found.options)
    )
]


@pytest.mark.parametrize("command", RUN_COMMANDS)
def test_a_missing_run_folder_is_refused_in_one_line(capsys, command):
    assert "RUN" in refuse(capsys, command, [])


@pytest.mark.parametrize("command", [name for name in RUN_COMMANDS if name != "export"])
def test_every_command_of_a_run_accepts_moved_data(command):
    run = ["run", "other"] if command in ("encode", "impute", "compare") else ["run"]
    asked = parse(COMMANDS[command], [*run, "--dataset", "moved.npz", "--data-dir", "there"])
    assert (asked.dataset, asked.data_dir) == ("moved.npz", "there")


def test_a_command_is_checked_from_python_too():
    with pytest.raises(ValueError, match="--num-particles: expected a whole number, at least 1, got 0"):
        Evaluate("run", num_particles=0)


# --- Resume ---


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--epochs", "7"], {"epochs": 7}),
        (["--dataset", "moved.npz", "--data-dir", "there"], {"dataset": "moved.npz", "data_dir": "there"}),
        (["--compile", "off"], {"compile": "off"}),
    ],
    ids=str,
)
def test_resume_takes_what_may_change(words, changes):
    asked = parse(TRAIN, ["--resume", "runs/x", *words])
    assert (asked.resume, asked.changes) == ("runs/x", changes)


FIXED = {spec.name: spec.default for spec in fields(Options) if spec.name not in CHANGES}
EXAMPLES: dict[str, Any] = {
    "binarization": "fixed",
    "warmup_epochs": 3,
    "hidden": 5,
    "image_size": 28,
    "color": "gray",
    "dequantization": "none",
    "keep": "last",
    "prior": "flow",
    "objective": "stl",
    "upper_latents": 3,
    "classes": 3,
    "labels": 100,
    "skip_norm": 1e6,
    "start_from": "x",
}


@pytest.mark.parametrize("name", [*FIXED, "run_dir"])
def test_resume_refuses_every_other_option(capsys, name):
    """Even with the value that the run has: a run keeps its own options."""
    given = EXAMPLES.get(name, FIXED.get(name, "runs/y"))
    values = given if isinstance(given, tuple) else (given,)
    line = refuse(capsys, "train", ["--resume", "runs/x", "--epochs", "7", format_flag(name), *map(str, values)])
    assert line.startswith("error: --resume: expected no other option than --epochs, --dataset, ")
    assert f"got {format_flag(name)} " in line


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    """A shell expands it in `--dataset ~/x`, and not in `--dataset=~/x` or in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('data-dir = "~/sets"')
    asked = parse(TRAIN, ["--config=~/run.toml", "--dataset=~/photos", "--run-dir=~/runs/a", "--seed", "3"])
    assert (asked.options.dataset, asked.options.data_dir) == (str(tmp_path / "photos"), str(tmp_path / "sets"))
    assert asked.run_dir == str(tmp_path / "runs" / "a")
    compared = parse(COMMANDS["compare"], ["~/a", "b~"])
    assert compared.run_dirs == (str(tmp_path / "a"), "b~")


def test_a_quick_training_is_short_unless_told_otherwise():
    quick = parse(COMMANDS["train"], ["--quick"]).options
    assert (quick.epochs, quick.images) == (QUICK["epochs"], QUICK["images"])
    assert parse(COMMANDS["train"], ["--quick", "--epochs", "7"]).options.epochs == 7
    assert parse(COMMANDS["train"], []).options.epochs == Options().epochs


def test_the_automatic_device_is_recorded_by_its_name():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Options().device == "auto"
    assert resolve(Options(dataset="mnist"), data.load("mnist")).device == expected
