"""The command line of every command, made from its dataclass of options.

A command is a dataclass in ``commands/options.py`` and one function ``run(options, say)``. The parser, ``--help``,
``--help-all``, ``--config FILE.toml`` and the error messages all come from the dataclass. Free of torch.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from ppl_vae.commands.options import COMMANDS, Command, UnusableRun
from ppl_vae.runs.fields import check_value, expand_home, format_flag, freeze_lists, get_kind, has_default, is_list
from ppl_vae.runtime.process import run_script

METAVARS = {int: "N", float: "X", str: "WORD"}


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and a suggestion for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2 and one line."""
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help lists the options)\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Ends the program if a word is no option, and suggests the nearest option."""
        if words:
            hint = suggest(words[0].split("=")[0], list(self._option_string_actions))
            self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command by its name: reads its command line, then calls its function. Errors end in one line.

    Args:
        name: A word of ``COMMANDS``.
        argv: The words after the command; by default the process's own.
    """

    def run() -> None:
        options = parse(COMMANDS[name], argv)
        module, function = COMMANDS[name].target.split(":")
        from tqdm import tqdm

        getattr(import_module(f"ppl_vae.{module}"), function)(options, say=tqdm.write)  # keeps a progress bar whole

    run_script(run)


def parse_options(options: type, argv: Sequence[str] | None = None) -> Any:
    """Reads the options of a script that is no command. The dataclass's docstring is its help."""
    return parse(Command("", options, options.__doc__ or ""), argv)


def parse(asked: Command, argv: Sequence[str] | None = None) -> Any:
    """Reads the options of a command. Ends with exit code 2 and one line if they are wrong.

    Args:
        asked: The command.
        argv: The words after the command; by default the process's own.

    Raises:
        ValueError: the run that --start-from names cannot be read.

    Returns:
        The command's dataclass, filled in: defaults, then ``--config``, then the command line.
    """
    parser = build_parser(asked)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    if given.pop("help_all", False):
        print(build_parser(asked, show_all=True).format_help())
        parser.exit()
    parser.refuse_unknown(unknown)
    config = given.pop("config", None)
    try:
        if config is not None:
            given = read_config_file(Path(config).expanduser(), asked.options) | given
        return make_options(asked.options, expand_home(freeze_lists(given)))
    except UnusableRun:
        raise  # no fault of the command line
    except ValueError as error:
        parser.error(str(error))


def build_parser(asked: Command, *, show_all: bool = False) -> Parser:
    """The parser of a command.

    Args:
        asked: The command.
        show_all: Whether rarely used options appear in its help.
    """
    parser = Parser(
        description=asked.help, argument_default=argparse.SUPPRESS, allow_abbrev=False, usage=_format_usage(asked)
    )
    groups: dict[str, Any] = {}
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


def iterate_fields(options: type) -> Iterator[Field[Any]]:
    """The fields of a dataclass of options, including those of a dataclass inside it."""
    hints = get_type_hints(options)
    for spec in fields(options):
        if is_dataclass(hints[spec.name]):
            yield from iterate_fields(hints[spec.name])
        elif "check" in spec.metadata:
            yield spec


def make_options(options: type, given: dict[str, Any]) -> Any:
    """Makes a dataclass of options from the given values, by name.

    A class with a method ``from_given`` decides itself, as train does for ``--resume``.
    """
    from_given = getattr(options, "from_given", None)
    return options(**given) if from_given is None else from_given(given)


def read_config_file(path: Path, options: type) -> dict[str, Any]:
    """Reads the options in a TOML file. Its keys are option names with - or _; tables only group them.

    Raises:
        ValueError: the file cannot be read, or has an unknown option or a wrong value.
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
        value = tuple(value) if isinstance(value, list) else value
        check_value(known[name], (value,) if is_list(known[name]) and not isinstance(value, tuple) else value)
        found[name] = value
    return found


def _flatten(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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


def _add(parser: Any, spec: Field[Any], *, show: bool) -> None:
    """Adds one option to a parser or to a group of it."""
    help = _format_help(spec) if show else argparse.SUPPRESS
    kind = get_kind(spec)
    if kind is bool:
        parser.add_argument(format_flag(spec.name), action="store_true", help=help)
        return
    several = "+" if is_list(spec) else None
    if spec.metadata["positional"]:
        nargs = several or (None if not has_default(spec) else "?")
        parser.add_argument(spec.name, metavar=_name_positional(spec), nargs=nargs, type=_reader(spec), help=help)
        return
    choices = spec.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices and show else METAVARS[kind]
    parser.add_argument(format_flag(spec.name), type=_reader(spec), help=help, metavar=metavar, nargs=several)


def _name_positional(spec: Field[Any]) -> str:
    return spec.name.upper().removesuffix("_DIRS").removesuffix("_DIR").removesuffix("_PATH")


def _reader(spec: Field[Any]) -> Any:
    """The function that turns one word of the command line into a checked value."""
    kind, check, choices = get_kind(spec), spec.metadata["check"], spec.metadata["choices"]

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not check.holds(value):
            hint = suggest(word, choices) if choices else ""
            raise argparse.ArgumentTypeError(f"expected {check.words}, got {word!r}{hint}")
        return value

    return read


def _format_help(spec: Field[Any]) -> str:
    """The option's help with its default."""
    text = spec.metadata["help"].replace("%", "%%")
    default = spec.default
    if not has_default(spec) or default is None or default is False or "(default" in text:
        return text
    words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {words})"


def _format_usage(asked: Command) -> str:
    positional = [spec for spec in iterate_fields(asked.options) if spec.metadata["positional"]]
    names = [
        (f"[{_name_positional(s)}]" if has_default(s) else _name_positional(s)) + (" ..." if is_list(s) else "")
        for s in positional
    ]
    return " ".join(["%(prog)s", *names, "[options]"])
