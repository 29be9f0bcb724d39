"""One table: the same plain VAE under each likelihood, trained for the same epochs, compared on one scale."""

from pathlib import Path

from ppl_vae.options import command, parse_likelihoods


def main() -> None:
    asked = parse_likelihoods()
    from tqdm import tqdm

    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    parent = asked.run_dir or f"runs/likelihoods-{Path(asked.options.dataset).stem}"
    experiment.compare_likelihoods(
        asked.likelihoods, asked.options, run_dir=parent, output=asked.output, say=tqdm.write
    )


if __name__ == "__main__":
    command(main)
