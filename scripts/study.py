"""The study: every run trained and measured, all numbers in one JSON, and one report of what they show."""

from ppl_vae.commands.cli import parse_study
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_study()
    from tqdm import tqdm

    from ppl_vae.study import DEFAULT, QUICK, run_study  # torch is imported here, so that --help answers at once

    run_study(
        QUICK if asked.quick else DEFAULT,
        asked.datasets,
        name="quick" if asked.quick else "default",
        output=asked.output,
        data_dir=asked.data_dir,
        say=tqdm.write,
    )


if __name__ == "__main__":
    command(main)
