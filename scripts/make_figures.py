"""Draw a run's figures again from its files: training curves, reconstructions, prior samples, interpolations."""

from ppl_vae.options import command, parse_run


def main() -> None:
    run_dir = parse_run("Draw a run's figures again from its files, into its folder figures/.")
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    experiment.draw_run(run_dir, say=print)


if __name__ == "__main__":
    command(main)
