"""Train a VAE by SVI; estimate its log-likelihood and draw its figures; or go on with an interrupted run."""

from ppl_vae.options import command, parse_train


def main() -> None:
    options, run_dir, resume_dir, epochs = parse_train()
    from ppl_vae import experiment  # torch is imported here, so that --help answers at once

    if options is not None:
        experiment.train(options, run_dir, say=print)
    elif resume_dir is not None:
        experiment.resume(resume_dir, epochs=epochs, say=print)


if __name__ == "__main__":
    command(main)
