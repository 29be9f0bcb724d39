"""The command ``ppl-vae``, also ``python -m ppl_vae``: every command by its name. Free of torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ppl_vae import __version__
from ppl_vae.commands import cli
from ppl_vae.commands.options import COMMANDS

_USAGE = "usage: ppl-vae COMMAND [options]"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names. Without a word it lists the commands.

    Args:
        argv: The words; by default the process's own.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_list_commands())
    elif name == "--version":
        print(f"ppl-vae {__version__}")
    elif name in COMMANDS:
        sys.argv[0] = f"ppl-vae {name}"  # the name in --help
        cli.main(name, words)
    else:
        hint = cli.suggest(name, list(COMMANDS))
        print(f"error: expected a command, one of {', '.join(COMMANDS)}; got {name!r}{hint}", file=sys.stderr)
        sys.exit(2)


def _list_commands() -> str:
    """Every command with what it does."""
    lines = [f"  {name:20} {command.options.__doc__}" for name, command in COMMANDS.items()]
    end = "ppl-vae COMMAND --help lists a command's options; ppl-vae --version prints the version."
    return "\n".join([_USAGE, "", *lines, "", end])


if __name__ == "__main__":
    main()
