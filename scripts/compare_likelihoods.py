"""One table: the same plain VAE under each likelihood, trained for the same epochs, compared on one scale."""

from pathlib import Path

from ppl_vae.commands.cli import parse_likelihoods
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_likelihoods()
    from tqdm import tqdm

    from ppl_vae.commands.compare_likelihoods import compare_likelihoods

    parent = asked.run_dir or f"runs/likelihoods-{Path(asked.options.dataset).stem}"
    compare_likelihoods(asked.likelihoods, asked.options, run_dir=parent, output=asked.output, say=tqdm.write)


if __name__ == "__main__":
    command(main)
