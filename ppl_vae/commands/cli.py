"""The command line of every command, made from its dataclass of options.

A command is a dataclass in ``commands/options.py`` and one function that is called with ``(options, say=say)``. The
parser, ``--help``, ``--help-all``, ``--config FILE.toml`` and the error messages all come from the dataclass. Free of
torch.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from ppl_vae.commands.options import COMMANDS, Command
from ppl_vae.runs.options import check_value, convert_value, expand_home, format_flag, get_kind, is_list
from ppl_vae.runtime.process import run_script

METAVARS = {int: "N", float: "X", str: "WORD"}


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help lists the options)\n")


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command by its name: reads its command line, then calls its function. Errors end in one line."""

    def run() -> None:
        options = parse(COMMANDS[name], argv)
        module, function = COMMANDS[name].target.split(":")
        from tqdm import tqdm

        getattr(import_module(f"ppl_vae.{module}"), function)(options, say=tqdm.write)  # keeps a progress bar whole

    run_script(run)


def parse(asked: Command, argv: Sequence[str] | None = None) -> Any:
    """The command's dataclass, filled in: defaults, then ``--config``, then the command line.

    Ends with exit code 2 and one line if they are wrong.
    """
    parser = build_parser(asked)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    if given.pop("help_all", False):
        print(build_parser(asked, show_all=True).format_help())
        parser.exit()
    if unknown:
        hint = suggest(unknown[0].split("=")[0], list(parser._option_string_actions))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    config = given.pop("config", None)
    try:
        if config is not None:
            given = read_config_file(Path(config).expanduser(), asked.options) | given
        make = getattr(asked.options, "make", asked.options)
        return make(**{name: expand_home(value) for name, value in given.items()})
    except ValueError as error:
        parser.error(str(error))


def build_parser(asked: Command, *, show_all: bool = False) -> Parser:
    """The parser of a command, whose help may show rarely used options too."""
    usage, words = _format_usage(asked), asked.options.__doc__
    parser = Parser(description=words, argument_default=argparse.SUPPRESS, allow_abbrev=False, usage=usage)
    groups: dict[str, argparse._ArgumentGroup] = {}
    has_rare = False
    for spec in iterate_fields(asked.options):
        group = spec.metadata["group"]
        if group and group not in groups:
            groups[group] = parser.add_argument_group(group)
        _add(groups.get(group, parser), spec, show=show_all or not spec.metadata["rare"])
        has_rare = has_rare or spec.metadata["rare"]
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a file; the command line wins")
    if has_rare:
        parser.add_argument("--help-all", action="store_true", help="also show rarely used options, and exit")
    return parser


def iterate_fields(options: type) -> Iterator[Field[object]]:
    """The fields of a dataclass of options, including those of a dataclass inside it."""
    hints = get_type_hints(options)
    for spec in fields(options):
        if is_dataclass(hints[spec.name]):
            yield from iterate_fields(hints[spec.name])
        elif "check" in spec.metadata:
            yield spec


def read_config_file(path: Path, options: type) -> dict[str, object]:
    """Reads the options in a TOML file. Its keys are option names with - or _; tables only group them.

    Raises ValueError for an unknown option or a wrong value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: {path} cannot be read: {error}") from None
    known = {spec.name: spec for spec in iterate_fields(options)}
    found = {}
    for key, value in _flatten(content):
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"--config: {path}: unknown option {key!r}{suggest(name, list(known))}")
        found[name] = convert_value(known[name], tuple(value) if isinstance(value, list) else value)
        check_value(known[name], found[name])
    return found


def _flatten(table: dict[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield key, value


def suggest(word: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" for the nearest of the known words, or nothing.

    >>> suggest("bernouli", ["bernoulli", "beta"])
    '; did you mean bernoulli?'
    """
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _add(parser: argparse._ActionsContainer, spec: Field[object], *, show: bool) -> None:
    """Adds one option to a parser or to a group of it."""
    help = _format_help(spec) if show else argparse.SUPPRESS
    kind = get_kind(spec)
    if kind is bool:
        parser.add_argument(format_flag(spec.name), action="store_true", help=help)
        return
    several = "+" if is_list(spec) else None
    if spec.metadata["positional"]:
        nargs = several or (None if spec.default is MISSING else "?")
        parser.add_argument(spec.name, metavar=_name_positional(spec), nargs=nargs, type=_reader(spec), help=help)
        return
    choices = spec.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices and show else METAVARS[kind]
    parser.add_argument(format_flag(spec.name), type=_reader(spec), help=help, metavar=metavar, nargs=several)


def _name_positional(spec: Field[object]) -> str:
    return spec.name.upper().removesuffix("_DIRS").removesuffix("_DIR").removesuffix("_PATH")


def _reader(spec: Field[object]) -> Callable[[str], object]:
    """The function that turns one word of the command line into a checked value."""
    kind, check, choices = get_kind(spec), spec.metadata["check"], spec.metadata["choices"]

    def read(word: str) -> object:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not check.holds(value):
            hint = suggest(word, choices) if choices else ""
            raise argparse.ArgumentTypeError(f"expected {check.words}, got {word!r}{hint}")
        return value

    return read


def _format_help(spec: Field[object]) -> str:
    """The option's help with its default."""
    text = spec.metadata["help"].replace("%", "%%")
    default = spec.default
    if spec.default is MISSING or default is None or default is False or "(default" in text:
        return text
    words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {words})"


def _format_usage(asked: Command) -> str:
    words = ["%(prog)s"]
    for spec in iterate_fields(asked.options):
        if spec.metadata["positional"]:
            name = _name_positional(spec)
            words.append((name if spec.default is MISSING else f"[{name}]") + " ..." * is_list(spec))
    return " ".join([*words, "[options]"])
