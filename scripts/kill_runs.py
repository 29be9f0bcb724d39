"""Kill small runs at random moments, resume each, and compare every number with that of an undisturbed run."""

import sys
import tempfile
from importlib import import_module
from pathlib import Path

from ppl_vae.commands.cli import parse_kills
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_kills()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    disturbed, killed = import_module("disturbed_runs"), import_module("killed_runs")
    with tempfile.TemporaryDirectory() as place:
        for server in disturbed.served(Path(place)):
            kills = killed.kill_runs(
                server, Path(place), num_kills=asked.kills, seed=asked.seed, compiles=asked.compile
            )
    print(f"{kills.count} kills, every run as if there had been none. They fell on: {dict(kills.moments)}")


if __name__ == "__main__":
    command(main)
