"""Draw a run's figures again from its files: curves, images, latents, and what its log-likelihood is made of."""

from ppl_vae.commands.cli import parse_figures
from ppl_vae.runtime.ending import command


def main() -> None:
    asked = parse_figures()
    from ppl_vae.reports.run_figures import draw_run

    draw_run(asked.run_dir, dataset=asked.dataset, data_dir=asked.data_dir, say=print)


if __name__ == "__main__":
    command(main)
