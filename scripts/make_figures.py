"""Draw a run's figures again from its files: curves, images, latents, and what its log-likelihood is made of."""

from ppl_vae.options import command, parse_figures


def main() -> None:
    asked = parse_figures()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.draw_run(asked.run_dir, dataset=asked.dataset, data_dir=asked.data_dir, say=print)


if __name__ == "__main__":
    command(main)
