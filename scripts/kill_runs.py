"""Kill small runs at random moments, resume each, and compare every number with that of an undisturbed run."""

import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ppl_vae.commands.cli import parse_options
from ppl_vae.runs.fields import NON_NEGATIVE_INTEGER, POSITIVE_INTEGER, CheckedOptions, option
from ppl_vae.runtime.process import run_script


@dataclass(frozen=True)
class Kills(CheckedOptions):
    """Kill small runs at random moments, resume each, and compare its numbers with an undisturbed run."""

    kills: int = option(100, "number of kills in all", POSITIVE_INTEGER)
    seed: int = option(0, "of the moments", NON_NEGATIVE_INTEGER)
    compile: tuple[str, ...] = option(("off", "off", "on"), "of the runs, in turn", ("on", "off"))


def main() -> None:
    asked = parse_options(Kills)
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    disturbed, killed = import_module("disturbed_runs"), import_module("killed_runs")
    with tempfile.TemporaryDirectory() as place:
        for server in disturbed.served(Path(place)):
            kills = killed.kill_runs(
                server, Path(place), num_kills=asked.kills, seed=asked.seed, compiles=asked.compile
            )
    print(f"{kills.count} kills, every run as if there had been none. They fell on: {dict(kills.moments)}")


if __name__ == "__main__":
    run_script(main)
